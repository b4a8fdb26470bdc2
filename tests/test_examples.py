"""Data files: the same examples as `json` reads, in any layout; errors name line and value."""

import contextlib
import csv
import json
import logging
import multiprocessing
import os
import random
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.data import examples as module
from src.data import files
from src.data.batches import ReaderDataset, make_loader
from src.data.examples import (
    Examples,
    describe_passages,
    load_data,
    parse_example,
    read_example,
    skip_unscored,
)
from src.data.json_files import JsonItems, read_json
from src.data.passages import Passages
from src.runtime.errors import InputError


@pytest.fixture(params=[1 << 20, 5])
def chunk(request, monkeypatch):
    """Small chunks put every kind of boundary in the middle of every kind of thing."""
    monkeypatch.setattr(files, "_CHUNK", request.param)


def random_text(rng: random.Random) -> str:
    """Text with a liking for quotes, backslashes, brackets and line breaks."""
    return "".join(rng.choice('a"\\[]{},:\n\té日') for _ in range(rng.randrange(8)))


def random_value(rng: random.Random, depth: int):
    """Anything that JSON can hold."""
    kind = rng.randrange(6 if depth < 4 else 3)
    if kind == 0:
        return rng.choice([None, True, -1.5e3, 12])
    if kind <= 2:
        return random_text(rng)
    if kind == 3:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(8))
def test_random_lists_and_lines_equal_json(seed, tmp_path, chunk):
    rng = random.Random(seed)
    items = [{"x": random_value(rng, 0)} for _ in range(rng.randrange(1, 12))]
    around = {f"k{i}": random_value(rng, 1) for i in range(rng.randrange(4))}
    around['"Data": ['] = 'a "Data": [{"x": 1}] \\'
    layouts = {
        "a.json": json.dumps(items),
        "b.json": "\n " + json.dumps(items, indent=2, ensure_ascii=False) + "\n\n",
        "c.json": "\ufeff" + json.dumps(items, separators=(",", ":")),
        "d.jsonl": "\n".join(map(json.dumps, items)),
        "e.jsonl": "\n\n  \n".join(map(json.dumps, items)) + "\n",
        "f.jsonl": "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items),
        "g.json": json.dumps({"Data": items, **around}),  # as TriviaQA has it
        "h.json": json.dumps({"Data": items, **around}, indent=2, ensure_ascii=False),
    }
    for name, text in layouts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        opened = Examples(tmp_path / name)
        assert [opened[i] for i in range(len(opened))] == items, name


def test_the_references_data(reference: Path):
    data = load_data(reference / "data.json")
    assert [data[i] for i in range(len(data))] == json.loads((reference / "data.json").read_text())
    example = read_example(data, 1)
    scores = [float(context["score"]) for context in data[1]["ctxs"]]
    ordered = sorted(scores, reverse=True)
    assert [passage.score for passage in example.passages] == ordered
    assert [scores[passage.position] for passage in example.passages] == ordered


def test_what_may_be_missing():
    example = parse_example({"question": "Who?"}, 7, "")
    assert (example.id, example.target, example.answers, example.passages) == ("7", None, [], [])
    context = {"text": "t"}
    assert parse_example({"question": "Who?", "ctxs": [context]}, 0, "").passages[0].title == ""
    example = parse_example({"id": 12, "question": "Who?", "target": "x"}, 0, "")
    assert (example.id, example.target) == ("12", "x")


# ----------------------------------------------------------------------------------------------
# Other people's questions


