"""Rankings judged by qrels, as trec_eval does it, and differences between two of them.

trec_eval sorts by score, in float32, then by passage id, descending; a passage that is not judged
is not relevant; averages are over the questions that are both in the run and in the qrels.
"""

import math
from collections.abc import Sequence

import numpy as np

from src.data.examples import load_data, read_example
from src.data.trec import Run, read_run
from src.runtime.errors import InputError

Values = dict[str, np.ndarray]  # a measure's values, one for each question, [n]
_RESAMPLES, _AT_ONCE = 10_000, 100


def load_run(path: str) -> Run:
    """A TREC run, or a data file with passages as one."""
    if not path.endswith((".json", ".jsonl")):
        return read_run(path)
    data, run = load_data(path), {}
    for index in range(len(data)):
        example, scores = read_example(data, index), {}
        for rank, passage in enumerate(example.passages):
            if not passage.id:
                where = f"{data.where(index)}, passage {passage.position + 1}"
                raise InputError(f'{where}: an "id" is needed to tell passages apart; add one')
            scores.setdefault(passage.id, -rank if passage.score is None else passage.score)
        run[example.id] = scores
    return run


def judge_run(
    run: Run, qrels: dict[str, dict[str, int]], ks: Sequence[int]
) -> tuple[list[str], Values]:
    """The questions that are in the run and the qrels, sorted, and for each of them nDCG@10,
    MRR@10, average precision and recall@k, in [0, 1]. Errors: `InputError` when there are none."""
    questions = sorted(question for question in run if question in qrels)
    if not questions:
        raise InputError("no question of the run is in the qrels; give those of the same data")
    judged = [_judge(run[question], qrels[question], ks) for question in questions]
    return questions, {name: np.array([values[name] for values in judged]) for name in judged[0]}


def _judge(scores: dict[str, float], judgements: dict[str, int], ks: Sequence[int]) -> dict:
    order = sorted(scores, key=lambda name: (np.float32(scores[name]), name.encode()), reverse=True)
    gains = [max(0, judgements.get(name, 0)) for name in order]
    best = sorted((gain for gain in judgements.values() if gain > 0), reverse=True)
    hits = [rank for rank, gain in enumerate(gains, start=1) if gain]
    n_relevant = max(1, len(best))  # without any, everything is 0
    precisions = [number / rank for number, rank in enumerate(hits, start=1)]
    return {
        "nDCG@10": _dcg(gains[:10]) / (_dcg(best[:10]) or 1),
        "MRR@10": 1 / hits[0] if hits and hits[0] <= 10 else 0.0,
        "MAP": sum(precisions) / n_relevant,
        **{f"recall@{k}": sum(rank <= k for rank in hits) / n_relevant for k in ks},
    }


def _dcg(gains: Sequence[int]) -> float:
    """Discounted cumulative gain (Järvelin and Kekäläinen, 2002), with linear gains."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def compare(
    ours: np.ndarray, theirs: np.ndarray, seed: int = 0
) -> tuple[float, float, float, float]:
    """The mean difference between paired values [n], its 95 % interval and its p-value, by paired
    bootstrap (Efron and Tibshirani, 1993, chapters 13 and 16): questions are drawn with replacement
    10,000 times. p is the two-sided probability of such a difference if there were none."""
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    rng, n, mean = np.random.default_rng(seed), len(differences), float(np.mean(differences))
    means = [
        differences[rng.integers(0, n, (_AT_ONCE, n))].mean(axis=1)
        for _ in range(_RESAMPLES // _AT_ONCE)
    ]
    drawn = np.concatenate(means)
    as_far = int((np.abs(drawn - mean) >= abs(mean) - 1e-12).sum())
    return mean, *np.percentile(drawn, [2.5, 97.5]).tolist(), (as_far + 1) / (_RESAMPLES + 1)
