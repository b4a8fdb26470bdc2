"""The scripts as a user runs them: whole runs, resuming and options."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from src import options as all_options
from src.options import train_reader_parser
from tests.conftest import ROOT, run, run_well


def training(reference: Path, folder: Path, *more) -> list:
    return [
        "train_reader.py", "--train_data", reference / "data.json",
        "--eval_data", reference / "data.json", "--model_path", reference / "t5",
        "--n_context", 2, "--text_maxlength", 48, "--per_gpu_batch_size", 2, "--lr", 1e-3,
        "--eval_freq", 2, "--save_freq", 2, "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip


def metrics(folder: Path) -> list[str]:
    return (folder / "run" / "metrics.jsonl").read_text().splitlines()


def test_stopped_by_a_signal_and_resumed(reference, tmp_path):
    """SIGTERM in the middle: the run saves and leaves; the same command ends where an
    uninterrupted one does, to the bit (dropout on, targets drawn at random)."""
    whole = training(reference, tmp_path / "whole", "--total_steps", 6, "--accumulation_steps", 2)
    run_well(*whole)
    parts = training(reference, tmp_path / "parts", "--total_steps", 6, "--accumulation_steps", 2)
    process = subprocess.Popen(
        [sys.executable, *map(str, parts)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many as `run` gives: they change bits
        start_new_session=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "saved" in line:  # in the middle, wherever that is
            os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: also to those that load data
            break
    printed += process.stdout.readlines()
    assert process.wait() == 128 + signal.SIGTERM  # so that no shell script goes on to what is next
    assert "stopped by a signal after update" in printed[-1], printed
    log = run_well(*parts)
    assert re.search(r"resuming from .*/step-\d", log)
    for name in ("step-6", "best_dev"):
        weights = [
            load_file(tmp_path / folder / "run" / "checkpoint" / name / "model.safetensors")
            for folder in ("whole", "parts")
        ]
        assert weights[0].keys() == weights[1].keys()
        assert all((weights[0][key] == weights[1][key]).all() for key in weights[0]), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    log = run_well(*parts)
    assert "all 6 updates are done" in log


def test_a_run_leaves_what_the_readme_says(reference, tmp_path):
    run_well(*training(reference, tmp_path, "--total_steps", 4, "--keep_checkpoints", 1))
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint",
        "metrics.jsonl",
        "options.json",
        "run.log",
        "tensorboard",
    ]
    checkpoints = {path.name for path in (folder / "checkpoint").iterdir()}
    assert checkpoints == {"best_dev", "latest", "step-4"}
    options = json.loads((folder / "options.json").read_text())
    assert options["options"]["lr"] == 1e-3
    assert options["command"][0].endswith("train_reader.py")


def test_bars_stay_out_of_pipes(reference, tmp_path):
    done = run(*training(reference, tmp_path, "--total_steps", 2))
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\r" not in done.stdout


def test_training_without_evaluation_and_testing_without_answers(reference, tmp_path):
    command = training(reference, tmp_path, "--total_steps", 2, "--eval_data", "none")
    assert not re.search("dev(?!ice)", run_well(*command).replace(str(tmp_path), ""))
    (tmp_path / "q.jsonl").write_text('{"question": "Who?"}\n{"question": "Where?", "id": "w"}\n')
    log = run_well(
        "test_reader.py", "--eval_data", tmp_path / "q.jsonl", "--write_results",
        "--model_path", tmp_path / "run/checkpoint/latest",
        "--checkpoint_dir", tmp_path, "--name", "answers",
    )  # fmt: skip
    assert "2 answers; the data has none to judge them by" in log
    lines = (tmp_path / "answers" / "final_output.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["0", "w"]


@pytest.mark.parametrize(
    ("parser", "defaults"),
    [
        (
            train_reader_parser,
            "name=experiment_name checkpoint_dir=./checkpoint/ seed=0 per_gpu_batch_size=1 "
            "model_path=none model_size=base n_context=1 text_maxlength=200 answer_maxlength=-1 "
            "total_steps=1000 accumulation_steps=1 lr=0.0001 optim=adam weight_decay=0.1 "
            "scheduler=fixed warmup_steps=1000 scheduler_steps=None fixed_lr=False clip=1.0 "
            "dropout=0.1 eval_freq=500 save_freq=5000 use_checkpoint=False no_title=False "
            "generation_max_length=50",
        ),
        (
            all_options.test_reader_parser,  # (by its own name pytest would run it)
            "eval_print_freq=1000 write_results=False write_crossattention_scores=False "
            "per_gpu_batch_size=1 n_context=1 text_maxlength=200 model_path=none",
        ),
    ],
)
def test_defaults_are_the_references(parser, defaults):
    options = vars(parser().parse_args([]))
    for pair in defaults.split():
        name, value = pair.split("=")
        assert str(options[name]) == value, name


def test_older_names():
    options = train_reader_parser().parse_args(
        ["--total_step", "15000", "--warmup_step", "7", "--local-rank", "3"]
    )
    assert (options.total_steps, options.warmup_steps, options.local_rank) == (15000, 7, 3)
    assert train_reader_parser().parse_args(["--local_rank=2"]).local_rank == 2
    assert "--total_step " not in train_reader_parser().format_help()


@pytest.mark.parametrize(
    ("script", "parser"),
    [
        ("train_reader.py", train_reader_parser),
        ("test_reader.py", all_options.test_reader_parser),
        ("train_retriever.py", all_options.train_retriever_parser),
        ("generate_passage_embeddings.py", all_options.passage_embeddings_parser),
        ("passage_retrieval.py", all_options.passage_retrieval_parser),
    ],
)
def test_every_option_is_read_and_explained(script, parser):
    source = (ROOT / script).read_text()
    for action in parser()._actions:
        if action.dest != "help":
            assert f"options.{action.dest}" in source, f"nothing reads --{action.dest}"
            assert action.help, action.dest
