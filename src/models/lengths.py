"""Texts of like length go through a model together, so that little is computed on padding."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

# A group of texts with fewer tokens than this is not worth a call of its own.
MIN_TOKENS = {"cpu": 256, "cuda": 8192}

Item = TypeVar("Item")


def length_groups(lengths: list[int], slack: float, min_tokens: int) -> list[tuple[int, int]]:
    """Cut a list of lengths, longest first, into groups [start, end) to be padded to their longest.

    Args:
        slack: the largest share of a text that may be padding ...
        min_tokens: ... unless the group has fewer tokens than this, and is not worth a call.
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


def token_batches(lengths: list[int], most_tokens: int) -> list[tuple[int, int]]:
    """Cut a list of lengths, longest first, into batches [start, end) that have as many texts as
    `most_tokens` allow when each is padded to the first, but at least one."""
    batches, start = [], 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, most_tokens // max(1, lengths[start])))
        batches.append((start, end))
        start = end
    return batches


def longest_first(mask: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The rows of a mask [R, L] in the order of their lengths, longest first, and these lengths."""
    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    return order, lengths[order].tolist()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each given when the one after it has been asked for: what was begun to make that
    one goes on (in a thread, on a GPU) while the caller uses this one."""
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
