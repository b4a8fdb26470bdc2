"""Nothing is lost: kills, signals, dead processes, full disks and hostile files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import test_reader
from src.runtime import launch
from tests.conftest import ROOT, on_small_disk, run_well
from tests.forks import free_port

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def training(reference: Path, folder: Path, *more) -> list[str]:
    """A command that trains a reader for 40 updates, with dropout and random targets."""
    data = reference / "data.json"
    command = [
        "train_reader.py", "--train_data", data, "--eval_data", data, "--model_path",
        reference / "t5", "--n_context", 2, "--text_maxlength", 48, "--lr", 1e-3, "--optim",
        "adamw", "--accumulation_steps", 2, "--total_steps", 40, "--eval_freq", 3, "--save_freq", 2,
        "--keep_checkpoints", 2, "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip
    return list(map(str, command))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(processes):
    """Whatever is killed, all files, and the list of files, equal those of an undisturbed run."""
    command = ["--chains", 2, "--processes", processes, "--scripts"]
    printed = run_well("-m", "tests.kill_chains", *command, "train_reader", "train_retriever")
    assert printed.count(": 0 differ\n") == 2, printed
    assert min(map(int, re.findall(r"(\d+) kills", printed))) > 0


def test_resuming_with_another_number_of_processes(reference, tmp_path):
    command = training(reference, tmp_path)
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
    request = launch.StopRequest()
    assert not request.requested
    signal.raise_signal(signal.SIGUSR1)
    assert request.requested
    now[0] += 1.0  # a launcher forwards the signal
    signal.raise_signal(signal.SIGTERM)
    assert ended == []
    now[0] += 5.0
    signal.raise_signal(signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


@pytest.mark.parametrize("task", [None, 3])
@pytest.mark.parametrize("state", ["RUNNING", "PREEMPTED", "COMPLETING", "CANCELLED"])
def test_a_stopped_job_is_requeued_unless_it_is_cancelled(state, task, monkeypatch, caplog):
    """With stand-ins for SLURM's commands; tests/slurm has the real ones."""
    # The last task of an array has the array's own number, which means all of them to SLURM.
    job = "7" if task is None else f"7_{task}"
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)} if task else {}
    for name, value in {"SLURM_JOB_ID": "7", **array}.items():
        monkeypatch.setenv(name, value)
    asked = []

    def ask(*command: str) -> subprocess.CompletedProcess:
        asked.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0, stdout=f"{state}\n", stderr="")

    monkeypatch.setattr(launch, "_ask_slurm", ask)
    request = launch.StopRequest()
    signal.raise_signal(signal.SIGUSR1)
    caplog.set_level("INFO")
    with pytest.raises(SystemExit) as ended:
        request.leave(launch.logging.getLogger(), "after update 7", is_main=True)
    assert ended.value.code == 128 + signal.SIGUSR1
    assert asked[0].endswith(f"--jobs={job}")
    requeues = state in ("RUNNING", "PREEMPTED")
    assert asked[1:] == ([f"scontrol requeue {job}"] if requeues else [])
    says = f"requeued SLURM job {job}" if requeues else f"SLURM job {job} is {state}: not requeued"
    assert says in caplog.text


# ----------------------------------------------------------------------------------------------
# Testing resumes, too


def answering(reference: Path, folder: Path, *more) -> list[str]:
    command = [
        "--eval_data", reference / "data.json", "--model_path", reference / "t5",
        "--n_context", 2, "--text_maxlength", 48, "--per_gpu_batch_size", 2, "--write_results",
        "--write_crossattention_scores", "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip
    return list(map(str, command))


def test_testing_resumes_after_the_last_finished_batch(reference, tmp_path, capsys, monkeypatch):
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
    # Another command does not use what this one left.
    killed_after(2)
    capsys.readouterr()
    test_reader.main(answering(reference, tmp_path / "parts", "--n_context", "1"))
    assert "going on" not in results("parts")[-1]


# ----------------------------------------------------------------------------------------------
# A process dies, or freezes


def start_two(command: list[str]) -> list[subprocess.Popen]:
    """Two processes as under srun, without a launcher that would end one with the other."""
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**ENVIRONMENT, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_others_end_when_a_process_is_gone(victim, how, reference, tmp_path):
    more = ["--total_steps", 100000, "--eval_data", "none", "--dist_timeout", 6]
    processes = start_two(training(reference, tmp_path, *more))
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
    "saving": ("src.data.outputs:flush_to_disk", 1),
    "a worker": ("src.data.batches:ReaderCollator.__call__", 2),
    "a worker of an evaluation": ("src.data.batches:ReaderDataset.__getitem__", 8),
}


def test_every_process_ends_after_a_bug(reference, tmp_path):
    """Whatever raises, in one process or in one of two, and with workers: status 1, a traceback,
    and no process is left."""
    cases, failures = [], [(name, 1, 0) for name in FAILURES]
    failures += [("an update", 2, 1), ("an evaluation", 2, 0), ("saving", 2, 0), ("a worker", 2, 1)]
    for name, processes, victim in failures:
        _, *options = training(reference, tmp_path / str(len(cases)))
        cases.append(["train_reader", options, *FAILURES[name], processes, victim])
    command = [sys.executable, "-m", "tests.fail_and_leave"]
    done = subprocess.run(
        command, input=json.dumps(cases), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
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
    command = training(reference, disk / "c", "--keep_checkpoints", 0)
    keep = f'"$@"; status=$?; cp -r {disk}/c {tmp_path}/kept; exit $status'
    done = on_small_disk(disk, 12, "sh", "-c", keep, "sh", sys.executable, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert re.match(r"error: .*/disk/c/run/.*(No space left on device|cannot be written)", lines[0])
    kept = tmp_path / "kept" / "run" / "checkpoint"
    assert list(kept.glob("step-*"))
    assert not list(kept.glob(".*"))
    newest = (kept / "latest").resolve()
    assert len(load_file(newest / "model.safetensors")) > 10
    shutil.move(tmp_path / "kept", tmp_path / "c")
    command[command.index(str(disk / "c"))] = str(tmp_path / "c")
    assert f"resuming from {tmp_path}/c/run/checkpoint/step-" in run_well(*command)
