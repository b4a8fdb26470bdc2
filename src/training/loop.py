"""The one training loop, which reader and retriever share.

A step is one update of the weights. Each update averages `accumulation_steps` micro-batches, and a
micro-batch is what all processes read together: the loss is the mean over all of its elements
(label tokens, or passages), so that K processes with batches of B train exactly as one with K * B.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.runtime import distributed
from src.runtime.device import autocast
from src.runtime.errors import InputError
from src.training.checkpoint import Checkpoints, load_state, read_meta
from src.training.metrics import Average, Metrics, progress_bar

LossFunction = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]

MOST_SKIPPED = 20  # updates in a row that fp16 may skip while its loss scale settles


@dataclasses.dataclass
class Position:
    """How far a run is: updates made, examples seen by all processes, best dev value so far, and
    whether the evaluation after the last update has still to be made."""

    step: int = 0
    examples_seen: int = 0
    best: float | None = None
    evaluation_due: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. `clip`: maximum gradient norm (0: no clipping)."""

    total_steps: int
    precision: str = "fp32"
    accumulation_steps: int = 1
    clip: float = 1.0
    eval_freq: int = 500
    save_freq: int = 5000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`run` returns the dev metrics by name, the same in every process, or None when it was cut off
    because a process is asked to stop. `metric` names the one that decides what is best."""

    run: Callable[[], dict[str, float] | None]
    metric: str
    higher_is_better: bool


class State:
    """What training changes, and a checkpoint restores.

    Args:
        model: on its device; its weights are changed in place.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str = "fp32",
    ):
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.position = Position()

    def restore(self, checkpoint: Path, seed: int) -> None:
        """Continue from a checkpoint, whose weights the model has already. The optimizer keeps its
        own hyperparameters, which may have changed. The random state is that of the checkpoint,
        unless the seed or the number of processes has changed."""
        saved, meta = load_state(checkpoint), read_meta(checkpoint)
        groups = self.optimizer.param_groups
        current = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, values in zip(self.optimizer.param_groups, current, strict=True):
            group.update(values)
        if saved["scaler"]:  # the checkpoint is of fp16
            self.scaler.load_state_dict(saved["scaler"])
        random_states = saved["random_states"]
        same_seed = meta["options"].get("seed") == seed
        if same_seed and len(random_states) == distributed.world_size():
            _set_random_state(random_states[distributed.rank()])
        self.position = Position(**(meta.get("position") or saved["position"]))

    def save(self, write: Callable[..., Path], **kwargs: Any) -> Path | None:
        """Have `write`, a method of `Checkpoints`, write this state; returns the path in the main
        process. Errors: `InputError` when a weight is not finite."""
        check_finite(self.model, f"after update {self.position.step}")
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state["random_states"] = distributed.gather(_random_state())
        if not distributed.is_main():
            return None
        return write(dataclasses.asdict(self.position), state, **kwargs)


