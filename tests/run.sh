#!/usr/bin/env bash
# Runs the tests, in a new environment if none is active. Arguments go to pytest.
#
#     bash tests/run.sh                       everything, a process per core; lists skipped tests
#     bash tests/run.sh --fast                one test of each kind, in under 3 minutes on 2 cores:
#                                             all that start no process, at least one per file
#     bash tests/run.sh tests/test_data.py    one file; -n 0: in this process
set -euo pipefail
cd "$(dirname "$0")/.."
source ./environment.sh
export OMP_NUM_THREADS=1
# A file's tests share fixtures, so a file stays in one process. The longest files come first.
parallel=(-n auto --dist loadfile --no-loadscope-reorder)
if [[ " $* " == *" no:xdist "* ]]; then parallel=(); fi
python -m pytest "${parallel[@]}" "$@"
