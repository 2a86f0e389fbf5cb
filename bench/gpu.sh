#!/usr/bin/env bash
# All work that needs a GPU, in one bounded call: ceilings, tests, whole encoders, kernels, the pipeline and the tuner.
# Run it again to continue. Every stage keeps its measurements.
#
#   bench/gpu.sh [--minutes 9] [--stage NAME]... [--output DIR] [--archive FILE] [--dry-run]
#
# The stages run in this order, so that a call which is cut short has the most telling results: environment ceilings
# tests end_to_end kernels compiled pipeline tune plot. They need PyTorch with CUDA, Triton and this checkout. Nothing
# is installed or downloaded. A missing package (pytest, a rival, matplotlib) is named and left out.
#
# --output    the folder for results; by default bench/results/DEVICE-DATE, or the folder that has results of this
#             device and code. The tuner's table goes there too, as launches.py. Copy it over kernels/launches.py to use
#             it. That changes the code, so measurements start again in a new folder.
# --archive   write all of the output as one tar file too, again after each stage, for machines that return one file.
#             To continue elsewhere, unpack it and name the folder as --output.
# --dry-run   run every stage at toy size on a CPU, under Triton's interpreter, in a folder of its own.
#
# Rivals without binary parts (openai-clip, open_clip_torch, timm, and ftfy and wcwidth, which the first two need) take
# part if they are on PYTHONPATH; `pip install --no-deps --target DIR ...` fills such a folder anywhere. They must be
# there from the first call on, since results of other versions are not continued. Where there is no git,
# CLIP_FAST_COMMIT gives the commit. Compilers keep their caches in .cache/ for the next call.
set -uo pipefail
cd "$(dirname "$0")/.."

minutes=9 output="" archive="" dry="" stages=()
while (($#)); do
    case $1 in
        --minutes) minutes=$2; shift 2 ;;
        --stage) stages+=("$2"); shift 2 ;;
        --output) output=$2; shift 2 ;;
        --archive) archive=$2; shift 2 ;;
        --dry-run) dry=1; shift ;;
        *) echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
    esac
done
((${#stages[@]})) || stages=(environment ceilings tests end_to_end kernels compiled pipeline tune plot)

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -n $dry ]]; then
    export TRITON_INTERPRET=1
    [[ -n $output ]] || output=$(mktemp -d)
else
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.cache/inductor}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.cache/triton}
    [[ -n $output ]] || output=$("$python" -m bench.environment --folder)
fi
seconds=$((${minutes%.*} * 60))
deadline=$((SECONDS + seconds))
mkdir -p "$output"
status=0

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
left() { echo $((deadline - SECONDS)); }
minutes_left() { "$python" -c "print(max(0, $(left) - 20) / 60)"; }  # less 20 s, to finish a step

# run NAME COMMAND...: runs it within the time left, and within `most` seconds; its output goes to NAME.log too.
run() {
    local name=$1 limit; shift
    limit=$(left)
    if ((limit < 20)); then echo "== $name: no time left"; return 1; fi
    if ((${most:-limit} < limit)); then limit=$most; fi
    echo "== $name ($limit s)"
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$output/$name.log"  # SIGINT lets pytest report its failures
    local result=${PIPESTATUS[0]}
    if ((result == 124 || result == 137)); then
        echo "== $name: cut by the time limit"
    elif ((result)); then
        echo "== $name: failed with exit status $result"
        status=1
    fi
    return "$result"
}

stage_environment() {
    run environment "$python" -m bench.environment
}

stage_ceilings() {
    local size=(--models "ViT-L/14,ViT-L/14@336px,ViT-B/16,ViT-B/32,RN50" --precisions bf16,fp16,tf32,fp32)
    [[ -n $dry ]] && size=(--models toy --batches 1 --precisions fp32 --device cpu)
    run ceilings "$python" -m bench.roofline "${size[@]}" --json "$output/ceilings.json"
}

