#!/usr/bin/env bash
# Everything that a GPU is needed for, in one bounded call: ceilings, proof, whole encoders, kernels, the pipeline and
# the tuner. Run it again to pick up what is left; every stage keeps what it has measured.
#
#   bench/gpu.sh [--minutes 9] [--stage NAME]... [--output DIR] [--archive FILE] [--dry-run]
#
# Stages, in this order, so that a call which is cut short leaves what tells most: environment ceilings tests end_to_end
# kernels compiled pipeline tune plot. Needs PyTorch with CUDA, Triton and this checkout; nothing is installed or
# downloaded. What is missing (pytest, a rival, matplotlib) is said and left out.
#
# --output    where results go; by default bench/results/DEVICE-DATE, or where this device and code have some already.
#             So does the tuner's table, as launches.py. Copied over kernels/launches.py it is what runs from then on; to
#             what was measured before that is other code, and results begin anew.
# --archive   all of the output as one tar file too, written anew after each stage, for machines that give back one file.
#             To go on elsewhere unpack it, and name the folder as --output.
# --dry-run   every stage at toy size on a CPU, under Triton's interpreter, in a folder of its own.
#
# Rivals without binary parts (openai-clip, open_clip_torch, timm, and ftfy and wcwidth that the first two need) take
# part where they are on PYTHONPATH; `pip install --no-deps --target DIR ...` fills such a folder anywhere. They must be
# there from the first call on: results of other versions are not gone on with. Where there is no git, CLIP_FAST_COMMIT
# says the commit. Compilers keep their caches in .cache/, for the next call.
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
minutes_left() { "$python" -c "print(max(0, $(left) - 20) / 60)"; }  # a run ends what it has begun

# run NAME COMMAND...: within what is left of the time, and within `most` seconds; its output in NAME.log too.
run() {
    local name=$1 limit; shift
    limit=$(left)
    if ((limit < 20)); then echo "== $name: no time left"; return 1; fi
    if ((${most:-limit} < limit)); then limit=$most; fi
    echo "== $name ($limit s)"
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$output/$name.log"  # interrupted, pytest says what it found
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
    local chosen=(tests/kernels tests/test_graphs.py tests/test_cuda.py --maxfail=30)
    has xdist && chosen+=(-n 4)  # each has a context and a cache on the GPU
    [[ -n $dry ]] && chosen=(tests/kernels/test_layer_norm.py tests/test_cuda.py -k "accuracy and 64")  # the suite has them all
    # Never all of the time: what is not through by then is no nearer the next time.
    most=$((seconds * 6 / 10)) run tests "$python" -m pytest -q -p no:cacheprovider "${chosen[@]}" &&
        echo "$code" >"$passed"
}

eager="clip_fast;openai-clip;open_clip;transformers"
stage_end_to_end() {  # without torch.compile, which takes minutes a model
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

stage_compiled() {  # all rivals, torch.compile(max-autotune) among them; small models first, they compile sooner
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
