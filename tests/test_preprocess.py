"""Preprocessing: JSON of other kinds by byte offsets, against `json`; what goes on after a stop;
what is broken; and memory. (That the right examples come out is in tests/test_get.py.)"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.data import files
from src.data.examples import Examples
from src.data.json_files import JsonItems, JsonLists
from src.runtime.errors import InputError
from src.tools import preprocess
from tests.conftest import ROOT, run
from tests.test_examples import random_text, random_value


@pytest.fixture(params=[1 << 20, 64, 5])
def chunk(request, monkeypatch):
    """Small chunks put every kind of boundary in the middle of every kind of thing."""
    monkeypatch.setattr(files, "_CHUNK", request.param)


# ----------------------------------------------------------------------------------------------
# JSON of other kinds


@pytest.mark.parametrize("seed", range(20))
def test_a_list_under_a_key_equals_json(seed, tmp_path, chunk):
    rng = random.Random(seed)
    items = [{"Data": random_value(rng, 0)} for _ in range(rng.randrange(1, 8))]
    around = {f"k{i}": random_value(rng, 1) for i in range(rng.randrange(4))}
    around['"Data": ['] = 'a "Data": [{"x": 1}] \\'
    names = [*around, "Data"]
    rng.shuffle(names)
    whole = {name: items if name == "Data" else around[name] for name in names}
    file = tmp_path / "data.json"
    for indent in (None, 2):
        file.write_text(json.dumps(whole, indent=indent, ensure_ascii=False), encoding="utf-8")
        opened = JsonItems(file, key="Data")
        assert [opened[i] for i in range(len(opened))] == items


@pytest.mark.parametrize("seed", range(20))
def test_lists_by_name_equal_json(seed, tmp_path, chunk):
    rng = random.Random(seed)
    lists = {
        random_text(rng) + str(i): [random_value(rng, 2) for _ in range(rng.randrange(4))]
        for i in range(rng.randrange(8))
    }
    file = tmp_path / "lists.json"
    layouts = [json.dumps(lists), "\ufeff\n" + json.dumps(lists, indent=1, ensure_ascii=False)]
    for text in layouts:
        file.write_text(text, encoding="utf-8")
        assert dict(JsonLists(file)) == lists
    assert JsonLists(file).get("no such name") is None


BROKEN_DATA = {
    "no list": ('{"Version": 1}', 'no list under "Data"'),
    "a list deeper down": ('{"x": {"Data": [{}]}}', 'no list under "Data"'),
    "a list after another": ('{"x": {"Data": [{}]}, "Data": [{}]}', 'no list under "Data"'),
    "a list in a list": ('[{"Data": [{}]}]', 'no list under "Data"'),
    "a cut list": ('{"Data": [{"x": 1}, {"x"', "ends inside the list"),
    "a cut end": ('{"Data": [{"x": 1}]', "bad JSON before or after the list"),
    "more than one object": ('{"Data": [{"x": 1}]} {}', "bad JSON before or after the list"),
    "numbers": ('{"Data": [1]}', "line 1.*must hold objects"),
    "nothing": ('{"Data": []}', "no examples"),
}


@pytest.mark.parametrize("case", BROKEN_DATA)
def test_broken_lists_under_a_key(case, tmp_path, chunk):
    text, message = BROKEN_DATA[case]
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match=r"data\.json.*" + message):
        JsonItems(tmp_path / "data.json", key="Data")


BROKEN_LISTS = {
    "a list": ('[["1"]]', "must hold an object of lists"),
    "text": ("x", "must hold an object of lists"),
    "a number": ('{"0": ["1"],\n"1": 7}', "line 1.*object of lists.*not ',\\\\n\"1\": 7'"),
    "a number before a list": ('{"0": 7, "1": ["1"]}', "object of lists"),
    "an object": ('{"0": {"1": []}}', "object of lists"),
    "a list without a name": ('{"0": ["1"], ["2"]}', "object of lists"),
    "no comma": ('{"0": ["1"] "1": ["2"]}', "object of lists"),
    "a comma at the start": ('{,"0": ["1"]}', "object of lists"),
    "a cut list": ('{"0": ["1"', "ends inside the object"),
    "a second object": ('{"0": ["1"]}\n{}', "line 2: bad JSON .text after the object's end"),
}


@pytest.mark.parametrize("case", BROKEN_LISTS)
def test_broken_objects_of_lists(case, tmp_path, chunk):
    text, message = BROKEN_LISTS[case]
    (tmp_path / "lists.json").write_text(text)
    with pytest.raises(InputError, match=r"lists\.json.*" + message):
        JsonLists(tmp_path / "lists.json")


# ----------------------------------------------------------------------------------------------
# Whole runs


def make_folder(folder: Path, n_passages: int, n_train: int, n_contexts: int) -> None:
    """What get-data.sh has before it calls preprocessing, of a size; dev and test are small."""
    downloads = folder / "download"
    for name in ("dataindex", "nq_passages", "tqa_passages", "triviaqa-unfiltered"):
        (downloads / name).mkdir(parents=True)
    rng = random.Random(0)
    words = [f"word{i}" for i in range(1000)]
    with open(folder / "psgs_w100.tsv", "w") as file:
        file.write("id\ttext\ttitle\n")
        for i in range(1, n_passages + 1):
            file.write(f"{i}\t{' '.join(rng.choices(words, k=100))}\tTitle {i}\n")
    for part in ("train", "dev"):
        nq = [{"question": f"{part} {i}?", "answer": [f"a {i}"]} for i in range(n_train)]
        lines = "".join(json.dumps(item) + "\n" for item in nq)
        (downloads / f"NQ-open.{part}.jsonl").write_text(lines)
        found = [{"Title": f"Page {i}", "Description": "x" * 100} for i in range(50)]
        tqa = [
            {
                "Question": f"{part} {i}?",
                "QuestionId": f"{part}_{i}",
                "Answer": {"Value": f"A {i}", "Aliases": [f"A {i}", "b"]},
                "SearchResults": found,
            }
            for i in range(n_train)
        ]
        path = downloads / "triviaqa-unfiltered" / f"unfiltered-web-{part}.json"
        path.write_text(json.dumps({"Data": tqa, "Version": 1.0}))
    for split, part in preprocess.PUBLISHED.items():
        rows = list(range(n_train if split == "train" else 5))
        for name in ("NQ", "TQA"):
            (downloads / "dataindex" / f"{name}.{split}.idx.json").write_text(json.dumps(rows))
            names = [str(row) if name == "NQ" else f"{part}_{row}" for row in rows]
            ids = {
                name: [str(rng.randrange(n_passages) + 1) for _ in range(n_contexts)]
                for name in names
            }
            path = downloads / f"{name.lower()}_passages" / f"{split}.json"
            path.write_text(json.dumps(ids))


@pytest.fixture
def folder(tmp_path) -> Path:
    make_folder(tmp_path / "data", 50, 12, 3)
    return tmp_path / "data"


def test_it_goes_on_where_it_was_stopped(folder, monkeypatch, capsys):
    """An example that fails leaves the splits before it, and nothing of its own."""
    read, seen = preprocess.read_tqa, []

    def stopped(questions: JsonItems, row: int, position: int) -> dict:
        seen.append(row)
        if len(seen) == 15:  # in the middle of dev
            raise RuntimeError("stopped")
        return read(questions, row, position)

    dataset = preprocess.DATASETS["tqa"]._replace(read=stopped)
    monkeypatch.setitem(preprocess.DATASETS, "tqa", dataset)
    with pytest.raises(RuntimeError, match="stopped"):
        preprocess.main([str(folder)])
    written = {str(path.relative_to(folder)) for path in folder.glob("*QA/*")}
    assert written == {"TQA/train.json"}
    before = (folder / "TQA" / "train.json").stat().st_mtime_ns
    preprocess.main([str(folder)])
    assert len(seen) == 15 + 5 + 5
    for name in ("NQ", "TQA"):
        assert [len(Examples(folder / name / f"{s}.json")) for s in preprocess.PUBLISHED] == [
            12,
            5,
            5,
        ]
    assert (folder / "TQA" / "train.json").stat().st_mtime_ns == before
    capsys.readouterr()
    shutil.rmtree(folder / "download")
    preprocess.main([str(folder)])
    assert "done already" in capsys.readouterr().out


def test_only_one_dataset(folder):
    shutil.rmtree(folder / "download" / "triviaqa-unfiltered")
    preprocess.main([str(folder), "--only", "nq"])
    assert not (folder / "TQA").exists()
    assert len(Examples(folder / "NQ" / "train.json")) == 12


def change(file: Path, *keys: str | int, to: object) -> None:
    """Put something else under the keys in a file of JSON, or of one JSON object a line."""
    is_lines = file.suffix == ".jsonl"
    lines = file.read_text().splitlines() if is_lines else [file.read_text()]
    whole = [json.loads(line) for line in lines]
    place = whole if is_lines else whole[0]
    for key in keys[:-1]:
        place = place[key]
    if to is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    file.write_text("\n".join(map(json.dumps, whole)))


CHANGES = {
    "a row beyond the end": ("dataindex/NQ.train.idx.json", (3,), 12,
        r"row 12, at place 3, is not one of the rows 0 to 11 of .*NQ-open\.train\.jsonl; let"),
    "a row before the start": ("dataindex/NQ.dev.idx.json", (0,), -1, "row -1, at place 0, is not"),
    "a row that is no number": ("dataindex/TQA.test.idx.json", (1,), "7", "row '7', at place 1"),
    "a row that is true": ("dataindex/TQA.dev.idx.json", (1,), True, "row True, at place 1, is"),
    "a question without passages": ("nq_passages/dev.json", ("4",), None,
        "question '4': there are no passages for it; remove it, and let get-data.sh"),
    "an empty list of passages": ("tqa_passages/test.json", ("dev_2",), [],
        "question 'dev_2': there are no passages for it"),
    "a passage that is not there": ("tqa_passages/train.json", ("train_7", 1), "51",
        r"question 'train_7': .*psgs_w100\.tsv: no passage has the id '51'; give the collection"),
    "a passage by number": ("nq_passages/test.json", ("0", 0), 5,
        r"question '0': must have ids of passages, as text, not \[5, "),
    "no answer": ("NQ-open.train.jsonl", (2, "answer"), None,
        r'example 3 \(line 3\): "answer" is missing; remove it'),
    "an answer that is no list": ("NQ-open.dev.jsonl", (2, "answer"), "x",
        r"example 3 \(line 3\): \"answers\" must be a list of texts, not 'x'"),
    "no question": ("triviaqa-unfiltered/unfiltered-web-train.json", ("Data", 3, "Question"), None,
        r"example 4 \(line 1\): the Question must be text, not None; remove it"),
    "a question without a name": ("triviaqa-unfiltered/unfiltered-web-dev.json",
        ("Data", 1, "QuestionId"), 7, "the QuestionId must be text, not 7"),
    "no answer in TriviaQA": ("triviaqa-unfiltered/unfiltered-web-dev.json",
        ("Data", 1, "Answer"), None, "the Value of the Answer must be text, not None"),
    "aliases that are no list": ("triviaqa-unfiltered/unfiltered-web-train.json",
        ("Data", 0, "Answer", "Aliases"), "x", "the Aliases of the Answer must be a list .* 'x'"),
    "a surrogate": ("triviaqa-unfiltered/unfiltered-web-train.json",
        ("Data", 0, "Question"), "\ud83d", r"example 1 \(line 1\): '\\ud83d' is an unpaired"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_belong_together(case, folder, capsys):
    file, keys, to, message = CHANGES[case]
    change(folder / "download" / file, *keys, to=to)
    with pytest.raises(SystemExit) as exited:
        preprocess.main([str(folder)])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {folder}/download/{file}.*{message}", line), line
    # Splits that were finished before are whole; of the broken one there is nothing.
    for path in [*folder.glob("NQ/*"), *folder.glob("TQA/*")]:
        assert json.loads(path.read_text())
        assert not path.name.startswith(".")


def test_half_a_character_in_what_is_not_used(folder):
    """Search results are cut anywhere; the original never looked at them either."""
    file = folder / "download" / "triviaqa-unfiltered" / "unfiltered-web-train.json"
    change(file, "Data", 0, "SearchResults", to="cut \ud83d")
    preprocess.main([str(folder), "--only", "tqa"])
    assert len(Examples(folder / "TQA" / "train.json")) == 12


def test_from_a_shell_without_files(tmp_path):
    done = run("-m", "src.tools.preprocess", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: .*/download/NQ-open\.dev\.jsonl: cannot be read .No such file", line)


# ----------------------------------------------------------------------------------------------
# Memory

PEAK = """
import re, sys
from pathlib import Path
from src.tools import preprocess
if len(sys.argv) > 1:
    preprocess.main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024)
"""


def peak(*arguments: object) -> float:
    """The most memory, in MB, that a process of its own had resident."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def test_memory(tmp_path):
    """50,000 passages and 5,000 examples with 100 each of both datasets: 1 GB is written. (What is
    counted are the pages of mapped files too, which the system can take back.)"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to see the largest resident memory")
    make_folder(tmp_path, 50_000, 5_000, 100)
    used = peak(tmp_path) - peak()
    assert len(Examples(tmp_path / "NQ" / "train.json")) == 5000
    assert len(Examples(tmp_path / "TQA" / "train.json")) == 5000
    print(f"{used:.0f} MB beside the imports")
    assert used < 300
