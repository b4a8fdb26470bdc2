"""Preprocessing: broken inputs. (tests/test_get.py checks the examples themselves.)"""

import json
import random
import re
from pathlib import Path

import pytest

from src.tools import preprocess


def make_folder(folder: Path, n_passages: int, n_train: int, n_contexts: int) -> None:
    """What get-data.sh has before it calls preprocessing, of a size; dev and test are small."""
    downloads = folder / "download"

    def write(name: str, value: object) -> None:
        (downloads / name).parent.mkdir(parents=True, exist_ok=True)
        (downloads / name).write_text(value if isinstance(value, str) else json.dumps(value))

    rng = random.Random(0)
    lines = [f"{i}\t{'word ' * 99}{i}\tTitle {i}\n" for i in range(1, n_passages + 1)]
    folder.mkdir(parents=True)
    (folder / "psgs_w100.tsv").write_text("id\ttext\ttitle\n" + "".join(lines))
    for part in ("train", "dev"):
        nq = [{"question": f"{part} {i}?", "answer": [f"a {i}"]} for i in range(n_train)]
        write(f"NQ-open.{part}.jsonl", "".join(json.dumps(item) + "\n" for item in nq))
        tqa = [
            {
                "Question": f"{part} {i}?",
                "QuestionId": f"{part}_{i}",
                "Answer": {"Value": f"A {i}", "Aliases": [f"A {i}", "b"]},
                "SearchResults": [{"Title": f"Page {i}", "Description": "x" * 100}] * 50,
            }
            for i in range(n_train)
        ]
        path = f"triviaqa-unfiltered/unfiltered-web-{part}.json"
        write(path, {"Data": tqa, "Version": 1.0})
    for split, part in preprocess.PUBLISHED.items():
        rows = list(range(n_train if split == "train" else 5))
        for name in ("NQ", "TQA"):
            write(f"dataindex/{name}.{split}.idx.json", rows)
            names = [str(row) if name == "NQ" else f"{part}_{row}" for row in rows]
            ids = {n: [str(rng.randint(1, n_passages)) for _ in range(n_contexts)] for n in names}
            write(f"{name.lower()}_passages/{split}.json", ids)


@pytest.fixture
def folder(tmp_path) -> Path:
    make_folder(tmp_path / "data", 50, 12, 3)
    return tmp_path / "data"


def change(file: Path, *keys: str | int, to: object) -> None:
    """Put something else under the keys in a file of JSON, or of one JSON object a line."""
    is_lines = file.suffix == ".jsonl"
    values = list(
        map(json.loads, file.read_text().splitlines() if is_lines else [file.read_text()])
    )
    holder, keys = values, keys if is_lines else (0, *keys)
    for key in keys[:-1]:
        holder = holder[key]
    if to is None:
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = to
    file.write_text("\n".join(map(json.dumps, values)))


CHANGES = {
    "a row beyond the end": ("dataindex/NQ.train.idx.json", (3,), 12,
        r"row 12 is not one of the 12 rows of .*NQ-open\.train\.jsonl; let get-data.sh fetch both"),
    "a question without passages": ("nq_passages/dev.json", ("4",), None,
        r"no passages for question '4'; remove it, and let get-data.sh"),
    "no answer": ("NQ-open.train.jsonl", (2, "answer"), None,
        r"row 2: no answers; remove it"),
    "no question": ("triviaqa-unfiltered/unfiltered-web-train.json", ("Data", 3, "Question"), None,
        r'row 3: no "question" among its fields'),
    "no answer in TriviaQA": ("triviaqa-unfiltered/unfiltered-web-dev.json",
        ("Data", 1, "Answer"), None, "row 1: no target; remove it, and let"),
    "a surrogate": ("triviaqa-unfiltered/unfiltered-web-train.json",
        ("Data", 0, "Question"), "\ud83d", r"line 1: '\\ud83d' is an unpaired surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_belong_together(case, folder, refused):
    file, keys, to, message = CHANGES[case]
    change(folder / "download" / file, *keys, to=to)
    line = refused(preprocess.main, [str(folder)])
    assert re.match(f"error: {folder}/download/{file}.*{message}", line), line
    # Splits that were finished before are whole; of the broken one there is nothing.
    for path in [*folder.glob("NQ/*"), *folder.glob("TQA/*")]:
        assert json.loads(path.read_text())
        assert not path.name.startswith(".")


def test_a_passage_that_is_not_there(folder, refused):
    change(folder / "download" / "tqa_passages" / "train.json", "train_7", 1, to="51")
    assert "tsv: no passage has the id '51'; give" in refused(preprocess.main, [str(folder)])
