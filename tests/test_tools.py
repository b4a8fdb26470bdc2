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
from src.tools import evaluate, fuse, split_documents

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
    data = [
        {
            "id": q,
            "question": "?",
            "ctxs": [{"id": p, "text": "", "score": s} for p, s in found.items()],
        }
        for q, found in read_run(run).items()
    ]
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "qrels").write_text(
        "\n".join(f"{q} 0 {p} {r}" for q, judged in QRELS.items() for p, r in judged.items())
    )
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


@pytest.mark.parametrize(
    ("files", "options", "problem"),
    [
        ({"a": "q Q0 d 1 high x"}, ["--qrels", "a"], "line 1: a line of qrels must be question"),
        (
            {"a": "q Q0 d 1 high x", "b": "q 0 d 1"},
            ["--qrels", "b"],
            "line 1: a line of a run must",
        ),
        ({"a": "q Q0 d 1 1 x", "b": "r 0 d 1"}, ["--qrels", "b"], "no question of the run is in"),
        ({"a": "x"}, [], "a: to judge answers, --data must name"),
        ({"a": "x"}, ["--compare"], "--compare needs two files, not 1"),
        ({"a": "x"}, ["--k", "5,0"], "0 must be at least 1"),
    ],
)
def test_files_that_cannot_be_judged(files, options, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as exited:
        evaluate.main(["a", *options])
    assert exited.value.code == 2
    assert problem in capsys.readouterr().err


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
            assert (c["text"], c["url"], c["hasanswer"]) == (
                f"text {c['id']}",
                c["id"],
                c["id"] == "y",
            )
    assert list(found.items()) == [(name, pytest.approx(score)) for name, score in expected.items()]


def test_files_that_cannot_be_fused(run, tmp_path, capsys):
    row = {"id": "q1", "question": "?", "ctxs": [{"id": "d", "text": ""}]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "b.json").write_text(json.dumps([{**row, "question": "!"}]))
    (tmp_path / "c.json").write_text(json.dumps([{**row, "ctxs": [{"text": ""}]}]))
    for files, more, problem in (
        (["a.json", "run.trec"], [], "run.trec: a TREC run has no texts: fuse into a run"),
        (["a.json", "b.json"], [], "b.json, example 1 (line 1): not question q1 of"),
        (["a.json", "c.json"], [], 'passage 1: an "id" is needed to tell passages apart'),
        (["a.json"], [], "give at least two files to fuse"),
        (["a.json", "a.json"], ["--weights", "1"], "--weights must be 2 numbers"),
    ):
        with pytest.raises(SystemExit):
            fuse.main(
                [str(tmp_path / f) for f in files] + ["-o", str(tmp_path / "out.json"), *more]
            )
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "out.json").exists()


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
    (folder / "b.md").write_text("intro\n# The title #\n\nsix seven\n")
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
    {"id": "b.md-0", "title": "The title", "text": "intro The title six"},
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


@pytest.mark.parametrize(
    ("name", "content", "more", "problem"),
    [
        ("a.txt", b"text \0\1", [], "a.txt: byte 5 is 0; not a text file"),
        ("a.txt", "na\u00efve".encode("latin-1"), [], "a.txt: byte 2 is not UTF-8 text; re-encode"),
        ("a.txt", b"", [], "a.txt: no text in these files"),
        ("a.txt", b"x" * 3_000_000, [], "a.txt: a word of 1,048,576 bytes; is this text?"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', [], "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"contents": 3}', [], "object 0 (from 0): its contents and title must be"),
        ("a.jsonl", b'{"text": "a"}', ["--text_field", "main"], "its main and title must be texts"),
        ("a.txt.gz", b"not gzip", [], "a.txt.gz: cannot be read"),
        ("a.txt", b"a", ["--overlap", "100"], "--overlap 100 must be less than --words 100"),
        ("a.txt", b"a", ["-o", "p.csv"], "its name must end in .tsv or .jsonl"),
        ("", b"", [], "no documents (.txt, "),
    ],
)
def test_documents_that_cannot_be_split(name, content, more, problem, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    if name:
        (tmp_path / "docs" / name).write_bytes(content)
    output = tmp_path / "p.jsonl"
    with pytest.raises(SystemExit) as exited:
        split_documents.main([str(tmp_path / "docs" / name), "-o", str(output), *more])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not output.exists()
