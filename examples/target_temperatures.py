"""Temperatures that make the targets of one reading comparable (--target_temperature):
python -m examples.target_temperatures checkpoint/scored/dataset_wscores.json 2.5

KL learns from the softmax of a target: a single passage if the target varies widely within a
question, all passages alike if it hardly varies. Divided by its temperature, every target has the
same standard deviation within a question (the mean over questions), the number given.
"""

import sys

import numpy as np

from src.runtime.errors import reports_input_errors
from src.tools.targets import read_scores


@reports_input_errors
def main(path: str, wanted: float) -> None:
    deviations: dict[str, list[float]] = {}
    for scores, _ in read_scores(path):
        for name, values in scores.items():
            deviations.setdefault(name, []).append(float(np.std(values[np.isfinite(values)])))
    for name, values in sorted(deviations.items()):
        print(name, f"{np.mean(values) / wanted or 1:.3g}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
