#!/usr/bin/env bash
# Check and measure npllm on a machine with a GPU.  Every figure is on disk as soon as it is known.
#
#   scripts/check_gpu.sh                   kernels, tests, weights, timings: under ten minutes
#   scripts/check_gpu.sh --all             scripts/bench_gpu.py and the tests without a GPU as well
#   scripts/check_gpu.sh --stages rest     some stages only, by name, separated by commas
#   scripts/check_gpu.sh --rehearse        the same without a GPU, on the stand-in, in small sizes
#
# OUT                   where the folder of this run is made [docs/gpu]
# NPLLM_COMMIT          the commit, where the tree has no history
# NPLLM_GPU_WEIGHTS     where the random checkpoints lie, 8 GB; kept for the next run [in TMPDIR]
# NPLLM_SECONDS_STAGE   the limit of a stage, as in NPLLM_SECONDS_timings=900
# NPLLM_ONLY_kernels    words: only variants whose name holds one; NPLLM_ONLY_timings: of tasks
# NPLLM_PYTEST_tests    more arguments of pytest; NPLLM_PYTEST_rest: of the other stage
# NPLLM_EXAMPLES        of Hypothesis, for each test on the GPU [10]
#
# The exit code is 0 where everything that ran passed; report.json holds all that was found.
set -u
cd "$(dirname "$0")/.."

usage() { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }

stages="kernels tests weights timings"
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
temporary=""
while [ $# -gt 0 ]; do
    case $1 in
        --all) stages="$stages bench $(command -v compute-sanitizer > /dev/null && echo sanitize) rest" ;;
        --stages) [ $# -gt 1 ] || usage; stages=${2//,/ }; shift ;;
        --rehearse) export NPLLM_REHEARSE=1 device=stand-in ;;
        *) usage ;;
    esac
    shift
done
for stage in $stages; do
    case $stage in kernels | tests | weights | timings | bench | sanitize | rest) ;; *) usage ;; esac
done

export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
: "${NPLLM_GPU_WEIGHTS:=${TMPDIR:-/tmp}/npllm-gpu-weights-$(id -u)}"
if [ "${NPLLM_REHEARSE:-}" = 1 ]; then
    export PYTHONPATH="$PWD/scripts/gpu/stand_in:$PYTHONPATH:$PWD/tests"
    temporary=$(mktemp -d)
    NPLLM_GPU_WEIGHTS="$temporary/weights"
    : "${NPLLM_SHIM_CACHE:=$temporary/shim}"
    : "${NPLLM_EXAMPLES:=2}"
    : "${NPLLM_PYTEST_rest:=-k 'test_ops_norm or test_ops_residual'}"
    export NPLLM_SHIM_CACHE NPLLM_EXAMPLES NPLLM_PYTEST_rest
fi
export NPLLM_GPU_WEIGHTS CUPY_CACHE_DIR="${CUPY_CACHE_DIR:-$NPLLM_GPU_WEIGHTS/cupy-cache}"
mkdir -p "$NPLLM_GPU_WEIGHTS"

folder="${OUT:-docs/gpu}/$(date -u +%Y-%m-%dT%H%M%SZ)-${device:-no-gpu}"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
child=""
result=1

report() {
    python3 -m gpu.report "$folder" > "$folder/report.log" 2>&1
    result=$?
}

finish() {
    trap '' INT TERM HUP
    [ -n "$child" ] && kill "$child" 2>/dev/null
    report
    cat "$folder/report.log"
    [ -n "$temporary" ] && rm -rf "$temporary"
    exit "$result"
}
trap finish EXIT
trap 'exit 143' INT TERM HUP

# stage NAME SECONDS COMMAND...: run a command under a time limit, and note how it ended.
stage() {
    local name=$1 limit="NPLLM_SECONDS_$1" seconds=$2 start code
    shift 2
    seconds=${!limit:-$seconds}
    printf '{"name": "%s", "status": "started"}\n' "$name" >> "$folder/stages.jsonl"
    echo "== $name (at most $seconds s)"
    start=$(date +%s)
    NPLLM_STAGE_SECONDS=$seconds NPLLM_STAGE_STARTED=$start \
        timeout -k 5 "$seconds" "$@" > "$folder/$name.log" 2>&1 &
    child=$!
    wait "$child"
    code=$?
    child=""
    printf '{"name": "%s", "status": "ended", "exit_code": %d, "seconds": %d}\n' \
        "$name" "$code" "$(($(date +%s) - start))" >> "$folder/stages.jsonl"
    tail -n 5 "$folder/$name.log"
    report
    return "$code"
}

stage machine 60 python3 -m gpu.machine "$folder" || exit  # no device: the report says why
for name in $stages; do
    case $name in
        kernels) stage kernels 80 python3 -m gpu.kernels "$folder" ;;
        tests) stage tests 140 python3 -m gpu.tests "$folder" tests ;;
        weights) stage weights 60 python3 -m gpu.weights "$folder" ;;
        timings) stage timings 260 python3 -m gpu.timings "$folder" ;;
        bench) stage bench 475 python3 scripts/bench_gpu.py "$folder" ;;
        sanitize) stage sanitize 240 python3 -m gpu.sanitize "$folder" ;;
        rest) stage rest 540 python3 -m gpu.tests "$folder" rest ;;
    esac
done
