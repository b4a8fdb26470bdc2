"""A checkpoint is complete or absent; incomplete ones are ignored."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from src.runtime.errors import InputError
from src.training.checkpoint import (
    Checkpoints,
    changed_options,
    find_newest,
    load_state,
    read_meta,
    recover_interrupted_saves,
)


def save_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)


def make(folder: Path, keep: int = 0, save=save_model) -> Checkpoints:
    return Checkpoints(folder, save, keep, {"lr": 0.1})


def state(step: int, **more) -> tuple[dict, dict]:
    """The position and the training state after an update."""
    return {"step": step, **more}, {"optimizer": {"m": torch.full((3,), float(step))}}


def saved_step(path: Path) -> float:
    """The update that a checkpoint's tensors are from."""
    return load_state(path)["optimizer"]["m"][0].item()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    checkpoints = make(tmp_path)
    path = checkpoints.save_step(*state(5))
    assert find_newest(tmp_path) == (tmp_path / "step-5", [])
    assert saved_step(path) == 5
    assert read_meta(path)["options"] == {"lr": 0.1}
    for step in (7, 9):
        path = checkpoints.save_best(*state(step))
        assert find_newest(tmp_path) == (path, [])
        assert saved_step(path) == step
    assert names(tmp_path) == ["best_dev", "latest", "step-5"]
    assert (tmp_path / "latest").resolve() == path


def test_keep(tmp_path):
    checkpoints = make(tmp_path, keep=2)
    checkpoints.save_best(*state(1))
    for step in (8, 9, 10):  # in the order of numbers, not of names
        checkpoints.save_step(*state(step))
    assert names(tmp_path) == ["best_dev", "latest", "step-10", "step-9"]
    checkpoints.save_step(*state(13), periodic=False)  # a run that is pre-empted ...
    assert names(tmp_path) == ["best_dev", "latest", "step-10", "step-13", "step-9"]
    checkpoints.save_step(*state(20))  # ... and removed after it has resumed
    assert names(tmp_path) == ["best_dev", "latest", "step-10", "step-20"]


def cut(name: str, size: int):
    return lambda path: os.truncate(path / name, size)


@pytest.mark.parametrize(
    "damage",
    [
        cut("model.safetensors", 100),
        cut("training_state.pt", 10),
        cut("checkpoint.json", 20),
        lambda path: (path / "checkpoint.json").write_text("[]"),
        lambda path: (path / "model.safetensors").unlink(),
    ],
)
def test_an_incomplete_checkpoint_is_ignored(damage, tmp_path):
    make(tmp_path).save_step(*state(1))
    broken = make(tmp_path).save_step(*state(2))
    damage(broken)
    assert find_newest(tmp_path) == (tmp_path / "step-1", [str(broken)])


def test_a_failed_save_leaves_earlier_checkpoints(tmp_path):
    make(tmp_path).save_best(*state(1))

    def failing(error: Exception):
        def save(folder: Path) -> None:
            save_model(folder)
            raise error

        return make(tmp_path, save=save)

    with pytest.raises(InputError, match=r"best_dev: .*No space left on device.*are intact"):
        failing(OSError(28, "No space left on device")).save_best(*state(2))
    with pytest.raises(LookupError):
        failing(LookupError("a bug")).save_best(*state(2))
    assert names(tmp_path) == ["best_dev", "latest"]
    assert saved_step(tmp_path / "best_dev") == 1


class Killed(BaseException):
    pass


def kill_at(moment: int, task, monkeypatch) -> bool:
    """Do a task that ends at its `moment`-th change to the file system; whether it got so far."""
    left = [moment]

    def killing(original):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "symlink", "fsync", "link"):
            patch.setattr(os, name, killing(getattr(os, name)))
        # A killed process does not clean up.
        patch.setattr(shutil, "rmtree", killing(shutil.rmtree))
        with contextlib.suppress(Killed):
            task()
            return False
    return True


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("save", ["save_best", "save_step"])
def test_killed_at_any_moment(save, keep, tmp_path, monkeypatch):
    """Nothing incomplete looks like a checkpoint, and the next start leaves the folders of a run
    that was not killed: the old checkpoint up to some moment, and the new one from then on."""
    moment, found, killed = 0, [], True
    while killed:
        folder = tmp_path / str(moment)
        getattr(make(folder), save)(*state(1))
        task = lambda folder=folder: getattr(make(folder, keep), save)(*state(2))  # noqa: E731
        killed = kill_at(moment, task, monkeypatch)
        assert find_newest(folder)[1] == []
        recover_interrupted_saves(folder, keep)
        newest, _ = find_newest(folder)
        found.append(saved_step(newest))
        old = ["step-1"] if save == "save_step" and not keep else []
        assert names(folder) == sorted({"latest", newest.name, *old})
        assert (folder / "latest").resolve() == newest
        moment += 1
    assert moment > 6
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_recovery_logs_what_it_did(tmp_path):
    path = make(tmp_path).save_step(*state(1))
    (tmp_path / ".step-2.0123abcd.partial").mkdir()
    (path / ".checkpoint.json.0123abcd.partial").write_text('{"step"')
    for line in recover_interrupted_saves(tmp_path):
        assert ".0123abcd.partial, left incomplete" in line
    assert names(path) == ["checkpoint.json", "model.safetensors", "training_state.pt"]
    assert recover_interrupted_saves(tmp_path) == []


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = make(tmp_path).save_step(*state(1))
    torch.save({"step": Evil()}, path / "training_state.pt")
    for folder in (path, tmp_path):  # the other has no such file
        with pytest.raises(InputError, match=r"training_state\.pt"):
            load_state(folder)
    assert not (tmp_path / "ran").exists()


def test_changed_options(tmp_path):
    before, now = {"lr": 1, "clip": 2, "old": 3}, {"lr": 1, "clip": 4, "new": 5}
    assert changed_options(tmp_path, before, now) == ["clip was 2 and is 4"]
    with pytest.raises(InputError, match=r"run: .*--model_size base, which cannot become large"):
        changed_options(tmp_path / "run", {"model_size": "base"}, {"model_size": "large"})


@pytest.mark.parametrize("links", [True, False])
def test_step_and_best_of_one_update_are_written_once(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "absent"), raising=False)
    written = []

    def save_once(folder: Path) -> None:
        written.append(folder)
        save_model(folder)

    checkpoints = make(tmp_path, save=save_once)
    step = checkpoints.save_step(*state(5, evaluation_due=True))
    best = checkpoints.save_best(*state(5, evaluation_due=False))
    checkpoints.update_step({"step": 5, "evaluation_due": False})
    assert len(written) == 1
    assert read_meta(step)["position"] == read_meta(best)["position"]
    assert (step / "model.safetensors").samefile(best / "model.safetensors") == links
    # Each can be replaced or removed, and the other stays as it is.
    contents = {file.name: file.read_bytes() for file in step.iterdir()}
    checkpoints.save_best(*state(7))
    assert saved_step(best) == 7
    assert {file.name: file.read_bytes() for file in step.iterdir()} == contents
    checkpoints.save_step(*state(9))
    checkpoints.save_best(*state(9))
    shutil.rmtree(tmp_path / "step-9")
    assert saved_step(best) == 9
