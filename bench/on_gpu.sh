#!/bin/sh
# The benchmark on a GPU, in at most ten minutes: one table and one JSON line.
#
#     bash bench/on_gpu.sh            # --tiny: small shapes, also on a CPU, to try it
set -e
cd "$(dirname "$0")/.."
export PYTORCH_NVML_BASED_CUDA_CHECK=1  # to ask for a GPU must not start CUDA: processes fork
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    timeout 100 python -m pytest -q -n 0 tests/test_device.py tests/test_gpu_search.py ||
        echo "TESTS FAILED: see above"
fi
exec timeout 480 python bench/bench_gpu.py "$@"
