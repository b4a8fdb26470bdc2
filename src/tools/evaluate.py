"""Judge answers and retrieved passages from the shell.

    python -m src.tools.evaluate retrieved_bm25.json retrieved_round1.json --k 1,5,20,50,100
    python -m src.tools.evaluate --qrels qrels.txt run.trec retrieved_round1.json
    python -m src.tools.evaluate --data test.json checkpoint/my_test/final_output.txt

The first prints the share of questions with an answer in their first k passages; the second
nDCG@10, MRR@10, MAP and the recall of relevant passages, equal to trec_eval's; the third exact
match and F1 of answers. `--compare` adds the difference between two files, with its uncertainty.
"""

from src.options import evaluation_parser
from src.runtime.errors import InputError, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(evaluation_parser().parse_args)()  # answers --help at once

import argparse
import sys

import numpy as np

from src.data.examples import load_data
from src.data.trec import read_qrels
from src.evaluation.answers import judge_answers
from src.evaluation.groups import measure_groups
from src.evaluation.rankings import judge_retrieval
from src.evaluation.relevance import Values, compare, judge_run, load_run
from src.runtime.terminal import count

Judged = tuple[object, Values]  # what tells one set of questions from another; values of each, [n]


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = evaluation_parser().parse_args(arguments)
    qrels = read_qrels(options.qrels) if options.qrels else None
    judged = {path: _judge(path, options, qrels) for path in options.files}
    rows = {}
    for path, (_, values) in judged.items():
        rows[path] = {"questions": len(next(iter(values.values()), ()))}
        rows[path] |= {name: 100 * float(np.mean(value)) for name, value in values.items()}
        if (options.also or options.by) and options.data:
            data = load_data(options.data, regex_answers=options.regex_answers)
            rows |= measure_groups(path, data, options.also, options.by, options.train_data)
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    width = max(map(len, rows))
    print(" " * width, *(f"{name:>11}" for name in columns))
    for path, values in rows.items():
        cells = [values.get(name, "-") for name in columns]
        cells = [f"{cell:11.2f}" if isinstance(cell, float) else f"{cell:>11}" for cell in cells]
        print(f"{path:{width}}", *cells)
    if options.compare:
        _print_comparison(*options.files, judged)


def _judge(path: str, options: argparse.Namespace, qrels: dict | None) -> Judged:
    if qrels is not None:
        questions, values = judge_run(load_run(path), qrels, options.k)
        if missing := len(qrels.keys() - set(questions)):
            left_out = f"{count(missing, 'question')} of {options.qrels} not found"
            print(f"{path}: {left_out}, and left out as in trec_eval", file=sys.stderr)
        return sorted(questions), _sorted(questions, values)
    if path.endswith((".json", ".jsonl")):
        return judge_retrieval(path, options.k, options.regex_answers)
    if options.data:
        data = load_data(options.data, regex_answers=options.regex_answers)
        return options.data, judge_answers(path, data)
    how = (
        "to judge answers, --data must name the questions' file; to judge a TREC run, give --qrels"
    )
    raise InputError(f"{path}: {how}")


def _sorted(questions: list[str], values: Values) -> Values:
    order = sorted(range(len(questions)), key=questions.__getitem__)
    return {name: value[order] for name, value in values.items()}


def _print_comparison(first: str, second: str, judged: dict[str, Judged]) -> None:
    (asked, before), (also_asked, after) = judged[first], judged[second]
    if asked != also_asked:
        raise InputError(f"{second}: its questions are not those of {first}; --compare needs pairs")
    print(f"\n{second} minus {first}")
    print(f"{'':11} {'difference':>11} {'95 % interval':>18} {'p':>9}")
    for name in (name for name in before if name in after):
        mean, low, high, p = compare(after[name], before[name])
        interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
        print(f"{name:11} {100 * mean:+11.2f} {interval:>18} {p:9.4f}")


if __name__ == "__main__":
    main()
