"""What examples/ablations.sh measured, as Markdown: python -m examples.ablations_table ablations"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.data.examples import load_data
from src.evaluation.answers import measure_answers
from src.options import LOSSES, TARGETS
from src.runtime.errors import reports_input_errors


def measure(cell: Path) -> list[float]:
    """Recall@1, recall@5 and exact match, in percent."""
    recalls = json.loads((cell / "test.jsonl.recall.json").read_text())
    answers = str(cell / "read" / "final_output.txt")
    matches = measure_answers(answers, load_data(cell / "test.jsonl"))["exact match"]
    return [100 * recalls["recall@1"], 100 * recalls["recall@5"], matches]


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):{sign}.1f} ± {spread:.1f}"


def position(row: tuple[str, str]) -> tuple[int, ...]:
    """In the table: the start, the losses on attention or what they need, KL on other targets."""
    loss, target = row
    is_target = loss == "kl" and target != "attention"
    number = TARGETS.index(target) if is_target else ("start", *LOSSES).index(loss)
    return is_target, number


@reports_input_errors
def main(folder: Path) -> None:
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for answers in sorted((folder / "cells").glob("*/read/final_output.txt")):
        loss, target, seed = answers.parents[1].name.split(".")
        rows.setdefault((loss, target), {})[seed] = measure(answers.parents[1])
    temperatures = dict(line.split() for line in (folder / "temperatures").read_text().splitlines())
    head = ["loss", "target", "its temperature", "recall@1", "recall@5", "recall@1 gained"]
    head += ["exact match", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for loss, target in sorted(rows, key=position):
        seeds, n = rows[loss, target], len(rows[loss, target])
        gains = [values[0] - rows["start", "-"][seed][0] for seed, values in seeds.items()]
        cells = [mean_and_spread(values) for values in zip(*seeds.values(), strict=True)]
        cells.insert(2, "-" if loss == "start" else mean_and_spread(gains, sign="+"))
        temperature = temperatures[target] if loss == "kl" else "-"
        lines.append(f"| {' | '.join([loss, target, temperature, *cells, str(n)])} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
