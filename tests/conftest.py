"""What the tests share: the reference's numbers, real text when it is at hand, running a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; a wrong name fails at once

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference"
XQUAD = ROOT.parent / "shared" / "data" / "xquad"


@pytest.fixture
def reference() -> Path:
    """The folder of numbers that the reference produced (see its README.md)."""
    return REFERENCE


@pytest.fixture
def xquad() -> Path:
    """XQuAD's English part, which lies beside the project where it is developed, not for users."""
    if not XQUAD.exists():
        pytest.skip(f"needs real text in {XQUAD}, which is not part of the project")
    return XQUAD


def run(
    *command: str | Path, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user does, from a shell, under torchrun if `processes` > 1."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*start, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_well(*command: str | Path, processes: int = 1, **environment: str) -> str:
    """Run a script that must succeed; returns what it printed."""
    done = run(*command, processes=processes, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
