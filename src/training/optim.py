"""Optimizers and learning-rate schedules, as the reference defines them."""

from collections.abc import Callable

import torch
from torch import nn

from src.options import OptimOptions


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adam (no weight decay, as in the reference) or AdamW over all parameters, in one kernel."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def linear_schedule(step: int, warmup_steps: int, scheduler_steps: int, fixed_lr: bool) -> float:
    """The factor on the learning rate before update `step` (the first is 0).

    It rises from 0 to 1 over `warmup_steps` updates, then falls to 0 at `scheduler_steps`, or stays
    at 1 with `fixed_lr`.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if fixed_lr:
        return 1.0
    return max(0.0, 1.0 - (step - warmup_steps) / max(1.0, scheduler_steps - warmup_steps))


def build_schedule(options: OptimOptions) -> Callable[[int], float]:
    """The learning rate of update `step` (the first is 0). `fixed`: always `lr`. `linear`: times
    `linear_schedule` until `scheduler_steps` (none: `total_steps`)."""
    if options.scheduler == "fixed":
        return lambda step: options.lr
    end = options.total_steps if options.scheduler_steps is None else options.scheduler_steps
    warmup, fixed = options.warmup_steps, options.fixed_lr
    return lambda step: options.lr * linear_schedule(step, warmup, end, fixed)
