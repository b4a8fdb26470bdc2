"""Files that other projects publish: each is read under our names, or named in one line.

The samples have the layout of the published files, cut down to one example.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from src.data.examples import load_data, read_example
from src.data.passages import Passage, Passages
from src.runtime.errors import InputError
from tests.conftest import ROOT

PROVENANCE = [{"wikipedia_id": "42", "title": "Radium", "start_paragraph_id": 1}]
CONTEXT = {
    "docid": "7",
    "score": "8.5",
    "has_answer": True,
    "text": '"Po"\nPolonium is it.',
}
READ = {  # name: (file's name, contents, id, question, answers)
    "FiD": ("a.json", [{"id": "0", "question": "Who?", "target": "I", "answers": ["I", "me"],
        "ctxs": [{"id": "7", "title": "Po", "text": "It is I.", "score": "8.5"}]}],
        "0", "Who?", ["I", "me"]),
    "DPR's training data": ("nq-train.json", [{"dataset": "nq_train_psgs_w100", "question": "who",
        "answers": ["I"], "positive_ctxs": [{"title": "Po", "text": "I.", "score": 1000,
        "passage_id": "7"}], "negative_ctxs": [], "hard_negative_ctxs": []}], "0", "who", ["I"]),
    "DPR's questions": ("nq-test.csv", "who\t['I', \"the 'me'\"]\n", "0", "who", ["I", "the 'me'"]),
    "NQ-open": ("NQ-open.dev.jsonl", {"question": "who", "answer": ["I", "me"]},
        "0", "who", ["I", "me"]),
    "BEIR": ("queries.jsonl", {"_id": "PLAIN-2", "text": "Do statins help?", "metadata": {}},
        "PLAIN-2", "Do statins help?", []),
    "pyserini": ("run.json", {"3": {"question": "who", "answers": ["I"], "contexts": [CONTEXT]}},
        "3", "who", ["I"]),
    "KILT": ("nq-dev-kilt.jsonl", {"id": "-4", "input": "who", "output": [{"answer": "I",
        "provenance": PROVENANCE}, {"answer": "me"}, {"provenance": PROVENANCE}],
        "meta": {"left_context": ""}}, "-4", "who", ["I", "me"]),
    "KILT's test questions": ("nq-test-kilt.jsonl", {"id": "5", "input": "who"}, "5", "who", []),
    "HotpotQA": ("hotpot_dev_fullwiki_v1.json", [{"_id": "5a8b", "answer": "yes",
        "question": "Were they?", "supporting_facts": [["Po", 0]],
        "context": [["Po", ["A sentence.", " Another."]]], "type": "comparison", "level": "hard"}],
        "5a8b", "Were they?", ["yes"]),
    "FlashRAG": ("dev.jsonl", {"id": "test_0", "question": "who", "golden_answers": ["I", "me"],
        "metadata": {}}, "test_0", "who", ["I", "me"]),
    "PopQA": ("test.jsonl", {"id": 42, "subj": "Curie", "prop": "occupation", "obj": "chemist",
        "question": "What is her occupation?", "possible_answers": '["chemist", "physicist"]'},
        "42", "What is her occupation?", ["chemist", "physicist"]),
    "Tevatron": ("train.jsonl", {"query_id": "9", "query": "who", "answers": ["I"],
        "positive_passages": [{"docid": "7", "title": "Po", "text": "I."}],
        "negative_passages": []}, "9", "who", ["I"]),
    "self-RAG": ("popqa_longtail_w_gs.jsonl", {"id": 3, "question": "who", "answers": ["I"],
        "pop": 20, "ctxs": [{"id": "7", "title": "Po", "text": "I.", "score": "1.5"}]},
        "3", "who", ["I"]),
    "SQuAD in datasets": ("squad.jsonl", {"id": "57", "title": "Po", "context": "It is I.",
        "question": "Who?", "answers": {"text": ["I", "I"], "answer_start": [6, 6]}},
        "57", "Who?", ["I", "I"]),
    "TriviaQA": ("unfiltered-web-dev.json", {"Data": [{"Answer": {"Aliases": ["Radium", "Ra"],
        "NormalizedAliases": ["radium", "ra"], "Value": "RADIUM"}, "Question": "Which?",
        "QuestionId": "tc_1", "SearchResults": [{"Title": "a [b"}]}], "Domain": "unfiltered-web",
        "Version": 1.0}, "tc_1", "Which?", ["Radium", "Ra"]),
    "TriviaQA in datasets": ("trivia.jsonl", {"question": "Which?", "question_id": "tc_1",
        "answer": {"aliases": ["Ra"], "normalized_aliases": ["ra"], "value": "Radium"}},
        "tc_1", "Which?", ["Ra"]),
    "MS MARCO's queries": ("queries.dev.tsv", "1048585\twhat is paula deen's brother\n",
        "1048585", "what is paula deen's brother", []),
    "MS MARCO QA": ("dev.jsonl", {"answers": ["2,662"], "query": ". what is albany", "query_id": 15,
        "query_type": "NUMERIC", "passages": {"is_selected": [1], "passage_text": ["x"]}},
        "15", ". what is albany", ["2,662"]),
}  # fmt: skip


def written(path: Path, content: object) -> Path:
    """A file with a text, or one object on a line, or a list over several."""
    indent = 1 if path.suffix == ".json" else None
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=indent))
    return path


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("packed", [False, True])
def test_others_questions_are_read(name, packed, tmp_path):
    file, content, identity, question, answers = READ[name]
    path = written(tmp_path / file, content)
    if packed:
        path = tmp_path / f"{file}.gz"
        path.write_bytes(gzip.compress((tmp_path / file).read_bytes()))
    data = load_data(path)
    example = read_example(data, len(data) - 1)
    assert (example.id, example.question, example.answers) == (identity, question, answers)


def test_what_comes_with_the_questions(tmp_path):
    run = load_data(written(tmp_path / "run.json", READ["pyserini"][1]))
    passage = Passage("7", "Po", "Polonium is it.", 8.5, 0)
    assert read_example(run, 0).passages == [passage]
    assert run[0]["ctxs"][0]["hasanswer"] is True
    trivia = load_data(written(tmp_path / "t.json", READ["TriviaQA"][1]))
    assert read_example(trivia, 0).target == "Radium"  # not in capitals, as FiD has it
    assert "SearchResults" in trivia[0]  # other fields are kept


REFUSED = {  # neighbours that cannot be read, and what is said
    "SQuAD": ({"data": [{"title": "Po", "paragraphs": [{"context": "I.", "qas": []}]}],
        "version": "1.1"}, r"one object over .*fields \['data', 'version'\]; give a list"),
    "SQuAD on a line": ('{"data": [{"paragraphs": []}], "version": "1.1"}',
        r"example 1 \(line 1\): no \"question\" among its fields \['data', 'version'\]; docs"),
    "one example": ({"question": "Who?", "answers": ["I"]}, r"one object .*'question', 'answers'"),
    "indented lines": ('{\n "question": "a"\n}\n{\n "question": "b"\n}\n', "several lines; .*jq"),
    "self-RAG's training data": ('{"instruction": "Do it", "input": "x", "output": "[Retrieval]"}',
        r"no \"question\" among its fields \['instruction'"),
    "pyserini without texts": ({"0": {"question": "who", "answers": ["I"], "contexts": [
        {"docid": "7", "score": 1.5, "has_answer": False}]}}, 'passage 1: "text" must be text'),
    "PopQA's list cut off": ('{"question": "a", "possible_answers": "[\\"x\\", "}', "not a list"),
    "two keys, one object": ('{"0": {"question": "a"} "1": {"question": "b"}}', "one comma"),
    "a key without a comma": ('{"0": {"question": "a"}, {"question": "b"}}', "one comma"),
    "another bracket": ('[{"question": "a"}}', "another bracket was open"),
    "a list under Data, cut": ('{"Data": [{"Question": "a"}], "Version" 1}', "bad JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_described(name, tmp_path):
    content, message = REFUSED[name]
    path = written(tmp_path / "data.json", content)
    with pytest.raises(InputError, match=f"^{path}.*{message}") as caught:
        load_data(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def _tar(content: bytes, mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        info = tarfile.TarInfo("data.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.jsonl", content)
    return file.getvalue()


PACKED = {
    "bz2": (bz2.compress, "a bzip2 archive; unpack it"),
    "xz": (lzma.compress, "an xz archive; unpack it"),
    "zip": (_zip, "a zip archive; unpack it"),
    "tar": (lambda content: _tar(content, "w"), "a tar archive; unpack it"),
    "tar.gz": (lambda content: _tar(content, "w:gz"), "a tar archive; unpack it"),
    "zst": (lambda content: b"\x28\xb5\x2f\xfd" + content, "a zstd archive"),
    "utf16": (lambda content: content.decode().encode("utf-16"), "UTF-16 text; re-encode"),
    "utf16be": (lambda c: b"\xfe\xff" + c.decode().encode("utf-16-be"), "UTF-16 text; re-encode"),
    "utf16 in gzip": (lambda c: gzip.compress(c.decode().encode("utf-16")), "UTF-16 text"),
    "NUL bytes in gzip": (lambda content: gzip.compress(bytes(9**6)), "a NUL byte"),
    "utf16 without mark": (lambda content: content.decode().encode("utf-16-le"), "a NUL byte"),
    "parquet": (lambda content: b"PAR1" + content + b"PAR1", "a Parquet table; write it as JSONL"),
    "arrow": (lambda content: b"\xff\xff\xff\xff\x10\0\0\0" + content, "an Arrow table"),
    "pickle": (lambda content: b"\x80\x04\x95" + content, "a Python pickle"),
    "lfs": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\n",
        "a pointer of Git LFS",
    ),
    "page": (lambda content: b"<!DOCTYPE html><title>404</title>", "a web page"),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("opened", [load_data, Passages])
def test_another_format_is_named(kind, opened, tmp_path):
    pack, message = PACKED[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(pack(b'{"id": "1", "question": "Who?", "text": "It is I."}\n'))
    with pytest.raises(InputError, match=f"^{path}.*: {message}") as caught:
        opened(path)
    assert str(caught.value).isprintable()


def test_wiki_dprs_rows_are_a_collection(tmp_path):
    row = {"id": "1", "text": "Aaron is a prophet", "title": "Aaron", "embeddings": [0.1, 0.2]}
    passages = Passages(written(tmp_path / "wiki.jsonl", row))
    assert passages[0] == Passage("1", "Aaron", "Aaron is a prophet")


BLANK = ("", " " * 10, "\t", " " * 5000, "\r")


@pytest.mark.parametrize("blank", BLANK)
def test_blank_lines_are_skipped(blank, tmp_path):
    collection = ["7\tThe Nile.\tNile", '8\t"The\n\nPo "\tPo', "9\tThe Rhine. \tRhine "]
    texts = [Passage("7", "Nile", "The Nile."), Passage("8", "Po", "The\n\nPo ")]
    texts.append(Passage("9", "Rhine ", "The Rhine. "))
    lines = ['{"id": "7", "title": "Nile", "text": "The Nile.", "question": "a"}', '{"id": "8", '
             '"title": "Po", "text": "The\\n\\nPo ", "question": "b"}']  # fmt: skip
    for name, rows in (("p.tsv", collection), ("p.jsonl", lines), ("q.csv", ["a\t['I']", "b\t[]"])):
        if blank == "\t" and name == "p.tsv":
            continue  # a row of two empty columns
        (tmp_path / name).write_text(f"\n{blank}\n".join(["", *rows, ""]), newline="")
    if blank != "\t":
        assert list(Passages(tmp_path / "p.tsv")) == texts
        assert [Passages(tmp_path / "p.tsv")[i] for i in range(3)] == texts
    assert [p[:3] for p in Passages(tmp_path / "p.jsonl")] == [p[:3] for p in texts[:2]]
    for name in ("p.jsonl", "q.csv"):
        data = load_data(tmp_path / name)
        assert [read_example(data, i).question for i in range(len(data))] == ["a", "b"]


@pytest.mark.parametrize("size", [131_071, 131_073, 1_000_000])
def test_a_long_quoted_field(size, tmp_path):
    text = "long " * (size // 5)
    (tmp_path / "p.tsv").write_text(f'id\ttext\ttitle\n7\t"{text}""x"""\tNile\n')
    assert Passages(tmp_path / "p.tsv")[0].text == f'{text}"x"'
    (tmp_path / "q.csv").write_text(f'"{text}""x"""\t"[\'{text}\']"\n')
    assert read_example(load_data(tmp_path / "q.csv"), 0).question == f'{text}"x"'


