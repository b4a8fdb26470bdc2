"""Dropout on a CPU, from 16 random bits an element.

PyTorch draws a CPU's masks in one thread, from 64 bits an element, which took 12 % of an update of
T5-small. Elsewhere, and when it is compiled, PyTorch's own is used.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as torch_dropout


class Dropout(nn.Dropout):
    """As PyTorch's, from `dropout` below."""

    stands_for = nn.Dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return dropout(hidden, self.p) if self.training else hidden


def use_fast_dropout(model: nn.Module) -> None:
    """Let all plain dropout modules of a model be ours."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


def dropout(hidden: torch.Tensor, p: float) -> torch.Tensor:
    """`hidden` with a share of `p` (rounded to 1 in 65,536) of its elements set to 0 at random, and
    the others scaled so that the expected value stays the same."""
    if hidden.device.type != "cpu" or p == 0 or torch.compiler.is_compiling():
        return torch_dropout(hidden, p)
    return _Dropout.apply(hidden, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, p: float) -> torch.Tensor:
        n_values = 1 << 16
        n_dropped = round(p * n_values)
        words = torch.empty(-(-hidden.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: hidden.numel()].view(hidden.shape)
        kept = bits >= n_dropped - n_values // 2
        ctx.save_for_backward(kept)
        ctx.scale = n_values / (n_values - n_dropped)
        return (hidden * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None
