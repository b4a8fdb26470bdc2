"""From the files that get-data.sh fetches to data files: questions, answers, the released passages.

    python -m src.tools.preprocess open_domain_data [--only nq]

Reads, in open_domain_data/download: the questions of NQ-open and TriviaQA as published; `dataindex`
(the rows of them that make up a split); `nq_passages` and `tqa_passages` (the ids of each
question's passages); and psgs_w100.tsv, the collection, next to that folder. Writes NQ/ and
TQA/{train,dev,test}.json there; existing splits are left alone.

Questions and passages are read by byte offsets and examples written one by one; only the passage
ids of a split are in memory (0.6 GB for a training split). Passages are looked up all over the
collection, so a disk with slow random access is slow here.
"""

from src.options import preprocess_parser
from src.runtime.errors import InputError, reports_input_errors, shorten

if __name__ == "__main__":
    reports_input_errors(preprocess_parser().parse_args)()  # answers --help at once

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.data.examples import Examples, parse_example
from src.data.json_files import json_list, read_json
from src.data.outputs import claim_output, write_whole
from src.data.passages import Passages
from src.training.metrics import passing_bar, progress_bar, start_log

# Each split, and the part of the published questions that its rows are counted in.
PUBLISHED = {"train": "train", "dev": "train", "test": "dev"}
_FETCH = "remove it, and let get-data.sh fetch it again"


FILES = {"nq": "NQ-open.{}.jsonl", "tqa": "triviaqa-unfiltered/unfiltered-web-{}.json"}
# What is taken of a question. (NQ's have no ids: they get their positions in the split.)
FIELDS = {"nq": ("question", "answers"), "tqa": ("id", "question", "target", "answers")}


def read_question(
    questions: Examples, row: int, position: int, fields: Sequence[str]
) -> dict[str, Any]:
    """Some fields of a published question. Errors: `InputError` for one that is missing."""
    raw, where = questions[row], f"{questions.path}, row {row}"
    example = parse_example(raw, row, where)
    if missing := [name for name in fields if not raw.get(name)]:
        raise InputError(f"{where}: no {missing[0]}; {_FETCH}")
    return {"id": str(position), **{name: getattr(example, name) for name in fields}}


def make_examples(folder: Path, dataset: str, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split, with their passages as `ctxs`, in the order of its index.

    Errors: `InputError` for a file that is missing or broken, a row that is out of range, a
    question without passages, and a passage that the collection lacks.
    """
    downloads = folder / "download"
    questions = Examples(downloads / FILES[dataset].format(PUBLISHED[split]))
    index = downloads / "dataindex" / f"{dataset.upper()}.{split}.idx.json"
    ids_file = downloads / f"{dataset}_passages" / f"{split}.json"
    rows, ids_of = read_json(index), read_json(ids_file)
    passages = Passages(folder / "psgs_w100.tsv", passing_bar)
    with progress_bar(len(rows), "question") as bar:
        for position, row in enumerate(rows):
            if not 0 <= row < len(questions):
                problem = f"row {row} is not one of the {len(questions)} rows of {questions.path}"
                raise InputError(f"{index}: {problem}; let get-data.sh fetch both again")
            example = read_question(questions, row, position, FIELDS[dataset])
            if not (ids := ids_of.get(example["id"])):
                problem = f"no passages for question {shorten(example['id'])}"
                raise InputError(f"{ids_file}: {problem}; {_FETCH}")
            found = [passages[i] for i in passages.find(ids)]
            contexts = [{"id": p.id, "title": p.title, "text": p.text} for p in found]
            yield {**example, "ctxs": contexts}
            bar.update()


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = preprocess_parser().parse_args(arguments)
    folder, log = Path(options.folder), start_log(None)
    for dataset in [options.only] if options.only else list(FILES):
        for split in PUBLISHED:
            path = folder / dataset.upper() / f"{split}.json"
            if path.is_file():
                log.info("done already: %s", path)
            else:
                claim_output(str(path), "folder")
                write_whole(path, json_list(make_examples(folder, dataset, split)))
                log.info("written: %s", path)


if __name__ == "__main__":
    main()
