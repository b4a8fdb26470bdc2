"""Nothing is lost: kills, signals, dead processes, full disks and hostile files."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_reader
from src.runtime.errors import InputError
from src.runtime.launch import StopRequest
from tests.conftest import ROOT, on_small_disk, run, run_well

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def training(script: str, reference: Path, folder: Path, *more) -> list[str]:
    """A command that trains for 40 updates with everything random on: dropout, order, targets."""
    data = reference / "data.json"
    command = [
        script, "--train_data", data, "--n_context", 2, "--per_gpu_batch_size", 1, "--lr", 1e-3,
        "--optim", "adamw", "--scheduler", "linear", "--warmup_steps", 5, "--dropout", 0.1,
        "--accumulation_steps", 2, "--total_steps", 40, "--eval_freq", 3, "--save_freq", 2,
        "--keep_checkpoints", 2, "--checkpoint_dir", folder, "--name", "run",
    ]  # fmt: skip
    if script == "train_reader.py":
        command += ["--model_path", reference / "t5", "--text_maxlength", 48, "--eval_data", data]
    else:
        scored = folder.parent / "scored.json"
        examples = [e for e in json.loads(data.read_text()) if e.get("ctxs")]
        scored.write_text(json.dumps(examples))
        command[2] = scored
        command += ["--model_path", reference / "legacy_retriever_mask_mean", "--tokenizer"]
        command += [reference / "bert", "--eval_data", scored]
    return [*map(str, command), *map(str, more)]


def assert_equal(one: object, other: object, name: str = "state") -> None:
    """Equal to the bit, down to every tensor."""
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{name}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    else:
        assert one == other, name


def assert_same_run(one: Path, other: Path, last: str = "step-40") -> None:
    for name in (last, "best_dev"):
        folders = [path / "run" / "checkpoint" / name for path in (one, other)]
        assert_equal(*[load_file(folder / "model.safetensors") for folder in folders])
        assert_equal(*[torch.load(folder / "training_state.pt") for folder in folders])
    metrics = [(path / "run" / "metrics.jsonl").read_text().splitlines() for path in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["train_reader.py", "train_retriever.py"])
def test_killed_at_ten_random_moments(script, processes, reference, tmp_path):
    for name, kills in (("whole", 0), ("killed", 10)):
        command = training(script, reference, tmp_path / name)
        seed = processes + 10 * (script == "train_reader.py")
        printed = run_well("-m", "tests.kill_and_resume", processes, kills, seed, *command)
        assert printed.splitlines()[-1] == f"killed {kills} times"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    log = (tmp_path / "killed" / "run" / "run.log").read_text()
    assert len(re.findall("resuming from", log)) >= 5
    folder = tmp_path / "killed" / "run" / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best_dev", "latest", "step-38", "step-40",
    ]  # fmt: skip


def test_going_on_with_another_number_of_processes(reference, tmp_path):
    command = training("train_reader.py", reference, tmp_path)
    run_well(*command, "--total_steps", 2)
    log = run_well(*command, "--total_steps", 4, "--lr", 1e-4, processes=2)
    assert "since that checkpoint, processes was 1 and is 2" in log
    assert "since that checkpoint, lr was 0.001 and is 0.0001" in log
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # The updates, and the evaluations after 3 and at both ends.
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3, 3, 4, 4]


# ----------------------------------------------------------------------------------------------
# Signals


def test_a_second_signal_ends_at_once_unless_it_is_an_echo(monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr("src.runtime.launch.os._exit", ended.append)
    monkeypatch.setattr("src.runtime.launch.time.monotonic", lambda: now[0])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        request = StopRequest()
        assert not request.requested
        signal.raise_signal(signal.SIGUSR1)
        assert request.requested
        now[0] += 1.0  # a launcher hands the signal on
        signal.raise_signal(signal.SIGTERM)
        assert ended == []
        now[0] += 5.0
        signal.raise_signal(signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


SLURM_SAYS = {  # the job's state: whether scontrol is asked to requeue, and what the log says
    "RUNNING": (True, "requeued SLURM job 7"),
    "PREEMPTED": (True, "requeued SLURM job 7"),
    "COMPLETING": (False, "SLURM job 7 is COMPLETING: not requeued"),
    "CANCELLED": (False, "SLURM job 7 is CANCELLED: not requeued"),
}


@pytest.mark.parametrize("task", [None, 3])
@pytest.mark.parametrize("state", SLURM_SAYS)
def test_a_stopped_job_is_requeued(state, task, tmp_path):
    """Against stand-ins of SLURM's commands; tests/slurm has the real ones."""
    commands, asked = tmp_path / "bin", tmp_path / "asked"
    commands.mkdir()
    # The last task of an array has the array's own number, which means all of them to SLURM.
    job = "7" if task is None else f"7_{task}"
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)} if task else {}
    squeue = f'[ "$3" = --jobs={job} ] && echo {state}'
    for name, line in (("squeue", squeue), ("scontrol", f'echo "$@" > {asked}')):
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from src.runtime.launch import StopRequest\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "request = StopRequest()\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "request.leave(logging.getLogger(), 'after update 7', is_main=True)\n"
    )
    path = f"{commands}:{os.environ['PATH']}"
    done = run(script, SLURM_JOB_ID="7", PATH=path, **array)
    requeues, says = SLURM_SAYS[state]
    assert done.returncode == 128 + signal.SIGUSR1
    assert asked.exists() == requeues
    if requeues:
        assert asked.read_text() == f"requeue {job}\n"
    assert says.replace("job 7", f"job {job}") in done.stdout


