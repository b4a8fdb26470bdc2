#!/usr/bin/env bash
# Sourced by the shell entries: makes sure that there is a Python environment with what we need.
#
# In an active environment (venv or conda), missing packages are installed by the ranges of
# requirements.txt and, for the tests, requirements-dev.txt. With none, .venv is made here, once,
# with the exact versions of constraints.txt.

fid_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python -m pip install --quiet --disable-pip-version-check \
        -r "$fid_root/requirements.txt" -r "$fid_root/requirements-dev.txt"
else
    fid_wanted=$(cat "$fid_root"/requirements*.txt "$fid_root/constraints.txt" | cksum)
    if [ "$(cat "$fid_root/.venv/installed" 2>/dev/null)" != "$fid_wanted" ]; then
        echo "making a Python environment in $fid_root/.venv (once; a few minutes)"
        python3 -m venv "$fid_root/.venv"
        "$fid_root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$fid_root/requirements.txt" -r "$fid_root/requirements-dev.txt" \
            -c "$fid_root/constraints.txt"
        echo "$fid_wanted" > "$fid_root/.venv/installed"
    fi
    source "$fid_root/.venv/bin/activate"
fi
