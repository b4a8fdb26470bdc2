"""The scripts as a user runs them: whole runs, resuming, options, and bad input."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import test_reader
import train_reader
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
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "saved" in line:  # in the middle, wherever that is
            process.send_signal(signal.SIGTERM)
            break
    printed += process.stdout.readlines()
    assert process.wait() == 0
    assert "stopped by a signal after update" in printed[-2], printed
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
    assert "dev" not in run_well(*command).replace(str(tmp_path), "")
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
    [("train_reader.py", train_reader_parser), ("test_reader.py", all_options.test_reader_parser)],
)
def test_every_option_is_read_and_explained(script, parser):
    source = (ROOT / script).read_text()
    for action in parser()._actions:
        if action.dest != "help":
            assert f"options.{action.dest}" in source, f"nothing reads --{action.dest}"
            assert action.help, action.dest


# --- bad input: (script, options, what the one line says)

GOOD_TRAIN = ["--train_data", "{data}", "--eval_data", "{data}", "--model_path", "{t5}"]
GOOD_TEST = ["--eval_data", "{data}", "--model_path", "{t5}"]
BAD = {
    "train data that is not there": ("train", ["--train_data", "no.json"], r"no\.json: cannot be"),
    "eval data that is not there": (
        "train",
        [*GOOD_TRAIN, "--eval_data", "no.json"],
        r"no\.json: cannot be read",
    ),
    "a folder as data": ("train", ["--train_data", "{dir}"], "cannot be read"),
    "a model that is not there": ("train", [*GOOD_TRAIN, "--model_path", "./no"], r"\./no: there"),
    "a folder that is no model": ("train", [*GOOD_TRAIN, "--model_path", "{dir}"], "config.json"),
    "a model of another kind": (
        "train",
        [*GOOD_TRAIN, "--model_path", "{retriever}"],
        "legacy_retriever_cls: .*t5",
    ),
    "a model without a tokenizer": (
        "test",
        [*GOOD_TEST, "--model_path", "{legacy}"],
        "t5-base: .*--tokenizer",
    ),
    "two starts": ("train", ["--model_path", "{t5}", "--model_config", "c.json"], "--model_config"),
    "a config that is no JSON": (
        "train",
        ["--train_data", "{data}", "--eval_data", "{data}", "--model_config", "{broken}"],
        "broken.json: no model config",
    ),
    "a vocabulary that is too small": (
        "train",
        ["--train_data", "{data}", "--eval_data", "{data}", "--model_config", "{small}",
         "--tokenizer", "{t5}"],
        "vocab_size 10 is smaller than the 800",
    ),
    "a broken example": ("test", ["--eval_data", "{broken}"], r"broken\.json, line 1"),
    "dev data without answers": (
        "train",
        [*GOOD_TRAIN, "--eval_data", "{unanswered}", "--total_steps", "1"],
        r"unanswered\.jsonl: no example has answers",
    ),
    "train data without answers": (
        "train",
        [*GOOD_TRAIN, "--train_data", "{unanswered}"],
        r"unanswered\.jsonl, example 1 .*answers",
    ),
    "a number that is none": ("train", ["--lr", "fast"], "--lr: 'fast' is not a number"),
    "a negative number": ("train", ["--n_context", "-3"], "--n_context: -3 must be at least 1"),
    "a rate above one": ("train", ["--dropout", "1.5"], "--dropout: 1.5 must be"),
    "an unknown option": ("test", ["--n_contexts", "3"], "--n_contexts"),
    "an unknown choice": ("test", ["--precision", "fp8"], "--precision.*fp8"),
    "a table that the model has not": (
        "train",
        [*GOOD_TRAIN, "--model_path", "{plain}", "--legacy_position_table"],
        "--legacy_position_table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, reference, tmp_path, capsys, monkeypatch):
    script, options, message = BAD[case]
    from src.reader import load_reader

    if "{plain}" in options:
        load_reader(str(reference / "t5")).save_pretrained(tmp_path / "plain")
    (tmp_path / "broken.json").write_text('{"question": ')
    (tmp_path / "small.json").write_text('{"model_type": "t5", "vocab_size": 10}')
    (tmp_path / "unanswered.jsonl").write_text('{"question": "Who?"}\n')
    places = {
        "data": reference / "data.json",
        "t5": reference / "t5",
        "dir": tmp_path,
        "retriever": reference / "legacy_retriever_cls",
        "legacy": reference / "legacy_reader/checkpoint/step-20",
        "broken": tmp_path / "broken.json",
        "small": tmp_path / "small.json",
        "unanswered": tmp_path / "unanswered.jsonl",
        "plain": tmp_path / "plain",
    }
    options = [option.format(**places) for option in options]
    options += ["--checkpoint_dir", str(tmp_path / "out"), "--num_workers", "0"]
    main = {"train": train_reader.main, "test": test_reader.main}[script]
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # pytest keeps its own
    with pytest.raises(SystemExit) as exited:
        main(options)
    assert exited.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.match("error: .*" + message, lines[0]), lines[0]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in written} <= {"run.log", "options.json", "metrics.jsonl"} | {
        path.name for path in written if "tensorboard" in str(path) or "step-1" in str(path)
    }


def test_bad_input_from_a_shell(tmp_path):
    done = run("train_reader.py", "--train_data", "no.json", "--checkpoint_dir", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: no.json: cannot be read (No such file or directory)"
    ]
