"""Targets equal the numbers that Atlas computed, or that their definitions give in float64."""

import numpy as np
import pytest
import torch

from src.models.reader import load_reader
from src.models.targets import AGGREGATES, cross_attention, questions, score_passages, without
from tests.conftest import REFERENCE

FOLDER = REFERENCE.parent / "reference_targets"
NUMBERS = {
    "attention_all": "scores_avg",
    "attention_max_heads": "plain_agg_max_heads_first",
    "attention_max_layers": "plain_agg_max_layers_first",
    "attention_max_tokens": "plain_agg_max_tokens_first",
    "attention_first_layer": "plain_agg_first_layer_first",
    "attention_last_layer": "plain_agg_last_layer_first",
    "attention_mass": "plain_prob_mass_first",
    "attention_mass_all": "plain_prob_mass_all",
    "attention_norm": "plain_norm_mass_all",
    "perplexity": "pdist",
    "leave_one_out": "loop",
    "token_log_probs": "token_logprob",
}


@pytest.fixture(scope="module")
def reader():
    """The reference's T5 without its position table."""
    return load_reader(str(REFERENCE / "t5")).eval()


@pytest.fixture(scope="module", params=["cut", "padded"])
def numbers(request):
    return np.load(FOLDER / f"{request.param}.npz")


def real_labels(numbers) -> list[torch.Tensor]:
    return [torch.tensor(row[row != -100]) for row in numbers["labels"]]


def targets(reader, numbers, n_passages: int, batch_size: int) -> dict[str, np.ndarray]:
    ids = torch.tensor(numbers["input_ids"][:, :n_passages])
    mask = torch.tensor(numbers["attention_mask"][:, :n_passages]).bool()
    found: dict[str, list] = {}
    answers = iter(real_labels(numbers))
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        with torch.no_grad():
            encoded = reader.encode(ids[rows], mask[rows])
        for question in questions(encoded, mask[rows]):
            names = [*AGGREGATES, "perplexity", "leave_one_out"]
            scores = score_passages(reader.decoder(), question, next(answers), names)
            for name, values in scores.items():
                found.setdefault(name, []).append(values)
    width = numbers["labels"].shape[1]
    tokens = found.pop("token_log_probs")
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in tokens]
    found["token_log_probs"] = padded
    return {name: torch.stack(values).numpy() for name, values in found.items()}


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("n_passages", [3, 2])
def test_targets_equal_the_reference(n_passages, batch_size, reader, numbers):
    found = targets(reader, numbers, n_passages, batch_size)
    assert found.keys() == NUMBERS.keys()
    for name, theirs in NUMBERS.items():
        expected = numbers[theirs if n_passages == 3 else f"two_{theirs}"]
        assert np.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name
    scaled = numbers["norms_sum" if n_passages == 3 else "two_norms_sum"]  # Atlas divides by 256
    assert np.allclose(found["attention_norm"] / 256, scaled, rtol=1e-4, atol=1e-7)
