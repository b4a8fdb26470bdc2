"""Complete, atomic checkpoints, and how a stopped run finds its way back.

A run's folder holds `checkpoint/step-N` (every `--save_freq` updates, and at the end), `best_dev`
and `latest` (a link to the newest). Each is an ordinary model folder with two more files:
`training_state.pt` (optimizer, loss scale, random states, read back with weights_only) and
`checkpoint.json` (how far the run is, its options, and the size of every other file, which reveals
a copy that was cut off). `step-N` and `best_dev` of the same update share their files on disk by
hard links: files of a checkpoint are only ever replaced, never written into.
"""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from src.data.outputs import atomic_folder, write_whole, writing
from src.runtime import distributed
from src.runtime.errors import InputError, first_line

STATE_FILE, META_FILE = "training_state.pt", "checkpoint.json"

# A resumed run takes weights, shape and tokenizer from its own checkpoint, so another value of
# these would have no effect.
_FIXED = """
model_path model_size model_config tokenizer legacy_position_table retriever_model
indexing_dimension question_maxlength passage_maxlength no_projection no_question_mask
no_passage_mask extract_cls best_by pooling normalize question_prefix passage_prefix two_towers
"""
_MEANING = {  # of a change, where that is not obvious
    "eval_data": "the best value so far, and best_dev, are by the earlier file",
    "seed": "order, targets and dropout now depend on it",
    "processes": "dropout is drawn anew",
    "loss": "the best value so far, and best_dev, are by the earlier one",
    "target": "the best value so far, and best_dev, are by the earlier one",
}


