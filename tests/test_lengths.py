"""Groups and batches of like length, against their definitions."""

import random

import torch

from src.models.embedder import token_batches
from src.models.lengths import length_groups, longest_first, prefetch_one


def many_lengths() -> list[list[int]]:
    rng = random.Random(0)
    return [
        sorted((rng.randint(1, 60) for _ in range(rng.randint(1, 30))), reverse=True)
        for _ in range(200)
    ]


def test_groups_of_like_length():
    rng = random.Random(1)
    for lengths in many_lengths():
        slack, min_tokens = rng.choice([0.0, 0.1, 0.5]), rng.choice([1, 100])
        groups = length_groups(lengths, slack, min_tokens)
        rows = [row for start, end in groups for row in range(start, end)]
        assert rows == list(range(len(lengths)))  # each row once, in order
        for start, end in groups[:-1]:
            assert lengths[start] * (end - start) >= min_tokens
            # One more row would have had too much padding.
            assert lengths[end] < (1 - slack) * lengths[start]
        for start, end in groups:  # a row with more padding had to fill a small group up
            for row in range(start + 1, end):
                if lengths[row] < (1 - slack) * lengths[start]:
                    assert lengths[start] * (row - start) < min_tokens


def test_batches_of_about_equal_token_counts():
    for lengths in many_lengths():
        for most in (1, 60, 200):
            batches = token_batches(lengths, most)
            rows = [row for start, end in batches for row in range(start, end)]
            assert rows == list(range(len(lengths)))
            for start, end in batches:
                assert end - start == 1 or (end - start) * lengths[start] <= most
                # One more text would have been too many.
                assert end == len(lengths) or (end - start + 1) * lengths[start] > most
    assert token_batches([], 10) == []


def test_longest_first_keeps_the_order_of_equals():
    mask = torch.arange(3) < torch.tensor([[1], [3], [0], [3]])
    order, lengths = longest_first(mask)
    assert (order.tolist(), lengths) == ([1, 3, 0, 2], [3, 3, 1, 0])


def test_prefetch_one_begins_the_next_before_it_gives_one():
    begun = []
    for item in prefetch_one(begun.append(n) or n for n in range(5)):
        assert begun == list(range(min(5, item + 2)))
    assert begun == list(range(5))
    assert list(prefetch_one([])) == []
