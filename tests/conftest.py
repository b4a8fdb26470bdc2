"""Shared by the tests: reference numbers, real text where available, running scripts, `--fast`."""

import inspect
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; a wrong name fails at once
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: one thread per test process

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference"
XQUAD = ROOT.parent / "shared" / "data" / "xquad"


# --- the fast set

# A function that uses one of these names starts processes.
_STARTERS = {"subprocess", "multiprocessing", "Popen", "fork", "spawn"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="one trustworthy test of each kind")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        kept = fast_set(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def fast_set(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests that `--fast` runs: those that start no process, which takes seconds, and are not
    marked `slow`; those marked `fast`; and the first not marked `slow` of a file without either."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    kept = []
    for tests in files.values():
        others = [item for item in tests if not item.get_closest_marker("slow")]
        kept += [*filter(_is_fast, tests)] or others[:1]
    return kept


def _is_fast(item: pytest.Item) -> bool:
    if item.get_closest_marker("fast") or item.get_closest_marker("slow"):
        return item.get_closest_marker("fast") is not None
    fixtures = [used[-1].func for used in item._fixtureinfo.name2fixturedefs.values()]
    return not any(starts_processes(function, set()) for function in [item.function, *fixtures])


def starts_processes(function: object, seen: set[object]) -> bool:
    """Whether a function of the tests does so itself or in another that it calls."""
    function = inspect.unwrap(function)
    if function in seen or not getattr(function, "__module__", "").startswith("tests."):
        return False
    seen.add(function)
    if inspect.isclass(function):
        methods = vars(function).values()
        return any(starts_processes(m, seen) for m in methods if inspect.isfunction(m))
    names, codes = set(), [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    called = [function.__globals__[name] for name in names if name in function.__globals__]
    called = [value for value in called if inspect.isfunction(value) or inspect.isclass(value)]
    return bool(names & _STARTERS) or any(starts_processes(other, seen) for other in called)


# --- fixtures and helpers

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_HANDLERS = {number: signal.getsignal(number) for number in _SIGNALS}


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A script run in this process leaves signals ignored when it ends, and later processes would
    inherit that. (A module's fixture may have run the script.)"""
    yield
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def reference() -> Path:
    """The folder with the reference's numbers (see its README.md)."""
    return REFERENCE


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Calls what must end with status 2; returns the one line that it says."""

    def call(task: Callable[..., object], *arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            task(*arguments)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


@pytest.fixture
def passages(reference: Path, tmp_path: Path) -> Path:
    """A copy, because side files are kept beside a collection."""
    return Path(shutil.copy(reference / "passages.tsv", tmp_path / "passages.tsv"))


@pytest.fixture
def xquad() -> Path:
    """XQuAD's English part, which is not part of the project."""
    if not XQUAD.exists():
        pytest.skip(f"needs XQuAD in {XQUAD}")
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
