"""What a run reports: log, progress bars, `metrics.jsonl`, TensorBoard, averages."""

import json
import logging
import platform
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from src.data.outputs import claim, require_regular, write_whole, writing
from src.runtime import distributed, terminal
from src.runtime.device import describe
from src.runtime.errors import InputError, drop_unread_output
from src.runtime.terminal import count, say

_ELSEWHERE = "give another --checkpoint_dir or --name"


class _BesideTheBar(logging.Handler):
    """Prints log lines without tearing a progress bar apart. A line that cannot be printed (closed
    output, a full disk) does not stop the run."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            drop_unread_output()
            self.handleError(record)


def start_log(file: Path | None) -> logging.Logger:
    """The log, which the main process alone writes: to the screen and to a file, `run.log`, if one
    is given. The file's folder is made, and reserved until this command ends.

    Errors: `InputError`, in every process, when the folder cannot be written or reserved.
    """
    if file is not None:
        distributed.run_on_main(lambda: claim(file.parent, _ELSEWHERE, lock_file=file))
    logging.raiseExceptions = False  # a full disk must not end a run here
    log = logging.getLogger("fid")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.INFO if distributed.is_main() else logging.CRITICAL)
    if not distributed.is_main():
        return log
    files = [logging.FileHandler(file, "a", "utf-8", False, "backslashreplace")] if file else []
    for handler in [_BesideTheBar(), *files]:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    return log


def announce(
    log: logging.Logger, name: str, title: str, device: torch.device, precision: str, results: Path
) -> None:
    """A script's first log lines: what it does, on what, and where the results go."""
    say(log, name, title)
    processes = count(distributed.world_size(), "process", "processes")
    say(log, "device", "%s; %s; %s", describe(device), precision, processes)
    say(log, "results", "%s", results)


def write_options(folder: Path, options: dict[str, Any]) -> None:
    """Save a run's options, command and versions in its folder's `options.json`."""
    if not distributed.is_main():
        return
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("torch", "transformers")}
    record = {"options": options, "command": sys.argv, "versions": versions}
    write_whole(folder / "options.json", [json.dumps(record, indent=1) + "\n"], _ELSEWHERE)


def progress_bar(total: int, unit: str, initial: int = 0) -> tqdm:
    """As `terminal.progress_bar`, of the main process alone."""
    return terminal.progress_bar(total, unit, initial, distributed.is_main())


def passing_bar(total: int, unit: str, what: str) -> tqdm:
    """As `terminal.passing_bar`, of the main process alone."""
    return terminal.passing_bar(total, unit, what, distributed.is_main())


class Metrics:
    """Numbers by step, in `metrics.jsonl` (a line each) and as TensorBoard curves. What a resumed
    run will write again is removed first: lines after `step`, and, with `evaluation_due`, the dev
    metrics of `step` itself."""

    def __init__(self, folder: Path, step: int, evaluation_due: bool = False):
        self._file = self._board = None
        if not distributed.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _keep_until(path, step, evaluation_due)
        self._file = open(path, "a")  # noqa: SIM115 (open for the whole run)
        from torch.utils.tensorboard import SummaryWriter  # slow, and for the main process only

        threading.excepthook = _without_lost_files
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values of one step; keys such as `train/loss` group TensorBoard's curves."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._file.name}: cannot be written ({error.strerror}); make room, and the "
                "same command resumes from the last checkpoint"
            ) from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _without_lost_files(unhandled: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands an error with its file to the main thread, which reports it."""
    if not isinstance(unhandled.exc_value, OSError):
        threading.__excepthook__(unhandled)


def _keep_until(path: Path, step: int, evaluation_due: bool) -> None:
    with writing(path, _ELSEWHERE):
        require_regular(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            again = evaluation_due and any(name.startswith("dev/") for name in values)
            if values["step"] <= (step - 1 if again else step):
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # cut off when the run was killed
    write_whole(path, kept, _ELSEWHERE)


class Average:
    """A running weighted mean, which can be taken over all processes."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value * weight
        self.weight += weight

    def value(self) -> float | None:
        """The mean so far in this process; None when nothing was added."""
        return self.total / self.weight if self.weight else None

    def over_all(self) -> "Average":
        """The same over what every process added."""
        joint = Average()
        joint.total, joint.weight = distributed.sum_numbers(self.total, self.weight)
        return joint
