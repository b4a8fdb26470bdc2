"""Data files: the same examples as `json` reads, whatever their layout; what is broken is named."""

import contextlib
import csv
import json
import multiprocessing
import os
import pickle
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.data import examples as module
from src.data import json_files
from src.data.examples import Examples, load_data, parse_example, read_example
from src.runtime.errors import InputError


@pytest.fixture(params=[1 << 24, 64, 5])
def chunk(request, monkeypatch):
    """Small chunks put every kind of boundary in the middle of every kind of thing."""
    monkeypatch.setattr(json_files, "_CHUNK", request.param)


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


@pytest.mark.parametrize("seed", range(20))
def test_random_lists_and_lines_equal_json(seed, tmp_path, chunk):
    rng = random.Random(seed)
    items = [{"x": random_value(rng, 0)} for _ in range(rng.randrange(1, 12))]
    layouts = {
        "a.json": json.dumps(items),
        "b.json": "\n " + json.dumps(items, indent=2, ensure_ascii=False) + "\n\n",
        "c.json": "\ufeff" + json.dumps(items, separators=(",", ":")),
        "d.jsonl": "\n".join(map(json.dumps, items)),
        "e.jsonl": "\n\n  \n".join(map(json.dumps, items)) + "\n",
        "f.jsonl": "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items),
    }
    for name, text in layouts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        opened = Examples(tmp_path / name)
        assert [opened[i] for i in range(len(opened))] == items, name
        again = pickle.loads(pickle.dumps(opened))  # as it travels to a data-loading worker
        assert [again[i] for i in range(len(again))] == items


def test_the_references_data(reference: Path):
    data = load_data(reference / "data.json")
    assert [data[i] for i in range(len(data))] == json.loads((reference / "data.json").read_text())
    example = read_example(data, 1)
    scores = [float(context["score"]) for context in data[1]["ctxs"]]
    assert [passage.score for passage in example.passages] == sorted(scores, reverse=True)
    assert [scores[passage.place] for passage in example.passages] == sorted(scores, reverse=True)


def test_xquad(xquad: Path):
    data = load_data(xquad / "questions.json")
    assert len(data) == 1190
    assert all(read_example(data, i).answers for i in range(len(data)))


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


@pytest.mark.parametrize("seed", range(20))
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
        again = pickle.loads(pickle.dumps(opened))
        assert [again[i] for i in range(len(again))] == wanted


def test_rows_as_they_stand_in_dprs_files(tmp_path):
    file = tmp_path / "nq-test.csv"
    file.write_text(
        "who sings does he love me with reba\t['Linda Davis']\n"
        "what is \"ps\" in a letter\t['post\\'scriptum', \"it's\"]\r\n"
        '"""what\'s up"" by who"\t"[\'4 Non Blondes\', \'the ""band""\']"\n'
        "\n"
        "how deep is it\t[]"
    )
    examples = [read_example(load_data(file), index) for index in range(4)]
    assert [(example.id, example.question, example.answers) for example in examples] == [
        ("0", "who sings does he love me with reba", ["Linda Davis"]),
        ("1", 'what is "ps" in a letter', ["post'scriptum", "it's"]),
        ("2", '"what\'s up" by who', ["4 Non Blondes", 'the "band"']),
        ("3", "how deep is it", []),
    ]


def test_lines_of_json_may_have_any_name(tmp_path):
    for name in ("a.txt", "a.tsv", "a"):
        for text in (line(), f"[{line()}]"):
            (tmp_path / name).write_text(text)
            assert load_data(tmp_path / name)[0] == json.loads(line())


def test_nq_opens_and_beirs_names_become_ours(tmp_path):
    file = tmp_path / "queries.jsonl"
    theirs = {"_id": "PLAIN-2", "text": "Do statins help?", "metadata": {"url": "http"}}
    file.write_text(json.dumps(theirs) + '\n{"question": "who?", "answer": ["I", "we"]}')
    data = load_data(file)
    assert data[0] == {"id": "PLAIN-2", "question": theirs["text"], "metadata": theirs["metadata"]}
    assert read_example(data, 0).id == "PLAIN-2"
    assert data[1] == {"question": "who?", "answers": ["I", "we"]}
    ours = {"_id": "x", "id": "y", "text": "t", "question": "Who?", "answer": "A", "answers": []}
    file.write_text(json.dumps(ours))
    assert load_data(file)[0] == ours  # what has our names keeps all it has


BROKEN_ROWS = {
    "one column": ("who", "a row must be a question, a tab and a list"),
    "three columns": ("who\t['I']\tthree", "a row must be a question, a tab and a list"),
    "an open quote mark": ('"who\t[\'I\']', "a row must be a question, a tab and a list"),
    "a quote mark open at the end": ('who\t"[\'I\']', "a row must be a question, a tab and a list"),
    "a header": ("question\tanswers", "list of texts like .*, not 'answers'"),
    "answers as text": ("who\tI", "list of texts"),
    "a number among the answers": ("who\t['I', 7]", "list of texts"),
    "lists in lists": ("who\t" + "[" * 99_999, "list of texts"),
    "a call": ("who\t[__import__('os').system('echo a stranger was here')]", "list of texts"),
    "a sum": ("who\t['I' + 'II']", "list of texts"),
    "bytes": ("who\t[b'I']", "list of texts"),
    "a cut list": ("who\t['I', 'II", "list of texts"),
    "a false escape": ("who\t['\\x1']", "list of texts"),
    "half a character": ("who\t['\\ud83d']", r"'.ud83d' is half a character"),
    "half a character said otherwise": ("who\t['\\U0000d83d']", r"'.ud83d' is half a character"),
    "a field without end": ("who" * 50_000 + "\t['I']", "not a row of TSV .*limit"),
    "not UTF-8": (b"caf\xe9\t['I']", "not UTF-8"),
    "no question": ("\t['I']", '"question" must be text'),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_ROWS)
