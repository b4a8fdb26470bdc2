"""Grouping texts by length, so that little is computed on padding."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

# Groups with fewer tokens than this are not worth a call of their own.
MIN_TOKENS = {"cpu": 256, "cuda": 8192}

Item = TypeVar("Item")


def length_groups(lengths: list[int], slack: float, min_tokens: int) -> list[tuple[int, int]]:
    """Cut a list of lengths, longest first, into groups [start, end) to be padded to their longest.

    Args:
        slack: the largest share of padding in a text, except in a group of fewer tokens than
            `min_tokens`, which is not worth a call of its own.
    """
    groups, start = [], 0
    for row in range(1, len(lengths) + 1):
        tokens = (row - start) * lengths[start]
        if row == len(lengths) or (
            lengths[row] < (1 - slack) * lengths[start] and tokens >= min_tokens
        ):
            groups.append((start, row))
            start = row
    return groups


def longest_first(mask: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The rows of a mask [R, L] in order of length, longest first, and their lengths."""
    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    return order, lengths[order].tolist()


def prefetch_one(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each yielded after the next one was requested, so that background work on the
    next (in a thread, on a GPU) continues while the caller uses this one."""
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
