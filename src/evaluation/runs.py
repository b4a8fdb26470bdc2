"""What a run has written, read back: options, training curves, probabilities, the curve over the
number of passages. A file that a run did not write gives an empty value."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.data.examples import Examples
from src.data.json_files import read_json
from src.evaluation.answers import ANSWERS, SCORES, read_aligned
from src.runtime.errors import InputError, shorten

METRICS, OPTIONS = "metrics.jsonl", "options.json"
PROBABILITIES, CURVE = "answers.jsonl", "n_context_curve.json"
_OTHER_SHAPE = (AttributeError, KeyError, TypeError, ValueError)
_NOT_OURS = "not as a run writes it; remove the file"
MOST_POINTS = 200  # of a curve; more are averaged in groups


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The finite values of a `metrics.jsonl` by name, as (step, value). An incomplete last line is
    ignored. Errors: `InputError` when another is not a step with numbers."""
    values: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
            for name, value in row.items():
                if math.isfinite(value):
                    values.setdefault(name, []).append((step, float(value)))
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            if not line.endswith(b"\n"):
                break  # the run was killed while writing it, or is writing it now
            shown = shorten(line.decode(errors="replace").strip(), 40)
            raise InputError(
                f'{path}, line {number}: must be a step with its numbers, such as {{"step": 1, '
                f'"train/loss": 2.5}}, not {shown}; remove the line'
            ) from None
    return values


def thin(points: Sequence[tuple[int, float]]) -> tuple[list[tuple[int, float]], int]:
    """A curve of at most `MOST_POINTS` points, and the number of values that each is the mean of. A
    point is at the step of its last value."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts], size


class Confidence(NamedTuple):
    """The probability that the reader gave its answer, in [0, 1], and other answers with theirs."""

    probability: float
    alternatives: list[tuple[str, float]]


def _probability(row: dict[str, Any]) -> float:
    """Four significant digits of it, as many as a page shows."""
    value = float(row["log_probability"])
    if not value <= 1e-3:  # of rounding; also refuses NaN
        raise ValueError
    return float(f"{math.exp(min(0.0, value)):.4g}")


def _confidence(line: str) -> tuple[object, Confidence]:
    row = json.loads(line)
    others = [(str(other["answer"]), _probability(other)) for other in row.get("alternatives", [])]
    return row["id"], Confidence(_probability(row), others)


def read_probabilities(path: Path, data: Examples) -> list[Confidence]:
    """The confidence of each answer in an `answers.jsonl`, in the data's order; [] without the
    file. Errors: `InputError` when they do not answer this data's questions."""
    shape = "with its id and log_probability"
    return read_aligned(path, data, _confidence, shape) if path.exists() else []


def read_curve(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Exact match and F1, in percent, by number of passages, from an `n_context_curve.json`."""
    if not path.exists():
        return {}
    names = {"exact match": "exact_match", "F1": "f1"}
    try:
        rows = sorted((int(n), row) for n, row in read_json(path).items())
        known = [(n, row) for n, row in rows if row["exact_match"] is not None]
        curves = {name: [(n, float(row[key])) for n, row in known] for name, key in names.items()}
    except _OTHER_SHAPE:
        raise InputError(f"{path}: {_NOT_OURS}") from None
    return curves if known else {}  # there may be no gold answers


def read_run_options(folder: Path) -> dict[str, Any]:
    """The options of a run; {} if it wrote none."""
    path = folder / OPTIONS
    try:
        return dict(read_json(path)["options"]) if path.exists() else {}
    except _OTHER_SHAPE:
        raise InputError(f"{path}: {_NOT_OURS}") from None


def find_data(folder: Path, given: str | None, run_options: dict[str, Any]) -> str:
    """The questions' file, which can be the "folder" itself; empty when nothing was answered."""
    if folder.is_file():
        return str(folder)
    if given or (folder / SCORES).exists():
        return given or str(folder / SCORES)
    if not (folder / ANSWERS).exists():
        return ""
    named = run_options.get("eval_data")
    if isinstance(named, str) and Path(named).is_file():
        return named
    where = f"the file of its questions, {shorten(named)}, is not here" if named else ""
    raise InputError(
        f"{folder / ANSWERS}: {where or 'nothing says which questions it answers'}; give --data"
    )
