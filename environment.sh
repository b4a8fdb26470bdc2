#!/usr/bin/env bash
# Sourced by the shell scripts: provides a Python environment with the required packages.
#
# In an active environment (venv or conda), missing packages are installed within the ranges of
# requirements.txt and requirements-dev.txt. Otherwise .venv is created here, once, with the exact
# versions of constraints.txt.

fid_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fid_python=python3
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then fid_python=python; fi
if ! $fid_python -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
    echo "error: $fid_python is not Python 3.11 or later; install it, or activate its environment" >&2
    exit 2
fi
if [ $fid_python = python ]; then
    python -m pip install --quiet --disable-pip-version-check \
        -r "$fid_root/requirements.txt" -r "$fid_root/requirements-dev.txt"
else
    fid_wanted=$(cat "$fid_root"/requirements*.txt "$fid_root/constraints.txt" | cksum)
    if [ "$(cat "$fid_root/.venv/installed" 2>/dev/null)" != "$fid_wanted" ]; then
        echo "creating a Python environment in $fid_root/.venv (once; a few minutes)"
        python3 -m venv "$fid_root/.venv"
        "$fid_root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$fid_root/requirements.txt" -r "$fid_root/requirements-dev.txt" \
            -c "$fid_root/constraints.txt"
        echo "$fid_wanted" > "$fid_root/.venv/installed"
    fi
    source "$fid_root/.venv/bin/activate"
fi
