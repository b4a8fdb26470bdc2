#!/bin/sh
# The benchmarks on a GPU, in at most ten minutes: one table each, and one JSON line.
#
#     bash bench/on_gpu.sh
set -e
cd "$(dirname "$0")/.."
python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU here")'
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout 240 python -m pytest -q -n 0 tests/test_device.py tests/test_gpu_search.py
for size in base large; do
    timeout 180 python bench/bench_gpu.py --size "$size"
done
