"""The scripts as a user runs them: a run and its files, resuming, options."""

import argparse
import dataclasses
import importlib
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
from transformers import BertConfig, BertModel, BertTokenizerFast

from src import options as all_options
from src.options import train_reader_parser
from tests.conftest import ROOT, run, run_well

SCRIPTS = {
    "train_reader": train_reader_parser,
    "test_reader": all_options.test_reader_parser,  # (by its own name pytest would run it)
    "train_retriever": all_options.train_retriever_parser,
    "generate_passage_embeddings": all_options.passage_embeddings_parser,
    "passage_retrieval": all_options.passage_retrieval_parser,
}


def training(reference: Path, folder: Path, *more) -> list:
    return [
        "train_reader.py", "--train_data", reference / "data.json",
        "--eval_data", reference / "data.json", "--model_path", reference / "t5",
        "--n_context", 2, "--text_maxlength", 48, "--per_gpu_batch_size", 2, "--lr", 1e-3,
        "--eval_freq", 2, "--save_freq", 2, "--checkpoint_dir", folder, "--name", "run", *more,
    ]  # fmt: skip


@pytest.mark.fast
def test_stopped_by_a_signal_and_resumed(reference, tmp_path):
    """SIGTERM in the middle: the run saves and ends; the same command then ends exactly as an
    uninterrupted run (dropout on, targets drawn at random). Also: what a run leaves and prints."""
    more = "--total_steps", 6, "--accumulation_steps", 2, "--keep_checkpoints", 1
    done = run(*training(reference, tmp_path / "whole", *more))
    assert (done.returncode, done.stderr) == (0, "")  # bars are for terminals
    assert "\r" not in done.stdout
    parts = training(reference, tmp_path / "parts", *more)
    process = subprocess.Popen(
        [sys.executable, *map(str, parts)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "saved" in line:  # in the middle, wherever that is
            os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: also to data-loading workers
            break
    printed += process.stdout.readlines()
    assert process.wait() == 128 + signal.SIGTERM  # so that a shell script does not continue
    assert "stopped by a signal after update" in printed[-1], printed
    assert re.search(r"resuming from .*/step-\d", run_well(*parts))
    for name in ("step-6", "best_dev"):
        file = Path("run") / "checkpoint" / name / "model.safetensors"
        whole, resumed = (load_file(tmp_path / folder / file) for folder in ("whole", "parts"))
        assert whole.keys() == resumed.keys()
        assert all((whole[key] == resumed[key]).all() for key in whole), name
    whole, resumed = (tmp_path / folder / "run" for folder in ("whole", "parts"))
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    for folder in (whole, resumed):
        files = {path.name for path in folder.iterdir()}
        assert files == {"checkpoint", "metrics.jsonl", "options.json", "run.log", "tensorboard"}
        checkpoints = {path.name for path in (folder / "checkpoint").iterdir()}
        assert checkpoints == {"best_dev", "latest", "step-6"}
    recorded = json.loads((whole / "options.json").read_text())
    assert recorded["options"]["lr"] == 1e-3
    assert recorded["command"][0].endswith("train_reader.py")


def test_training_without_evaluation_and_testing_without_answers(reference, tmp_path, capsys):
    command = training(reference, tmp_path, "--total_steps", 2, "--eval_data", "none")
    importlib.import_module("train_reader").main([str(word) for word in command[1:]])
    assert not re.search("dev(?!ice)", capsys.readouterr().out.replace(str(tmp_path), ""))
    (tmp_path / "q.jsonl").write_text('{"question": "Who?"}\n{"question": "Where?", "id": "w"}\n')
    run = f"{tmp_path}/run/checkpoint/latest --checkpoint_dir {tmp_path} --name answers"
    command = f"--write_results --eval_data {tmp_path}/q.jsonl --model_path {run}"
    importlib.import_module("test_reader").main(command.split())
    assert "the data has no answers to judge by" in capsys.readouterr().out
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
            all_options.test_reader_parser,
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


# ----------------------------------------------------------------------------------------------
# Every option is read; wrong ones are reported before anything is loaded


class Recorder:
    """The options that a run reads, one by one or as fields of a group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.read: set[str] = set()
        parse = all_options._Parser.parse_args
        recording = self._recording(argparse.Namespace)
        monkeypatch.setattr(
            all_options._Parser, "parse_args", lambda *given: recording(**vars(parse(*given)))
        )
        for kind in vars(all_options).values():
            if dataclasses.is_dataclass(kind):
                monkeypatch.setattr(
                    kind, "__getattribute__", self._recording(kind).__getattribute__
                )

    def _recording(self, kind: type) -> type:
        get = kind.__getattribute__

        class Recording(kind):
            def __getattribute__(recorded, name: str) -> object:
                self.read.add(name)
                return get(recorded, name)

        return Recording


def runs_of(script: str, reference: Path, folder: Path) -> list[list]:
    """Runs of a script on tiny models that together reach all its branches."""
    t5, bert, passages = reference / "t5", folder / "bert", folder / "passages.tsv"
    retriever = reference / "legacy_retriever_mask_mean"
    found = ["--passages_embeddings", reference / "legacy_embeddings" / "wiki_*"]
    short = ["--total_steps", 1, "--checkpoint_dir", folder, "--num_workers", 0, "--name"]
    data = ["--train_data", folder / "data.json", "--eval_data", folder / "data.json"]
    schedule = ["--scheduler", "linear"]
    if script == "train_reader":
        shape = ["--model_config", t5 / "config.json", "--tokenizer", t5]
        data += ["--generation_max_length", 2]
        return [[*data, *shape, *short, "a"], [*data, "--model_path", t5, *short, "b", *schedule]]
    if script == "train_retriever":
        data += ["--tokenizer", bert]
        shape = ["--model_config", bert / "config.json"]
        return [
            [*data, *shape, *short, "a"],
            [*data, "--model_path", retriever, *short, "b"],
            [*data, "--retriever_model", bert, *short, "c", *schedule],
            [*data, "--model_path", retriever, *short, "d", "--loss", "margin"],
        ]
    if script == "test_reader":
        data = ["--eval_data", folder / "data.json", "--checkpoint_dir", folder]
        reader = ["--model_path", t5, "--generation_max_length", 2]
        (folder / "unanswered.json").write_text('[{"question": "?", "ctxs": [{"text": "a"}]}]')
        ask = ["--question", "Who?", "--passages", passages]
        tokenizer = ["--retriever_tokenizer", bert]
        return [
            [*reader, *data, "--num_workers", 0],
            [
                *reader,
                "--eval_data",
                folder / "unanswered.json",
                "--checkpoint_dir",
                folder,
                "--write_results",
                "--write_crossattention_scores",
                "--targets",
                "perplexity",
                "--score_own_answer",
                "--name",
                "scored",
            ],
            [*reader, *ask, "--bm25"],
            [*reader, *ask, "--retriever_path", retriever, *found, *tokenizer],
        ]
    start = ["--passages", passages, "--output_path"]
    model = ["--model_path", retriever, "--tokenizer", bert]
    if script == "generate_passage_embeddings":
        return [[*start, folder / "embeddings", *model]]
    start += [folder / "found.json", "--data", reference / "questions.json", "--n-docs", 2]
    start += ["--validation_workers", 1]
    codes = ["--n-subquantizers", 8, "--n-bits", 4]
    return [[*start, "--bm25"], [*start, *model, *found, *codes]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_read_and_explained(script, reference, tmp_path, monkeypatch):
    """An option that nothing reads is a bug. (Writing all options to options.json does not count,
    nor does checking them against each other.)"""
    examples = json.loads((reference / "data.json").read_text())[:2]
    (tmp_path / "data.json").write_text(json.dumps(examples))
    shutil.copy(reference / "passages.tsv", tmp_path)
    tokenizer = BertTokenizerFast(str(reference / "bert" / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "vocab_size": len(tokenizer)}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path / "bert")
    recorder = Recorder(monkeypatch)
    for run_options in runs_of(script, reference, tmp_path):
        importlib.import_module(script).main([str(word) for word in run_options])
    actions = [action for action in SCRIPTS[script]()._actions if action.dest != "help"]
    # Read on a GPU only; of a web page, in test_serve.py; another way to say --n_context.
    elsewhere = {"no_fp16", "host", "port", "negatives"}
    unread = {action.dest for action in actions} - recorder.read - elsewhere
    assert not unread
    assert all(action.help for action in actions)


PROGRAMS = [f"{script}.py" for script in SCRIPTS]
PROGRAMS += [f"-m src.tools.{tool}" for tool in ("evaluate", "preprocess", "report")]
WRONG = {  # rules about several options, too
    "train_reader.py": "--model_config x.json --model_path y",
    "test_reader.py": "--question Who? --passages x.tsv",
    "train_retriever.py": "--model_config x.json --model_path y",
    "generate_passage_embeddings.py": "--passages x.tsv --model_path y --shard_id 1",
    "passage_retrieval.py": "--passages x.tsv --output_path y --index_factory PQ8 --bm25",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_wrong_options_load_no_library(program):
    """They respond at once, also when a rule about several options is broken."""
    look = (
        "import atexit, runpy, sys\n"
        "libraries = {'torch', 'transformers', 'faiss'}  # slow ones\n"
        "atexit.register(lambda: print('loaded:', sorted(libraries & set(sys.modules))))\n"
        "sys.path.insert(0, '')\n"
        "name, *sys.argv[1:] = sys.argv[1:]\n"
        "run = runpy.run_path if name.endswith('.py') else runpy.run_module\n"
        "run(name, run_name='__main__')\n"
    )
    wrong = ["--no_such_option 1", *([WRONG[program]] if program in WRONG else [])]
    for given, status in (("--help", 0), *((options, 2) for options in wrong)):
        name = program.removeprefix("-m ")
        done = run("-c", look, name, *given.split())
        assert done.returncode == status, done.stderr
        assert done.stdout.endswith("loaded: []\n")
        assert done.stdout.startswith("usage: python ") == (given == "--help")
        assert len(done.stderr.splitlines()) == status // 2
        assert done.stderr == "" or re.match(r"error: .* \(python .* --help lists", done.stderr)


# ----------------------------------------------------------------------------------------------
# Groups of values


def test_a_group_has_the_values_of_its_options():
    given = "--passages p --output_path o --model_path m --passages_embeddings e --plain_text "
    options = all_options.passage_retrieval_parser().parse_args(
        f"{given} --n-subquantizers 16 --n-bits 4".split()
    )
    search = all_options.select(all_options.SearchOptions, options)
    assert (search.factory, search.plain_text, search.bm25) == ("PQ16x4", True, False)
    # The conversation has no --n-subquantizers, and other names for the retriever.
    given = "--question Who? --passages p --retriever_path m --passages_embeddings e "
    options = all_options.test_reader_parser().parse_args(f"{given} --index_factory SQ8".split())
    search = all_options.conversation_search(options)
    assert (search.factory, search.model_path) == ("SQ8", "m")
