"""Dropout drawn from 16 bits an element."""

import pytest
import torch
from torch import nn

from src.models.dropout import Dropout, dropout, use_fast_dropout
from src.models.reader import load_reader
from tests.conftest import REFERENCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_what_is_kept_is_scaled_and_passes_the_gradient(p, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(7, 1001, dtype=dtype).requires_grad_()  # not a multiple of 4
    out = dropout(hidden, p)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    scale = 1 / (1 - round(p * 65536) / 65536)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, hidden * scale, 0.0))
    torch.testing.assert_close(hidden.grad, torch.where(kept, gradient * scale, 0.0))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.9])
def test_each_element_is_dropped_with_the_same_probability(p):
    """The four elements of a 64-bit number, and neighbours, which are independent."""
    torch.manual_seed(0)
    n = 400_000
    dropped = dropout(torch.ones(n, 4), p) == 0
    spread = 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    assert dropped.double().mean(dim=0).sub(p).abs().max() < spread
    flat = dropped.flatten()
    for distance in (1, 2, 3, 4):
        both = (flat[distance:] & flat[:-distance]).double().mean()
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5


def test_it_depends_on_the_random_state_alone():
    hidden = torch.ones(100, 10)
    torch.manual_seed(3)
    first, second = dropout(hidden, 0.5), dropout(hidden, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(hidden, 0.5), first)
    assert not torch.equal(first, second)


def test_modules_are_replaced_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    use_fast_dropout(model)
    assert type(model[1]) is Dropout
    assert model[1].p == 0.5
    hidden = torch.randn(3, 4)
    assert torch.equal(model.eval()(hidden), model[0](hidden))
    assert (model.train()(torch.ones(50, 4)) == 0).any()


def test_a_readers_encoder_that_drops_next_to_nothing():
    """Attention with dropout is computed step by step, not by PyTorch's function."""
    reader = load_reader(str(REFERENCE / "t5"), dropout=1e-9)  # rounded to 0
    ids = torch.randint(3, 100, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([[12, 5, 7], [9, 12, 1]])[:, :, None]
    trained = reader.train().encode(ids * mask, mask).hidden
    torch.testing.assert_close(trained, reader.eval().encode(ids * mask, mask).hidden)
