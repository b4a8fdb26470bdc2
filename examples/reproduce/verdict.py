"""Compare a result with the published figure, in one line; status 3 if it was not reproduced.

    python -m examples.reproduce.verdict nq_reader_base final_output.txt --questions test.json

figures.tsv has the published values and the tolerances.
"""

import argparse
import csv
import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path

from src.data.examples import load_data
from src.evaluation.answers import measure_answers
from src.evaluation.rankings import measure_retrieval
from src.runtime.errors import InputError, reports_input_errors

FIGURES = Path(__file__).with_name("figures.tsv")


def read_figures() -> dict[str, dict[str, str]]:
    """The rows of figures.tsv by name, as text."""
    with FIGURES.open(newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file, delimiter="\t")}


def is_reproduced(got: list[float], expected: str, tolerance: str) -> bool:
    """Whether every value, rounded to two decimals, is at most the tolerance away from the expected
    one. In decimals, because in floats 50.1 - 49.8 exceeds 0.3.

    Args: expected: a value for each of `got`, joined by slashes.
    """
    try:
        published = [Decimal(value) for value in expected.split("/")]
        if len(published) != len(got) or not all(value.is_finite() for value in published):
            raise InvalidOperation
    except InvalidOperation:
        problem = f"must be {len(got)} numbers joined by slashes"
        raise InputError(f"the expected value '{expected}' {problem}; correct it") from None
    pairs = zip(got, published, strict=True)
    return all(abs(Decimal(f"{a:.2f}") - b) <= Decimal(tolerance) for a, b in pairs)


def measure(name: str, result: str, questions: str) -> tuple[list[float], int]:
    """The values of a measure, in percent, and the number of questions. `recall@5/20/100` is three
    values of a file with passages; all else is of answers to the `questions`."""
    if not name.startswith("recall@"):
        values = measure_answers(result, load_data(questions))
        return [values[name]], values["questions"]
    values = measure_retrieval(result)
    names = [f"recall@{k}" for k in name.removeprefix("recall@").split("/")]
    if missing := [name for name in names if name not in values]:
        raise InputError(f"{result}: too few passages for {missing[0]}; retrieve more (--n-docs)")
    return [values[name] for name in names], values["questions"]


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row", choices=read_figures(), metavar="ROW", help="a row of figures.tsv")
    parser.add_argument("result", help="final_output.txt, or a file with retrieved passages")
    parser.add_argument("--questions", help="the file that was answered")
    parser.add_argument("--expected", help="instead of the value in figures.tsv")
    options = parser.parse_args(arguments)
    row = read_figures()[options.row]
    got, n_questions = measure(row["measure"], options.result, options.questions)
    expected, tolerance = options.expected or row["expected"], row["tolerance"]
    if expected == "-":
        against, verdict = "no published value in figures.tsv", "not compared"
    else:
        against = f"expected {expected} ± {tolerance}"
        verdict = "reproduced" if is_reproduced(got, expected, tolerance) else "NOT reproduced"
    shown = "/".join(f"{value:.2f}" for value in got)
    said = f"{row['measure']}, {against}, got {shown} on {n_questions:,} questions"
    print(f"{options.row}: {said}: {verdict}")
    if verdict != "reproduced":
        sys.exit(3)


if __name__ == "__main__":
    main()