def test_broken_rows_are_named_with_line_and_value(case, tmp_path, chunk):
    content, message = BROKEN_ROWS[case]
    file = tmp_path / "nq-test.csv"
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(b"who is it\t['I']\n" + content + b"\n")
    with pytest.raises(InputError, match=f"^{file}, .*line 2.*: .*{message}") as caught:
        load_data(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


# ----------------------------------------------------------------------------------------------


def test_passages_are_read_by_score_and_those_without_last():
    scores = [None, "1.5", 2, None, -3.0, 2.0]
    contexts = [{"text": str(i), "score": score} for i, score in enumerate(scores)]
    passages = parse_example({"question": "?", "ctxs": contexts}, 0, "").passages
    assert [passage.place for passage in passages] == [2, 5, 1, 4, 0, 3]
    contexts = [{"text": str(i)} for i in range(3)]
    passages = parse_example({"question": "?", "ctxs": contexts}, 0, "").passages
    assert [passage.place for passage in passages] == [0, 1, 2]


def line(**changes) -> str:
    return json.dumps({"question": "Who?", "answers": ["I"], "ctxs": [], **changes})


BROKEN = {
    "empty file": ("", "empty"),
    "only spaces": ("  \n \n", "empty"),
    "empty list": ("[]", "no examples"),
    "cut list": (f"[{line()},\n{line()[:-9]}", "cut off"),
    "missing comma": (f"[{line()}\n{line()}]", "line 1.*comma"),
    "two commas": (f"[{line()},\n,{line()}]", "line 1.*comma"),
    "a number in the list": (f"[{line()},\n3,\n{line()}]", "line 1.*comma"),
    "text after the list": (f"[{line()}]\n\nx", "line 3.*after the list"),
    "a second list": (f"[{line()}]\n[{line()}]", "line 2"),
    "brackets that do not match": (f"[{line()}]]", "line 1.*(after the list|unmatched)"),
    "bad line": (f"{line()}\n{line()[:-2]}\n{line()}", "line 2.*bad JSON"),
    "bad item": (f'[{line()},\n{line()},\n {{"question": x}}]', "line 3.*bad JSON"),
    "not UTF-8": (b'{"question": "x"}\n{"question": "caf\xe9"}', "line 2.*UTF-8"),
    "a line that is no object": (f"{line()}\n[1]", "line 2.*object"),
    "no question": (line() + '\n{"answers": ["I"]}', "example 2 .line 2.*question.*None"),
    "blank question": (line(question=" "), "question"),
    "question of another kind": (line(question=["Who?"]), "question.*Who"),
    "answers as text": (line(answers="I"), "answers.*list"),
    "an answer that is no text": (line(answers=["I", 7]), "answer must be text, not 7"),
    "target that is no text": (line(target=7), "target.*7"),
    "ctxs that are no list": (line(ctxs={"text": "t"}), "ctxs.*list"),
    "a context that is no object": (line(ctxs=["text"]), "passage 1"),
    "a context without text": (line(ctxs=[{"text": "t"}, {"title": "t"}]), "passage 2.*text.*None"),
    "a title that is no text": (line(ctxs=[{"text": "t", "title": 1}]), "title.*1"),
    "a score that is no number": (line(ctxs=[{"text": "t", "score": "high"}]), "score.*high"),
    "a score that is nan": (line(ctxs=[{"text": "t", "score": "nan"}]), "score.*nan"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_line_and_value(case, tmp_path, chunk):
    content, message = BROKEN[case]
    file = tmp_path / "data.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_data(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read \(No such file"):
        load_data(tmp_path / "nowhere.json")


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


def test_a_bar_counts_the_examples_of_its_process(tmp_path, counting):
    opened, counts, bar = counting
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([line()] * 5))
    load_data(file, rank=1, world_size=2, bar=bar)
    assert opened == [(2, "example", "checking examples")]
    assert counts == [1, 1]


@pytest.fixture
def several_processes(monkeypatch):
    """Files of any size are checked by three processes."""
    monkeypatch.setattr(module, "_BYTES_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(module, "_cpus", lambda: 3)


@pytest.mark.usefixtures("several_processes")
@pytest.mark.parametrize("broken", [[], [700], [3], [699, 250, 701]])
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
def test_a_process_that_checks_and_dies_is_not_taken_for_well(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}?"}) for i in range(30)))
    parse = module.parse_example

    def deadly(raw: dict, index: int, where: str) -> module.Example:
        if index == 16:
            os._exit(9)
        return parse(raw, index, where)

    monkeypatch.setattr(module, "parse_example", deadly)
    with pytest.raises(RuntimeError, match="status 9"):
        load_data(path)


@pytest.mark.usefixtures("several_processes")
def test_an_interrupt_ends_the_processes_that_check(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}?"}) for i in range(900)))
    monkeypatch.setattr(module, "read_example", lambda *_: signal.pause())  # takes for ever

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.multiprocessing.connection, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_data(path)
    assert not multiprocessing.active_children()
