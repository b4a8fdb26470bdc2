"""The one training loop, which reader and retriever share.

A step is one update of the weights. Each update averages `accumulation_steps` micro-batches, and a
micro-batch is what all processes read together: the loss is the mean over all of its elements
(label tokens, or passages), so that K processes with batches of B train exactly as one with K * B.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from src.options import LoopOptions
from src.runtime import distributed
from src.runtime.device import autocast
from src.runtime.errors import InputError
from src.training.checkpoint import Checkpoints
from src.training.metrics import Average, Metrics, progress_bar
from src.training.sharding import full

if TYPE_CHECKING:
    from src.training.run import State

LossFunction = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, ...]]

MOST_SKIPPED = 20  # updates in a row that fp16 may skip while its loss scale settles


@dataclasses.dataclass
class Position:
    """How far a run is: updates made, examples seen by all processes, best dev value so far, and
    whether the evaluation after the last update is still to be made."""

    step: int = 0
    examples_seen: int = 0
    best: float | None = None
    evaluation_due: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`run` returns the dev metrics by name, the same in every process; what it returns after a
    request to stop is ignored. `metric` names the one that decides which weights are best."""

    run: Callable[[], dict[str, float]]
    metric: str
    higher_is_better: bool


def train(
    state: State,
    loss_function: LossFunction,
    batches: Iterator[dict[str, Any]],
    learning_rate: Callable[[int], float],
    checkpoints: Checkpoints,
    metrics: Metrics,
    log: logging.Logger,
    options: LoopOptions,
    evaluation: Evaluation | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `total_steps` updates were made, or until a process is asked to stop; where that
    was, `state.position` says.

    Args:
        loss_function: (model, batch) -> the mean loss over a batch's elements, first.
        batches: endless micro-batches of this process, starting at the state's position, each with
            its number of elements, `n_elements`.
        learning_rate: the rate of update `step` (the first is 0).
        checkpoints: where to save, every `save_freq` updates, at the end, and when the dev
            value is the best so far.

    Errors: `InputError` when the loss, the gradient or a weight is not finite; nothing is saved
        after that.
    """
    position = state.position
    check_finite(state.model, "before training")
    report = _Report(state, metrics, log, options.total_steps)
    state.model.train()

    def evaluate() -> bool:
        return _evaluate(state, evaluation, checkpoints, report, should_stop)

    position.evaluation_due = position.evaluation_due and evaluation is not None
    # The run may have stopped between an update and its evaluation.
    stopped = position.evaluation_due and not evaluate()
    while position.step < options.total_steps and not stopped:
        rate = learning_rate(position.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = _update(state, loss_function, batches, options)
        position.step += 1
        report.add(loss, norm, rate)

        stopped = distributed.any_process(should_stop())
        is_end = position.step == options.total_steps
        saves = position.step % options.save_freq == 0 or is_end
        reports = position.step % options.eval_freq == 0 or is_end
        position.evaluation_due = reports and evaluation is not None
        if reports or saves or stopped or report.is_full():
            report.write(is_end)
        # Saved before the evaluation, which may fail or be cut off, and is then made on resuming.
        if saves or stopped:
            path = state.save(checkpoints.save_step, periodic=saves)
            if saves:
                log.info("saved %s", path)
        if position.evaluation_due and not stopped:
            stopped = not evaluate()
            if stopped and not saves:
                state.save(checkpoints.save_step, periodic=False)
        elif reports and not stopped:
            report.log_line()
        if reports:
            report.restart()
    report.bar.close()


def _update(
    state: State,
    loss_function: LossFunction,
    batches: Iterator[dict[str, Any]],
    options: LoopOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights. Returns this process's part of its loss, which is the sum of all
    processes', and its gradient norm, on the device."""
    n_processes, n_batches = distributed.world_size(), options.accumulation_steps
    optimizer, scaler, shares = state.optimizer, state.scaler, [1.0] * n_batches
    micro_batches = itertools.islice(batches, n_batches)
    if n_processes > 1:
        # This process's shares of the means over every process's elements: exchanged once, and on
        # the CPU, where nothing waits for a GPU.
        micro_batches = list(micro_batches)
        counts = torch.tensor([batch["n_elements"] for batch in micro_batches])
        shares = (counts / distributed.sum_tensor(counts).clamp(min=1)).tolist()
    update_loss = torch.zeros((), device=state.device)
    for micro, batch in enumerate(micro_batches):
        batch = move_to(batch, state.device)
        with state.averaging(is_last=micro == n_batches - 1):
            with autocast(state.device, options.precision):
                loss = loss_function(state.wrapped, batch)[0] * (shares[micro] / n_batches)
            # (Gradients are averaged over processes, hence the factor.)
            scaler.scale(loss * n_processes).backward()
            update_loss += loss.detach()
        state.position.examples_seen += len(batch["index"]) * n_processes
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = full(torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf))
    scaler.step(optimizer)
    scaler.update()
    # (DDP's gradients are views of the buckets that it sends.)
    optimizer.zero_grad(set_to_none=state.wrapped is state.model)
    return update_loss, norm


