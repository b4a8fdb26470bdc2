"""Complete, atomic checkpoints, and how a stopped run finds its way back.

A run's folder holds `checkpoint/step-N` (every `--save_freq` updates, and at the end), `best_dev`
and `latest` (a link to the newest). Each is an ordinary model folder with two more files:
`training_state.pt` (optimizer, loss scale, random states, read back with weights_only) and
`checkpoint.json` (how far the run is, its options, and the size of every other file). A checkpoint
is written to a hidden folder and renamed, so it is complete or absent; the sizes reveal a copy that
was cut off. `step-N` and `best_dev` of the same update share their files on disk by hard links:
nothing ever writes into a file that is in a checkpoint, it only replaces it.
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

from src.data.outputs import write_whole
from src.runtime import distributed
from src.runtime.errors import InputError, first_line

STATE_FILE, META_FILE = "training_state.pt", "checkpoint.json"

# What a run keeps from its beginning: a resumed run takes weights, shape and tokenizer from its own
# checkpoint, so another value would be without effect.
_FIXED = """
model_path model_size model_config tokenizer legacy_position_table retriever_model
indexing_dimension question_maxlength passage_maxlength no_projection no_question_mask
no_passage_mask extract_cls
"""
# What a changed option means, where it is not simply used from now on.
_MEANING = {
    "train_data": "examples come from there from now on",
    "eval_data": "the best value so far, and best_dev, are by the file before",
    "seed": "order, targets and dropout are drawn by it from now on",
    "processes": "dropout is drawn anew",
}


class Checkpoints:
    """The checkpoints of one run. Only the main process writes.

    Args:
        folder: `checkpoint_dir/name/checkpoint`.
        save_model: writes weights, config and tokenizer into a folder.
        keep: how many periodic `step-N` stay; 0 keeps all.
        options: the run's options, written into each checkpoint's meta file.

    Positions are `loop.Position` as a dict; states go into `training_state.pt`.
    """

    def __init__(
        self, folder: Path, save_model: Callable[[Path], None], keep: int, options: dict[str, Any]
    ):
        self.folder = folder
        self._save_model = save_model
        self._keep = keep
        self._options = options

    def save_step(
        self, position: dict[str, Any], state: dict[str, Any], periodic: bool = True
    ) -> Path:
        """Write `step-N`; one that is not periodic gives way to the next checkpoint."""
        path = self._save(f"step-{position['step']}", position, state, periodic)
        remove_old_steps(self.folder, self._keep)
        return path

    def save_best(self, position: dict[str, Any], state: dict[str, Any]) -> Path:
        """Write `best_dev` in place of the one before."""
        return self._save("best_dev", position, state, True)

    def update_step(self, position: dict[str, Any]) -> None:
        """Note in `step-N`, if there is one, how far the run is since its weights were saved (its
        evaluation has been made)."""
        path = self.folder / f"step-{position['step']}"
        if meta := read_meta(path):
            write_whole(path / META_FILE, [_as_text({**meta, "position": position})])

    def _save(
        self, name: str, position: dict[str, Any], state: dict[str, Any], periodic: bool
    ) -> Path:
        target, partial = self.folder / name, self.folder / f".{name}.partial"
        try:
            _remove(partial)
            partial.mkdir(parents=True)
            same = self.folder / f"step-{position['step']}"  # saved before it was evaluated
            if target != same and (saved := read_meta(same)):
                for file in saved["files"]:
                    _link(same / file, partial / file)
            else:
                self._save_model(partial)
                torch.save(state, partial / STATE_FILE)
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            meta = {"step": position["step"], "periodic": periodic, "position": position}
            meta |= {"options": self._options, "files": sizes}
            (partial / META_FILE).write_text(_as_text(meta))
            _flush_to_disk(partial)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            # A full disk, as Python, safetensors and torch.save tell of it.
            kinds = ("os error", "inline_container")
            if not (isinstance(error, OSError) or any(kind in str(error) for kind in kinds)):
                raise
            raise InputError(
                f"{target}: the checkpoint cannot be written ({first_line(error)}); "
                "what was there before still is"
            ) from error
        _swap(partial, target)
        _link_latest(self.folder)
        return target


def _as_text(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=1) + "\n"


def _link(file: Path, new: Path) -> None:
    try:
        os.link(file, new)
    except OSError:  # not every file system has hard links
        shutil.copyfile(file, new)


def _link_latest(folder: Path) -> None:
    newest, _ = find_newest(folder)
    if newest is not None:
        link = folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(newest.name)
        link.replace(folder / "latest")


def remove_old_steps(folder: Path, keep: int) -> None:
    """Remove all periodic `step-N` but the newest `keep` (0: none), and those that are not
    periodic but the newest of all."""
    steps = [(meta["step"], path) for path in folder.glob("step-*") if (meta := read_meta(path))]
    periodic = [path for _, path in sorted(steps) if read_meta(path)["periodic"]]
    others = {path for _, path in sorted(steps)[:-1]} - set(periodic)
    for path in [*others, *(periodic[:-keep] if keep else [])]:
        # Renamed first: killed half-way, it does not look like a checkpoint.
        removed = folder / f".{path.name}.removed"
        _remove(removed)
        path.rename(removed)
        _remove(removed)


def recover_interrupted_saves(folder: Path, keep: int = 0) -> list[str]:
    """Clean up after a run that was killed while it saved: finish what can be finished, remove
    what is incomplete. Returns a line for the log about each.

    Args: keep: how many periodic `step-N` stay; 0: all.
    """
    lines = []
    leftovers = [path for end in ("partial", "old", "removed") for path in folder.glob(f".*.{end}")]
    for leftover in [*leftovers, *folder.glob(f"step-*/.{META_FILE}*.partial")]:
        target = folder / leftover.name[1:].rsplit(".", 1)[0]
        is_whole = leftover.suffix != ".removed" and read_meta(leftover) is not None
        if is_whole and not target.exists():
            leftover.rename(target)
            lines.append(f"recovered {target}, which a stopped run had not finished renaming")
        else:
            _remove(leftover)
            lines.append(f"removed {leftover}, left incomplete by a stopped run")
    remove_old_steps(folder, keep)
    _link_latest(folder)
    return lines


def resume_point(folder: Path, options: dict[str, Any], log: logging.Logger) -> Path | None:
    """The run's newest complete checkpoint, or None, after cleaning up; the log gets what was done,
    and which options have changed since.

    Errors: `InputError` when an option has changed that cannot.
    """
    if distributed.is_main() and folder.exists():
        for line in recover_interrupted_saves(folder, options["keep_checkpoints"]):
            log.info("%s", line)
    distributed.barrier()
    newest, incomplete = find_newest(folder)
    for path in incomplete:
        log.info("passing over %s: it is not a complete checkpoint of ours", path)
    if newest:
        changes = changed_options(newest, read_meta(newest)["options"], options)
        log.info("resuming from %s", newest)
        for change in changes:
            log.info("since that checkpoint, %s", change)
    return newest


def describe_resume(folder: Path) -> str:
    """What the command of a run that is cut off now will do, in a few words."""
    newest, _ = find_newest(folder)
    return f"resumes from {newest}" if newest else "starts again"


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
            "run resumes from the checkpoint before it"
        ) from error


def changed_options(path: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that differ between a checkpoint and the run that resumes it, a text each.
    Options that only one of them knows are of another version of this program.

    Errors: `InputError` for one that cannot change, and would be without effect.
    """
    changes = []
    known = (set(before) & set(now)) - {"local_rank"}
    for name in sorted(name for name in known if before[name] != now[name]):
        if name in _FIXED.split():
            raise InputError(
                f"{path}: this run was started with --{name} {before[name]}, which cannot become "
                f"{now[name]} now; give {before[name]} again, or start another run with --name"
            )
        meaning = f" ({_MEANING[name]})" if name in _MEANING else ""
        changes.append(f"{name} was {before[name]} and is {now[name]}{meaning}")
    return changes


def _flush_to_disk(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    """Replace a folder. A crash in between leaves both for `recover_interrupted_saves`."""
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