def write_dpr(rows: list[tuple[str, list[str]]], file: Path, newline: str = "\n") -> Path:
    """Questions as DPR writes its `nq-test.csv`: by `csv`, the answers by `str`."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, delimiter="\t", lineterminator=newline)
        writer.writerows((question, str(answers)) for question, answers in rows)
    return file


@pytest.mark.parametrize("seed", range(8))
def test_dprs_questions_are_what_was_written(seed, tmp_path, chunk):
    rng = random.Random(seed)

    def text() -> str:  # a line of its own: no line breaks, but whatever quotes there are
        return "".join(rng.choice("a\"'\\[],é日\t ") for _ in range(rng.randrange(8)))

    rows = [
        (
            f"who {text()}",
            [f"{text()}\n" * rng.randrange(2) + text() for _ in range(rng.randrange(4))],
        )
        for _ in range(rng.randrange(1, 9))
    ]
    wanted = [{"question": question, "answers": answers} for question, answers in rows]
    for name, newline in (("a.csv", "\r\n"), ("b.tsv", "\n"), ("c.txt", "\n")):
        opened = Examples(write_dpr(rows, tmp_path / name, newline))
        assert [opened[i] for i in range(len(opened))] == wanted


def test_lines_of_json_may_have_any_name(tmp_path):
    for name in ("a.txt", "a.tsv", "a"):
        for text in (line(), f"[{line()}]"):
            (tmp_path / name).write_text(text)
            assert load_data(tmp_path / name)[0] == json.loads(line())


def test_what_has_our_names_keeps_all_it_has(tmp_path):
    file = tmp_path / "queries.jsonl"
    ours = {"_id": "x", "id": "y", "text": "t", "question": "Who?", "answer": "A", "answers": []}
    file.write_text(json.dumps(ours))
    assert load_data(file)[0] == ours


BROKEN_ROWS = {  # the second row of a .csv
    "one column": ("who", "a row must be a question, a tab and a list"),
    "an open quote mark": ('"who\t[\'I\']', "a row must be a question, a tab and a list"),
    "a header": ("question\tanswers", "list of texts like .*, not 'answers'"),
    "answers as text": ("who\tI", "list of texts"),
    "lists in lists": ("who\t" + "[" * 99_999, "list of texts"),
    "a call": ("who\t[__import__('os').system('echo a stranger was here')]", "list of texts"),
    "a sum": ("who\t['I' + 'II']", "list of texts"),
    "a false escape": ("who\t['\\x1']", "list of texts"),
    "a surrogate": ("who\t['\\ud83d']", r"'.ud83d' is an unpaired surrogate"),
    "a carriage return": ("who\ris it\t['I']", "not a row of TSV .*new-line character"),
}  # fmt: skip


def test_passages_are_read_by_score_and_those_without_last():
    scores = [None, "1.5", 2, None, -3.0, 2.0]
    contexts = [{"text": str(i), "score": score} for i, score in enumerate(scores)]
    passages = parse_example({"question": "?", "ctxs": contexts}, 0, "").passages
    assert [passage.position for passage in passages] == [2, 5, 1, 4, 0, 3]
    contexts = [{"text": str(i)} for i in range(3)]
    passages = parse_example({"question": "?", "ctxs": contexts}, 0, "").passages
    assert [passage.position for passage in passages] == [0, 1, 2]


def line(**changes) -> str:
    return json.dumps({"question": "Who?", "answers": ["I"], "ctxs": [], **changes})


BROKEN = {
    "empty file": ("", "empty"),
    "empty list": ("[]", "no examples"),
    "cut list": (f"[{line()},\n{line()[:-9]}", "cut off"),
    "missing comma": (f"[{line()}\n{line()}]", "line 1.*comma"),
    "a number in the list": (f"[{line()},\n3,\n{line()}]", "line 1.*comma"),
    "text after the list": (f"[{line()}]\n\nx", "line 3.*after its end"),
    "brackets that do not match": (f"[{line()}]]", "line 1.*(after its end|unmatched)"),
    "bad line": (f"{line()}\n{line()[:-2]}\n{line()}", "line 2.*bad JSON"),
    "bad item": (f'[{line()},\n{line()},\n {{"question": x}}]', "line 3.*bad JSON"),
    "a line that is no object": (f"{line()}\n[1]", "line 2.*object"),
    "lists in lists": ('{"question": ' + "[" * 100_000, "line 1: unreadable JSON .maximum rec"),
    "a number without end": ('{"x": ' + "1" * 5000 + "}", "line 1: unreadable JSON .Exceeds the"),
    "no question": (
        line() + '\n{"answers": ["I"]}',
        "example 2 .line 2.*no .question. among",
    ),
    "blank question": (line(question=" "), "question"),
    "question of another kind": (line(question=["Who?"]), "question.*Who"),
    "answers as text": (line(answers="I"), "answers.*list"),
    "an answer that is no text": (line(answers=["I", 7]), "answer must be text, not 7"),
    "ctxs that are no list": (line(ctxs={"text": "t"}), "ctxs.*list"),
    "a context that is no object": (line(ctxs=["text"]), "passage 1"),
    "a context without text": (line(ctxs=[{"text": "t"}, {"title": "t"}]), "passage 2.*text.*None"),
    "a score that is no number": (line(ctxs=[{"text": "t", "score": "high"}]), "score.*high"),
    "a score that is nan": (line(ctxs=[{"text": "t", "score": "nan"}]), "score.*nan"),
    "a cut list under a key": ('{"Data": [{"x": 1}, {"x"', "ends inside the object"),
    "a cut end": ('{"Data": [{"x": 1}]', "ends inside the object"),
    "more than one object": ('{"Data": [{"x": 1}]} {}', "bad JSON .text after its end"),
    "numbers under a key": ('{"Data": [1]}', "line 1.*there must be objects"),
    "nothing under a key": ('{"Data": []}', "no examples"),
}
BROKEN_FILES = [("data.json", *case) for case in BROKEN.values()]
BROKEN_FILES += [
    ("a.csv", f"who is it\t['I']\n{row}\n", f"line 2.*: .*{said}")
    for row, said in BROKEN_ROWS.values()
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN_FILES, ids=[*BROKEN, *BROKEN_ROWS])
def test_broken_files_are_named_with_line_and_value(name, content, message, tmp_path, chunk):
    file = tmp_path / name
    file.write_text(content, newline="")
    with pytest.raises(InputError, match=f"^{file}.*{message}") as caught:
        load_data(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_training_needs_something_to_train_on(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(line() + "\n" + line(answers=[]))
    load_data(file)
    with pytest.raises(InputError, match=r"example 2.*answers"):
        load_data(file, needs_target=True)


def test_each_process_checks_its_share(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([line(), line(question=3), line()]))
    assert len(load_data(file, rank=0, world_size=2)) == 3  # all are there; 0 and 2 were checked
    with pytest.raises(InputError, match="example 2"):
        load_data(file, rank=1, world_size=2)


@pytest.fixture
def counting():
    """A progress bar that counts: how it was opened, by how much it moved, and itself."""
    opened, counts = [], []

    def bar(*how: object) -> contextlib.AbstractContextManager:
        opened.append(how)
        return contextlib.nullcontext(SimpleNamespace(update=counts.append))

    return opened, counts, bar


@pytest.fixture
def several_processes(monkeypatch):
    """Files of any size are checked by three processes."""
    monkeypatch.setattr(module, "_BYTES_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(module, "available_cpus", lambda: 3)


@pytest.mark.usefixtures("several_processes")
@pytest.mark.parametrize("broken", [[], [3], [699, 250, 701]])
def test_examples_checked_by_several_processes(broken, tmp_path, counting):
    """As by one: all of them, or the error of the first broken one, whoever finds it."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"{i}?", "answers": ["a"]}) for i in range(702)]
    for index in broken:
        lines[index] = json.dumps({"question": index})
    path.write_text("\n".join(lines))
    opened, counts, bar = counting
    if broken:
        with pytest.raises(InputError) as error:
            load_data(path, needs_target=True, bar=bar)
        first = min(broken)
        assert str(error.value) == (
            f'{path}, example {first + 1} (line {first + 1}): "question" must be text, not {first}'
        )
    else:
        assert len(load_data(path, needs_target=True, bar=bar)) == 702
        assert opened == [(702, "example", "checking examples")]
        assert sum(counts) == 702
        assert max(counts) <= 100
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("several_processes")
def test_an_interrupt_ends_the_processes_that_check(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}?"}) for i in range(900)))

    def interrupted(*_: object) -> contextlib.AbstractContextManager:
        def update(n: int) -> None:
            raise KeyboardInterrupt

        return contextlib.nullcontext(SimpleNamespace(update=update))

    with pytest.raises(KeyboardInterrupt):
        load_data(path, bar=interrupted)
    assert not multiprocessing.active_children()