class Checkpoints:
    """The checkpoints of one run. Only the main process writes.

    Args:
        folder: `checkpoint_dir/name/checkpoint`.
        save_model: writes weights, config and tokenizer into a folder.
        keep: how many periodic `step-N` stay; 0 keeps all.
        options: the run's options, for each checkpoint's meta file.

    A `position` is a `loop.Position` as a dict; a `state` goes into `training_state.pt`.
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
        """Write or replace `best_dev`."""
        return self._save("best_dev", position, state, True)

    def update_step(self, position: dict[str, Any]) -> None:
        """Note in `step-N`, if there is one, that it has been evaluated."""
        path = self.folder / f"step-{position['step']}"
        if meta := read_meta(path):
            write_whole(path / META_FILE, [_as_text({**meta, "position": position})])

    def _save(
        self, name: str, position: dict[str, Any], state: dict[str, Any], periodic: bool
    ) -> Path:
        target = self.folder / name
        try:
            with atomic_folder(target) as partial:
                same = self.folder / f"step-{position['step']}"  # saved before it was evaluated
                if target != same and (saved := read_meta(same)):
                    for file in saved["files"]:
                        (partial / file).parent.mkdir(parents=True, exist_ok=True)
                        _link(same / file, partial / file)
                else:
                    self._save_model(partial)
                    torch.save(state, partial / STATE_FILE)
                files = sorted(file for file in partial.rglob("*") if file.is_file())
                sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
                meta = {"step": position["step"], "periodic": periodic, "position": position}
                meta |= {"options": self._options, "files": sizes}
                (partial / META_FILE).write_text(_as_text(meta))
        except Exception as error:
            # How Python, safetensors and torch.save report a full disk.
            kinds = ("os error", "inline_container")
            if not (isinstance(error, OSError) or any(kind in str(error) for kind in kinds)):
                raise
            raise InputError(
                f"{target}: the checkpoint cannot be written ({first_line(error)}); "
                "earlier checkpoints are intact"
            ) from error
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
    """Remove all periodic `step-N` but the newest `keep` (0: none), and all others but the newest
    checkpoint."""
    metas = {path: meta for path in folder.glob("step-*") if (meta := read_meta(path))}
    steps = sorted(metas, key=lambda path: metas[path]["step"])
    periodic = [path for path in steps if metas[path]["periodic"]]
    others = [path for path in steps[:-1] if path not in periodic]
    for path in [*others, *(periodic[:-keep] if keep else [])]:
        # Renamed first: if killed half-way, it does not look like a checkpoint.
        removed = path.rename(folder / f".{path.name}.removed")
        shutil.rmtree(removed)


def recover_interrupted_saves(folder: Path, keep: int = 0) -> list[str]:
    """Clean up after a run that was killed while it saved: complete the renaming of what is
    complete, remove the rest. Returns a line for the log about each.

    Args: keep: how many periodic `step-N` stay; 0: all.
    """
    lines = []
    # Killed between two renames, both the old and the new best_dev are left: newest first.
    partials = [path for path in folder.glob(".*.partial") if not path.is_symlink()]
    partials.sort(key=lambda path: -(read_meta(path) or {"step": -1})["step"])
    for partial in partials:
        target = folder / partial.name[1:].split(".")[0]
        if read_meta(partial) and not target.exists():
            partial.rename(target)
            lines.append(f"recovered {target}, which a stopped run had not finished renaming")
    partials += [*folder.glob(".*.removed"), *folder.glob("step-*/.*.partial")]
    for path in filter(os.path.lexists, partials):
        path.unlink() if path.is_file() else shutil.rmtree(path)
        lines.append(f"removed {path}, left incomplete by a stopped run")
    remove_old_steps(folder, keep)
    _link_latest(folder)
    return lines


def resume_point(folder: Path, options: dict[str, Any], log: logging.Logger) -> Path | None:
    """The run's newest complete checkpoint, or None, after cleaning up. Logs what was done, and
    which options have changed since.

    Errors: `InputError` when an option has changed that cannot change, when no checkpoint in the
        folder is complete (training would start again), and when it cannot be cleaned up.
    """

    def recover() -> None:
        link = folder / "latest"
        if link.is_dir() and not link.is_symlink():
            problem = "a folder, where a link to the newest checkpoint belongs; remove or rename it"
            raise InputError(f"{link}: {problem}")
        with writing(folder, "give another --checkpoint_dir or --name"):
            if os.path.lexists(folder):
                for line in recover_interrupted_saves(folder, options["keep_checkpoints"]):
                    log.info("%s", line)

    distributed.run_on_main(recover)
    newest, incomplete = find_newest(folder)
    if incomplete and newest is None:
        raise InputError(
            f"{incomplete[-1]}: not a complete checkpoint of this program, and no other is left "
            "to resume from; remove it to start again, or give another --name"
        )
    for path in incomplete:
        log.info("ignoring %s: not a complete checkpoint of this program", path)
    if newest:
        changes = changed_options(newest, read_meta(newest)["options"], options)
        log.info("resuming from %s", newest)
        for change in changes:
            log.info("since that checkpoint, %s", change)
    return newest


def describe_resume(folder: Path) -> str:
    """What the same command would do if the run were stopped now, in a few words."""
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
    """The contents of `checkpoint.json`, or None when the checkpoint is not complete."""
    try:
        meta = json.loads((path / META_FILE).read_text())
        step, position, files = meta["step"], meta["position"], meta["files"]
        best, due = position.get("best"), position.get("evaluation_due", False)
        is_whole = (
            set(position) <= {"step", "examples_seen", "best", "evaluation_due"}
            and all(type(n) is int and n >= 0 for n in (step, position.get("examples_seen", 0)))
            and position["step"] == step
            and (best is None or (type(best) in (int, float) and math.isfinite(best)))
            and {type(due), type(meta["periodic"])} == {bool}
            and type(meta["options"]) is dict
            and all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)
            and files == {name: (path / name).stat().st_size for name in files}
        )
        return meta if is_whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_state(
    path: Path, optimizer: torch.optim.Optimizer | None, rank: int, step: int
) -> tuple[dict[str, Any], dict[str, float], list[dict[str, torch.Tensor]]]:
    """The training state in a checkpoint: the optimizer's, the loss scaler's (empty without fp16),
    and the random states of all processes. They are checked to be of this model, because PyTorch
    takes tensors of any shape, and some kernels then never return.

    Args:
        optimizer: the one to restore; None: the checkpoint has its state in shares.
        rank: whose random state is checked.
        step: the updates that were made.
    Errors: `InputError`.
    """
    saved = load_state(path)
    try:
        theirs, scaler = saved["optimizer"], saved["scaler"]
        if optimizer is not None:
            _check_optimizer(theirs, optimizer, may_be_new=bool(scaler) or step == 0)
        if scaler:
            torch.amp.GradScaler("cpu").load_state_dict(scaler)
        if not all(type(n) in (int, float) and math.isfinite(n) for n in scaler.values()):
            raise ValueError("the loss scale is not a number")
        states = saved["random_states"]
        for device, state in states[min(rank, len(states) - 1)].items():
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(state)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        problem = f"not the training state of this model ({first_line(error)})"
        raise _bad_state(path, problem) from None
    return theirs, scaler, states


def _bad_state(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path / STATE_FILE}: {problem}; remove {path}, and the same command resumes from the "
        "checkpoint before it"
    )


def _check_optimizer(
    saved: dict[str, Any], optimizer: torch.optim.Optimizer, may_be_new: bool
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    known = set(saved["state"]) & set(numbers)
    if len(parameters) != len(numbers):
        raise ValueError(f"for {len(numbers)} tensors, not {len(parameters)}")
    if len(known) != len(saved["state"]) or not (known or may_be_new):
        raise ValueError(f"{len(known)} of its tensors have been trained")
    for number in known:
        moments, shape = saved["state"][number], list(parameters[number].shape)
        found = {n: list(v.shape) for n, v in moments.items() if v.is_floating_point()}
        if found != {"step": [], "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(f"{found} for a tensor of shape {shape}")


def load_state(path: Path) -> dict[str, Any]:
    """The training state in a checkpoint, unchecked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the one line below says it
            return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a broken or hostile file
        raise _bad_state(path, f"cannot be read ({first_line(error)})") from error


def changed_options(path: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that differ between a checkpoint and the run that resumes it, a text each.
    (Options that only one of them has come from another version of this program.)

    Errors: `InputError` for one that cannot change.
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
