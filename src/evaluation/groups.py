"""Answers judged by more than exact match, and by kinds of questions."""

from collections.abc import Callable, Sequence
from pathlib import Path

from src.data.examples import Example, Examples, load_data, read_example
from src.evaluation.answers import (
    contains_answer,
    exact_match,
    f1,
    normalize_answer,
    read_answers,
    rouge_l,
)
from src.evaluation.calibration import expected_calibration_error, reliability
from src.evaluation.runs import PROBABILITIES, read_probabilities
from src.runtime.errors import InputError

_METRICS = {"contained": contains_answer, "rouge_l": rouge_l}
_NAMES = {"contained": "contained", "rouge_l": "ROUGE-L"}
TYPES = ("how many", "how much", "who", "what", "when", "where", "which", "why", "how")
Group = Callable[[Example], tuple[int, str]]  # a group's position in a table, and its name


def question_type(question: str) -> str:
    """The first word, or "how many" and "how much"; "other" for a word that asks nothing."""
    beginning = f"{normalize_answer(question)} "
    return next((kind for kind in TYPES if beginning.startswith(f"{kind} ")), "other")


def answer_length(answers: Sequence[str]) -> int:
    """Words of the shortest gold answer, normalised."""
    return min(len(normalize_answer(answer).split()) for answer in answers)


def by_type(example: Example) -> tuple[int, str]:
    kind = question_type(example.question)
    return [*TYPES, "other"].index(kind), kind


def by_length(example: Example) -> tuple[int, str]:
    n = min(answer_length(example.answers), 6)
    return n, f"{n}{'+' if n == 6 else ''} {'word' if n == 1 else 'words'}"


def by_overlap(train: Examples) -> Group:
    """Groups by whether training had the question (after normalisation), or else one of its gold
    answers. Paraphrased questions are not found (Lewis et al., 2021, marked those by hand)."""
    questions, answers = set(), set()
    for index in range(len(train)):
        example = read_example(train, index)
        questions.add(normalize_answer(example.question))
        answers.update(map(normalize_answer, [*example.answers, example.target or ""]))
    answers.discard("")

    def group(example: Example) -> tuple[int, str]:
        if normalize_answer(example.question) in questions:
            return 0, "question in training data"
        if answers & set(map(normalize_answer, example.answers)):
            return 1, "only answer in training data"
        return 2, "neither in training data"

    return group


def measure_groups(
    path: str, data: Examples, also: Sequence[str], by: Sequence[str], train_data: str | None
) -> dict[str, dict[str, float]]:
    """Rows of a table: a file of answers, then its groups of questions, each with the number of
    questions, exact match and F1 in percent, and more.

    Args:
        also: "contained", "rouge_l", "calibration" (needs `answers.jsonl` beside the answers).
        by: "type", "length", "overlap" (needs `train_data`, a data file).
    Errors: `InputError`, also when no question has gold answers.
    """
    if "overlap" in by and not train_data:
        raise InputError("--by overlap: --train_data must name the file of training questions")
    beside = Path(path).with_name(PROBABILITIES)
    sure = read_probabilities(beside, data) if "calibration" in also else []
    if "calibration" in also and not sure:
        raise InputError(f"{beside}: no such file; test_reader.py --write_results writes it")
    metrics = {"exact match": exact_match, "F1": f1}
    metrics |= {_NAMES[name]: metric for name, metric in _METRICS.items() if name in also}
    kinds: dict[str, Group] = {"type": by_type, "length": by_length}
    if train_data:
        kinds["overlap"] = by_overlap(load_data(train_data))
    rows: dict[tuple[int, int, str], list[tuple[float, ...]]] = {}
    for index, answer in enumerate(read_answers(path, data)):
        example = read_example(data, index)
        if example.answers:
            values = tuple(float(metric(answer, example.answers)) for metric in metrics.values())
            values += (sure[index].probability,) if sure else ()
            keys = [(n, *kinds[name](example)) for n, name in enumerate(by, start=1)]
            for key in [(0, 0, path), *keys]:
                rows.setdefault(key, []).append(values)
    if not rows:
        problem = "no question in this file has answers; give --data that has some"
        raise InputError(f"{data.path}: {problem}")
    names = [*metrics, *["probability"] * bool(sure)]
    return {
        f"{'  ' * min(n, 1)}{key[-1]}": _means(names, rows[n, *key]) for n, *key in sorted(rows)
    }


def _means(names: Sequence[str], values: Sequence[tuple[float, ...]]) -> dict[str, float]:
    columns = dict(zip(names, zip(*values, strict=True), strict=True))
    row = {"questions": len(values)}
    row |= {name: 100 * sum(column) / len(values) for name, column in columns.items()}
    if "probability" in columns:
        bins = reliability(columns["probability"], [bool(v) for v in columns["exact match"]])
        row["ECE"] = 100 * expected_calibration_error(bins)
    return row
