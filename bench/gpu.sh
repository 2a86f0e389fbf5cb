#!/usr/bin/env bash
# All work that needs a GPU, in two calls of at most nine minutes each. The first call has the most telling results:
#
#   environment  the device, the driver, the versions
#   tests        the kernels' tests in bf16, and the tests of equal bits, in at most 150 seconds
#   epilogue     `linear` at K = 64 beside K = 1024, which gives the cost of its epilogue
#   first        ViT-L/14 and ViT-B/32 in bf16 at 256 images and at 1, beside eager and compiled rivals
#
# The second call has the rest: ceilings all_tests end_to_end kernels compiled pipeline tune plot. A call goes as far as
# its time allows, and the same command continues. It leaves out the stages that are done, and repeats those that were
# cut or failed. The file `stages` in the output has the state of each. Every stage keeps its measurements, and tests
# that have passed do not run again. Pictures are drawn in each call.
#
#   bench/gpu.sh [--minutes 9] [--stage NAME]... [--output DIR] [--archive FILE] [--dry-run]
#
# The stages need PyTorch with CUDA, Triton and this checkout. Nothing is installed or downloaded. A missing package
# (pytest, a rival, matplotlib) is named and left out.
#
# --stage     run only this stage, whether it is done or not.
# --output    the folder for results; by default bench/results/DEVICE-DATE, or the folder that has results of this
#             machine, these versions and this code. With another driver, kernel, CPU, number of cores or version of a
#             package, results begin in a new folder, since they are not continued. The tuner's table goes there too, as
#             launches.py. Copy it over kernels/launches.py to use it. That changes the code, so all is measured again.
# --archive   write all of the output as one tar file too, again after each stage, for machines that return one file.
#             To continue elsewhere, unpack it and name the folder as --output.
# --dry-run   run every stage at toy size on a CPU, under Triton's interpreter, in a folder of its own.
#
# Rivals without binary parts (openai-clip, open_clip_torch, timm, and ftfy and wcwidth, which the first two need) take
# part if they are on PYTHONPATH; `pip install --no-deps --target DIR ...` fills such a folder anywhere. They must be
# there from the first call on, since another version begins a new folder. Where there is no git, CLIP_FAST_COMMIT gives
# the commit. Compilers keep their caches in .cache/ for the next call.
set -uo pipefail
here=$PWD
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
named=${#stages[@]}
((named)) || stages=(environment tests epilogue first ceilings all_tests end_to_end kernels compiled pipeline tune plot)

absolute() { if [[ -z $1 || $1 == /* ]]; then echo "$1"; else echo "$here/$1"; fi; }
output=$(absolute "$output") archive=$(absolute "$archive")

python=${PYTHON:-python3}
if [[ $python == */* ]]; then python=$(absolute "$python"); fi
PYTHONPATH=$(tr : '\n' <<<"${PYTHONPATH:-}" | while read -r part; do absolute "$part"; done | paste -sd:)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

told() {  # OPTION: what bench.environment prints
    local said
    if said=$("$python" -m bench.environment "$1") && [[ -n $said ]]; then echo "$said"; return; fi
    echo "gpu.sh: \`$python -m bench.environment $1\` fails; the variable PYTHON names a Python with PyTorch" >&2
    return 1
}

if [[ -n $dry ]]; then
    export TRITON_INTERPRET=1
    [[ -n $output ]] || output=$(mktemp -d)
else
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.cache/inductor}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.cache/triton}
    [[ -n $output ]] || output=$(told --folder) || exit
fi
code=$(told --code) || exit
seconds=$((${minutes%.*} * 60))
deadline=$((SECONDS + seconds))
mkdir -p "$output"
status=0

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
left() { echo $((deadline - SECONDS)); }
minutes_left() { "$python" -c "print(max(0, $(left) - 20) / 60)"; }  # less 20 s, to finish a step

# state STAGE prints done, cut, failed, missing (a package is), or nothing; mark STAGE STATE sets it, for this code.
state() { awk -v stage="$1" -v code="$code" '$1 == stage && $3 == code {print $2}' "$output/stages" 2>/dev/null; }
mark() {
    local others
    others=$(awk -v stage="$1" '$1 != stage' "$output/stages" 2>/dev/null)
    printf '%s\n' ${others:+"$others"} "$1 $2 $code" >"$output/stages"
}

