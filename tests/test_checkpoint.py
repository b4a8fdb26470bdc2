"""A checkpoint is complete or absent; what is left incomplete is passed over."""

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


def make(folder: Path, keep: int = 0) -> Checkpoints:
    return Checkpoints(folder, save_model, keep, {"lr": 0.1})


def state(step: int) -> tuple[dict, dict]:
    """The position and the training state after an update."""
    return {"step": step}, {"optimizer": {"m": torch.full((3,), float(step))}}


def saved_step(path: Path) -> float:
    """The update that a checkpoint's tensors are from."""
    return load_state(path)["optimizer"]["m"][0].item()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    checkpoints = make(tmp_path)
    path = checkpoints.save_step(*state(5))
    assert path == tmp_path / "step-5"
    assert find_newest(tmp_path) == (path, [])
    assert torch.equal(load_state(path)["optimizer"]["m"], torch.full((3,), 5.0))
    assert read_meta(path)["options"] == {"lr": 0.1}
    assert (tmp_path / "latest").resolve() == path


def test_best_replaces_best(tmp_path):
    checkpoints = make(tmp_path)
    checkpoints.save_step(*state(5))
    for step in (7, 9):
        path = checkpoints.save_best(*state(step))
        assert find_newest(tmp_path) == (path, [])
        assert saved_step(path) == step
    assert names(tmp_path) == ["best_dev", "latest", "step-5"]
    assert (tmp_path / "latest").resolve() == path


def test_newest_is_by_number_not_by_name(tmp_path):
    checkpoints = make(tmp_path)
    for step in (10, 9, 100, 20):
        checkpoints.save_step(*state(step))
    assert find_newest(tmp_path)[0].name == "step-100"


def test_keep(tmp_path):
    checkpoints = make(tmp_path, keep=2)
    checkpoints.save_best(*state(1))
    for step in (10, 20, 30):
        checkpoints.save_step(*state(step))
    assert names(tmp_path) == ["best_dev", "latest", "step-20", "step-30"]
    checkpoints.save_step(*state(33), periodic=False)  # a run that is pre-empted ...
    assert names(tmp_path) == ["best_dev", "latest", "step-20", "step-30", "step-33"]
    checkpoints.save_step(*state(40))  # ... and gives way once it has gone on
    assert names(tmp_path) == ["best_dev", "latest", "step-30", "step-40"]


@pytest.mark.parametrize("damage", ["weights", "state", "meta", "meta cut", "file gone"])
def test_an_incomplete_checkpoint_is_passed_over(damage, tmp_path):
    checkpoints = make(tmp_path)
    checkpoints.save_step(*state(1))
    broken = checkpoints.save_step(*state(2))
    if damage == "weights":
        os.truncate(broken / "model.safetensors", 100)
    elif damage == "state":
        os.truncate(broken / "training_state.pt", 10)
    elif damage == "meta":
        (broken / "checkpoint.json").unlink()
    elif damage == "meta cut":
        os.truncate(broken / "checkpoint.json", 20)
    else:
        (broken / "model.safetensors").unlink()
    assert find_newest(tmp_path) == (tmp_path / "step-1", [str(broken)])


def test_a_failed_save_leaves_what_was_there(tmp_path):
    make(tmp_path).save_best(*state(1))

    def no_space(folder: Path) -> None:
        save_model(folder)
        raise OSError(28, "No space left on device")

    full = Checkpoints(tmp_path, no_space, 0, {})
    with pytest.raises(InputError, match=r"best_dev: .*No space left on device.*still is"):
        full.save_best(*state(2))
    assert names(tmp_path) == ["best_dev", "latest"]
    assert saved_step(find_newest(tmp_path)[0]) == 1


