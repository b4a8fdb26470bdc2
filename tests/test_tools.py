"""Evaluation by qrels, fusion and splitting, from a shell."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest

from src.data.passages import Passages
from src.data.trec import read_qrels, read_run
from src.evaluation.relevance import compare, judge_run
from src.tools import evaluate, fuse, split_documents, targets
from src.tools.report import __main__ as report

# What pytrec_eval 0.5.11 gives: nDCG@10, MRR, MAP, recall@1, recall@5 (q4 is not in the run).
RUN = """q1 Q0 d 1 2 x
q1 Q0 a 2 1 x
q1 Q0 b 3 1 x
q1 Q0 c 4 1.00000001 x
q2 Q0 z 1 1 x
q2 Q0 a 2 0.5 x
q3 Q0 b 1 1 x
q5 Q0 a 1 1 x
q5 Q0 b 2 0.9 x
q5 Q0 c 3 0.8 x
q6 Q0 a 1 1 x
"""
QRELS = {
    "q1": {"a": 2, "b": 1, "c": 0, "x": 1},  # a tie, also in float32
    "q2": {"z": 0},  # nothing is relevant
    "q3": {"a": 1},
    "q4": {"m": 1},
    "q5": {"a": -1, "b": 3, "c": 2},
}
EXPECTED = {
    "q1": [0.4348079399079101, 0.3333333333333333, 0.27777777777777773, 0.0, 0.6666666666666666],
    "q2": [0, 0, 0, 0, 0],
    "q3": [0, 0, 0, 0, 0],
    "q5": [0.6787622294601761, 0.5, 0.5833333333333333, 0, 1],
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.trec").write_text(RUN)
    return tmp_path / "run.trec"


@pytest.mark.parametrize("kind", ["trec", "beir", "gz"])
def test_measures_are_pytrec_evals(kind, run, tmp_path):
    rows = [(q, p, relevance) for q, judged in QRELS.items() for p, relevance in judged.items()]
    lines = [f"{q}\t{p}\t{r}" if kind == "beir" else f"{q} 0 {p} {r}" for q, p, r in rows]
    text = "\n".join(["query-id\tcorpus-id\tscore"] * (kind == "beir") + lines)
    path = tmp_path / ("qrels.gz" if kind == "gz" else "qrels.tsv")
    path.write_bytes(gzip.compress(text.encode()) if kind == "gz" else text.encode())
    assert read_qrels(path) == QRELS
    questions, values = judge_run(read_run(run), read_qrels(path), [1, 5])
    assert list(values) == ["nDCG@10", "MRR@10", "MAP", "recall@1", "recall@5"]
    found = dict(zip(questions, np.stack(list(values.values()), axis=1).tolist(), strict=True))
    assert found == {question: pytest.approx(row, abs=1e-12) for question, row in EXPECTED.items()}


def test_ranks_beyond_ten():
    scores = {f"d{n:02}": -n for n in range(30)}
    _, values = judge_run({"q": scores}, {"q": {"d10": 1}}, [10, 11])
    assert [float(value[0]) for value in values.values()] == [0, 0, pytest.approx(1 / 11), 0, 1]


def test_qrels_from_a_shell(run, tmp_path, capsys):
    """A data file with the run's passages gives the run's figures, under `--compare` p = 1."""
    data = []
    for question, found in read_run(run).items():
        contexts = [{"id": p, "text": "", "score": score} for p, score in found.items()]
        data.append({"id": question, "question": "?", "ctxs": contexts})
    (tmp_path / "data.json").write_text(json.dumps(data))
    lines = [f"{q} 0 {p} {r}\n" for q, judged in QRELS.items() for p, r in judged.items()]
    (tmp_path / "qrels").write_text("".join(lines))
    files = [str(tmp_path / "data.json"), str(run)]
    evaluate.main([*files, "--qrels", str(tmp_path / "qrels"), "--k", "5,1", "--compare"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    means = [f"{100 * np.mean(column):.2f}" for column in zip(*EXPECTED.values(), strict=True)]
    assert [line.split()[1:] for line in lines[1:3]] == [["4", *means]] * 2
    assert lines[6].split() == ["nDCG@10", "+0.00", "+0.00", "to", "+0.00", "1.0000"]
    assert f"{run}: 1 question of {tmp_path}/qrels not found" in err


def test_paired_bootstrap():
    """The interval is that of the normal approximation; p is small only for a real difference."""
    rng = np.random.default_rng(1)
    before = rng.random(400) < 0.5
    after = before | (rng.random(400) < 0.1)
    mean, low, high, p = compare(after, before)
    differences = after.astype(float) - before
    error = 1.96 * differences.std() / 20
    assert mean == pytest.approx(differences.mean())
    assert [low, high] == pytest.approx([mean - error, mean + error], abs=0.004)
    assert p < 0.001
    assert compare(after, before) == (mean, low, high, p)
    assert compare(before, rng.permutation(before))[3] > 0.05


def test_bootstrap_of_known_cases():
    """Of two questions, one gained: a mean of 0, 1/2 or 1 is drawn with odds of 1 : 2 : 1, and
    half of the draws are as far from 1/2 as 1/2 is from 0. A difference without spread is sure."""
    mean, low, high, p = compare(np.array([1, 1]), np.array([0, 1]))
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    assert p == pytest.approx(0.5, abs=0.02)
    assert compare(np.ones(9), np.zeros(9)) == (1.0, 1.0, 1.0, 1 / 10_001)
    assert compare(np.ones(9), np.ones(9)) == (0.0, 0.0, 0.0, 1.0)


# ----------------------------------------------------------------------------------------------
# Fusion

A = {"x": 9.0, "y": 5.0, "z": 1.0}
B = {"y": 0.3, "w": 0.1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"y": 1 / 62 + 1 / 61, "x": 1 / 61, "w": 1 / 62, "z": 1 / 63}),
        (["--rrf_k", "0", "--weights", "3", "1", "--n-docs", "2"], {"x": 3.0, "y": 2.5}),
        (["--method", "sum", "--weights", "1", "2"], {"y": 2.5, "x": 1.0, "z": 0.0, "w": 0.0}),
    ],
)
@pytest.mark.parametrize("output", ["c.trec", "c.json", "c.jsonl"])
def test_fusion(options, expected, output, tmp_path):
    for name, scores in (("a", A), ("b", B)):
        contexts = [{"id": p, "text": f"text {p}", "url": p, "score": s} for p, s in scores.items()]
        rows = [{"id": "q", "question": "?", "answers": ["y"], "ctxs": contexts}]
        rows += [{"id": "r", "question": "r", "answers": ["y"], "ctxs": []}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    fuse.main([*files, "-o", str(tmp_path / output), *options])
    if output == "c.trec":
        found = read_run(tmp_path / output)["q"]
    else:
        text = (tmp_path / output).read_text()
        rows = json.loads(text) if output == "c.json" else list(map(json.loads, text.splitlines()))
        assert rows[1] == {"id": "r", "question": "r", "answers": ["y"], "ctxs": []}
        found = {context["id"]: context["score"] for context in rows[0]["ctxs"]}
        for c in rows[0]["ctxs"]:
            name = c["id"]
            assert (c["text"], c["url"], c["hasanswer"]) == (f"text {name}", name, name == "y")
    assert list(found.items()) == [(name, pytest.approx(score)) for name, score in expected.items()]


# ----------------------------------------------------------------------------------------------
# Splitting


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("pieces", [1, 7])
def test_passages_are_windows_of_words(overlap, pieces):
    words = [f"w{n}" for n in range(103)]
    cuts = np.linspace(0, len(words), pieces + 1).astype(int)
    text = [" \n".join(words[a:b]) + "\t" for a, b in itertools.pairwise(cuts)]
    found = [passage.split() for passage in split_documents.split(text, 10, overlap)]
    step = 10 - overlap
    assert found == [words[n : n + 10] for n in range(0, len(words) - overlap, step)]
    assert all(a[step:] == b[:overlap] for a, b in itertools.pairwise(found))


def test_passages_end_with_sentences_where_one_ends():
    rng = random.Random(0)
    words = [f"w{n}" + rng.choice(["", "", "", "."]) for n in range(500)]
    found = list(split_documents.split([" ".join(words)], 8, 0, sentences=True))
    assert " ".join(found).split() == words
    for passage in found[:-1]:
        assert passage.endswith(".") or ("." not in passage and len(passage.split()) == 8)
    text = 'He said "no." Then he left the room at once'
    assert next(split_documents.split([text], 5, 0, sentences=True)) == 'He said "no."'


def write_documents(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("one two three four five")
    (folder / "b.md").write_text("# The title #\n\nintro six\nseven\n")
    rows = [{"_id": 7, "title": "T", "body": "eight\nnine", "url": "u"}, {"text": 'ten "q"'}]
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "d.json").write_text(json.dumps([{"id": "d", "title": "D", "text": "eleven"}]))
    (folder / "wiki_00").write_text(
        '<doc id="12" url="https://x" title="A &amp; B">\nA & B\n\ntwelve.\n</doc>\n'
    )
    (folder / "empty.txt").write_text("")
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    return folder


ROWS = [
    {"id": "a.txt-0", "title": "a", "text": "one two three four"},
    {"id": "a.txt-1", "title": "a", "text": "five"},
    {"id": "b.md-0", "title": "The title", "text": "The title intro six"},
    {"id": "b.md-1", "title": "The title", "text": "seven"},
    {"id": "7-0", "title": "T", "text": "eight nine", "url": "u"},
    {"id": "c.jsonl.gz-1-0", "title": "", "text": 'ten "q"'},
    {"id": "d-0", "title": "D", "text": "eleven"},
    {"id": "12-0", "title": "A & B", "text": "twelve.", "url": "https://x"},
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl"])
def test_documents_of_every_kind(workers, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(split_documents, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(split_documents, "_BATCH", 1)
    monkeypatch.setattr(split_documents, "_CHUNK", 9)  # texts are read while they are split
    folder, output = write_documents(tmp_path / "docs"), tmp_path / name
    split_documents.main(
        [str(folder), "-o", str(output), "--words", "4", "--workers", str(workers)]
    )
    assert "skipped 1 file of other kinds" in capsys.readouterr().out
    found = [{"id": p.id, "title": p.title, "text": p.text, **p.more} for p in Passages(output)]
    if name == "p.tsv":
        assert found == [{k: row[k] for k in ("id", "title", "text")} for row in ROWS]
    else:
        assert found == ROWS


# ----------------------------------------------------------------------------------------------
# Bad input

ROW = {"id": "q1", "question": "?", "ctxs": [{"id": "d", "text": ""}]}
FILES = {
    "bad.run": "q Q0 d 1 high x", "good.run": "q Q0 d 1 1 x", "qrels": "q 0 d 1",
    "other": "r 0 d 1",
    "a.json": json.dumps([ROW]), "b.json": json.dumps([{**ROW, "question": "!"}]),
    "c.json": json.dumps([{**ROW, "ctxs": [{"text": ""}]}]),
    "zero.txt": b"text \0\1", "latin.txt": "na\u00efve".encode("latin-1"), "empty.txt": "",
    "word.txt": "x" * 3_000_000, "cut.jsonl": '{"text": "a"}\n{"text"', "a.txt.gz": "not gzip",
    "number.jsonl": '{"contents": 3}', "a.jsonl": '{"text": "a"}', "docs/image.png": "",
    "deep.jsonl": "[" * 100_000,
    "scores.json": json.dumps([{**ROW, "ctxs": [{"text": "", "scores": {"attention": "high"}}]}]),
}  # fmt: skip
JUDGE, FUSE, SPLIT = (
    (tool, f"{options} " if options else "")
    for tool, options in ((evaluate, ""), (fuse, "-o out.json"), (split_documents, "-o out.jsonl"))
)
BAD = [
    (JUDGE, "bad.run --qrels bad.run", "line 1: a line of qrels must be question"),
    (JUDGE, "bad.run --qrels qrels", "line 1: a line of a run must"),
    (JUDGE, "good.run --qrels other", "no question of the run is in"),
    (JUDGE, "nowhere", "nowhere: cannot be read (No such file or directory)"),
    (JUDGE, "good.run", "good.run: to judge answers, --data must name"),
    (JUDGE, "good.run --compare", "--compare needs two files, not 1"),
    (JUDGE, "good.run --k 5,0", "0 must be at least 1"),
    (FUSE, "a.json good.run", "good.run: a TREC run has no texts: fuse into a run"),
    (FUSE, "a.json b.json", "b.json, example 1 (line 1): not question q1 of"),
    (FUSE, "a.json c.json", 'passage 1: an "id" is needed to tell passages apart'),
    (FUSE, "a.json", "give at least two files to fuse"),
    (FUSE, "a.json a.json --weights 1", "--weights must be 2 numbers"),
    (FUSE, "a.json a.json -o a.json", "a.json is a file that this command reads"),
    ((report, ""), "a.json -o a.json", "a.json is a file that this command reads"),
    ((targets, ""), "scores.json", '(line 1): a passage\'s "scores" must be numbers'),
    (SPLIT, "a.jsonl -o a.jsonl", "a.jsonl is a file that this command reads"),
    (SPLIT, "deep.jsonl", "deep.jsonl, line 1: not JSON"),
    (SPLIT, "zero.txt", "zero.txt: byte 5 is 0; not a text file"),
    (SPLIT, "latin.txt", "latin.txt: byte 2 is not UTF-8 text; re-encode"),
    (SPLIT, "empty.txt", "empty.txt: no text in these files"),
    (SPLIT, "word.txt", "word.txt: a word of 1,048,576 bytes; is this text?"),
    (SPLIT, "cut.jsonl", "cut.jsonl, line 2: not JSON"),
    (SPLIT, "number.jsonl", "object 0 (from 0): its contents and title must be"),
    (SPLIT, "a.jsonl --text_field main", "its main and title must be texts"),
    (SPLIT, "a.txt.gz", "a.txt.gz: cannot be read"),
    (SPLIT, "a.jsonl --overlap 100", "--overlap 100 must be less than --words 100"),
    (SPLIT, "a.jsonl -o p.csv", "its name must end in .tsv or .jsonl"),
    (SPLIT, "docs", "docs: no documents (.txt, "),
    (SPLIT, "nowhere", "nowhere: no documents (.txt, "),
]


@pytest.mark.parametrize(("tool", "options", "problem"), BAD)
def test_bad_input_is_one_line(tool, options, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name, content in FILES.items():
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    module, output = tool
    with pytest.raises(SystemExit) as exited:
        module.main((output + options).split())
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1 or "usage: " in error
    assert not list(tmp_path.glob("out.*"))
