"""Bad use and bad input, script by script: one line on stderr with file, value and remedy.

Each case of `CASES` adds options to a script's good ones (`GOOD`); a later option replaces an
earlier one. The script must end with status 2, print one line, and leave nothing but the log and
options of a run that had begun. (Broken data files: test_examples.py, test_passages.py.)
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import generate_passage_embeddings
import passage_retrieval
import test_reader
import train_reader
import train_retriever
from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from src.models.retriever import load_retriever
from src.tools import evaluate
from src.tools.report import __main__ as report
from tests.conftest import REFERENCE, ROOT, run
from tests.test_get import Server

MAINS: dict[str, Callable] = {
    "train_reader": train_reader.main,
    "test_reader": test_reader.main,
    "train_retriever": train_retriever.main,
    "embed": generate_passage_embeddings.main,
    "retrieve": passage_retrieval.main,
    "bm25": passage_retrieval.main,
    "bare retrieve": passage_retrieval.main,
    "evaluation": evaluate.main,
    "report": report.main,
}
_RUN = "--checkpoint_dir {out} --name run --num_workers 0"
_RETRIEVER = "--model_path {retriever} --tokenizer {bert}"
_SEARCH = "--passages {passages.tsv} --data {questions.json} --output_path {out}/found.json"
GOOD = {
    "train_reader": f"--train_data {{data.json}} --eval_data {{data.json}} --model_path {{t5}} "
    f"--text_maxlength 16 --total_steps 1 {_RUN}",
    "test_reader": f"--eval_data {{data.json}} --model_path {{t5}} --text_maxlength 16 "
    f"--write_results {_RUN}",
    "train_retriever": f"--train_data {{data.json}} --eval_data {{data.json}} {_RETRIEVER} "
    f"--total_steps 1 {_RUN}",
    "embed": f"--passages {{passages.tsv}} --output_path {{out}}/x {_RETRIEVER}",
    "retrieve": f"{_SEARCH} --passages_embeddings {{shards}}/wiki_* {_RETRIEVER}",
    "bm25": f"{_SEARCH} --bm25",
    "bare retrieve": _SEARCH,
    "evaluation": "",
    "report": "-o {out}/page.html",
}


# ----------------------------------------------------------------------------------------------
# What the cases name in braces: {name} is a file or folder `name`, made once


class Hostile:
    """Unpickling it runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("echo a stranger was here",)


FILES: dict[str, str | bytes] = {
    "unanswered.json": json.dumps([{"question": "Who?"}]),
    "no_score.json": json.dumps([{"question": "Who?", "ctxs": [{"text": "It is I."}]}]),
    "dpr.json": json.dumps([{"question": "Who?", "answers": ["I"], "positive_ctxs": []}]),
    "small_t5.json": '{"model_type": "t5", "vocab_size": 10}',
    "text_t5.json": '{"model_type": "t5", "d_model": "large"}',
    "odd_bert.json": '{"model_type": "bert", "vocab_size": 700, "hidden_size": 25}',
    "spaced_id.json": json.dumps([{"id": name, "question": "Who?"} for name in ("a", "a b")]),
    "twice_id.json": json.dumps([{"id": name, "question": "Who?"} for name in ("a", "a")]),
    "spaced_id.jsonl": '{"id": "a", "text": "The Nile."}\n{"id": "b c", "text": "The Po."}\n',
    "one.json": json.dumps([{"question": "Who?"}]),
    "answers.txt": "q0\tI\n",
    "answer_0.txt": "0\tI\n",
}  # fmt: skip


def copied(folder: Path, source: Path, config: dict | str | None = None, **files: bytes) -> None:
    """A model's folder, with a changed config or files (by their names' beginnings)."""
    shutil.copytree(source, folder)
    if isinstance(config, dict):
        config = json.dumps(json.loads((folder / "config.json").read_text()) | config)
    if config is not None:
        (folder / "config.json").write_text(config)
    for beginning, content in files.items():
        (path,) = folder.glob(f"{beginning}*")
        path.write_bytes(content)