# run NAME COMMAND...: runs it within the time left, and within `most` seconds; its output goes to NAME.log too. A
# command that is ended at its limit leaves its stage cut, and so does one with --minutes, which ends there by itself.
run() {
    local name=$1 limit began=$SECONDS; shift
    limit=$(left)
    if ((limit < 20)); then echo "== $name: no time left"; outcome=cut; return 1; fi
    if ((${most:-limit} < limit)); then limit=$most; fi
    echo "== $name ($limit s)"
    # SIGINT lets pytest report its failures. Its list of passed tests is for the next call, not for the screen.
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee "$output/$name.log" | grep --line-buffered -v "^PASSED "
    local result=${PIPESTATUS[0]}
    local by_itself=0
    [[ " $* " == *" --minutes "* ]] && ((!result && limit > 25 && SECONDS - began > limit - 25)) && by_itself=1
    if ((result == 124 || result == 137 || by_itself)); then
        echo "== $name: cut by the time limit"
        [[ $outcome == failed ]] || outcome=cut
    elif ((result)); then
        echo "== $name: failed with exit status $result"
        outcome=failed status=1
    fi
    return "$result"
}

stage_environment() {
    run environment "$python" -m bench.environment
}

# tests NAME ARGUMENTS...: those that have not passed yet by this code; a call that is cut keeps what has passed.
tests() {
    local name=$1 passed="$output/tests.passed"; shift
    if ! has pytest; then echo "== $name: pytest is not installed"; outcome=missing; return; fi
    [[ -e $passed && $(head -n 1 "$passed") == "$code" ]] || echo "$code" >"$passed"
    sed -n '2,$s/^/--deselect=/p' "$passed" >"$output/passed.arguments"
    local how=(-q -p no:cacheprovider -rfEp -m "slow or not slow" --maxfail=30)
    has xdist && [[ -z $dry ]] && how+=(-n 14)  # each has a context and a cache on the GPU
    run "$name" "$python" -m pytest "${how[@]}" "$@" "@$output/passed.arguments"
    local result=$?
    sed -n 's/^PASSED //p' "$output/$name.log" >>"$passed"
    if ((result == 5)); then echo "== $name: passed already"; outcome=done status=$before; fi  # nothing is left to run
}

stage_tests() {
    local chosen=(tests/kernels tests/engine/test_cuda.py)
    local these="dtype1 or bf16 or batch or one_row or one_embedding or one_pooled or every_run or many_programs"
    [[ -n $dry ]] && chosen=(tests/kernels/test_layer_norm.py) these="accuracy and dtype1 and 64"
    most=150 tests tests "${chosen[@]}" -k "$these"
}

stage_epilogue() {
    local size=()
    [[ -n $dry ]] && size=(--model toy --batch 1 --precision fp32 --ks 64,128 --rounds 1 --device cpu)
    most=60 run epilogue "$python" -m bench.epilogue "${size[@]}" --json "$output/epilogue.json"
}

eager="clip_fast;openai-clip;open_clip;transformers"
end_to_end() {  # NAME ARGUMENTS...
    local name=$1; shift
    run "$name" "$python" -m bench.end_to_end "$@" \
        --json "$output/end_to_end.json" --resume --minutes "$(minutes_left)"
}

stage_first() {  # eager rivals of both models, then what is compiled, which takes minutes a model
    local size=(--models "ViT-L/14,ViT-B/32" --batches 256,1 --precisions bf16)
    local compiled="clip_fast;transformers, compiled;open_clip, compiled"
    if [[ -n $dry ]]; then
        size=(--models toy --batches 1 --precisions fp32 --rounds 1 --device cpu)
        compiled=$eager  # the stage of that name compiles
    fi
    end_to_end first --systems "$eager" "${size[@]}"
    end_to_end first_compiled --systems "$compiled" "${size[@]}"
}