stage_tests() {
    if ! has pytest; then echo "== tests: pytest is not installed"; return; fi
    local code passed="$output/tests.passed"
    code=$("$python" -m bench.environment --code)
    if [[ -e $passed && $(<"$passed") == "$code" ]]; then echo "== tests: passed already"; return; fi
    local chosen=(tests/kernels tests/engine/test_graphs.py tests/engine/test_cuda.py --maxfail=30)
    has xdist && chosen+=(-n 4)  # only four: each process has a context and a cache on the GPU
    [[ -n $dry ]] && chosen=(tests/kernels/test_layer_norm.py tests/engine/test_cuda.py -k "accuracy and 64")  # the suite runs them all
    # Not all of the time: tests that are cut start again at the next call, and would leave none for other stages.
    most=$((seconds * 6 / 10)) run tests "$python" -m pytest -q -p no:cacheprovider "${chosen[@]}" &&
        echo "$code" >"$passed"
}

eager="clip_fast;openai-clip;open_clip;transformers"
stage_end_to_end() {  # without torch.compile, which takes minutes for each model
    local size=(--models "ViT-L/14,ViT-B/32,ViT-B/16,RN50" --batches 1,8,32,256,1024 --precisions bf16,fp16)
    [[ -n $dry ]] && size=(--models toy --batches 1,2 --precisions fp32 --rounds 1 --device cpu)
    run end_to_end "$python" -m bench.end_to_end "${size[@]}" --systems "$eager" \
        --json "$output/end_to_end.json" --resume --minutes "$(minutes_left)"
}

kernels() {  # NAME ARGUMENTS...
    local name=$1 size=(--models "ViT-L/14,ViT-B/32,ViT-B/16,RN50" --batches 256,1 --precisions bf16); shift
    [[ -n $dry ]] && size=(--models toy,toy-resnet --batches 1 --precisions fp32 --rounds 1 --device cpu)
    run "$name" "$python" -m bench.kernels "${size[@]}" "$@" \
        --json "$output/kernels.json" --resume --minutes "$(minutes_left)"
}

stage_kernels() { kernels kernels --without-compiled; }

stage_compiled() {  # all rivals, torch.compile(max-autotune) among them; small models compile sooner
    local size=(--models "ViT-B/32,RN50,ViT-B/16,ViT-L/14" --batches 256,1 --precisions bf16) ops=()
    if [[ -n $dry ]]; then
        size=(--models toy --batches 2 --precisions fp32 --rounds 1 --device cpu --systems "clip_fast;open_clip, compiled")
        ops=(--ops mean_token)
    fi
    run compiled "$python" -m bench.end_to_end "${size[@]}" \
        --json "$output/end_to_end.json" --resume --minutes "$(minutes_left)"
    kernels compiled_kernels "${ops[@]}"
}

stage_pipeline() {
    local size=(--model ViT-B/32)
    [[ -n $dry ]] && size=(--model toy --count 4 --batch-size 2 --workers 0 --rounds 1 --device cpu)
    run pipeline "$python" -m bench.pipeline "${size[@]}" \
        --json "$output/pipeline.json" --resume --minutes "$(minutes_left)"
}

stage_tune() {
    local size=(--table "$output/launches.py" --json "$output/tune.json" --resume --minutes "$(minutes_left)")
    [[ -n $dry ]] && size=(--dry-run)
    [[ -e $output/launches.py ]] || cp kernels/launches.py "$output/launches.py"
    run tune "$python" -m bench.tune "${size[@]}"
}

stage_plot() {
    if ! has matplotlib; then echo "== plot: matplotlib is not installed"; return; fi
    if [[ ! -e $output/end_to_end.json ]]; then echo "== plot: nothing was measured"; return; fi
    run plot "$python" -m bench.plot "$output/end_to_end.json"
}

for stage in "${stages[@]}"; do
    if ! declare -F "stage_$stage" >/dev/null; then echo "gpu.sh: no stage $stage" >&2; exit 2; fi
done
for stage in "${stages[@]}"; do
    "stage_$stage"
    if [[ -n $archive ]]; then
        tar -czf "$archive.partial" -C "$output" . && mv "$archive.partial" "$archive"
    fi
done
echo "results are in $output"
exit $status