@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl", "q.jsonl", "q.csv", "q.json"])
@pytest.mark.parametrize("bad", [b"\xe9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
def test_what_is_not_utf8_is_said_at_opening(name, bad, tmp_path, monkeypatch):
    monkeypatch.setattr("src.data.files._CHUNK", 7)  # characters are cut in two
    good = {"p.tsv": "7\tNîle €\tx\n8\tPo ?\ty\n", "q.csv": "é€\t['I']\nb ?\t['I']\n"}
    line = '{"id": %d, "text": "é€ %s", "question": "a"}'
    lines = [line % (1, ""), line % (2, "?")]
    good |= {"p.jsonl": "\n".join(lines), "q.jsonl": "\n".join(lines)}
    content = good.get(name, f"[{lines[0]},\n{lines[1]}]").encode()
    opened = Passages if name[0] == "p" else load_data
    (tmp_path / name).write_bytes(content)
    assert len(opened(tmp_path / name)) == 2
    (tmp_path / name).write_bytes(content.replace(b"?", bad + b"x"))
    with pytest.raises(InputError, match=f"{name}, line 2: byte 0x.. is not UTF-8 text; re-enc"):
        opened(tmp_path / name)


def test_the_documents_table_names_every_sample():
    page = (ROOT / "docs/formats.md").read_text()
    table = page[page.index("### Other people's files") : page.index("## Passages")].lower()
    for name in READ:
        assert name.split("'")[0].split(" ")[0].lower() in table, name


# ----------------------------------------------------------------------------------------------
# Regular expressions as answers


def test_regular_expressions(tmp_path):
    from src.evaluation.answers import has_answer, judge

    row = {"question": "When?", "answers": [r"(19|20)\d\d", "Caf\u00e9s?"]}
    path = written(tmp_path / "trec.jsonl", row)
    answers = read_example(load_data(path, regex_answers=True), 0).answers
    text = "it opened in 1987, as CAFE\u0301"
    assert has_answer(answers, text)
    assert not has_answer(answers, "in 1887")
    assert not has_answer(row["answers"], text)  # as plain answers
    assert judge("1987, I think", answers) == (True, 1)
    assert judge("in 1987", answers) == (False, 0)
    row["answers"] = ["(19"]
    with pytest.raises(InputError, match=r"example 1 \(line 1\): '\(19' is no regular expression"):
        load_data(written(path, row), regex_answers=True)
    row["answers"] = ["(a+)+$"]
    slow = read_example(load_data(written(path, row), regex_answers=True), 0).answers
    assert not has_answer(slow, "ab")


def test_empty_answers_are_counted(tmp_path, caplog):
    rows = [{"question": "a", "answers": ["", " "]}, {"question": "b", "answers": ["", "I"]}]
    load_data(written(tmp_path / "a.json", rows))
    assert "1 of 2 questions of" in caplog.text