# ----------------------------------------------------------------------------------------------
# Testing goes on, too


def answering(reference: Path, folder: Path, *more) -> list[str]:
    command = [
        "--eval_data", reference / "data.json", "--model_path", reference / "t5",
        "--n_context", 2, "--text_maxlength", 48, "--per_gpu_batch_size", 2, "--write_results",
        "--write_crossattention_scores", "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip
    return list(map(str, command))


def test_testing_goes_on_after_the_last_finished_batch(reference, tmp_path, capsys, monkeypatch):
    def results(name: str) -> list:
        printed = capsys.readouterr().out
        judged = re.search(r"exact match .*", printed)[0]
        folder = tmp_path / name / "run"
        files = [folder / file for file in ("final_output.txt", "dataset_wscores.json")]
        assert not list(folder.glob(".*"))
        return [judged, *[file.read_bytes() for file in files], printed]

    test_reader.main(answering(reference, tmp_path / "whole"))
    whole = results("whole")

    class Killed(BaseException):
        pass

    def killed_after(n_batches: int, *more) -> None:
        left = [n_batches]
        original = test_reader.AnswerFile.write

        def write(self, answers):
            if left[0] == 0:
                self._file.write('[[0, "cut')  # as a kill in the middle of a write leaves it
                raise Killed
            left[0] -= 1
            original(self, answers)

        with monkeypatch.context() as patch:
            patch.setattr(test_reader.AnswerFile, "write", write)
            with pytest.raises(Killed):
                test_reader.main(answering(reference, tmp_path / "parts", *more))

    killed_after(2)
    killed_after(3)
    assert "resuming after 2 of" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "run" / "final_output.txt").exists()
    test_reader.main(answering(reference, tmp_path / "parts"))
    parts = results("parts")
    assert "resuming after 5 of" in parts[-1]
    assert parts[:3] == whole[:3]
    # Another command does not go on with what this one left.
    killed_after(2)
    capsys.readouterr()
    test_reader.main(answering(reference, tmp_path / "parts", "--n_context", "1"))
    assert "going on" not in results("parts")[-1]


# ----------------------------------------------------------------------------------------------
# A process dies, or freezes


