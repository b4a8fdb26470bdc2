"""Whether confidence can be trusted: calibration, coverage, agreement of two rankings."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

N_BINS = 10  # of equal width


class Bin(NamedTuple):
    """Answers with a probability in [low, low + 1 / N_BINS), the last bin with 1: their number,
    mean probability and share of right ones."""

    low: float
    count: int
    confidence: float
    accuracy: float


def reliability(probabilities: Sequence[float], right: Sequence[bool]) -> list[Bin]:
    """The bins of a reliability diagram that have answers (Guo et al., 2017, section 2)."""
    sure, right = np.asarray(probabilities, float), np.asarray(right, float)
    numbers = np.minimum(N_BINS - 1, (sure * N_BINS).astype(int))
    bins = {number: numbers == number for number in np.unique(numbers).tolist()}
    return [
        Bin(number / N_BINS, int(part.sum()), float(sure[part].mean()), float(right[part].mean()))
        for number, part in bins.items()
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of confidence and accuracy over answers, in [0, 1] (Guo et al., 2017,
    equation 3)."""
    gaps = [abs(b.accuracy - b.confidence) for b in bins]
    return float(np.average(gaps, weights=[b.count for b in bins]))


def coverage_curve(
    probabilities: Sequence[float], right: Sequence[bool]
) -> list[tuple[float, float]]:
    """(coverage, exact match), both in [0, 1], when only the most probable answers are given: a
    point for each probability, since equal ones are given together (El-Yaniv and Wiener, 2010)."""
    order = np.argsort(-np.asarray(probabilities), kind="stable")
    n, n_right = np.arange(1, len(order) + 1), np.cumsum(np.asarray(right)[order])
    is_last = np.append(np.diff(np.asarray(probabilities)[order]) != 0, True)
    points = zip(n / len(order), n_right / n, strict=True)
    return [(float(x), float(y)) for x, y in itertools.compress(points, is_last)]


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, in [-1, 1]; None if there is none, as all values of one are equal."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def percent(values: Sequence[float]) -> float:
    """The mean of shares or verdicts, in percent."""
    return 100 * float(np.mean(values))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent questions, both in [0, 1] (Wilson, 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half
