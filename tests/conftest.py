"""What the tests share: the reference's numbers, real text when it is at hand, running a script."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; a wrong name fails at once

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference"
XQUAD = ROOT.parent / "shared" / "data" / "xquad"


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_HANDLERS = {number: signal.getsignal(number) for number in _SIGNALS}


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A script that runs in this process leaves signals ignored, as it should at its end; what is
    started after it would inherit that. (The script can have been run by a module's fixture.)"""
    yield
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


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


def on_small_disk(folder: Path, megabytes: int, *command) -> subprocess.CompletedProcess:
    """Run a command that sees a disk of a few megabytes at `folder`."""
    script = f'mount -t tmpfs -o size={megabytes}m none {folder} && exec "$@"'
    start = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    return subprocess.run(
        [*start, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder for `on_small_disk`, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = on_small_disk(folder, 1, "true") if shutil.which("unshare") else None
    if tried is None or tried.returncode != 0:
        pytest.skip("needs the right to mount a small disk in a namespace of its own (unshare)")
    return folder