def start_two(command: list[str]) -> list[subprocess.Popen]:
    """Two processes that meet as under srun, without a launcher that would clear up after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("victim", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_the_others_end_when_a_process_is_gone(victim, how, reference, tmp_path):
    more = ["--total_steps", 100000, "--eval_data", "none", "--dist_timeout", 6]
    processes = start_two(training("train_reader.py", reference, tmp_path, *more))
    try:
        for line in processes[0].stdout:
            if "saved" in line:
                break
        processes[victim].send_signal(how)
        _, errors = processes[1 - victim].communicate(timeout=120)  # a hang fails the test
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode == 1
    who = "error: " if victim == 1 else r"error \(process 1\): "
    assert re.match(who + "lost contact with another process .* resumes$", errors.splitlines()[-1])
    assert "Traceback" not in errors


FAILURES = {  # where something raises: its function, and the number of the call
    "an update": ("torch.nn.utils:clip_grad_norm_", 3),
    "an evaluation": ("train_reader:answer_questions", 1),
    "saving": ("src.training.checkpoint:_flush_to_disk", 1),
    "a worker": ("src.data.batches:ReaderCollator.__call__", 2),
    "a worker of an evaluation": ("src.data.batches:ReaderDataset.__getitem__", 8),
}


def test_every_process_ends_after_a_bug(reference, tmp_path):
    """Whatever raises, in one process or in one of two, and with workers: status 1, a traceback,
    and no process is left."""
    places = [(name, 1, 0) for name in FAILURES]
    places += [("an update", 2, 1), ("an evaluation", 2, 0), ("saving", 2, 0), ("a worker", 2, 1)]
    cases = []
    for name, processes, victim in places:
        _, *options = training("train_reader.py", reference, tmp_path / str(len(cases)))
        cases.append(["train_reader", options, *FAILURES[name], processes, victim])
    done = subprocess.run(
        [sys.executable, "-m", "tests.fail_and_leave"],
        input=json.dumps(cases),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for case, (statuses, errors, n_left) in zip(cases, json.loads(done.stdout), strict=True):
        print(case, errors)  # for who reads of a failure
        assert statuses == [1] * case[4]
        assert errors.count("LookupError: a bug") >= 1
        assert errors.count("lost contact with another process") == case[4] - 1
        assert n_left == 0


# ----------------------------------------------------------------------------------------------
# Full disks


def test_a_full_disk(disk, reference, tmp_path):
    """It fills while training: one line, status 2, and the checkpoint before it loads."""
    command = training("train_reader.py", reference, disk / "c", "--keep_checkpoints", 0)
    keep = f'"$@"; status=$?; cp -r {disk}/c {tmp_path}/kept; exit $status'
    done = on_small_disk(disk, 12, "sh", "-c", keep, "sh", sys.executable, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert re.match(r"error: .*/disk/c/run/.*No space left on device", lines[0])
    kept = tmp_path / "kept" / "run" / "checkpoint"
    assert list(kept.glob("step-*"))
    assert not list(kept.glob(".*"))
    newest = (kept / "latest").resolve()
    assert len(load_file(newest / "model.safetensors")) > 10
    shutil.move(tmp_path / "kept", tmp_path / "c")
    command[command.index(str(disk / "c"))] = str(tmp_path / "c")
    assert f"resuming from {tmp_path}/c/run/checkpoint/step-" in run_well(*command)


# ----------------------------------------------------------------------------------------------
# Hostile files


class Evil:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


HOSTILE = {
    "calls os.system": lambda marker: pickle.dumps({"step": Evil(marker)}, 2),
    "nests deeply": lambda marker: nested(200_000),
    "claims an absurd size": lambda marker: b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x",
    "an array that nobody has": lambda marker: pickle.dumps(
        (["1"], torch.zeros(1).numpy()), 2
    ).replace(b"K\x01\x85", b"\x8a\x06\xff\xff\xff\xff\xff\x7f\x85"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("place", ["embeddings", "weights", "optimizer"])
def test_hostile_pickles_are_refused(place, case, reference, tmp_path):
    marker = tmp_path / "ran"
    content = HOSTILE[case](marker)
    if place == "embeddings":
        passages = shutil.copy(reference / "passages.tsv", tmp_path / "passages.tsv")
        hostile = tmp_path / "wiki_00"
        command = [
            "passage_retrieval.py", "--model_path", reference / "legacy_retriever_mask_mean",
            "--tokenizer", reference / "bert", "--passages", passages, "--data",
            reference / "questions.json", "--output_path", tmp_path / "out.json",
            "--passages_embeddings", hostile,
        ]  # fmt: skip
    elif place == "weights":
        folder = Path(shutil.copytree(reference / "t5", tmp_path / "model"))
        hostile = folder / "pytorch_model.bin"
        command = ["test_reader.py", *answering(reference, tmp_path / "c", "--model_path", folder)]
    else:
        command = training("train_reader.py", reference, tmp_path / "c", "--total_steps", 2)
        run_well(*command)
        command[command.index("--total_steps", command.index("--total_steps") + 1) + 1] = 3
        hostile = tmp_path / "c" / "run" / "checkpoint" / "step-2" / "training_state.pt"
    hostile.write_bytes(content)
    if place == "optimizer":  # as if it had been saved so
        meta = hostile.with_name("checkpoint.json")
        record = json.loads(meta.read_text())
        record["files"][hostile.name] = len(content)
        meta.write_text(json.dumps(record))
    done = run(*command)
    assert not marker.exists()
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert re.match(r"error: .*" + re.escape(str(hostile)), line)
    assert not (tmp_path / "out.json").exists()


def test_state_errors_are_ours(tmp_path):
    from src.training.checkpoint import load_state

    with pytest.raises(InputError, match=r"training_state\.pt"):
        load_state(tmp_path)
