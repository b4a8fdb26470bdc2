"""Complete, atomic checkpoints, and how a stopped run finds its way back.

A run's folder holds `checkpoint/step-N` (every `--save_freq` updates, and at the end), `best_dev`
and `latest` (a link to the newest). Each is an ordinary model folder with two more files:
`training_state.pt` (optimizer, schedule, random states, read back with weights_only) and
`checkpoint.json` (step, options, and the size of every file). A checkpoint is written beside its
place and renamed, so it is complete or absent; the sizes tell a copy that was cut off.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from src.runtime import distributed
from src.runtime.errors import InputError, first_line

STATE_FILE, META_FILE = "training_state.pt", "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run. Only the main process writes.

    Args:
        folder: `checkpoint_dir/name/checkpoint`.
        save_model: writes weights, config and tokenizer into a folder.
        keep: how many periodic `step-N` stay; 0 keeps all.
        options: the run's options, written into each checkpoint's meta file.
    """

    def __init__(
        self, folder: Path, save_model: Callable[[Path], None], keep: int, options: dict[str, Any]
    ):
        self.folder = folder
        self._save_model = save_model
        self._keep = keep
        self._options = options

    def save_step(self, state: dict[str, Any], periodic: bool = True) -> Path:
        """Write `step-N`; one that is not periodic gives way to the next checkpoint."""
        path = self._save(f"step-{state['step']}", state, periodic)
        self._remove_old_steps(path, self._keep - periodic)
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        """Write `best_dev` in place of the one before."""
        return self._save("best_dev", state, True)

    def _save(self, name: str, state: dict[str, Any], periodic: bool) -> Path:
        target, partial = self.folder / name, self.folder / f".{name}.partial"
        try:
            _remove(partial)
            partial.mkdir(parents=True)
            self._save_model(partial)
            torch.save(state, partial / STATE_FILE)
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            meta = {
                "step": state["step"],
                "periodic": periodic,
                "options": self._options,
                "files": sizes,
            }
            (partial / META_FILE).write_text(json.dumps(meta, indent=1) + "\n")
            _flush_to_disk(partial)
        except Exception as error:  # the model's own writers raise kinds of their own
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"{target}: the checkpoint cannot be written ({first_line(error)}); "
                "what was there before still is"
            ) from error
        _swap(partial, target)
        link = self.folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.folder / "latest")
        return target

    def _remove_old_steps(self, newest: Path, n_others: int) -> None:
        periodic = []
        for path in self.folder.glob("step-*"):
            meta = read_meta(path)
            if meta is None or path == newest:
                continue
            if meta["periodic"]:
                periodic.append((meta["step"], path))
            else:
                _remove(path)
        if self._keep > 0:
            for _, path in sorted(periodic, reverse=True)[n_others:]:
                _remove(path)


def tidy(folder: Path) -> list[str]:
    """Clear up after a run that was killed while it wrote: finish a swap that was half done,
    remove what is incomplete. Returns a line for the log about each."""
    lines = []
    for leftover in sorted(folder.glob(".*.partial")) + sorted(folder.glob(".*.old")):
        target = folder / leftover.name[1:].rsplit(".", 1)[0]
        if not leftover.is_symlink() and read_meta(leftover) and not target.exists():
            leftover.rename(target)
            lines.append(f"put {target} in its place, which a stopped run had left beside it")
        else:
            _remove(leftover)
            lines.append(f"removed {leftover}, left incomplete by a stopped run")
    return lines


def resume_point(folder: Path, options: dict[str, Any], log: logging.Logger) -> Path | None:
    """The run's newest complete checkpoint, or None, after tidying up and telling the log, also
    which options have changed since."""
    if distributed.is_main():
        for line in tidy(folder):
            log.info("%s", line)
    distributed.barrier()
    newest, incomplete = find_newest(folder)
    for path in incomplete:
        log.info("passing over %s: it is not a complete checkpoint of ours", path)
    if newest:
        log.info("resuming from %s", newest)
        for change in changed_options(read_meta(newest)["options"], options):
            log.info("since that checkpoint, %s", change)
    return newest


def goes_on_from(folder: Path) -> str:
    """What the command of a run that is cut off now will do, in a few words."""
    newest, _ = find_newest(folder)
    return f"goes on from {newest}" if newest else "starts again"


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The complete checkpoint with the most updates, or None, and the incomplete ones' names."""
    complete, incomplete = [], []
    candidates = [*folder.glob("step-*"), *folder.glob("best_dev")]
    for path in sorted(candidates):
        meta = read_meta(path)
        if meta is None:
            incomplete.append(str(path))
        else:
            complete.append((meta["step"], path.name, path))
    return (max(complete)[2] if complete else None), incomplete


def read_meta(path: Path) -> dict[str, Any] | None:
    """What `checkpoint.json` says, or None when the checkpoint is not complete."""
    try:
        meta = json.loads((path / META_FILE).read_text())
        whole = all((path / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return meta if whole else None


def load_state(path: Path) -> dict[str, Any]:
    """The training state in a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is wrong is said by the one line
            return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a broken or hostile file
        raise InputError(
            f"{path / STATE_FILE}: cannot be read ({first_line(error)}); remove {path}, and the "
            "run goes on from the checkpoint before it"
        ) from error


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that differ between a checkpoint and the run that resumes it, one text each."""
    names = sorted(set(before) | set(now))
    return [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _flush_to_disk(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    """Put a folder in another's place. A crash in between leaves both, for `tidy` to mend."""
    old = target.parent / f".{target.name}.old"
    _remove(old)
    if target.exists():
        target.rename(old)
    new.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