# ----------------------------------------------------------------------------------------------
# Files that change while they are read, or hold far less than their size


def test_a_worker_that_loads_data_reports_the_change(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([line()] * 40))
    dataset = ReaderDataset(load_data(path), 1)
    batches = iter(make_loader(dataset, [[(0, i)] for i in range(40)], list, num_workers=2))
    next(batches)
    os.truncate(path, 20)
    with pytest.raises(
        InputError, match=r"changed while it was being read; run the command again$"
    ):
        list(batches)


def test_more_workers_than_cpus_are_no_warning(tmp_path, monkeypatch, recwarn):
    (tmp_path / "data.jsonl").write_text(line())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    dataset = ReaderDataset(load_data(tmp_path / "data.jsonl"), 1)
    assert list(make_loader(dataset, [[(0, 0)]], list, num_workers=2))
    assert not [w for w in recwarn.list if "DataLoader" in str(w.message)]


@pytest.mark.parametrize("read", [load_data, read_json, Passages])
@pytest.mark.parametrize(
    "content", [b"", line().encode() + b"\n", b'[{"question": "', b"1\ttext\ttitle\n"]
)
def test_a_sparse_file_is_refused_at_once(content, read, tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    os.truncate(path, 5 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"a NUL byte, .*not UTF-8 text"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"[", b"[{", b'["', b"\\", b"\n", b'"'])
def test_memory_is_a_small_multiple_of_the_files_size(content, tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(content * ((8 << 20) // len(content)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"bad JSON|the file is empty|unreadable JSON"):
            load_data(path)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


# ----------------------------------------------------------------------------------------------
# Examples without passages


def test_questions_without_scored_passages_are_skipped(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    scored = [{"text": "a"}, {"text": "b", "score": 1}]
    contexts = [scored, [], None, scored, [{"text": "a"}], scored]
    path.write_text("\n".join(line(question=f"{i}?", ctxs=c) for i, c in enumerate(contexts)))
    caplog.set_level("INFO")
    log = logging.getLogger("fid")
    for world_size in (1, 2, 4):
        shares = [load_data(path, rank, world_size, needs_scores=1) for rank in range(world_size)]
        for examples in shares:
            left = skip_unscored(examples, [share.unscored for share in shares], log)
            assert [left[i]["question"] for i in range(len(left))] == ["0?", "3?", "5?"]
            assert left.where(1) == f"{path}, example 4 (line 4)"
    assert f"skipped 3 of 6 questions of {path} without scored passages" in caplog.text
    everything = load_data(path)
    assert everything.unscored == []


@pytest.mark.parametrize("name", ["positive_ctxs", "passages", "contexts", "hits"])
def test_data_without_passages_says_what_it_has(name, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([line(**{name: [{"text": "a"}]})] * 3))
    examples = load_data(path)
    fields = f"['question', 'answers', 'ctxs', '{name}']"
    found = f'no example has passages under "ctxs" (the first has {fields})'
    assert describe_passages(examples, 9) == f"questions alone: {found}"
    with pytest.raises(InputError) as caught:
        describe_passages(examples, 9, "score them")
    assert str(caught.value) == (
        f"{path}: {found}, but they are needed to score them; find some with passage_retrieval.py, "
        "or rename the field that holds them"
    )
    path.write_text(path.read_text() + "\n" + line(ctxs=[{"text": "a"}]))
    assert describe_passages(load_data(path), 9, "score them") == "at most 9 passages each"


@pytest.mark.parametrize("content", [b"\x0c", b"\x0b\n\x0c\n"])
def test_lines_of_other_white_space_alone(content, tmp_path):
    """Python takes form feeds for white space, JSON does not."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="there are no examples in this file"):
        JsonItems(path)
