"""Learning rates equal the reference's, update by update."""

import json
from pathlib import Path

import pytest
import torch

from src.options import OptimOptions
from src.training.optim import build_optimizer, build_schedule


def learning_rates(scheduler: str, n: int, lr: float, **kwargs) -> list[float]:
    options = OptimOptions(optim="adam", lr=lr, weight_decay=0.0, scheduler=scheduler, **kwargs)
    learning_rate = build_schedule(options)
    return [learning_rate(step) for step in range(n)]


def test_linear_schedules_equal_the_reference(reference: Path):
    cases = json.loads((reference / "schedules.json").read_text())
    assert len(cases) == 6
    for case in cases:
        expected = case.pop("lr_before_each_update")
        assert learning_rates("linear", len(expected), **case) == pytest.approx(expected, abs=1e-9)


def test_the_fixed_schedule_has_no_warm_up():
    rates = learning_rates(
        "fixed", 5, 0.01, warmup_steps=3, total_steps=4, scheduler_steps=None, fixed_lr=False
    )
    assert rates == [0.01] * 5


def test_weight_decay_is_adamws_alone():
    model = torch.nn.Linear(2, 2)
    assert build_optimizer(model, "adamw", 0.1, 0.3).param_groups[0]["weight_decay"] == 0.3
    assert build_optimizer(model, "adam", 0.1, 0.3).param_groups[0]["weight_decay"] == 0.0
