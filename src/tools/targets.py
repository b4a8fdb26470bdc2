"""What passage scores are worth before a retriever learns from them.

    python -m src.tools.targets checkpoint/my_test/dataset_wscores.json

For each target in the files (test_reader.py --targets): recall@k when passages are sorted by it;
how often the first passage has no answer although another has one ("misses"); and the rank
correlation with the other targets (Spearman's, averaged over questions).
"""

from collections.abc import Iterator

import numpy as np

from src.data.examples import load_data
from src.evaluation.answers import find_answers
from src.evaluation.calibration import percent, rank_correlation
from src.evaluation.rankings import first_hit
from src.options import targets_parser
from src.runtime.errors import InputError, reports_input_errors
from src.runtime.terminal import print_table

KS = (1, 5, 20)


def read_scores(path: str) -> Iterator[tuple[dict[str, np.ndarray], list[bool]]]:
    """Each question's scores by target [n], and which passages have an answer (by the texts)."""
    data = load_data(path)
    for index in range(len(data)):
        raw = data[index]
        contexts = [c for c in raw.get("ctxs") or [] if isinstance(c.get("scores"), dict)]
        names = set.intersection(*(set(c["scores"]) for c in contexts)) if contexts else set()
        try:
            scores = {n: np.array([c["scores"][n] for c in contexts], float) for n in names}
        except (ValueError, TypeError):
            problem = 'a passage\'s "scores" must be numbers; make the file again'
            raise InputError(f"{data.where(index)}: {problem}") from None
        yield scores, list(find_answers(raw.get("answers") or [], (c["text"] for c in contexts)))


def measure(path: str) -> tuple[list[str], list[list[str]]]:
    """A table's head, and a row for each target: recalls and misses, in percent, and correlations
    with all targets. Errors: `InputError` when the file has no targets."""
    firsts: dict[str, list[int]] = {}
    related: dict[tuple[str, str], list[float]] = {}
    for scores, flags in read_scores(path):
        for name, values in scores.items():
            order = np.argsort(-values, kind="stable")
            firsts.setdefault(name, []).append(first_hit(flags[n] for n in order))
            for other in scores:
                if (value := rank_correlation(values, scores[other])) is not None:
                    related.setdefault((name, other), []).append(value)
    if not firsts:
        raise InputError(
            f"{path}: no passages with scores by name; write them with test_reader.py "
            "--write_crossattention_scores --targets attention,perplexity"
        )
    names, rows = sorted(firsts), []
    for number, name in enumerate(names, start=1):
        found = np.array(firsts[name])
        recalls = [percent((found > 0) & (found <= k)) for k in KS]
        misses = 100 * np.mean(found > 1) / max(np.mean(found > 0), 1e-9)
        means = [np.mean(related.get((name, other), np.nan)) for other in names]
        shares = [f"{share:.1f}" for share in (*recalls, misses)]
        rows.append([f"{number} {name}", *shares, *(f"{mean:.2f}" for mean in means)])
    return ["", *(f"recall@{k}" for k in KS), "misses", *map(str, range(1, number + 1))], rows


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    for path in targets_parser().parse_args(arguments).files:
        table = measure(path)
        print(path)
        print_table(*table)


if __name__ == "__main__":
    main()
