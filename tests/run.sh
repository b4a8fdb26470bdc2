#!/usr/bin/env bash
# Runs every test, after making an environment if none is active; arguments go to pytest.
#
#     bash tests/run.sh                    everything; what was skipped is listed with the reason
#     bash tests/run.sh tests/test_data.py
set -euo pipefail
cd "$(dirname "$0")/.."
source ./environment.sh
python -m pytest "$@"
