"""The quickstart's result, as one table: python -m examples.quickstart_table quickstart/seed-0"""

import sys
from pathlib import Path

from src.data.examples import load_data
from src.evaluation.answers import measure_answers
from src.evaluation.rankings import measure_retrieval
from src.runtime.errors import reports_input_errors


@reports_input_errors
def main(folder: Path) -> None:
    data = load_data(folder / "data" / "test.json")
    columns = ["recall@1", "recall@5", "recall@20"]
    print(f"{len(data)} test questions, in percent")
    print(f"{'passages by':22}", *(f"{name:>10}" for name in columns), " EM, 1 read  EM, 8 read")
    for name, title in (("bm25", "BM25"), ("distilled", "distilled retriever")):
        recalls = measure_retrieval(str(folder / f"{name}_test.jsonl"))
        cells = [f"{recalls[column]:10.1f}" for column in columns]
        for n in (1, 8):
            answers = folder / "runs" / f"test_{name}_{n}" / "final_output.txt"
            cells.append(f"{measure_answers(str(answers), data)['exact match']:11.1f}")
        print(f"{title:22}", *cells)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
