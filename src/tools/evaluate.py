"""Judge answers and retrieved passages from the shell.

    python -m src.tools.evaluate retrieved_bm25.json retrieved_round1.json
    python -m src.tools.evaluate --data test.json checkpoint/my_test/final_output.txt

The first prints recall@k of files with passages side by side, the second exact match and F1 of
answers.
"""

from src.options import evaluation_parser
from src.runtime.errors import InputError, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(evaluation_parser().parse_args)()  # answers --help at once

from src.data.examples import load_data
from src.evaluation.answers import measure_answers
from src.evaluation.groups import measure_groups
from src.evaluation.rankings import measure_retrieval


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = evaluation_parser().parse_args(arguments)
    rows = {}
    for path in options.files:
        if path.endswith((".json", ".jsonl")):
            rows[path] = measure_retrieval(path)
        elif options.data:
            data, more = load_data(options.data), (options.also, options.by)
            rows[path] = measure_answers(path, data)
            if any(more):
                rows |= measure_groups(path, data, *more, options.train_data)
        else:
            raise InputError(f"{path}: to judge answers, --data must name the questions' file")
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    width = max(map(len, rows))
    print(" " * width, *(f"{name:>11}" for name in columns))
    for path, values in rows.items():
        cells = [values.get(name, "-") for name in columns]
        cells = [f"{cell:11.2f}" if isinstance(cell, float) else f"{cell:>11}" for cell in cells]
        print(f"{path:{width}}", *cells)


if __name__ == "__main__":
    main()
