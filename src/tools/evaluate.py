"""Judge answers and retrieved passages from the shell.

    python -m src.tools.evaluate retrieved_bm25.json retrieved_round1.json --k 1,5,20,50,100
    python -m src.tools.evaluate --qrels qrels.txt run.trec retrieved_round1.json
    python -m src.tools.evaluate --data test.json checkpoint/my_test/final_output.txt

The first prints the share of questions with an answer in their first k passages; the second
nDCG@10, MRR@10, MAP and the recall of relevant passages, equal to trec_eval's; the third exact
match and F1 of answers. `--compare` adds the difference between two files, with its uncertainty.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from src.data.examples import load_data
from src.data.files import open_text
from src.data.trec import read_qrels
from src.evaluation.answers import METRICS, judge_answers, means
from src.evaluation.calibration import expected_calibration_error, reliability
from src.evaluation.groups import group_questions
from src.evaluation.rankings import judge_retrieval
from src.evaluation.relevance import Values, compare, judge_run, load_run
from src.evaluation.runs import PROBABILITIES, read_probabilities
from src.options import evaluation_parser
from src.runtime.errors import InputError, reports_input_errors
from src.runtime.terminal import count, print_table

Rows = list[tuple[str, dict[str, float]]]  # of the table, each with its name
Judged = tuple[object, Values]  # what tells one set of questions from another; values of each, [n]


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = evaluation_parser().parse_args(arguments)
    qrels = read_qrels(options.qrels) if options.qrels else None
    rows: Rows = []
    judged = {path: _judge(path, options, qrels, rows) for path in options.files}
    columns = list(dict.fromkeys(name for _, values in rows for name in values))
    cells = [[path, *(values.get(name, "-") for name in columns)] for path, values in rows]
    as_text = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in cells]
    print_table(["", *columns], as_text)
    if options.compare:
        _print_comparison(*options.files, judged)


def _judge(path: str, options: argparse.Namespace, qrels: dict | None, rows: Rows) -> Judged:
    """Judge a file, and add its rows."""
    if qrels is not None:
        questions, values = judge_run(load_run(path), qrels, options.k)
        if missing := len(qrels.keys() - set(questions)):
            left_out = f"{count(missing, 'question')} of {options.qrels} not found"
            print(f"{path}: {left_out}, and left out as in trec_eval", file=sys.stderr)
    elif path.endswith((".json", ".jsonl")):
        questions, values = judge_retrieval(path, options.k, options.regex_answers)
    elif options.data:
        return options.data, _judge_answers(path, options, rows)
    else:
        open_text(path)  # a wrong path is reported as such
        how = "to judge answers, --data must name the questions' file"
        raise InputError(f"{path}: {how}; to judge a TREC run, give --qrels")
    rows.append((path, means(values)))
    return questions, values


def _judge_answers(path: str, options: argparse.Namespace, rows: Rows) -> Values:
    """With rows for groups of questions, and calibration from the file beside the answers."""
    data = load_data(options.data, regex_answers=options.regex_answers)
    indices, columns = judge_answers(path, data, [n for n in options.also if n in METRICS])
    values = {name: np.array(column, float) for name, column in columns.items()}
    if "calibration" in options.also:
        beside = Path(path).with_name(PROBABILITIES)
        if not (sure := read_probabilities(beside, data)):
            raise InputError(f"{beside}: no such file; test_reader.py --write_results writes it")
        values["probability"] = np.array([sure[index].probability for index in indices])
    groups = group_questions(data, indices, options.by, options.train_data)
    for name, chosen in [(path, slice(None)), *((f"  {n}", group) for n, group in groups.items())]:
        part = {n: column[chosen] for n, column in values.items()}
        rows.append((name, means(part)))
        if "probability" in part:
            bins = reliability(part["probability"], part["exact match"])
            rows[-1][1]["ECE"] = 100 * expected_calibration_error(bins)
    return values


def _print_comparison(first: str, second: str, judged: dict[str, Judged]) -> None:
    (asked, before), (also_asked, after) = judged[first], judged[second]
    if asked != also_asked:
        raise InputError(f"{second}: its questions are not those of {first}; --compare needs pairs")
    print(f"\n{second} minus {first}")
    rows = []
    for name in (name for name in before if name in after):
        mean, low, high, p = compare(after[name], before[name])
        interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
        rows.append([name, f"{100 * mean:+.2f}", interval, f"{p:.4f}"])
    print_table(["", "difference", "95 % interval", "p"], rows)


if __name__ == "__main__":
    main()
