"""Bad use and bad input, script by script: one line on stderr that names file, value and cure.

Each case of `BAD` runs a script with good options (`GOOD`) and something wrong behind them; a later
option replaces an earlier one. The script must end with status 2, say one line, and leave nothing
behind but the log and options of a run that had begun.
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
from src.tools import evaluate, preprocess
from src.tools.report import page as report
from tests.conftest import REFERENCE, ROOT, run
from tests.test_preprocess import change, make_folder

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
    "preprocess": preprocess.main,
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
    "preprocess": "",
}


# ----------------------------------------------------------------------------------------------
# What the cases name in braces: {name} is a file or folder `name`, made once


def example(**changed: object) -> str:
    """A data file of one good example, then one that is changed."""
    good = {"question": "Who?", "answers": ["I"], "ctxs": [{"text": "It is I.", "score": 1.0}]}
    bad = {**good, **changed}
    bad = {key: value for key, value in bad.items() if value is not None}
    return json.dumps([good, bad], indent=1)


def with_score(score: object) -> str:
    return example(ctxs=[{"text": "It is I.", "score": score}])


class Hostile:
    """Unpickling it runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("echo a stranger was here",)


FILES: dict[str, str | bytes] = {
    "empty": "",
    "cut.json": '[{"question": "Who?", "answers": ["I"]}, {"question": "Wh',
    "cut.jsonl": '{"question": "Who?", "answers": ["I"]}\n{"question": "Wh',
    "latin.json": '[{"question": "Where is Ærø?"}]'.encode("latin-1"),
    "utf16.json": '[{"question": "Who?"}]'.encode("utf-16"),
    "binary.json": bytes(range(256)),
    "numbers.json": "[1, 2]",
    "numbers.jsonl": "1\n2\n",
    "squad.json": '{"version": "1.1", "data": [{"title": "x", "paragraphs": []}]}',
    "nested.jsonl": '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
    "digits.jsonl": '{"question": "Who?", "id": ' + "1" * 5000 + "}\n",
    "surrogate.jsonl": '{"question": "Who is \\ud83d?", "answers": ["I"]}\n',
    "no_list.json": "[]",
    "one_answer.json": example(answers="I"),
    "unanswered.json": json.dumps([{"question": "Who?"}]),
    "no_text.json": example(ctxs=[{"title": "I"}]),
    "text_score.json": with_score("high"),
    "nan_score.json": with_score(float("nan")),
    "inf_score.json": with_score(float("inf")),
    "list_score.json": with_score([0.5]),
    "no_score.json": json.dumps([{"question": "Who?", "ctxs": [{"text": "It is I."}]}]),
    "dpr.json": json.dumps([{"question": "Who?", "answers": ["I"], "positive_ctxs": []}]),
    "nul.json": b"[\n" + bytes(9999),
    "names.tsv": "number\tabstract\tname\n1\tThe Nile is long.\tNile\n",
    "header.tsv": "id\ttext\ttitle\n",
    "columns.tsv": "id\ttext\ttitle\n1\tThe Nile is long.\tNile\n2\tThe Rhine is short.\n",
    "open_quote.tsv": 'id\ttext\ttitle\n1\t"The Nile is long.\tNile\n2\tThe Rhine.\tRhine\n',
    "latin.tsv": "id\ttext\ttitle\n1\tAn island.\tSylt\n2\tIt lies\tÆrø\n".encode("latin-1"),
    "cut.tsv.gz": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xcbL\xb1(I\xad(",
    "twice.tsv": "id\ttext\ttitle\n7\tThe Nile.\tNile\n8\tThe Po.\tPo\n7\tThe Rhine.\tRhine\n",
    "twice.jsonl": '{"id": "a", "text": "The Nile."}\n{"id": "a", "text": "The Po."}\n',
    "no_id.jsonl": '{"id": "a", "text": "The Nile."}\n{"text": "The Po."}\n',
    "no_text.jsonl": '{"id": "a", "text": "The Nile."}\n{"id": "b", "title": "Po"}\n',
    "cut_passages.jsonl": '{"id": "a", "text": "The Nile."}\n{"id": "b", "te',
    "surrogate_passages.jsonl": '{"id": "a", "text": "The \\ud83d Nile."}\n',
    "broken.json": "{",
    "small_t5.json": '{"model_type": "t5", "vocab_size": 10}',
    "text_t5.json": '{"model_type": "t5", "d_model": "large"}',
    "odd_bert.json": '{"model_type": "bert", "vocab_size": 700, "hidden_size": 25}',
    "bert.json": '{"model_type": "bert", "vocab_size": 700, "hidden_size": 48, '
    '"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}',
    "short_bert.json": '{"model_type": "bert", "vocab_size": 700, "max_position_embeddings": 32}',
    "header.csv": "who is it\t['I']\nquestion\tanswers\n",
    "columns.csv": "who is it\t['I']\nwho\n",
    "call.csv": "who is it\t[__import__('os').system('echo a stranger was here')]\n",
    "spaced_id.json": json.dumps([{"id": name, "question": "Who?"} for name in ("a", "a b")]),
    "twice_id.json": json.dumps([{"id": name, "question": "Who?"} for name in ("a", "a")]),
    "spaced_id.jsonl": '{"id": "a", "text": "The Nile."}\n{"id": "b c", "text": "The Po."}\n',
    "pickle": pickle.dumps(Hostile()),
    "one.json": json.dumps([{"question": "Who?"}]),
    "answers.txt": "q0\tI\n",
    "answer_0.txt": "0\tI\n",
    "latin.txt": "q0\tÆrø\n".encode("latin-1"),
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
    weights = (t5 / "pytorch_model.bin").read_bytes()
    copied(at / "t5_cut", t5, pytorch_model=weights[:300_000])
    copied(at / "t5_hostile", t5, pytorch_model=pickle.dumps(Hostile()))
    copied(at / "t5_wide", t5, {"d_model": 64})
    copied(at / "t5_deep", t5, {"num_layers": 4})
    copied(at / "t5_broken_config", t5, "{")
    copied(at / "t5_list_config", t5, "[]")
    copied(at / "t5_unknown", t5, {"model_type": "fusion"})
    copied(at / "t5_cut_tokenizer", t5, spiece=(t5 / "spiece.model").read_bytes()[:1000])
    copied(at / "t5_weightless", t5)
    (at / "t5_weightless" / "pytorch_model.bin").unlink()
    torch.save([torch.zeros(3)], at / "t5_weightless" / "pytorch_model.bin")
    (at / "t5_weightless").rename(at / "t5_list_weights")
    copied(at / "t5_weightless", t5)
    (at / "t5_weightless" / "pytorch_model.bin").unlink()
    legacy = at / "legacy_reader"
    copied(at / "legacy_wide", legacy, {"d_ff": 96})
    copied(at / "legacy_few", legacy, {"num_layers": 4})
    load_reader(str(t5)).save_pretrained(at / "plain")
    load_tokenizer(str(t5), "").save_pretrained(at / "plain")
    whole = (at / "plain" / "model.safetensors").read_bytes()
    copied(at / "plain_cut", at / "plain", model=whole[:-1000])
    copied(at / "plain_cut_header", at / "plain", model=whole[:100])
    copied(at / "plain_broken_tokenizer", at / "plain", **{"tokenizer.json": b'{"model": '})
    fast = PreTrainedTokenizerFast(tokenizer_file=str(at / "plain" / "tokenizer.json"))
    fast.save_pretrained(at / "no_padding")  # its special tokens are not said

    for name, changed in (
        ("retriever_narrow", {"indexing_dimension": 16}),
        ("retriever_odd", {"hidden_size": 50}),
        ("retriever_text", {"indexing_dimension": "wide"}),
    ):
        copied(at / name, retriever, changed)
    bin_file = (retriever / "pytorch_model.bin").read_bytes()
    copied(at / "retriever_cut", retriever, pytorch_model=bin_file[:-5000])
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
    cut, one, twice, text = (at / f"shards_{name}" for name in ("cut", "one", "twice", "text"))
    for folder in (cut, one, twice, text):
        shutil.copytree(shards, folder)
    os.truncate(cut / "wiki_01", 3000)
    (one / "wiki_01").unlink()
    shutil.copy(twice / "wiki_01", twice / "wiki_again")
    (text / "wiki_01").write_text("id\ttext\ttitle\n")
    other = at / "shards_other"
    shutil.copytree(shards, other)
    (other / "wiki_02").unlink()
    options = f"--shard_id 2 --num_shards 3 --output_path {other}/wiki --model_path"
    options += " {other_retriever}"
    generate_passage_embeddings.main(arguments(f"{GOOD['embed']} {options}", at, at / "out"))
    replaced = at / "shards_replaced"  # an index of what stood there before
    shutil.copytree(shards, replaced)
    find = f"{GOOD['retrieve']} --passages_embeddings {replaced}/wiki_* --index_factory Flat"
    passage_retrieval.main(arguments(f"{find} --save_or_load_index", at, at / "out"))
    for number in range(3):
        options = f"--shard_id {number} --num_shards 3 --output_path {replaced}/wiki --no_title"
        generate_passage_embeddings.main(arguments(f"{GOOD['embed']} {options}", at, at / "out"))
    legacy = pickle.loads((REFERENCE / "legacy_embeddings" / "wiki_00").read_bytes())
    ids, vectors = list(map(str, legacy[0])), np.asarray(legacy[1])
    for name, content in {
        "half": (ids, vectors[:, :16]),
        "mixed": (ids, vectors[:, :16]),
        "uneven": (ids[:5], vectors),
        "unknown": ([f"x{identity}" for identity in ids], vectors),
        "hostile": (ids, vectors, Hostile()),
        "flat": (ids, vectors[:, 0]),
        "words": (ids, "vectors"),
        "nan": (ids, np.full_like(vectors, np.nan)),
    }.items():
        (at / f"pickles_{name}").mkdir()
        (at / f"pickles_{name}" / "wiki_00").write_bytes(pickle.dumps(content))
    shutil.copy(REFERENCE / "legacy_embeddings" / "wiki_01", at / "pickles_mixed")
    (at / "pickles_cut").mkdir()
    whole = (REFERENCE / "legacy_embeddings" / "wiki_00").read_bytes()
    (at / "pickles_cut" / "wiki_00").write_bytes(whole[:4000])
    shutil.copytree(shards, at / "indexed")
    (at / "indexed" / "index_Flat").mkdir()
    (at / "indexed" / "index_Flat" / "notes.txt").write_text("")


def make_downloads(at: Path) -> None:
    """Folders as get-data.sh has them before it calls preprocessing, each with one thing wrong."""
    make_folder(at / "data", 20, 6, 2)
    for name in ("gone", "no_tsv", "index", "object", "row", "key", "cut", "map", "id", "place"):
        shutil.copytree(at / "data", at / f"data_{name}")
    (at / "data_gone" / "download" / "nq_passages" / "dev.json").unlink()
    (at / "data_no_tsv" / "psgs_w100.tsv").unlink()
    (at / "data_index" / "download" / "dataindex" / "NQ.dev.idx.json").write_text("[0, 1")
    (at / "data_object" / "download" / "dataindex" / "NQ.dev.idx.json").write_text("{}")
    change(at / "data_row" / "download" / "dataindex" / "NQ.test.idx.json", 1, to=6)
    triviaqa = at / "data_cut" / "download" / "triviaqa-unfiltered" / "unfiltered-web-dev.json"
    os.truncate(triviaqa, 20_000)
    triviaqa = at / "data_key" / "download" / "triviaqa-unfiltered" / "unfiltered-web-train.json"
    triviaqa.write_text('{"Version": 1.0}')
    (at / "data_map" / "download" / "tqa_passages" / "train.json").write_text('["1"]')
    change(at / "data_id" / "download" / "nq_passages" / "train.json", "3", 1, to="x21")
    (at / "data_place" / "TQA" / "dev.json").mkdir(parents=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("places")
    for name, content in FILES.items():
        (at / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("t5", "bert", "data.json", "questions.json"):
        (at / name).symlink_to(REFERENCE / name)
    shutil.copy(REFERENCE / "passages.tsv", at)  # side files are kept beside a collection
    lines = (REFERENCE / "passages.tsv").read_text().splitlines(keepends=True)
    (at / "fewer.tsv").write_text("".join(lines[:50]))
    (at / "retriever").symlink_to(REFERENCE / "legacy_retriever_mask_mean")
    (at / "other_retriever").symlink_to(REFERENCE / "legacy_retriever_cls")
    (at / "legacy_reader").symlink_to(REFERENCE / "legacy_reader" / "checkpoint" / "step-20")
    (at / "folder").mkdir()
    make_models(at)
    make_embeddings(at)
    make_runs(at)
    make_reported(at)
    make_downloads(at)
    shutil.copy(REFERENCE / "passages.tsv", at / "indexed.tsv")
    (at / "indexed.tsv.bm25").mkdir()
    (at / "indexed.tsv.bm25" / "notes.txt").write_text("")
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
        ("latin_metrics", "metrics.jsonl", '{"step": 1, "æ": 1}\n'.encode("latin-1")),
        ("without_options", "metrics.jsonl", '{"step": 1}\n'),
        ("scored", "dataset_wscores.json", "[]"),
    ]:
        (at / name).mkdir()
        (at / name / file).write_bytes(content.encode() if isinstance(content, str) else content)
    options = json.dumps({"options": {"eval_data": "gone.json"}})
    (at / "answered_elsewhere" / "options.json").write_text(options)
    (at / "without_options" / "options.json").write_text('{"lr": 1}')


def arguments(line: str, places: Path, out: Path) -> list[str]:
    """The options in a line, with the paths for what is in braces."""

    def path(found: re.Match) -> str:
        if found[1] == "out":
            return str(out)
        assert (places / found[1]).exists(), found[1]
        return str(places / found[1])

    return [re.sub(r"\{(.+?)\}", path, word).replace("''", "") for word in line.split()]


# ----------------------------------------------------------------------------------------------
# The cases: script, options, what the one line says (file or option, value, cure)

Case = tuple[str, str, str]
_CHECK_PATH = r"cannot be read \(No such file or directory\); check the path"
_MEND_JSON = r"; correct it, or make the file again"
_COPY = r"; was the file cut off\? copy it, or make the model, again"
_CONFIG = "; give the config.json that was saved with these weights, or make the model again"
_OFFLINE = r".*couldn't connect.*"
_HELP = r" \(python .* --help lists the options\)"
_AGAIN = "; make .* again with generate_passage_embeddings.py"

READER: dict[str, Case] = {
    # data
    "train data that is not there": ("train_reader", "--train_data no.json",
        rf"no\.json: {_CHECK_PATH}"),
    "an empty file": ("train_reader", "--train_data {empty}",
        "empty: the file is empty; write or copy it again"),
    "a list that is cut off": ("train_reader", "--train_data {cut.json}",
        r"cut\.json: bad JSON \(the file ends inside the list.*make or copy it again"),
    "a line that is cut off": ("train_reader", "--train_data {cut.jsonl}",
        rf"cut\.jsonl, line 2: bad JSON \(Unterminated string.*\){_MEND_JSON}"),
    "data in Latin-1": ("train_reader", "--train_data {latin.json}",
        r"latin\.json, line 1: not UTF-8 text; re-encode it"),
    "data in UTF-16": ("train_reader", "--train_data {utf16.json}",
        r"utf16\.json, line 1: a NUL byte, so not UTF-8 text; re-encode"),
    "binary data": ("train_reader", "--train_data {binary.json}",
        r"binary\.json, line 1: a NUL byte, so not UTF-8 text; re-encode"),
    "a folder as data": ("train_reader", "--train_data {folder}",
        r"folder: cannot be read \(Is a directory\); check the path"),
    "a list of numbers": ("train_reader", "--train_data {numbers.json}",
        r"numbers\.json, line 1: .*the list must hold objects .*, not '1, 2'"),
    "lines of numbers": ("train_reader", "--train_data {numbers.jsonl}",
        r'numbers\.jsonl, line 1: an example must be an object like \{"question".*, not 1'),
    "another kind of data": ("train_reader", "--train_data {squad.json}",
        r'squad\.json, example 1 \(line 1\): "question" must be text, not None'),
    "lists in lists without end": ("train_reader", "--train_data {nested.jsonl}",
        rf"nested\.jsonl, line 1: JSON that cannot be read \(maximum recursion.*{_MEND_JSON}"),
    "a number without end": ("train_reader", "--train_data {digits.jsonl}",
        rf"digits\.jsonl, line 1: JSON that cannot be read \(Exceeds the limit.*{_MEND_JSON}"),
    "a surrogate": ("train_reader", "--train_data {surrogate.jsonl}",
        r"surrogate\.jsonl, line 1: '\\ud83d' is an unpaired surrogate; remove it"),
    "no examples": ("train_reader", "--train_data {no_list.json}",
        r"no_list\.json: there are no examples in this file; give one with some"),
    "an answer that is no list": ("train_reader", "--train_data {one_answer.json}",
        r"one_answer\.json, example 2 \(line 14\): \"answers\" must be a list of texts, not 'I'"),
    "a passage without text": ("train_reader", "--train_data {no_text.json}",
        r'no_text\.json, example 2 \(line 14\), passage 1: "text" must be text, not None'),
    "train data without answers": ("train_reader", "--train_data {unanswered.json}",
        r'unanswered\.json, example 1 \(line 1\): "target" or "answers" is needed'),
    "DPR's questions with a header": ("train_reader", "--train_data {header.csv}",
        r"header\.csv, line 2: the answers of a row must be a list of texts like .*, not "
        "'answers'; correct it, or give JSON"),
    "DPR's questions without answers": ("test_reader", "--eval_data {columns.csv}",
        r"columns\.csv, line 2: a row must be a question, a tab and .*, not 'who\\n'; correct it"),
    "answers that run a command": ("test_reader", "--eval_data {call.csv}",
        r"call\.csv, line 1: the answers of a row must be a list of texts .*; correct it, or give "
        "JSON"),
    "dev data that is not there": ("train_reader", "--eval_data no.json",
        rf"no\.json: {_CHECK_PATH}"),
    "dev data without answers": ("train_reader", "--eval_data {unanswered.json}",
        r"unanswered\.json: no example has answers .*give another file, or --eval_data none"),
    "questions that are not there": ("test_reader", "--eval_data no.json",
        rf"no\.json: {_CHECK_PATH}"),
    "nothing to score": ("test_reader", "--eval_data {dpr.json} --write_crossattention_scores",
        r"dpr\.json: no example has passages under .*'positive_ctxs'.\), .* needed to score them"),
    "no passages to train on": ("train_reader", "--train_data {dpr.json} --n_context 2",
        r"dpr\.json: no example has passages under .* needed to train with --n_context 2; find"),
    "a file that was never written": ("test_reader", "--eval_data {nul.json}",
        r"nul\.json, line 2: a NUL byte, so not UTF-8 text; re-encode the file, or copy"),
    "a broken example": ("test_reader", "--eval_data {cut.jsonl}",
        rf"cut\.jsonl, line 2.*{_MEND_JSON}"),
    "a score that is text": ("test_reader", "--eval_data {text_score.json}",
        r"text_score\.json, example 2 .*passage 1: \"score\" must be a finite number or left out, "
        "not 'high'"),
    # models
    "a model that is not there": ("train_reader", "--model_path ./no",
        r"\./no: there is no such file or folder; check the path"),
    "a model's file that is not there": ("train_reader", "--model_path a/b/c",
        "a/b/c: there is no such file or folder; check the path"),
    "a name that nobody knows": ("train_reader", "--model_path no-such-model",
        rf"no-such-model: no model config{_OFFLINE}; give a model's folder or hub name"),
    "no model": ("train_reader", "--model_path none",
        rf"t5-base: no model config{_OFFLINE}; give a model's folder or hub name"),
    "a folder that is no model": ("train_reader", "--model_path {folder}",
        r"folder: no config\.json in this folder; give the folder of a model"),
    "a retriever as reader": ("train_reader", "--model_path {retriever}",
        "retriever: a bert model, but a t5 is needed here; give a T5 or a reader"),
    "a retriever to read with": ("test_reader", "--model_path {other_retriever}",
        "other_retriever: a bert model, but a t5 is needed here; give a T5 or a reader"),
    "weights that are cut off": ("train_reader", "--model_path {t5_cut}",
        rf"t5_cut/pytorch_model\.bin: not a file of weights.*{_COPY}"),
    "safetensors that are cut off": ("test_reader", "--model_path {plain_cut}",
        rf"plain_cut: the model's weights cannot be read .*not fully covered\){_COPY}"),
    "safetensors that are cut off in their header": (
        "train_reader",
        "--model_path {plain_cut_header}",
        rf"plain_cut_header: the model's weights cannot be read .*header.*{_COPY}",
    ),
    "weights that run a command": ("train_reader", "--model_path {t5_hostile}",
        rf"t5_hostile/pytorch_model\.bin: .*refused: more than tensors in it.*{_COPY}"),
    "weights that are a list": ("train_reader", "--model_path {t5_list_weights}",
        rf"t5_list_weights/pytorch_model\.bin: not a file of weights \(it holds a list\){_COPY}"),
    "no weights": ("train_reader", "--model_path {t5_weightless}",
        rf"t5_weightless: the model's weights .*no file named model\.safetensors.*{_COPY}"),
    "weights of another width": ("train_reader", "--model_path {t5_wide}",
        rf"t5_wide: the weights have other shapes than its config\.json says{_CONFIG}"),
    "weights with fewer layers": ("train_reader", "--model_path {t5_deep}",
        rf"t5_deep: the weights lack 21 tensors, such as decoder\.block\.3.*{_CONFIG}"),
    "a legacy reader of another width": ("test_reader", "--model_path {legacy_wide}",
        rf"legacy_wide: by its config\.json .* is \[96, 32\], .*it is \[64, 32\]{_CONFIG}"),
    "a legacy reader with fewer layers": ("test_reader", "--model_path {legacy_few}",
        rf"legacy_few: the weights lack 21 tensors, such as decoder\.block\.3.*{_CONFIG}"),
    "a config that is cut off": ("train_reader", "--model_path {t5_broken_config}",
        "t5_broken_config: no model config .*not a valid JSON file.*; give a model's folder"),
    "a config that is a list": ("train_reader", "--model_path {t5_list_config}",
        "t5_list_config: no model config can be read there.*; give a model's folder"),
    "a model that nobody knows": ("train_reader", "--model_path {t5_unknown}",
        "t5_unknown: no model config .*`fusion`.*; give a model's folder"),
    "a table that the model has not": (
        "train_reader",
        "--model_path {plain} --legacy_position_table",
        "plain: its weights hold no .*leave out --legacy_position_table",
    ),
    "two starts": ("train_reader", "--model_config {small_t5.json}",
        r"--model_config .*small_t5\.json starts from fresh weights: leave out --model_path"),
    "a table of fresh weights": (
        "train_reader",
        "--model_path none --model_config {small_t5.json} --legacy_position_table",
        r"--model_config .*small_t5\.json .*leave out .*--legacy_position_table",
    ),
    "a shape that is no JSON": ("train_reader", "--model_path none --model_config {broken.json}",
        r"broken\.json: no model config .*not a valid JSON file.*; give a model's"),
    "a shape that is text": ("train_reader", "--model_path none --model_config {text_t5.json}",
        r"text_t5\.json: no model config .*'d_model'.*; give a model's"),
    "the shape of a retriever": ("train_reader", "--model_path none --model_config {bert.json}",
        r"bert\.json: a bert model, but a t5 is needed here; give a T5 or a reader"),
    # tokenizers
    "a model without a tokenizer": ("test_reader", "--model_path {legacy_reader}",
        rf"t5-base: no tokenizer{_OFFLINE}; give one with --tokenizer"),
    "a tokenizer that is not there": (
        "test_reader",
        "--model_path {legacy_reader} --tokenizer ./no",
        r"\./no: there is no such file or folder; check the path",
    ),
    "a folder that is no tokenizer": (
        "test_reader",
        "--model_path {legacy_reader} --tokenizer {folder}",
        "folder: no tokenizer can be read there .*; give one with --tokenizer",
    ),
    "a tokenizer that is cut off": ("train_reader", "--model_path {t5_cut_tokenizer}",
        "t5_cut_tokenizer: no tokenizer can be read there .*; give one with --tokenizer"),
    "a tokenizer that is no JSON": ("train_reader", "--model_path {plain_broken_tokenizer}",
        r"plain_broken_tokenizer: no tokenizer .*column 11.*; give one with --tokenizer"),
    "a tokenizer without padding": (
        "train_reader",
        "--model_path {legacy_reader} --tokenizer {no_padding}",
        "no_padding: this tokenizer has no pad_token; .*give another with --tokenizer",
    ),
    "a tokenizer without an end": (
        "train_reader",
        "--model_path {legacy_reader} --tokenizer {bert}",
        "bert: this tokenizer has no eos_token; .*give another with --tokenizer",
    ),
    "a vocabulary that is too small": (
        "train_reader",
        "--model_path none --model_config {small_t5.json} --tokenizer {t5}",
        "vocab_size 10 is smaller than the 800 tokens of the tokenizer .*t5; give its own with "
        "--tokenizer, or raise vocab_size in --model_config",
    ),
    # options
    "a number that is none": ("train_reader", "--lr fast", "--lr: 'fast' is not a number" + _HELP),
    "a rate of 0": ("train_reader", "--lr 0", "--lr: 0 must be more than 0" + _HELP),
    "a rate that is nan": ("train_reader", "--lr nan", "--lr: 'nan' is not a finite number"),
    "a norm without end": ("train_reader", "--clip inf", "--clip: 'inf' is not a finite number"),
    "a negative number": ("train_reader", "--n_context -3", "--n_context: -3 must be at least 1"),
    "no passages": ("test_reader", "--n_context 0", "--n_context: 0 must be at least 1" + _HELP),
    "half a passage": ("test_reader", "--n_context 2.5",
        "--n_context: '2.5' is not a whole number" + _HELP),
    "no value": ("test_reader", "--n_context", "--n_context: expected one argument" + _HELP),
    "a rate above one": ("train_reader", "--dropout 1.5",
        r"--dropout: 1\.5 must be at least 0 and at most 0\.99" + _HELP),
    "a negative rate": ("train_reader", "--dropout -0.1", r"--dropout: -0\.1 must be at least 0"),
    "a negative seed": ("train_reader", "--seed -1", "--seed: -1 must be at least 0 and at most"),
    "a seed of twenty digits": ("train_reader", f"--seed {'9' * 20}",
        "--seed: 9+ must be .*at most"),
    "no updates": ("train_reader", "--total_steps 0", "--total_steps: 0 must be at least 1"),
    "answers of nothing": ("test_reader", "--generation_max_length 1",
        "--generation_max_length: 1 must be at least 2" + _HELP),
    "answers of less than nothing": ("train_reader", "--answer_maxlength -2",
        "--answer_maxlength: -2 must be at least -1" + _HELP),
    "waiting for ever": ("train_reader", "--dist_timeout 1e300", "--dist_timeout: .*at most"),
    "a rank that is none": ("train_reader", "--local_rank x", "--local_rank: 'x' is not"),
    "an unknown option": ("test_reader", "--n_contexts 3", "--n_contexts 3" + _HELP),
    "a word too many": ("train_reader", "more", "unrecognized arguments: more" + _HELP),
    "an unknown choice": ("test_reader", "--precision fp8", "--precision.*'fp8'.*'bf16'.*" + _HELP),
    "an unknown optimizer": ("train_reader", "--optim sgd", "--optim.*'sgd'.*'adam'.*" + _HELP),
    "an unknown size": ("test_reader", "--model_size giant", "--model_size.*'giant'.*'base'"),
    "a rate that nothing survives": ("train_reader", "--total_steps 3 --lr 1e30",
        "the gradient of update 2 is (nan|inf) .*: try a lower --lr"),
    # places
    "a file as folder of runs": ("train_reader", "--checkpoint_dir {out}/file",
        r"file/run: cannot be written \(Not a directory\); .*another --checkpoint_dir or --name"),
    "a folder of runs in a file": ("test_reader", "--checkpoint_dir {out}/file/deeper",
        r"file/deeper/run: cannot be written \(Not a directory\); .*another --checkpoint_dir"),
    "a file as run": ("train_reader", "--name file",
        r"out/file: cannot be written \(File exists\); .*another --checkpoint_dir or --name"),
    "a name without end": ("train_reader", f"--name {'n' * 300}",
        r"--name: 'n+\.\.\.' cannot be a folder's name; leave out slashes" + _HELP),
    "a name that leaves its folder": ("test_reader", "--name ../run",
        "--name: '../run' cannot be a folder's name; leave out slashes" + _HELP),
    "a folder in the results' place": ("test_reader", "--eval_data {one.json} --name answered",
        r"final_output\.txt: cannot be written \(final.* is a folder, .*\); .*another --name"),
    "a run of a retriever": ("train_reader", "--checkpoint_dir {runs}",
        "run/checkpoint/step-1: a bert model, but a t5 is needed here; give"),
}  # fmt: skip

RETRIEVER: dict[str, Case] = {
    # data
    "passages without scores": ("train_retriever", "--train_data {no_score.json}",
        r"no_score\.json: none of the passages that are read has a score .*; write them "
        "with test_reader.py --write_crossattention_scores"),
    "positive_ctxs alone": ("train_retriever", "--train_data {dpr.json}",
        r"dpr\.json: no example has passages under .* \(the first has .*'positive_ctxs'.\), but "
        "they are needed to distil from them; find some with passage_retrieval"),
    "dev data without scores": ("train_retriever", "--eval_data {no_score.json}",
        r"no_score\.json: none .*; write them with test_reader\.py"),
    "a score that is nan": ("train_retriever", "--train_data {nan_score.json}",
        r"nan_score\.json, example 2 .*passage 1: .* a finite number or left out, not nan"),
    "a score without end": ("train_retriever", "--train_data {inf_score.json}",
        r"inf_score\.json, example 2 .*passage 1: .* a finite number or left out, not inf"),
    "a score that is a list": ("train_retriever", "--train_data {list_score.json}",
        r"list_score\.json, example 2 .*passage 1: .* a finite number or left out, not \[0\.5\]"),
    # models
    "a reader as retriever": ("train_retriever", "--model_path {t5}",
        "t5: a t5 model, but a bert is needed here; give a BERT or a retriever"),
    "a reader as BERT": ("train_retriever", "--model_path none --retriever_model {plain}",
        "plain: a t5 model, but a bert is needed here; give a BERT or a retriever"),
    "a retriever as BERT": ("train_retriever", "--model_path none --retriever_model {retriever}",
        "retriever: a retriever already, not a BERT; give it with --model_path"),
    "a BERT that is not there": ("train_retriever", "--model_path none --retriever_model ./no",
        r"\./no: there is no such file or folder; check the path"),
    "two starts of a retriever": ("train_retriever", "--model_config {bert.json}",
        r"--model_config .*bert\.json starts from fresh weights: leave out --model_path"),
    "another dimension than the checkpoint's": ("train_retriever", "--indexing_dimension 16",
        "retriever: this retriever has indexing_dimension 32, not 16; leave that option out"),
    "another kind of mean": ("train_retriever", "--extract_cls",
        "retriever: this retriever has extract_cls False, not True; leave that option out"),
    "a dimension without a projection": (
        "train_retriever",
        "--model_path none --model_config {bert.json} --no_projection --indexing_dimension 16",
        "without a projection .*48, not 16: leave out --indexing_dimension or --no_projection",
    ),
    "a config of another dimension": ("train_retriever", "--model_path {retriever_narrow}",
        rf"retriever_narrow: .*is \[16\], but in the weights it is \[32\]{_CONFIG}"),
    "a dimension that is text": ("train_retriever", "--model_path {retriever_text}",
        f"retriever_text: the model's weights cannot be read .*{_COPY}"),
    "a hidden size that heads cannot share": (
        "train_retriever",
        "--model_path none --model_config {odd_bert.json}",
        r"odd_bert\.json: no model can be built .*hidden size \(25\).*; mend its numbers",
    ),
    "a retriever that is cut off": ("train_retriever", "--model_path {retriever_cut}",
        f"retriever_cut: the model's weights cannot be read .*{_COPY}"),
    "a retriever of nan": ("train_retriever", "--model_path {retriever_nan}",
        "the gradient of update 1 is nan .*: try a lower --lr"),
    "a BERT that reads too little": (
        "train_retriever",
        "--model_path none --model_config {short_bert.json}",
        r"short_bert\.json: reads at most 32 tokens, not 200; lower .*--passage_maxlength",
    ),
    "a state that is damaged": (
        "train_retriever",
        "--checkpoint_dir {runs_damaged} --total_steps 2",
        r"step-1/training_state\.pt: cannot be read \(.*\); remove .*step-1",
    ),
    # tokenizers
    "another model's tokenizer": (
        "train_retriever",
        "--tokenizer {bert_large}",
        "vocab_size 700 is smaller than the 800 tokens of the tokenizer .*bert_large; give its own",
    ),
    "a broken tokenizer": ("train_retriever", "--tokenizer {bert_broken}",
        "bert_broken: no tokenizer can be read there .*; give one with --tokenizer"),
    "a retriever without a tokenizer": ("train_retriever", "--tokenizer none",
        rf"bert-base-uncased: no tokenizer{_OFFLINE}; give one with --tokenizer"),
    # options and places
    "an unknown schedule": ("train_retriever", "--scheduler cosine",
        "--scheduler.*'cosine'.*'linear'.*" + _HELP),
    "a flag with a value": ("train_retriever", "--extract_cls yes", "arguments: yes" + _HELP),
    "a file as folder of retrievers": ("train_retriever", "--checkpoint_dir {out}/file",
        r"file/run: cannot be written \(Not a directory\); .*another --checkpoint_dir"),
}  # fmt: skip

EMBED: dict[str, Case] = {
    # passages
    "passages that are not there": ("embed", "--passages no.tsv", rf"no\.tsv: {_CHECK_PATH}"),
    "empty passages": ("embed", "--passages {empty}", "empty: the file is empty; write or"),
    "a folder as passages": ("embed", "--passages {folder}",
        r"folder: .*\(Is a directory\); check"),
    "a header alone": ("embed", "--passages {header.tsv}",
        r"header\.tsv: there are no passages in this file; give one with some"),
    "a row of two columns": ("embed", "--passages {columns.tsv}",
        r"columns\.tsv, line 3: a row must have 3 columns, .*not the 2 of '2.*; correct it"),
    "data as passages": ("embed", "--passages {data.json}",
        r"data\.json, line 1: a row must have 3 columns .*not the 1 of '\['; correct it, or give"),
    "unknown names of columns": ("embed", "--passages {names.tsv}",
        r"names\.tsv, line 1: the first row, 'number\\tabstract\\tname', looks like a header with"),
    "an open quote mark": ("embed", "--passages {open_quote.tsv}",
        r"open_quote\.tsv, line 2: this row has no end; is a quote mark left open"),
    "passages in Latin-1": ("embed", "--passages {latin.tsv}",
        r"latin\.tsv, line 3: byte 0xc6 is not UTF-8 text; re-encode the file"),
    "an archive that is cut off": ("embed", "--passages {cut.tsv.gz}",
        r"cut\.tsv\.gz: the archive is cut off or damaged .*; fetch it again"),
    "an id that stands twice": ("embed", "--passages {twice.tsv}",
        r"twice\.tsv, line 4: the id '7' is that of line 2 too; change one"),
    "an id that stands twice in JSONL": ("embed", "--passages {twice.jsonl}",
        r"twice\.jsonl, line 2: the id 'a' is that of line 1 too; change one"),
    "a passage without an id": ("embed", "--passages {no_id.jsonl}",
        r'no_id\.jsonl, line 2: "id" or "_id" must be text or a whole number, not None'),
    "a passage that is a title alone": ("embed", "--passages {no_text.jsonl}",
        r'no_text\.jsonl, line 2: no text: "text" or "contents" must be text, not None'),
    "passages that are cut off": ("embed", "--passages {cut_passages.jsonl}",
        r"cut_passages\.jsonl, line 2: bad JSON .*; write one object on each line"),
    "a surrogate in a passage": ("embed", "--passages {surrogate_passages.jsonl}",
        r"surrogate_passages\.jsonl, line 1: '\\ud83d' is an unpaired surrogate; remove it"),
    "lists in a passage without end": ("embed", "--passages {nested.jsonl}",
        r"nested\.jsonl, line 1: JSON that cannot be read \(maximum recursion.*; correct it"),
    # models
    "no retriever": ("embed", "--model_path none", "--model_path is missing: give the folder of a"),
    "a reader to embed with": ("embed", "--model_path {plain}", "plain: a t5 model.*; give a BERT"),
    "a retriever's config of another dimension": ("embed", "--model_path {retriever_narrow}",
        rf"retriever_narrow: .*is \[16\], but in the weights it is \[32\]{_CONFIG}"),
    "a hidden size that the weights have not": ("embed", "--model_path {retriever_odd}",
        rf"retriever_odd: the model's weights .*hidden size \(50\).*{_COPY}"),
    "a retriever whose safetensors are cut off": ("embed", "--model_path {retriever_safe_cut}",
        rf"retriever_safe_cut: the model's weights cannot be read .*not fully covered\){_COPY}"),
    "embeddings of nan": (
        "embed",
        "--model_path {retriever_nan}",
        "out/x_00: the embedding of passage '1000' is not finite .*; embed with --no_fp16",
    ),
    # options and places
    "a shard too many": ("embed", "--shard_id 3 --num_shards 3",
        "--shard_id 3 of --num_shards 3: shards count from 0 to 2"),
    "a negative shard": ("embed", "--shard_id -1", "--shard_id: -1 must be at least 0" + _HELP),
    "no shards": ("embed", "--num_shards 0", "--num_shards: 0 must be at least 1" + _HELP),
    "batches of nothing": ("embed", "--per_gpu_batch_size 0", "--per_gpu_batch_size: 0 must be at"),
    "more tokens than the model reads": ("embed", "--passage_maxlength 600",
        "reads at most 512 tokens, not 600: lower --passage_maxlength"),
    "a shard inside a file": ("embed", "--output_path {out}/file/x",
        r"file/x_00: cannot be written \(File exists\); use another --output_path"),
    "a folder in a shard's place": ("embed", "--output_path {out}/folder/wiki",
        r"folder/wiki_00: cannot be written \(wiki_00 is a folder, .*; use another --output_path"),
}  # fmt: skip

RETRIEVE: dict[str, Case] = {
    "neither model nor bm25": ("bare retrieve", "", "give either --model_path .*, or --bm25"),
    "embeddings without a model": ("bare retrieve", "--passages_embeddings {shards}/wiki_*",
        "give either --model_path and --passages_embeddings, or --bm25"),
    "both model and bm25": ("retrieve", "--bm25", "give either --model_path .*, or --bm25"),
    "a model without embeddings": ("bare retrieve", "--model_path {retriever}",
        "--passages_embeddings is missing, for example"),
    "bm25 with embeddings": ("bm25", "--passages_embeddings {shards}/wiki_*",
        "--bm25 uses neither embeddings nor .*: leave out --passages_embeddings"),
    "bm25 with codes": ("bm25", "--n-subquantizers 8",
        "--bm25 uses neither embeddings nor .*: leave out .*--n-subquantizers"),
    # embeddings
    "embeddings that are not there": ("retrieve", "--passages_embeddings no_*",
        r"no_\*: there are no embeddings of this name; make them with generate_passage_embeddings"),
    "a folder as embeddings": ("retrieve", "--passages_embeddings {shards}",
        'shards: a folder; name its shards, like ".*shards/wiki_'),
    "a shard that is cut off": ("retrieve", "--passages_embeddings {shards_cut}/wiki_*",
        rf"wiki_01: not a complete shard .*incomplete.*{_AGAIN}"),
    "a shard that is text": ("retrieve", "--passages_embeddings {shards_text}/wiki_*",
        rf"wiki_01: not a complete shard .*{_AGAIN}"),
    "an empty shard": ("retrieve", "--passages_embeddings {empty}",
        "empty: the file is empty; write or copy it again"),
    "a model as embeddings": ("retrieve", "--passages_embeddings {safe}/model.safetensors",
        rf"model\.safetensors: not a complete shard .*{_AGAIN}"),
    "a shard that is missing": ("retrieve", "--passages_embeddings {shards_one}/wiki_*",
        "shard 1 of 3 is missing; make it with --shard_id 1, or say --allow_mismatch"),
    "a shard that is there twice": ("retrieve", "--passages_embeddings {shards_twice}/wiki_*",
        "wiki_01 and .*wiki_again are both shard 1; leave one out, or say --allow_mismatch"),
    "embeddings of another dimension": (
        "retrieve",
        "--passages_embeddings {pickles_half}/* --allow_mismatch",
        "have 32 dimensions, but those in .*wiki_00 have 16; use the --model_path that",
    ),
    "embeddings of two dimensions": ("retrieve", "--passages_embeddings {pickles_mixed}/*",
        "wiki_00 and .*wiki_01: .* have 16 and 32 dimensions; search those of one model"),
    "more embeddings than ids": ("retrieve", "--passages_embeddings {pickles_uneven}/*",
        rf"wiki_00: not embeddings .*5 ids, but 60 embeddings.*{_AGAIN}"),
    "embeddings that are words": ("retrieve", "--passages_embeddings {pickles_words}/*",
        rf"wiki_00: not embeddings that can be read .*{_AGAIN}"),
    "embeddings that are numbers": ("retrieve", "--passages_embeddings {pickles_flat}/*",
        rf"wiki_00: not embeddings .*float32 \[60\].*{_AGAIN}"),
    "a pickle that is cut off": ("retrieve", "--passages_embeddings {pickles_cut}/*",
        rf"wiki_00: not embeddings that can be read .*{_AGAIN}"),
    "a pickle that runs a command": ("retrieve", "--passages_embeddings {pickle}",
        rf"pickle: refused, because this pickle asks for 'posix\.system'.*{_AGAIN}"),
    "embeddings that run a command": ("retrieve", "--passages_embeddings {pickles_hostile}/*",
        rf"wiki_00: refused, because this pickle asks for 'posix\.system'.*{_AGAIN}"),
    "embeddings that are fewer than the passages": (
        "retrieve",
        "--passages_embeddings {pickles_nan}/*",
        r"wiki_00: 60 embeddings, but .*passages\.tsv has 120 passages; give all shards of this "
        "collection, or say --allow_mismatch",
    ),
    "embeddings that are not finite": (
        "retrieve",
        "--passages_embeddings {pickles_nan}/* --allow_mismatch",
        "wiki_00: the embedding of passage '1000' is not finite; make the shard again",
    ),
    "embeddings of unknown passages": (
        "retrieve",
        "--passages_embeddings {pickles_unknown}/* --allow_mismatch",
        r"passages\.tsv: no passage has the id 'x\d+'; give the collection that",
    ),
    # models and collections that do not belong together
    "another model": ("retrieve", "--model_path {other_retriever}",
        "other_retriever and .*wiki_00 do not belong together: the model .*--allow_mismatch"),
    "shards of two models": ("retrieve", "--passages_embeddings {shards_other}/wiki_*",
        "wiki_00 and .*wiki_02 do not belong together: model is .*--allow_mismatch"),
    "an index of the shards before": (
        "retrieve",
        "--passages_embeddings {shards_replaced}/wiki_* --index_factory Flat --save_or_load_index",
        "index_Flat and .*wiki_00 do not belong together: options is .*--allow_mismatch",
    ),
    "texts of another kind": ("retrieve", "--plain_text",
        "this command and .*wiki_00 do not belong together: --plain_text is True in the first and "
        "False in the second; .*--allow_mismatch"),
    "another collection": ("retrieve", "--passages {fewer.tsv}",
        r"fewer\.tsv and .*wiki_00 do not belong together: the collection .*--allow_mismatch"),
    "passages that the collection lacks": ("retrieve", "--passages {fewer.tsv} --allow_mismatch",
        r"fewer\.tsv: no passage has the id '\d+'; give the collection that"),
    "a collection with an id twice": ("retrieve", "--passages {twice.tsv} --allow_mismatch",
        r"twice\.tsv, line 4: the id '7' is that of line 2 too; change one"),
    "a reader to search with": ("retrieve", "--model_path {t5}", "t5: a t5 model.*; give a BERT"),
    "a model of nan": ("retrieve", "--model_path {retriever_nan} --allow_mismatch",
        "the questions' embeddings are not finite; use --no_fp16, or repair the model"),
    # options
    "two kinds of index": ("retrieve", "--index_factory PQ8 --n-subquantizers 8",
        "--index_factory PQ8 and --n-subquantizers 8: give one; .*PQ8x8"),
    "an index that nobody knows": ("retrieve", "--index_factory nonsense",
        "--index_factory 'nonsense': FAISS cannot .*; leave it .*out for exact search"),
    "codes that do not fit": ("retrieve", "--n-subquantizers 7",
        r"'PQ7x8': .*dimension 32 .*; leave it \(or --n-subquantizers\) out for exact search"),
    "more lists than passages": ("retrieve", "--index_factory IVF4096,PQ8",
        r"'IVF4096,PQ8': .*120.*4096.*; leave it .*out for exact search"),
    "an index that is broken": (
        "retrieve",
        "--index_factory Flat --save_or_load_index --passages_embeddings {indexed}/wiki_*",
        r"index_Flat: not a complete index, and it holds notes\.txt; remove it to build it again",
    ),
    "no results": ("retrieve", "--n-docs 0", "--n-docs.*: 0 must be at least 1" + _HELP),
    "an unknown format": ("retrieve", "--output_format xml",
        "--output_format: .*'xml'.*'trec'.*" + _HELP),
    "a question's id with a space": (
        "bm25",
        "--output_format trec --data {spaced_id.json}",
        r"spaced_id\.json, example 2 \(line 1\): its id 'a b' is empty or has white space; change "
        "it, or say --output_format json",
    ),
    "two questions with one id": ("retrieve", "--output_format trec --data {twice_id.json}",
        r"twice_id\.json, example 2 .*: its id 'a' is another's too; change it, or say"),
    "a passage's id with a space": (
        "bm25",
        "--output_format trec --passages {spaced_id.jsonl}",
        r"spaced_id\.jsonl: the id 'b c' is empty or has white space; change it, or say",
    ),
    "many results": ("retrieve", "--n-docs many", "--n-docs.*: 'many' is not a whole number"),
    "more tokens of a question than the model reads": ("retrieve", "--question_maxlength 600",
        "reads at most 512 tokens, not 600: lower --question_maxlength"),
    "a surrogate in a question": ("bm25", "--data {surrogate.jsonl}",
        r"surrogate\.jsonl, line 1: '\\ud83d' is an unpaired surrogate; remove it"),
    "no questions": ("bm25", "--data {no_list.json}", r"no_list\.json: there are no .*; give one"),
    "a BM25 index that is something else": ("bm25", "--passages {indexed.tsv} --save_or_load_index",
        r"indexed\.tsv\.bm25: not a complete index, and it holds notes\.txt; remove it"),
    # places
    "a folder to write into": ("retrieve", "--output_path {out}/folder",
        r"folder: cannot be written \(folder is a folder, not a .*\); give another --output_path"),
    "a device to write into": ("bm25", "--output_path /dev/null",
        r"/dev/null: cannot be written \(null is a device, .*\); give another --output_path"),
    "nothing to write into": ("bm25", "--output_path ''",
        r"\.: cannot be written \(. is a folder, not a .*\); give another --output_path"),
    "a file to write into inside a file": ("bm25", "--output_path {out}/file/found.json",
        r"file/found\.json: cannot be written \(File exists\); give another --output_path"),
}  # fmt: skip

EVALUATION: dict[str, Case] = {
    "no files": ("evaluation", "", "the following arguments are required: FILE" + _HELP),
    "an option without a value": ("evaluation", "{data.json} --data",
        "--data: expected one argument" + _HELP),
    "an option cut short": ("evaluation", "{data.json} --dat x", "--dat x" + _HELP),
    "a file that is not there": ("evaluation", "no.json", rf"no\.json: {_CHECK_PATH}"),
    "answers that are not there": ("evaluation", "no.txt --data {data.json}",
        rf"no\.txt: {_CHECK_PATH}"),
    "answers without questions": ("evaluation", "{answers.txt}",
        r"answers\.txt: to judge answers, --data must name"),
    "answers to other questions": ("evaluation", "{answers.txt} --data {data.json}",
        r"answers\.txt: 1 lines of answers to the 24 questions of .*data\.json; give the --data"),
    "answers to questions of other names": ("evaluation", "{answers.txt} --data {unanswered.json}",
        r"answers\.txt, line 1: must be the answer to question 0 of .*, not 'q0\\tI'; give the"),
    "answers in Latin-1": ("evaluation", "{latin.txt} --data {unanswered.json}",
        r"latin\.txt: byte 3 is not UTF-8 text; re-encode the file"),
    "questions without passages": ("evaluation", "{unanswered.json}",
        r"unanswered\.json: no question in this file has both answers and passages .*; give what"),
    "answers that nobody can judge": ("evaluation", "{answer_0.txt} --data {unanswered.json}",
        r"unanswered\.json: no question in this file has answers; give --data that has some"),
}  # fmt: skip

REPORT: dict[str, Case] = {
    "a report of nothing": ("report", "", "the following arguments are required: FOLDER" + _HELP),
    "a report of no folder": ("report", "no_run",
        r"no_run: no such folder; give a run's \(--checkpoint_dir/--name\)"),
    "a report of a folder without a run": ("report", "{folder}",
        r"folder: neither metrics\.jsonl nor final_output\.txt nor dataset_wscores\.json is in this"
        r" folder; give a run's"),
    "no question on the page": ("report", "{counted} --max_questions 0",
        "--max_questions: 0 must be at least 1" + _HELP),
    "a page in a folder's place": ("report", "{counted} -o {folder}",
        r"folder: cannot be written \(folder is a folder, not a .*\); give another --output"),
    "a page in a file's folder": ("report", "{counted} -o {empty}/page.html",
        r"page\.html: cannot be written \((File exists|Not a directory)\); give another --output"),
    "numbers without a step": ("report", "{miscounted}",
        r"metrics\.jsonl, line 2: must be a step with its numbers, such as .*, not '{.loss.: 2\.5}'"
        "; remove the line"),
    "words for numbers": ("report", "{misworded}",
        r"metrics\.jsonl, line 1: must be a step with its numbers.*; remove the line"),
    "numbers in Latin-1": ("report", "{latin_metrics}",
        r"metrics\.jsonl, line 1: must be a step with its numbers.*; remove the line"),
    "options that no run wrote": ("report", "{without_options}",
        r"options\.json: not the options that a run writes; remove the file"),
    "a report of answers alone": ("report", "{answered}",
        r"final_output\.txt: nothing says which questions it answers; give --data"),
    "a report of answers to questions that are gone": ("report", "{answered_elsewhere}",
        r"final_output\.txt: the file of its questions, 'gone\.json', is not here; give --data"),
    "a report of answers to other questions": ("report", "{answered} --data {data.json}",
        r"final_output\.txt: 1 lines of answers to the 24 questions of .*; give the --data"),
    "a report of no questions": ("report", "{scored}",
        r"dataset_wscores\.json: there are no examples in this file"),
    "passages to compare that are not there": ("report", "{counted} --retrieved no.json",
        rf"no\.json: {_CHECK_PATH}"),
    "questions without passages to compare": ("report", "{counted} --retrieved {unanswered.json}",
        r"unanswered\.json: no question in this file has both answers and passages .*; give what"),
}  # fmt: skip

# (More of what can be wrong inside these files is in tests/test_preprocess.py.)
PREPROCESS: dict[str, Case] = {
    "no folder": ("preprocess", "", "the following arguments are required: FOLDER" + _HELP),
    "a dataset that nobody knows": ("preprocess", "{data} --only squad",
        "--only: invalid choice: 'squad'.*" + _HELP),
    "a folder that is not there": ("preprocess", "no_data",
        rf"no_data/download/NQ-open\.dev\.jsonl: {_CHECK_PATH}"),
    "a map that is not there": ("preprocess", "{data_gone}",
        rf"nq_passages/dev\.json: {_CHECK_PATH}"),
    "a collection that is not there": ("preprocess", "{data_no_tsv}",
        rf"psgs_w100\.tsv: {_CHECK_PATH}"),
    "an index that is cut off": ("preprocess", "{data_index}",
        rf"NQ\.dev\.idx\.json, line 1: bad JSON .*{_MEND_JSON}"),
    "an index that is no list": ("preprocess", "{data_object}",
        r"NQ\.dev\.idx\.json: must hold a list of rows, not \{\}; remove it, and let get-data.sh"),
    "a row that is out of range": ("preprocess", "{data_row}",
        r"NQ\.test\.idx\.json: row 6, at place 1, is not one of the rows 0 to 5 of .*; let get-"),
    "TriviaQA without questions": ("preprocess", "{data_key}",
        r'unfiltered-web-train\.json: no list under "Data" in this file; was it cut off'),
    "TriviaQA that is cut off": ("preprocess", "{data_cut}",
        r"unfiltered-web-dev\.json: bad JSON \(the file ends inside the list.*make or copy it"),
    "a map that is a list": ("preprocess", "{data_map}",
        r"tqa_passages/train\.json: must hold an object of lists, .*; make or copy it again"),
    "a passage that the collection lacks": ("preprocess", "{data_id} --only nq",
        r"train\.json, question '3': .*psgs_w100\.tsv: no passage has the id 'x21'; give the coll"),
    "a folder in a split's place": ("preprocess", "{data_place} --only tqa",
        r"TQA/dev\.json: cannot be written \(dev\.json is a folder, .*\); remove it"),
}  # fmt: skip

KINDS = (READER, RETRIEVER, EMBED, RETRIEVE, EVALUATION, REPORT, PREPROCESS)
BAD = {name: case for cases in KINDS for name, case in cases.items()}
assert len(BAD) == sum(map(len, KINDS))
# Runs that have begun when what is wrong comes to light: they have written numbers, too.
BEGUN = {"a rate that nothing survives", "a retriever of nan"}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_status_2(case, places, tmp_path, capfd, monkeypatch):
    script, options, message = BAD[case]
    out = tmp_path / "out"
    for folder in ("folder/wiki_00", "answered/final_output.txt"):
        (out / folder).mkdir(parents=True)
    (out / "file").write_text("")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)  # what is written to no place in particular is seen, too
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    with pytest.raises(SystemExit) as exited:
        MAINS[script](arguments(f"{GOOD[script]} {options}", places, out))
    assert exited.value.code == 2
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, lines
    assert re.match("error: .*" + message, lines[0]), lines[0]
    assert "a stranger was here" not in printed.out
    written = {path.split("/", 2)[-1] for path in files(tmp_path) - before}
    allowed = {"run.log", "options.json"} if "--name" in GOOD[script] else set()
    if case in BEGUN:
        allowed |= {"metrics.jsonl"} | {name for name in written if name.startswith("tensorboard/")}
    assert written <= allowed
    assert not list(places.rglob("*partial*"))


@pytest.mark.parametrize("case", ["weights that run a command"])
def test_from_a_shell(case, places, tmp_path):
    """Here the libraries' own warnings would be seen, wherever they go."""
    script, options, message = BAD[case]
    done = run(f"{script}.py", *arguments(f"{GOOD[script]} {options}", places, tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match("error: .*" + message, line), line


def test_a_hub_that_cannot_be_reached_is_asked_once(places, tmp_path):
    """Left to themselves, the libraries ask for half a minute, and say so on six lines."""
    options = arguments(f"{GOOD['train_reader']} --model_path no-such-model", places, tmp_path)
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = run("train_reader.py", *options, **nobody)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(
        "error: no-such-model: .*the hub cannot be asked.*; give a model's folder", line
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sed 1", "--sed: no such option .*--help"),
        ("more", "more: no such option .*--help"),
        ("--seed one", "--seed 'one': must be a whole number from 0"),
        ("--seed -1", "--seed '-1': must be a whole number from 0"),
        (f"--seed {'9' * 20}", "--seed '9+': must be .* of 18 digits at most"),
        ("--fresh --seed", "an option's value is missing .*--help"),
        ("-o", "an option's value is missing .*--help"),
        ("-o {data.json}", r"-o .*data\.json: this is a file; name a folder"),
    ],
)
def test_the_quickstarts_options(options, message, places):
    before = sorted(os.listdir(ROOT))
    done = subprocess.run(
        ["bash", ROOT / "quickstart.sh", *arguments(options, places, places)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert re.match("error: " + message, line), line
    assert sorted(os.listdir(ROOT)) == before
