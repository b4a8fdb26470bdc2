"""What examples/ablations.sh measured, as Markdown: python -m examples.ablations_table ablations"""

import json
import sys
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


def position(row: tuple[str, str]) -> tuple[int, ...]:
    """In the table: the start, the losses on attention or what they need, KL on other targets."""
    loss, target = row
    is_target = loss == "kl" and target != "attention"
    number = TARGETS.index(target) if is_target else ("start", *LOSSES).index(loss)
    return is_target, number


@reports_input_errors
def main(folder: Path) -> None:
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for answers in sorted((folder / "cells").glob("*/read/final_output.txt")):
        loss, target, _ = answers.parents[1].name.split(".")
        rows.setdefault((loss, target), []).append(measure(answers.parents[1]))
    temperatures = dict(line.split() for line in (folder / "temperatures").read_text().splitlines())
    lines = [
        "| loss | target | its temperature | recall@1 | recall@5 | exact match | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for loss, target in sorted(rows, key=position):
        values = rows[loss, target]
        means, n = np.mean(values, axis=0), len(values)
        spreads = np.std(values, axis=0, ddof=1) if n > 1 else np.zeros(3)
        cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads, strict=True)]
        temperature = temperatures[target] if loss == "kl" else "-"
        lines.append(f"| {' | '.join([loss, target, temperature, *cells, str(n)])} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