def make_models(at: Path) -> None:
    t5, retriever = REFERENCE / "t5", REFERENCE / "legacy_retriever_mask_mean"
    copied(at / "t5_hostile", t5, pytorch_model=pickle.dumps(Hostile()))
    copied(at / "t5_wide", t5, {"d_model": 64})
    copied(at / "t5_broken_config", t5, "{")
    copied(at / "t5_cut_tokenizer", t5, spiece=(t5 / "spiece.model").read_bytes()[:1000])
    copied(at / "t5_weightless", t5)
    (at / "t5_weightless" / "pytorch_model.bin").unlink()
    torch.save([torch.zeros(3)], at / "t5_weightless" / "pytorch_model.bin")
    (at / "t5_weightless").rename(at / "t5_list_weights")
    copied(at / "t5_weightless", t5)
    (at / "t5_weightless" / "pytorch_model.bin").unlink()
    legacy = at / "legacy_reader"
    copied(at / "legacy_wide", legacy, {"d_ff": 96})
    load_reader(str(t5)).save_pretrained(at / "plain")
    load_tokenizer(str(t5), "").save_pretrained(at / "plain")
    whole = (at / "plain" / "model.safetensors").read_bytes()
    copied(at / "plain_cut", at / "plain", model=whole[:-1000])
    copied(at / "plain_broken_tokenizer", at / "plain", **{"tokenizer.json": b'{"model": '})
    fast = PreTrainedTokenizerFast(tokenizer_file=str(at / "plain" / "tokenizer.json"))
    fast.save_pretrained(at / "no_padding")  # its special tokens are not said

    copied(at / "retriever_text", retriever, {"indexing_dimension": "wide"})
    copied(at / "retriever_safe_cut", retriever)
    (at / "retriever_safe_cut" / "pytorch_model.bin").unlink()
    model = load_retriever(str(retriever))
    model.save_pretrained(at / "safe")
    safe = (at / "safe" / "model.safetensors").read_bytes()
    (at / "retriever_safe_cut" / "model.safetensors").write_bytes(safe[: len(safe) // 2])
    with torch.no_grad():
        model.norm.bias[3] = torch.nan
    model.save_pretrained(at / "retriever_nan")
    words = (REFERENCE / "bert" / "vocab.txt").read_text()
    (at / "bert_large").mkdir()
    more = "".join(f"word{number}\n" for number in range(100))
    (at / "bert_large" / "vocab.txt").write_text(words + more)
    (at / "bert_broken").mkdir()
    (at / "bert_broken" / "tokenizer.json").write_text("{")


def make_embeddings(at: Path) -> None:
    shards = at / "shards"
    for number in range(3):
        options = f"--shard_id {number} --num_shards 3 --output_path {shards}/wiki"
        command = f"{GOOD['embed']} {options}"
        generate_passage_embeddings.main(arguments(command, at, at / "out"))
    legacy = pickle.loads((REFERENCE / "legacy_embeddings" / "wiki_00").read_bytes())
    ids, vectors = list(map(str, legacy[0])), np.asarray(legacy[1])
    for name, content in {
        "half": (ids, vectors[:, :16]),
        "unknown": ([f"x{identity}" for identity in ids], vectors),
        "hostile": (ids, vectors, Hostile()),
        "nan": (ids, np.full_like(vectors, np.nan)),
    }.items():
        (at / f"pickles_{name}").mkdir()
        (at / f"pickles_{name}" / "wiki_00").write_bytes(pickle.dumps(content))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("inputs")
    for name, content in FILES.items():
        (at / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("t5", "bert", "data.json", "questions.json"):
        (at / name).symlink_to(REFERENCE / name)
    shutil.copy(REFERENCE / "passages.tsv", at)  # side files are kept beside a collection
    (at / "retriever").symlink_to(REFERENCE / "legacy_retriever_mask_mean")
    (at / "legacy_reader").symlink_to(REFERENCE / "legacy_reader" / "checkpoint" / "step-20")
    (at / "folder").mkdir()
    make_models(at)
    make_embeddings(at)
    make_runs(at)
    make_reported(at)
    return at


def make_runs(at: Path) -> None:
    line = f"{GOOD['train_retriever']} --checkpoint_dir {{runs}}"
    (at / "runs").mkdir()
    train_retriever.main(arguments(line, at, at))
    shutil.copytree(at / "runs", at / "runs_damaged", symlinks=True)
    (at / "runs_damaged" / "run" / "checkpoint" / "best_dev").rename(at / "unused")
    state = at / "runs_damaged" / "run" / "checkpoint" / "step-1" / "training_state.pt"
    state.write_bytes(bytes(state.stat().st_size))


def make_reported(at: Path) -> None:
    """Folders of runs for the report: each is good but for one file."""
    for name, file, content in [
        ("answered", "final_output.txt", "0\tI\n"),
        ("answered_elsewhere", "final_output.txt", "0\tI\n"),
        ("counted", "metrics.jsonl", '{"step": 1, "train/loss": 2.5}\n{"step": 2}\n'),
        ("miscounted", "metrics.jsonl", '{"step": 1}\n{"loss": 2.5}\n{"step": 3}\n'),
        ("misworded", "metrics.jsonl", '{"step": 1, "train/loss": "low"}\n'),
        ("scored", "dataset_wscores.json", "[]"),
    ]:
        (at / name).mkdir()
        (at / name / file).write_text(content)
    options = json.dumps({"options": {"eval_data": "gone.json"}})
    (at / "answered_elsewhere" / "options.json").write_text(options)


def arguments(line: str, inputs: Path, out: Path) -> list[str]:
    """The options in a line, with the paths for what is in braces."""

    def path(found: re.Match) -> str:
        if found[1] == "out":
            return str(out)
        assert (inputs / found[1]).exists(), found[1]
        return str(inputs / found[1])

    return [re.sub(r"\{(.+?)\}", path, word).replace("''", "") for word in line.split()]


# ----------------------------------------------------------------------------------------------
# The cases: script, options, what the one line says (file or option, value, cure)

_CHECK_PATH = r"cannot be read \(No such file or directory\); check the path"
_MEND_JSON = r"; correct it, or make the file again"
_COPY = r"; was the file cut off\? copy it, or make the model, again"
_CONFIG = "; give the config.json that was saved with these weights, or make the model again"
_OFFLINE = r".*couldn't connect.*"
_HELP = r" \(python .* --help lists the options\)"
_AGAIN = "; make .* again with generate_passage_embeddings.py"

CASES: dict[str, list[tuple[str, str]]] = {  # by script: options, and the message
    "train_reader": [
        ("--train_data no.json", rf"no\.json: {_CHECK_PATH}"),
        ("--eval_data {unanswered.json}",
         r"unanswered\.json: no example has answers .*give another file, or --eval_data none"),
        ("--train_data {dpr.json} --n_context 2",
         r"dpr\.json: no example has passages under .* needed to train with --n_context 2; find"),
        ("--model_path ./no", r"\./no: there is no such file or folder; check the path"),
        ("--model_path no-such-model",
         rf"no-such-model: no model config{_OFFLINE}; give a model's folder or hub name"),
        ("--model_path none",
         rf"t5-base: no model config{_OFFLINE}; give a model's folder or hub name"),
        ("--model_path {t5_hostile}",
         rf"t5_hostile: .*refused: more than tensors in it.*{_COPY}"),
        ("--model_path {t5_list_weights}",
         rf"t5_list_weights: the model's weights cannot be read .*{_COPY}"),
        ("--model_path {t5_weightless}",
         rf"t5_weightless: the model's weights .*no file named model\.safetensors.*{_COPY}"),
        ("--model_path {t5_wide}",
         r"t5_wide: by its config\.json decoder.* is \[64, 64\], but in the weights it is \[64, 32"
         rf"\]{_CONFIG}"),
        ("--model_path {t5_broken_config}",
         "t5_broken_config: no model config .*not a valid JSON file.*; give a model's folder"),
        ("--model_config {small_t5.json}",
         r"--model_config .*small_t5\.json starts from fresh weights: leave out --model_path"),
        ("--model_path none --model_config {small_t5.json} --legacy_position_table",
         r"--model_config .*small_t5\.json .*leave out .*--legacy_position_table"),
        ("--model_path none --model_config {text_t5.json}",
         r"text_t5\.json: no model config .*'d_model'.*; give a model's"),
        ("--model_path {t5_cut_tokenizer}",
         "t5_cut_tokenizer: no tokenizer can be read there .*; give one with --tokenizer"),
        ("--model_path {plain_broken_tokenizer}",
         r"plain_broken_tokenizer: no tokenizer .*column 11.*; give one with --tokenizer"),
        ("--model_path {legacy_reader} --tokenizer {no_padding}",
         "no_padding: this tokenizer has no pad_token; .*give another with --tokenizer"),
        ("--model_path {legacy_reader} --tokenizer {bert}",
         "bert: this tokenizer has no eos_token; .*give another with --tokenizer"),
        ("--model_path none --model_config {small_t5.json} --tokenizer {t5}",
         "vocab_size 10 is smaller than the 800 tokens of the tokenizer .*t5; give its own with "
         "--tokenizer, or raise vocab_size in --model_config"),
        ("--lr 0", "--lr: 0 must be more than 0" + _HELP),
        ("--lr nan", "--lr: 'nan' is not a finite number"),
        (f"--seed {'9' * 20}", "--seed: 9+ must be .*at most"),
        ("--total_steps 3 --lr 1e30", "the gradient of update 2 is (nan|inf): try a lower --lr"),
        ("--checkpoint_dir {out}/file",
         r"file/run: cannot be written \(Not a directory\); .*another --checkpoint_dir or --name"),
        ("--name file",
         r"out/file: cannot be written \(File exists\); .*another --checkpoint_dir or --name"),
    ],
    "test_reader": [
        ("--eval_data {dpr.json} --write_crossattention_scores",
         r"dpr\.json: no example has passages under .*'positive_ctxs'.\), .* needed to score them"),
        ("--model_path {plain_cut}",
         rf"plain_cut: the model's weights cannot be read .*not fully covered\){_COPY}"),
        ("--model_path {legacy_wide}",
         rf"legacy_wide: by its config\.json .* is \[96, 32\], .*it is \[64, 32\]{_CONFIG}"),
        ("--model_path {legacy_reader}",
         rf"t5-base: no tokenizer{_OFFLINE}; give one with --tokenizer"),
        ("--model_path {legacy_reader} --tokenizer ./no",
         r"\./no: there is no such file or folder; check the path"),
        ("--model_path {legacy_reader} --tokenizer {folder}",
         "folder: no tokenizer can be read there .*; give one with --tokenizer"),
        ("--n_context 0", "--n_context: 0 must be at least 1" + _HELP),
        ("--n_contexts 3", "--n_contexts 3" + _HELP),
        ("--precision fp8", "--precision.*'fp8'.*'bf16'.*" + _HELP),
        ("--name ../run", "--name: '../run' cannot be a folder's name; leave out slashes" + _HELP),
        ("--eval_data {one.json} --name answered",
         r"final_output\.txt: cannot be written \(final.* is a folder, .*\); .*another --name"),
    ],
    "train_retriever": [
        ("--train_data {no_score.json}",
         r"no_score\.json: none of the passages that are read has a score .*; write them "
         "with test_reader.py --write_crossattention_scores"),
        ("--train_data {dpr.json}",
         r"dpr\.json: no example has passages under .* \(the first has .*'positive_ctxs'.\), but "
         "they are needed to distil from them; find some with passage_retrieval"),
        ("--model_path {t5}",
         "t5: a t5 model, but a bert, camembert, .* or dpr is needed here; give one of these or "),
        ("--model_path none --retriever_model {retriever}",
         "retriever: a retriever already, not a BERT; give it with --model_path"),
        ("--indexing_dimension 16",
         "retriever: this retriever has indexing_dimension 32, not 16; leave that option out"),
        ("--extract_cls",
         "retriever: this retriever has extract_cls False, not True; leave that option out"),
        ("--model_path {retriever_text}",
         "retriever_text: in its config.json indexing_dimension is 'wide'; fix its value"),
        ("--model_path none --model_config {odd_bert.json}",
         r"odd_bert\.json: no model can be built .*hidden size \(25\).*; fix its values"),
        ("--model_path {retriever_nan}",
         "the weight norm.bias is not finite before training: start from other weights"),
        ("--checkpoint_dir {runs_damaged} --total_steps 2",
         r"step-1/training_state\.pt: cannot be read \(.*\); remove .*step-1"),
        ("--tokenizer {bert_large}",
         "vocab_size 700 is smaller than the 800 tokens of the tokenizer .*bert_large; give its"),
        ("--tokenizer {bert_broken}",
         "bert_broken: no tokenizer can be read there .*; give one with --tokenizer"),
        ("--tokenizer none",
         rf"bert-base-uncased: no tokenizer{_OFFLINE}; give one with --tokenizer"),
        ("--extract_cls yes", "arguments: yes" + _HELP),
    ],
    "embed": [
        ("--passages no.tsv", rf"no\.tsv: {_CHECK_PATH}"),
        ("--model_path none", "--model_path is missing: give the folder of a"),
        ("--model_path {retriever_safe_cut}",
         rf"retriever_safe_cut: the model's weights cannot be read .*not fully covered\){_COPY}"),
        ("--model_path {retriever_nan}",
         "out/x_00: the embedding of passage '1000' is not finite .*; embed with --no_fp16, or"),
        ("--shard_id 3 --num_shards 3", "--shard_id 3 of --num_shards 3: shards count from 0 to 2"),
        ("--passage_maxlength 600", "reads at most 512 tokens, not 600: lower --passage_maxlength"),
        ("--output_path {out}/file/x",
         r"file/x_00: cannot be written \(File exists\); use another --output_path"),
        ("--output_path {out}/folder/wiki",
         r"folder/wiki_00: cannot be written \(wiki_00 is a .*; give another --output_path"),
    ],
    "bare retrieve": [
        ("", "give either --model_path .*, or --bm25"),
        ("--passages_embeddings {shards}/wiki_*",
         "give either --model_path and --passages_embeddings, or --bm25"),
        ("--model_path {retriever}", "--passages_embeddings is missing, for example"),
    ],
    "bm25": [
        ("--passages_embeddings {shards}/wiki_*",
         "--bm25 uses neither embeddings nor .*: leave out --passages_embeddings"),
        ("--output_format trec --data {spaced_id.json}",
         r"spaced_id\.json, example 2 \(line 1\): its id 'a b' is empty or has white space; change "
         "it, or say --output_format json"),
        ("--output_format trec --passages {spaced_id.jsonl}",
         r"spaced_id\.jsonl: the id 'b c' is empty or has white space; change it, or say"),
        ("--output_path /dev/null",
         r"/dev/null: cannot be written \(null is a device, .*\); give another --output_path"),
        ("--output_path ''",
         r"\.: cannot be written \(. is a folder, not a .*\); give another --output_path"),
    ],
    "retrieve": [
        ("--passages_embeddings {pickles_half}/* --allow_mismatch",
         "have 32 dimensions, but those in .*wiki_00 have 16; use the --model_path that"),
        ("--passages_embeddings {pickles_hostile}/*",
         rf"wiki_00: refused, because this pickle asks for 'posix\.system'.*{_AGAIN}"),
        ("--passages_embeddings {pickles_nan}/*",
         r"wiki_00: 60 embeddings, but .*passages\.tsv has 120 passages; give all shards of this "
         "collection, or say --allow_mismatch"),
        ("--passages_embeddings {pickles_nan}/* --allow_mismatch",
         "wiki_00: the embedding of passage '1000' is not finite; make the shard again"),
        ("--passages_embeddings {pickles_unknown}/* --allow_mismatch",
         r"passages\.tsv: no passage has the id 'x\d+'; give the collection that"),
        ("--plain_text",
         "this command and .*wiki_00 do not belong together: --plain_text is True in the first and "
         "False in the second; .*--allow_mismatch"),
        ("--index_factory PQ8 --n-subquantizers 8",
         "--index_factory PQ8 and --n-subquantizers 8: give one; .*PQ8x8"),
        ("--output_format trec --data {twice_id.json}",
         r"twice_id\.json, example 2 .*: its id 'a' is another's too; change it, or say"),
        ("--question_maxlength 600",
         "reads at most 512 tokens, not 600: lower --question_maxlength"),
        ("--output_path {out}/folder",
         r"folder: cannot be written \(folder is a folder, not a .*\); give another --output_path"),
    ],
    "evaluation": [
        ("", "the following arguments are required: FILE" + _HELP),
        ("{data.json} --data", "--data: expected one argument" + _HELP),
        ("no.json", rf"no\.json: {_CHECK_PATH}"),
        ("{answers.txt} --data {data.json}",
         r"answers\.txt: 1 lines of answers to the 24 questions of .*data\.json; give the --data"),
        ("{answers.txt} --data {unanswered.json}",
         r"answers\.txt, line 1: must be the answer to question 0 of .*, not 'q0\\tI'; give the"),
        ("{unanswered.json}",
         r"unanswered\.json: no question in this file has both answers and passages .*; give what"),
        ("{answer_0.txt} --data {unanswered.json}",
         r"unanswered\.json: no question in this file has answers; give --data that has some"),
    ],
    "report": [
        ("", "the following arguments are required: RUN" + _HELP),
        ("no_run", r"no_run: no such folder; give a run's \(--checkpoint_dir/--name\)"),
        ("{folder}",
         r"folder: neither metrics\.jsonl nor final_output\.txt nor dataset_wscores\.json is in"
         r" this folder; give a run's"),
        ("{counted} -o {folder}",
         r"folder: cannot be written \(folder is a folder, not a .*\); give another --output"),
        ("{miscounted}",
         r"metrics\.jsonl, line 2: must be a step .*, not '{.loss.: 2\.5}'; remove the line"),
        ("{misworded}",
         r"metrics\.jsonl, line 1: must be a step with its numbers.*; remove the line"),
        ("{answered}", r"final_output\.txt: nothing says which questions it answers; give --data"),
        ("{answered_elsewhere}",
         r"final_output\.txt: the file of its questions, 'gone\.json', is not here; give --data"),
        ("{scored}", r"dataset_wscores\.json: there are no examples in this file"),
    ],
}  # fmt: skip
BAD = [(script, *case) for script, cases in CASES.items() for case in cases]
# Runs that have begun when what is wrong comes to light: they have written numbers, too.
BEGUN = {"--total_steps 3 --lr 1e30", "--model_path {retriever_nan}"}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    ("script", "options", "message"), BAD, ids=[f"{script} {options}" for script, options, _ in BAD]
)
def test_one_line_and_status_2(script, options, message, inputs, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    for folder in ("folder/wiki_00", "answered/final_output.txt"):
        (out / folder).mkdir(parents=True)
    (out / "file").write_text("")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)  # so that a file written to the working folder is seen
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    with pytest.raises(SystemExit) as exited:
        MAINS[script](arguments(f"{GOOD[script]} {options}", inputs, out))
    assert exited.value.code == 2
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, lines
    assert re.match("error: .*" + message, lines[0]), lines[0]
    assert "a stranger was here" not in printed.out
    written = {path.split("/", 2)[-1] for path in files(tmp_path) - before}
    allowed = {"run.log", "options.json"} if "--name" in GOOD[script] else set()
    if options in BEGUN:
        allowed |= {"metrics.jsonl"} | {name for name in written if name.startswith("tensorboard/")}
    assert written <= allowed
    assert not list(inputs.rglob("*partial*"))


UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
WITH_MODEL = [name for name, options in GOOD.items() if "--model_path" in options]


@pytest.mark.parametrize("script", WITH_MODEL)
def test_a_hub_that_cannot_be_reached_is_asked_once(script, inputs, tmp_path):
    """Left to themselves, the libraries ask for half a minute, and say so on six lines."""
    options = arguments(f"{GOOD[script]} --model_path no-such-model", inputs, tmp_path)
    done = run(f"{MAINS[script].__module__}.py", *options, **UNREACHABLE, HF_HOME=str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(
        "error: no-such-model: .*the hub cannot be asked.*; give a model's folder", line
    )


@pytest.mark.parametrize("script", ["test_reader", "embed"])
def test_a_name_that_the_hub_does_not_know(script, inputs, tmp_path):
    options = arguments(f"{GOOD[script]} --model_path no-such-model", inputs, tmp_path)
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": Server({}).url, "HF_HOME": str(tmp_path)}
    done = run(f"{MAINS[script].__module__}.py", *options, **hub)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match("error: no-such-model: .*give a", line)


def test_a_cached_model_is_used_where_the_hub_cannot_be_reached(inputs, tmp_path):
    model = tmp_path / "hub/models--our--t5"
    shutil.copytree(arguments("{t5}", inputs, tmp_path)[0], model / "snapshots/123")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("123")
    options = arguments(f"{GOOD['test_reader']} --model_path our/t5", inputs, tmp_path)
    done = run("test_reader.py", *options, **UNREACHABLE, HF_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sed 1", "--sed: no such option .*--help"),
        ("more", "more: no such option .*--help"),
        ("--seed one", "--seed 'one': must be a whole number from 0"),
        ("-o", "an option's value is missing .*--help"),
        ("-o {data.json}", r"-o .*data\.json: this is a file; name a folder"),
    ],
)
def test_the_quickstarts_options(options, message, inputs):
    before = sorted(os.listdir(ROOT))
    done = subprocess.run(
        ["bash", ROOT / "quickstart.sh", *arguments(options, inputs, inputs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert re.match("error: " + message, line), line
    assert sorted(os.listdir(ROOT)) == before
