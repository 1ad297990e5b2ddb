#!/usr/bin/env bash
# On a machine with a GPU: the complete suite, NumPy beside CuPy, and the benchmarks; one JSON of every figure goes to docs/gpu/.
#   scripts/check_gpu.sh [checkpoint folder or name]     (the default checkpoint where none is given)
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -c 'from npllm.arrays import backend_namespace; backend_namespace("cupy")'  # no GPU: an error that says what is missing
passed=true
NPLLM_REQUIRE_CUDA_BUILD=1 NPLLM_GPU_FIGURES="$work/parity.json" pytest -m "gpu or not gpu" --junitxml="$work/tests.xml" || passed=false
for backend in cupy numpy; do
    npllm bench ${1:+-m "$1"} --backend "$backend" --json > "$work/bench-$backend.json"
done
python scripts/bench.py generate ${1:+-m "$1"} --json > "$work/generate.json"
python scripts/gpu_report.py "$work"
$passed