def train(
    state: State,
    loss_function: LossFunction,
    batches: Iterator[dict[str, Any]],
    learning_rate: Callable[[int], float],
    checkpoints: Checkpoints,
    metrics: Metrics,
    log: logging.Logger,
    settings: Settings,
    evaluation: Evaluation | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Position:
    """Train until `total_steps` updates were made, or until a process is asked to stop.

    Args:
        loss_function: (model, batch) -> the mean loss over a batch's elements, and their number.
        batches: endless micro-batches of this process, from where the state's position says.
        learning_rate: the rate of update `step` (the first is 0).
        checkpoints: where to save, every `save_freq` updates, at the end, and when the dev
            value is the best so far.

    Returns: where training ended. Errors: `InputError` when the loss, the gradient or a weight is
        not finite; nothing is saved after that.
    """
    position, model = state.position, state.model
    check_finite(model, "before training")
    wrapped = model
    if distributed.world_size() > 1:
        devices = [state.device] if state.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    report = _Report(state, metrics, log, settings.total_steps)
    model.train()
    position.evaluation_due = position.evaluation_due and evaluation is not None
    stopped = False
    if position.evaluation_due:  # the run stopped between an update and its evaluation
        stopped = not _evaluate(state, evaluation, checkpoints, metrics, log, report)
    while position.step < settings.total_steps and not stopped:
        rate = learning_rate(position.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = _update(state, wrapped, loss_function, batches, settings)
        position.step += 1
        report.add(loss, norm, rate)

        stopped = distributed.any_process(should_stop())
        is_end = position.step == settings.total_steps
        saves = position.step % settings.save_freq == 0 or is_end
        reports = position.step % settings.eval_freq == 0 or is_end
        position.evaluation_due = reports and evaluation is not None
        if reports or saves or stopped or report.is_full():
            report.write(is_end)
        # Saved before the evaluation, which can fail or be cut off and is then made on resuming.
        if saves or stopped:
            path = state.save(checkpoints.save_step, periodic=saves)
            if saves:
                log.info("saved %s", path)
        if position.evaluation_due and not stopped:
            stopped = not _evaluate(state, evaluation, checkpoints, metrics, log, report)
            if stopped and not saves:
                state.save(checkpoints.save_step, periodic=False)
        elif reports and not stopped:
            report.log_line()
        if reports:
            report.restart()
    report.bar.close()
    return position


def _update(
    state: State,
    wrapped: nn.Module,
    loss_function: LossFunction,
    batches: Iterator[dict[str, Any]],
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights. Returns its loss and gradient norm, on the device."""
    n_processes, n_batches = distributed.world_size(), settings.accumulation_steps
    optimizer, scaler = state.optimizer, state.scaler
    update_loss = torch.zeros((), device=state.device)
    for micro in range(n_batches):
        batch = move_to(next(batches), state.device)
        with contextlib.ExitStack() as stack:
            if n_processes > 1 and micro < n_batches - 1:
                stack.enter_context(wrapped.no_sync())  # gradients are averaged once an update
            with autocast(state.device, settings.precision):
                loss, count = loss_function(wrapped, batch)
            # This process's share of the mean over every process's elements. (DDP averages
            # gradients over processes, hence the factor.)
            sums = distributed.sum_tensor(torch.stack([loss.detach() * count, count.float()]))
            share = n_processes * count / sums[1] if n_processes > 1 else 1.0
            scaler.scale(loss * share / n_batches).backward()
            update_loss += sums[0] / sums[1] / n_batches
        state.position.examples_seen += len(batch["index"]) * n_processes
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return update_loss, norm


def _evaluate(
    state: State,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    metrics: Metrics,
    log: logging.Logger,
    report: "_Report",
) -> bool:
    """Report the dev metrics, and keep the weights if they are the best so far. Returns False when
    the evaluation was cut off by a signal, and has still to be made."""
    position = state.position
    state.model.eval()
    try:
        values = evaluation.run()
    finally:
        state.model.train()
    if values is None:
        return False
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"dev {name} is {value} after update {position.step}: {_remedy(state)}"
            )
    position.evaluation_due = False
    metrics.write(position.step, {f"dev/{name}": value for name, value in values.items()})
    report.log_line(", ".join(f"{name} {_short(value)}" for name, value in values.items()))
    value, sign = values[evaluation.metric], 1 if evaluation.higher_is_better else -1
    if position.best is None or (value - position.best) * sign > 0:
        position.best = value
        log.info("saved %s", state.save(checkpoints.save_best))
    if distributed.is_main():
        checkpoints.update_step(dataclasses.asdict(position))
    report.show()
    return True


class _Report:
    """What a run prints and keeps about its updates: log lines, the bar, and the metrics, every few
    updates, because reading a loss waits for the GPU."""

    def __init__(self, state: State, metrics: Metrics, log: logging.Logger, total_steps: int):
        self._state, self._metrics, self._log, self._total = state, metrics, log, total_steps
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
        for step, loss_, norm_, lr in self._recent:
            loss, norm = loss_.item(), norm_.item()
            values = {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr}
            is_skipped = math.isfinite(loss) and not math.isfinite(norm)
            if not math.isfinite(loss):
                raise InputError(f"the loss of update {step} is {loss}: {_remedy(self._state)}")
            if is_skipped and not self._state.scaler.is_enabled():
                raise InputError(f"the gradient of update {step} is {norm}: {_remedy(self._state)}")
            if is_skipped:
                del values["train/grad_norm"]
            self._skipped = self._skipped + 1 if is_skipped else 0
            if self._skipped == MOST_SKIPPED:
                what = f"{MOST_SKIPPED} updates in a row, up to {step}, overflow and are skipped"
                raise InputError(f"{what}: {_remedy(self._state)}")
            self._metrics.write(step, values)
            self._average.add(loss)
            self._last_loss = loss
        self._recent.clear()
        made = [values["step"] > 0 for values in self._state.optimizer.state.values()]
        if is_end and self._state.scaler.is_enabled() and not any(made):
            what = "every update has been skipped, because its gradient overflows"
            raise InputError(f"{what}: {_remedy(self._state)}")
        passed = time.perf_counter() - self._since
        self._rate = (self._state.position.examples_seen - self._seen) / passed
        self.show()

    def show(self) -> None:
        """The last numbers, behind the bar; where it is cut off, what matters most comes first."""
        best = self._state.position.best
        shown_best = "" if best is None else f"best {_short(best)}, "
        lr = self._state.optimizer.param_groups[0]["lr"]
        text = f"{self._rate:.1f} examples/s, loss {self._last_loss:.3f}, {shown_best}lr {lr:.2g}"
        # The rate in examples replaces that in updates: 80 columns are few.
        self.bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar.set_postfix_str(text, refresh=False)

    def log_line(self, dev: str = "") -> None:
        loss = self._average.value()
        self._log.info(
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
        if not torch.isfinite(parameter).all():
            remedy = "start from other weights, or with a lower --lr; it has not been saved"
            raise InputError(f"the weight {name} is not finite {when}: {remedy}")


def _remedy(state: State) -> str:
    remedy = "a lower --lr, a longer --warmup_steps or --precision fp32"
    remedy = "--precision bf16 or fp32" if state.scaler.is_enabled() else remedy
    return f"try {remedy}; the last checkpoint is from before it"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def move_to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from in this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