def test_killed_at_any_moment(tmp_path, monkeypatch):
    """Whatever the last thing is that a save did, a complete checkpoint is found afterwards."""

    class Killed(BaseException):
        pass

    def count_calls(limit: float) -> int:
        """Save best_dev anew, and die at the `limit`-th change to the file system."""
        calls = 0

        def watched(original):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "write_text", "unlink", "symlink_to", "replace"):
                patch.setattr(Path, name, watched(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
            patch.setattr(torch, "save", watched(torch.save))
            with contextlib.suppress(Killed):
                make(folder).save_best(*state(2))
        return calls

    folder = tmp_path / "count"
    make(folder).save_best(*state(1))
    total = count_calls(float("inf"))
    assert total > 6
    found = []
    for limit in range(total + 1):
        folder = tmp_path / str(limit)
        make(folder).save_best(*state(1))
        count_calls(limit)
        recover_interrupted_saves(folder)
        newest, incomplete = find_newest(folder)
        assert not incomplete
        found.append(saved_step(newest))
        assert [name for name in names(folder) if name.startswith(".")] == []
    assert found == sorted(found)  # the old one up to some moment, the new one from then on
    assert set(found) == {1, 2}


def test_tidy_tells_what_it_did(tmp_path):
    make(tmp_path).save_step(*state(1))
    (tmp_path / ".step-2.partial").mkdir()
    (line,) = recover_interrupted_saves(tmp_path)
    assert ".step-2.partial" in line
    assert "incomplete" in line
    assert recover_interrupted_saves(tmp_path) == []


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = make(tmp_path).save_step(*state(1))
    torch.save({"step": Evil()}, path / "training_state.pt")
    with pytest.raises(InputError, match=r"training_state\.pt"):
        load_state(path)
    assert not (tmp_path / "ran").exists()


def test_changed_options(tmp_path):
    before, now = {"lr": 1, "clip": 2, "old": 3}, {"lr": 1, "clip": 4, "new": 5}
    assert changed_options(tmp_path, before, now) == ["clip was 2 and is 4"]
    with pytest.raises(InputError, match=r"run: .*--model_size base, which cannot become large"):
        changed_options(tmp_path / "run", {"model_size": "base"}, {"model_size": "large"})


@pytest.mark.parametrize("links", [True, False])
def test_step_and_best_of_one_update_are_written_once(links, tmp_path, monkeypatch):
    if not links:

        def no_links(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", no_links)
    written = []

    def save_once(folder: Path) -> None:
        written.append(folder)
        save_model(folder)

    checkpoints = Checkpoints(tmp_path, save_once, 0, {})
    step = checkpoints.save_step({"step": 5, "evaluation_due": True}, state(5)[1])
    checkpoints.save_best({"step": 5, "evaluation_due": False}, state(5)[1])
    checkpoints.update_step({"step": 5, "evaluation_due": False})
    assert len(written) == 1
    assert [read_meta(tmp_path / name)["position"] for name in ("step-5", "best_dev")] == [
        {"step": 5, "evaluation_due": False}
    ] * 2
    same = [
        (tmp_path / name / "model.safetensors").stat().st_ino for name in ("step-5", "best_dev")
    ]
    assert (same[0] == same[1]) == links
    # Each can be replaced or removed, and the other stays as it is.
    contents = {file.name: file.read_bytes() for file in step.iterdir()}
    checkpoints.save_best(*state(7))
    assert len(written) == 2
    assert saved_step(tmp_path / "best_dev") == 7
    assert {file.name: file.read_bytes() for file in step.iterdir()} == contents
    checkpoints.save_step(*state(9))
    checkpoints.save_best(*state(9))
    shutil.rmtree(tmp_path / "step-9")
    assert saved_step(tmp_path / "best_dev") == 9
    assert read_meta(tmp_path / "best_dev") is not None


def test_killed_while_an_old_checkpoint_is_removed(tmp_path, monkeypatch):
    """At any moment, nothing incomplete looks like a checkpoint, and the next start ends with the
    folders of a run that was not killed."""

    class Killed(BaseException):
        pass

    left = [0]

    def killing(original):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*args, **kwargs)

        return call

    for moment in range(20):
        folder = tmp_path / str(moment)
        make(folder).save_step(*state(1))
        left[0] = moment
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "rename"):
                patch.setattr(os, name, killing(getattr(os, name)))
            with contextlib.suppress(Killed):
                make(folder, keep=1).save_step(*state(2))
        assert find_newest(folder)[1] == []
        recover_interrupted_saves(folder, keep=1)
        newest = find_newest(folder)[0]
        assert names(folder) == ["latest", newest.name]
        assert (folder / "latest").resolve() == newest
    assert newest.name == "step-2"
    assert left[0] > 0  # the last was not killed


def test_killed_while_a_position_is_updated(tmp_path):
    path = make(tmp_path).save_step(*state(1))
    (path / ".checkpoint.json.partial").write_text('{"step"')
    (line,) = recover_interrupted_saves(tmp_path)
    assert ".checkpoint.json.partial" in line
    assert names(path) == ["checkpoint.json", "model.safetensors", "training_state.pt"]


def test_a_bug_while_saving_is_no_full_disk(tmp_path):
    def bug(folder: Path) -> None:
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        Checkpoints(tmp_path, bug, 0, {}).save_step(*state(1))
    assert names(tmp_path) == []
