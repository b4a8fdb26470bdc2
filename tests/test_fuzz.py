"""A short run of the fuzzer (tests/fuzz.py), always the same."""

from tests.fuzz import KINDS, fuzz


def test_a_few_hundred_damaged_files():
    counts = fuzz(seed=0, most=40 * len(KINDS))
    for kind in KINDS:  # both outcomes are tried
        assert counts[f"{kind} read"] + counts[f"{kind} refused"] == 40
