"""A checkpoint is complete or absent; incomplete ones are ignored."""

import contextlib
import json
import logging
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
    read_state,
    recover_interrupted_saves,
    resume_point,
)
from tests.conftest import ROOT, run, run_well


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


def rewrite(path: Path, key: str, value: object) -> None:
    meta = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**meta, key: value}))


@pytest.mark.parametrize(
    "damage",
    [
        cut("model.safetensors", 100),
        cut("training_state.pt", 10),
        cut("checkpoint.json", 20),
        lambda path: (path / "model.safetensors").unlink(),
        *[
            lambda path, text=text: (path / "checkpoint.json").write_text(text)
            for text in ("[]", "null", "3", '"x"', "{}", "[" * 99_999, '{"files": []}', "\0")
        ],
        *[
            lambda path, key=key, value=value: rewrite(path, key, value)
            for key, value in (
                ("step", None),
                ("step", "2"),
                ("step", True),
                ("step", -1),
                ("step", 1),
                ("position", None),
                ("position", []),
                ("position", {}),
                ("position", {"step": 0}),
                ("position", {"step": 2, "best": "x"}),
                ("position", {"step": 2, "worst": 1}),
                ("position", {"step": 2, "best": float("nan")}),
                ("periodic", None),
                ("options", None),
                ("options", []),
                ("files", None),
                ("files", {"../x": 1}),
            )
        ],
        lambda path: (shutil.rmtree(path), path.write_text("a file")),
    ],
)
def test_an_incomplete_checkpoint_is_ignored(damage, tmp_path):
    make(tmp_path).save_step(*state(1))
    broken = make(tmp_path).save_step(*state(2))
    damage(broken)
    assert find_newest(tmp_path) == (tmp_path / "step-1", [str(broken)])
    options = {"lr": 0.1, "keep_checkpoints": 0}
    log = logging.getLogger("fid")
    assert resume_point(tmp_path, options, log) == tmp_path / "step-1"
    shutil.rmtree(tmp_path / "step-1")  # with no other left, training would start again
    with pytest.raises(InputError, match=r"step-2: not a complete .* remove it to start again, or"):
        resume_point(tmp_path, options, log)


def test_latest_is_a_folder(tmp_path):
    path = make(tmp_path).save_step(*state(1))
    (tmp_path / "latest").unlink()
    shutil.copytree(path, tmp_path / "latest")  # as a copy without links has it
    with pytest.raises(InputError, match=r"latest: a folder, where a link .*; remove or rename it"):
        resume_point(tmp_path, {"lr": 0.1, "keep_checkpoints": 0}, logging.getLogger("fid"))


def adam(*shapes: tuple[int, ...]) -> torch.optim.Optimizer:
    """An optimizer that has made an update."""
    tensors = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(tensors)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    return optimizer


def edited(keys: str, value: object):
    """Sets a part of the state, by the keys that lead to it."""

    def edit(state: dict) -> None:
        *path, last = [int(key) if key.isdigit() else key for key in keys.split()]
        for key in path:
            state = state[key]
        state[last] = value

    return edit


STATES = {
    "nothing": lambda state: state.clear(),
    "no optimizer": lambda state: state.pop("optimizer"),
    "no scaler": lambda state: state.pop("scaler"),
    "a list": edited("optimizer", []),
    "other shapes": edited("optimizer", adam((2, 3), (5,)).state_dict()),
    "fewer": edited("optimizer", adam((2, 3)).state_dict()),
    "more": edited("optimizer", adam((2, 3), (4,), (1,)).state_dict()),
    "no moments": edited("optimizer state", {}),
    "a transposed moment": edited("optimizer state 0 exp_avg", torch.ones(3, 2)),
    "a moment of whole numbers": edited("optimizer state 0 exp_avg", torch.ones(2, 3).long()),
    "a moment that is a list": edited("optimizer state 1 exp_avg", [1.0] * 4),
    "a vector of steps": edited("optimizer state 1 step", torch.ones(4)),
    "SGD's": edited("optimizer state 0", {"momentum_buffer": torch.ones(2, 3)}),
    "a state of no tensor": edited("optimizer state 7", {}),
    "a group without tensors": edited("optimizer param_groups 0 params", None),
    "no random states": edited("random_states", []),
    "a short random state": edited("random_states 0 cpu", torch.zeros(7, dtype=torch.uint8)),
    "a random state of floats": edited("random_states 0 cpu", torch.zeros(5056)),
    "zeros as a random state": edited("random_states 0 cpu", torch.zeros(5056, dtype=torch.uint8)),
    "a scale that is nan": edited("scaler", {"scale": float("nan")}),
    "half a scaler": edited("scaler", {"scale": 2.0}),
}


def whole_state() -> dict:
    random_states = [{"cpu": torch.get_rng_state()}]
    optimizer = adam((2, 3), (4,)).state_dict()
    return {"optimizer": optimizer, "scaler": {}, "random_states": random_states}


@pytest.mark.parametrize("case", STATES)
def test_another_training_state_is_refused(case, tmp_path):
    saved = whole_state()
    torch.save(saved, tmp_path / "training_state.pt")
    optimizer, scaler, random_states = read_state(tmp_path, adam((2, 3), (4,)), 0, 1)
    assert torch.equal(optimizer["state"][0]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])
    assert (scaler, len(random_states)) == ({}, 1)
    STATES[case](saved)
    torch.save(saved, tmp_path / "training_state.pt")
    message = f"^{tmp_path}/training_state.pt: not the training state of this model .*; remove"
    with pytest.raises(InputError, match=message) as caught:
        read_state(tmp_path, adam((2, 3), (4,)), 0, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_end_when_one_finds_a_damaged_state(reference, tmp_path):
    """(The random state of the second process alone is damaged.)"""
    data, model = reference / "data.json", reference / "t5"
    command = [
        "train_reader.py",
        "--train_data",
        data,
        "--eval_data",
        "none",
        "--model_path",
        model,
    ]
    command += ["--text_maxlength", 16, "--num_workers", 0, "--checkpoint_dir", tmp_path]
    command += ["--name", "run", "--dist_timeout", 30, "--total_steps"]
    run_well(*command, 1, processes=2)
    file = tmp_path / "run/checkpoint/step-1/training_state.pt"
    saved = torch.load(file, weights_only=True)
    saved["random_states"][1]["cpu"][:] = 0
    torch.save(saved, file)
    done = run(*command, 2, processes=2)
    assert done.returncode != 0
    assert "error: " + str(file) in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    assert "lost contact" not in done.stderr


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