def _evaluate(
    state: State,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    report: _Report,
    should_stop: Callable[[], bool],
) -> bool:
    """Report the dev metrics, and keep the weights if they are the best so far. Returns False when
    a process was asked to stop: the evaluation is then still to be made."""
    position = state.position
    state.model.eval()
    values = evaluation.run()
    state.model.train()
    if distributed.any_process(should_stop()):
        return False
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"dev {name} is {value} after update {position.step}: {_remedy(state)}"
            )
    position.evaluation_due = False
    report.write_dev(values)
    value, sign = values[evaluation.metric], 1 if evaluation.higher_is_better else -1
    if position.best is None or (value - position.best) * sign > 0:
        position.best = value
        report.log.info("saved %s", state.save(checkpoints.save_best))
    if distributed.is_main():
        checkpoints.update_step(dataclasses.asdict(position))
    report.show()
    return True


class _Report:
    """What a run prints and keeps about its updates: log lines, the bar, and the metrics, every few
    updates, because reading a loss waits for the GPU."""

    def __init__(self, state: State, metrics: Metrics, log: logging.Logger, total_steps: int):
        self.log = log
        self._state, self._metrics, self._total = state, metrics, total_steps
        self._recent: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []  # not yet written
        self._skipped = 0  # updates in a row
        self._last_loss = self._rate = 0.0
        self.bar = progress_bar(total_steps, "update", initial=state.position.step)
        self.restart()

    def restart(self) -> None:
        """From now on, average anew."""
        self._average = Average()
        self._since, self._seen = time.perf_counter(), self._state.position.examples_seen

    def add(self, loss: torch.Tensor, norm: torch.Tensor, lr: float) -> None:
        """The update that was just made."""
        self._recent.append((self._state.position.step, loss, norm, lr))
        self.bar.update()

    def is_full(self) -> bool:
        return len(self._recent) == 10

    def write(self, is_end: bool) -> None:
        """Write the updates since the last time to the metrics.

        Errors: `InputError` when training has failed: a loss or gradient is not finite, or fp16,
        which may skip an update because of its gradient, skips too many.
        """
        fp16 = self._state.scaler.is_enabled()
        problem = None
        steps, losses, norms, rates = zip(*self._recent, strict=True)
        losses = distributed.sum_tensor(torch.stack(losses)).tolist()
        norms = torch.stack(norms).tolist()
        for step, loss, norm, lr in zip(steps, losses, norms, rates, strict=True):
            values = {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr}
            is_skipped = not math.isfinite(norm)
            self._skipped = self._skipped + 1 if is_skipped else 0
            if not math.isfinite(loss):
                problem = f"the loss of update {step} is {loss}"
            elif is_skipped and not fp16:
                problem = f"the gradient of update {step} is {norm}"
            elif self._skipped == MOST_SKIPPED:
                problem = f"{MOST_SKIPPED} updates in a row, up to {step}, overflow and are skipped"
            if problem:
                break
            if is_skipped:
                del values["train/grad_norm"]
            self._metrics.write(step, values)
            self._average.add(loss)
            self._last_loss = loss
        self._recent.clear()
        made = [values["step"] > 0 for values in self._state.optimizer.state.values()]
        if is_end and fp16 and not any(made):
            problem = problem or "every update has been skipped, because its gradient overflows"
        if problem:
            raise InputError(f"{problem}: {_remedy(self._state)}")
        passed = time.perf_counter() - self._since
        self._rate = (self._state.position.examples_seen - self._seen) / passed
        self.show()

    def write_dev(self, values: dict[str, float]) -> None:
        """Write and log the dev metrics after the last update."""
        dev = {f"dev/{name}": value for name, value in values.items()}
        self._metrics.write(self._state.position.step, dev)
        self.log_line(", ".join(f"{name} {_short(value)}" for name, value in values.items()))

    def show(self) -> None:
        """The last numbers behind the bar, the most important first: the line may be cut off."""
        best = self._state.position.best
        shown_best = "" if best is None else f"best {_short(best)}, "
        lr = self._state.optimizer.param_groups[0]["lr"]
        text = f"{self._rate:.1f} examples/s, loss {self._last_loss:.3f}, {shown_best}lr {lr:.2g}"
        # The rate in examples replaces that in updates: 80 columns are few.
        self.bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar.set_postfix_str(text, refresh=False)

    def log_line(self, dev: str = "") -> None:
        loss = self._average.value()
        self.log.info(
            "step %d of %d | train loss %s | %slr %.3g | %.2f examples/s",
            self._state.position.step,
            self._total,
            "-" if loss is None else f"{loss:.4f}",
            f"dev {dev} | " if dev else "",
            self._state.optimizer.param_groups[0]["lr"],
            self._rate,
        )


def check_finite(model: nn.Module, when: str) -> None:
    """Errors: `InputError` when a weight is not finite: it would spread to all others."""
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(own).all():
            remedy = "start from other weights, or with a lower --lr; it has not been saved"
            raise InputError(f"the weight {name} is not finite {when}: {remedy}")


def _remedy(state: State) -> str:
    remedy = "a lower --lr, a longer --warmup_steps or --precision fp32"
    remedy = "--precision bf16 or fp32" if state.scaler.is_enabled() else remedy
    return f"try {remedy}; the last checkpoint is from before it"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def move_to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device, except for a reader's `attention_mask`, by which it
    groups passages: to look at it there would be to wait for the device."""
    return {
        key: value.to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and key != "attention_mask"
        else value
        for key, value in batch.items()
    }