stage_ceilings() {
    local size=(--models "ViT-L/14,ViT-L/14@336px,ViT-B/16,ViT-B/32,RN50" --precisions bf16,fp16,tf32,fp32)
    [[ -n $dry ]] && size=(--models toy --batches 1 --precisions fp32 --device cpu)
    run ceilings "$python" -m bench.roofline "${size[@]}" --json "$output/ceilings.json"
}

stage_all_tests() {
    local chosen=(tests/kernels tests/engine/test_graphs.py tests/engine/test_cuda.py)
    # The suite has them all.
    [[ -n $dry ]] && chosen=(tests/kernels/test_layer_norm.py tests/engine/test_cuda.py -k "accuracy and 64")
    # Never all of the time: other stages come after it.
    most=$((seconds * 4 / 10)) tests all_tests "${chosen[@]}"
}

stage_end_to_end() {  # without torch.compile
    local size=(--models "ViT-L/14,ViT-B/32,ViT-B/16,RN50" --batches 1,8,32,256,1024 --precisions bf16,fp16)
    [[ -n $dry ]] && size=(--models toy --batches 1,2 --precisions fp32 --rounds 1 --device cpu)
    end_to_end end_to_end --systems "$eager" "${size[@]}"
}

kernels() {  # NAME ARGUMENTS...
    local name=$1 size=(--models "ViT-L/14,ViT-B/32,ViT-B/16,RN50" --batches 256,1 --precisions bf16); shift
    [[ -n $dry ]] && size=(--models toy,toy-resnet --batches 1 --precisions fp32 --rounds 1 --device cpu)
    run "$name" "$python" -m bench.kernels "${size[@]}" "$@" \
        --json "$output/kernels.json" --resume --minutes "$(minutes_left)"
}

stage_kernels() {
    local ops=()  # a photograph takes the interpreter minutes to resize; the suite has a small one
    [[ -n $dry ]] && ops=(--ops patch_embed,layer_norm,linear,flash_attention,attention_pool,mean_token)
    kernels kernels --without-compiled "${ops[@]}"
}

stage_compiled() {  # all rivals, torch.compile(max-autotune) among them; small models compile sooner
    local size=(--models "ViT-B/32,RN50,ViT-B/16,ViT-L/14" --batches 256,1 --precisions bf16) ops=()
    if [[ -n $dry ]]; then
        size=(--models toy --batches 2 --precisions fp32 --rounds 1 --device cpu --systems "clip_fast;open_clip, compiled")
        ops=(--ops mean_token)
    fi
    end_to_end compiled "${size[@]}"
    kernels compiled_kernels "${ops[@]}"
}

stage_pipeline() {
    local size=(--models ViT-B/32)
    [[ -n $dry ]] && size=(--models toy --kinds given --count 4 --batch-size 2 --workers 0 --rounds 1 --device cpu)
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
    if ! has matplotlib; then echo "== plot: matplotlib is not installed"; outcome=missing; return; fi
    local results=() name
    for name in end_to_end pipeline; do [[ -e $output/$name.json ]] && results+=("$output/$name.json"); done
    if ((!${#results[@]})); then echo "== plot: nothing was measured"; outcome=missing; return; fi
    run plot "$python" -m bench.plot "${results[@]}"
}

for stage in "${stages[@]}"; do
    if ! declare -F "stage_$stage" >/dev/null; then echo "gpu.sh: no stage $stage" >&2; exit 2; fi
done
for stage in "${stages[@]}"; do
    if ((!named)) && [[ $stage != plot && $(state "$stage") == done ]]; then echo "== $stage: done already"; continue; fi
    outcome=done before=$status
    "stage_$stage"
    mark "$stage" "$outcome"
    if [[ -n $archive ]]; then
        tar -czf "$archive.partial" -C "$output" . && mv "$archive.partial" "$archive"
    fi
done
rm -f "$output/passed.arguments"
sed 's/^/== /; s/ [^ ]*$//' "$output/stages"
unfinished=$(for stage in "${stages[@]}"; do [[ $(state "$stage") == done ]] || printf ' %s' "$stage"; done)
[[ -z $unfinished ]] || echo "not finished:$unfinished. The same command goes on with them."
echo "results are in $output"
exit $status
