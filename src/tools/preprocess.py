"""From the files that get-data.sh fetches to data files: questions, answers, the released passages.

    python -m src.tools.preprocess open_domain_data [--only nq]

Reads, in open_domain_data/download: the questions of NQ-open and TriviaQA as their makers publish
them; `dataindex` (which of them, by row, make up a split); `nq_passages` and `tqa_passages` (the
ids of each question's passages); and psgs_w100.tsv, the collection, beside that folder. Writes
NQ/ and TQA/{train,dev,test}.json there; a split that is there already is left alone.

All is read by byte offsets and written as a stream. In memory are one question with its passages
and, for each question of a dataset, its name and some numbers. The collection's 13 GB are not, but
passages are looked up all over it: a disk that is slow at that is slow at this.
"""

from src.options import preprocess_parser
from src.runtime.errors import InputError, reports_input_errors, shorten

if __name__ == "__main__":
    reports_input_errors(preprocess_parser().parse_args)()  # answers --help at once

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from src.data.examples import Examples, read_example
from src.data.json_files import (
    BadValue,
    JsonFile,
    JsonItems,
    JsonLists,
    check_characters,
    json_list,
)
from src.data.outputs import claim, require_regular, write_whole, writing
from src.data.passages import Passages
from src.training.metrics import progress_bar, start_log

# Each split, and the part of the published questions that its rows are counted in.
PUBLISHED = {"train": "train", "dev": "train", "test": "dev"}
_FETCH = "remove it, and let get-data.sh fetch it again"


class Dataset(NamedTuple):
    """How a dataset is published.

    `open` takes the folder of downloads and the part (train or dev); `read` the questions, a row
    of them and the position in the split, and gives an example without passages. Its `id` is what
    the map in `passages_folder` calls the question.
    """

    name: str
    passages_folder: str
    open: Callable[[Path, str], JsonItems]
    read: Callable[[JsonItems, int, int], dict[str, Any]]


def open_nq(downloads: Path, part: str) -> JsonItems:
    return Examples(downloads / f"NQ-open.{part}.jsonl")


def read_nq(questions: Examples, row: int, position: int) -> dict[str, Any]:
    """A question of NQ-open; its map of passages counts the questions of a split."""
    example = read_example(questions, row)
    if not example.answers:
        raise InputError(f'{questions.where(row)}: "answer" is missing; {_FETCH}')
    return {"id": str(position), "question": example.question, "answers": example.answers}


def open_tqa(downloads: Path, part: str) -> JsonItems:
    return JsonItems(downloads / "triviaqa-unfiltered" / f"unfiltered-web-{part}.json", key="Data")


def read_tqa(questions: JsonItems, row: int, position: int) -> dict[str, Any]:
    """A question of TriviaQA; what is all in capitals in its answer is put in title case."""
    published = questions[row]
    answer = published.get("Answer")
    answer = answer if isinstance(answer, dict) else {}
    value, aliases = answer.get("Value"), answer.get("Aliases")
    texts = {
        "Question": published.get("Question"),
        "QuestionId": published.get("QuestionId"),
        "Value of the Answer": value,
    }
    for name, text in texts.items():
        if not isinstance(text, str):
            where = questions.where(row)
            raise InputError(f"{where}: the {name} must be text, not {shorten(text)}; {_FETCH}")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        problem = f"the Aliases of the Answer must be a list of texts, not {shorten(aliases)}"
        raise InputError(f"{questions.where(row)}: {problem}; {_FETCH}")
    example = {
        "id": texts["QuestionId"],
        "question": texts["Question"],
        "target": value.title() if value.isupper() else value,
        "answers": aliases,
    }
    try:
        check_characters(example)
    except BadValue as error:
        raise InputError(f"{questions.where(row)}: {error}") from None
    return example


DATASETS = {
    "nq": Dataset("NQ", "nq_passages", open_nq, read_nq),
    "tqa": Dataset("TQA", "tqa_passages", open_tqa, read_tqa),
}


class Split(NamedTuple):
    """What a split is made of: rows of the published questions, and a map from what they are called
    to the ids of their passages."""

    path: Path
    rows: list[int]
    questions: JsonItems
    passage_ids: JsonLists
    read: Callable[[JsonItems, int, int], dict[str, Any]]


def open_splits(folder: Path, dataset: Dataset) -> list[Split]:
    """The splits of a dataset that are not in the folder yet.

    Errors: `InputError` for a file that is missing or broken, and for a row that is out of range.
    """
    downloads = folder / "download"
    paths = {split: folder / dataset.name / f"{split}.json" for split in PUBLISHED}
    missing = [split for split, path in paths.items() if not path.is_file()]
    parts = {PUBLISHED[split] for split in missing}
    published = {part: dataset.open(downloads, part) for part in sorted(parts)}
    splits = []
    for split in missing:
        with writing(paths[split], "remove it"):
            require_regular(paths[split])
        index = JsonFile(downloads / "dataindex" / f"{dataset.name}.{split}.idx.json")
        questions = published[PUBLISHED[split]]
        rows = check_rows(index, questions)
        passage_ids = JsonLists(downloads / dataset.passages_folder / f"{split}.json")
        splits.append(Split(paths[split], rows, questions, passage_ids, dataset.read))
    return splits


def check_rows(index: JsonFile, questions: JsonItems) -> list[int]:
    """The rows in an index file. Errors: `InputError` when one is not that of a question."""
    rows = index.json()
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{index.path}: must hold a list of rows, not {shorten(rows)}; {_FETCH}")
    for place, row in enumerate(rows):
        if type(row) is not int or not 0 <= row < len(questions):
            raise InputError(
                f"{index.path}: row {shorten(row)}, at place {place}, is not one of the rows 0 to "
                f"{len(questions) - 1} of {questions.path}; let get-data.sh fetch both again"
            )
    return rows


def make_examples(split: Split, passages: Passages, bar: tqdm) -> Iterator[dict[str, Any]]:
    """The examples of a split, with their passages as `ctxs`, in the order of its index.

    Errors: `InputError` for a question without passages, and for one that the collection lacks.
    """
    for position, row in enumerate(split.rows):
        example = split.read(split.questions, row, position)
        name = example["id"]
        where = f"{split.passage_ids.path}, question {shorten(name)}"
        ids = split.passage_ids.get(name)
        if not ids:
            raise InputError(f"{where}: there are no passages for it; {_FETCH}")
        if not all(isinstance(identity, str) for identity in ids):
            raise InputError(f"{where}: must have ids of passages, as text, not {shorten(ids)}")
        try:
            found = [passages[place] for place in passages.find(ids)]
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        contexts = [{"id": p.id, "title": p.title, "text": p.text} for p in found]
        yield {**example, "ctxs": contexts}
        bar.update()


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = preprocess_parser().parse_args(arguments)
    folder = Path(options.folder)
    log = start_log(None)
    names = [options.only] if options.only else list(DATASETS)
    splits = [split for name in names for split in open_splits(folder, DATASETS[name])]
    if not splits:
        log.info("done already: %s", ", ".join(f"{folder / DATASETS[name].name}" for name in names))
        return
    for split in splits:
        claim(split.path, "give another folder")
    passages = Passages(folder / "psgs_w100.tsv")
    log.info("%d passages of %s", len(passages), passages.path)
    with progress_bar(sum(len(split.rows) for split in splits), unit="question") as bar:
        for split in splits:
            write_whole(split.path, json_list(make_examples(split, passages, bar)))
            log.info("%d questions: %s", len(split.rows), split.path)


if __name__ == "__main__":
    main()
