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
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.runtime import distributed
from src.runtime.device import autocast
from src.runtime.errors import InputError
from src.training.checkpoint import Checkpoints
from src.training.metrics import Average, Metrics, progress_bar

Evaluation = Callable[[], dict[str, float] | None]
LossFunction = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Position:
    """How far a run is: updates made, examples seen by all processes, best dev value so far, and
    whether the evaluation after the last update has still to be made."""

    step: int = 0
    examples_seen: int = 0
    best: float | None = None
    evaluation_due: bool = False


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer, scheduler: Any) -> Position:
    """Bring optimizer, schedule and this process's random state back to a saved state."""
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    random_states = state["random_states"]
    if len(random_states) == distributed.world_size():
        _set_random_state(random_states[distributed.rank()])
    return Position(**state["position"])


def train(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Iterator[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    checkpoints: Checkpoints,
    metrics: Metrics,
    log: logging.Logger,
    device: torch.device,
    *,
    total_steps: int,
    metric: str,
    higher_is_better: bool,
    evaluate: Evaluation | None = None,
    position: Position | None = None,
    scaler_state: dict[str, Any] | None = None,
    precision: str = "fp32",
    accumulation_steps: int = 1,
    clip: float = 1.0,
    eval_freq: int = 500,
    save_freq: int = 5000,
    should_stop: Callable[[], bool] = lambda: False,
) -> Position:
    """Train until `total_steps` updates were made, or until a process is asked to stop.

    Args:
        model: on its device; its weights are changed in place.
        loss_function: (model, batch) -> the mean loss over a batch's elements, and their number.
        batches: endless micro-batches of this process, from where `position` says.
        checkpoints: where to save, every `save_freq` updates, at the end, and when the dev
            value is the best so far.
        evaluate: gives the dev metrics by name, the same in every process, or None when it was
            cut off because a process is asked to stop. No `evaluate`: no evaluation.
        metric: the name of the one that decides which checkpoint is best.
        scaler_state: the fp16 loss scaler's state of a resumed run.
        clip: the gradient's largest norm; 0 leaves it as it is.

    Returns: where training ended. Errors: `InputError` when the loss is no longer a number.
    """
    position = position or Position()
    n_processes = distributed.world_size()
    wrapped = model
    if n_processes > 1:
        devices = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if scaler_state:
        scaler.load_state_dict(scaler_state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    recent: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []  # not yet in metrics.jsonl
    average = Average()
    direction = 1 if higher_is_better else -1

    def save(write: Callable[..., Any], silently: bool = False, **kwargs: Any) -> None:
        state = {
            "step": position.step,
            "position": dataclasses.asdict(position),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "random_states": distributed.gather(_random_state()),
        }
        if distributed.is_main():
            path = write(state, **kwargs)
            if not silently:
                log.info("saved %s", path)

    def report_losses() -> float:
        """Write the updates since the last time to the metrics; returns the last loss."""
        for step, loss, norm, lr in recent:
            values = {"train/loss": loss.item(), "train/grad_norm": norm.item(), "train/lr": lr}
            if not scaler.is_enabled() and not math.isfinite(values["train/grad_norm"]):
                raise InputError(
                    f"the gradient of update {step} is {values['train/grad_norm']} (loss "
                    f"{values['train/loss']}): try a lower --lr, a longer --warmup_steps or "
                    "--precision fp32; the last checkpoint is from before it"
                )
            metrics.write(step, values)
            average.add(values["train/loss"])
        last = recent[-1][1].item() if recent else math.nan
        recent.clear()
        return last

    def log_line(dev: str, lr: float, rate: float) -> None:
        loss = average.value()
        log.info(
            "step %d of %d | train loss %s | %slr %.3g | %.2f examples/s",
            position.step,
            total_steps,
            "-" if loss is None else f"{loss:.4f}",
            dev,
            lr,
            rate,
        )

    def evaluate_now(lr: float, rate: float) -> bool:
        """Report the dev metrics, and keep the weights if they are the best so far. False when
        the evaluation was cut off by a signal, and is still to be made."""
        values = _evaluate(model, evaluate)
        if values is None:
            return False
        position.evaluation_due = False
        metrics.write(position.step, {f"dev/{name}": value for name, value in values.items()})
        shown = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
        log_line(f"dev {shown} | ", lr, rate)
        if position.best is None or (values[metric] - position.best) * direction > 0:
            position.best = values[metric]
            save(checkpoints.save_best)
        return True

    model.train()
    stopped = False
    if position.evaluation_due:  # the run stopped between an update and its evaluation
        stopped = not evaluate_now(optimizer.param_groups[0]["lr"], 0.0)
        if position.step == total_steps and not stopped:
            save(checkpoints.save_step)
    bar = progress_bar(total_steps, "update", initial=position.step)
    since, seen = time.perf_counter(), position.examples_seen
    while position.step < total_steps and not stopped:
        update_loss = torch.zeros((), device=device)
        for micro in range(accumulation_steps):
            batch = move_to(next(batches), device)
            is_last = micro == accumulation_steps - 1
            with contextlib.ExitStack() as stack:
                if n_processes > 1 and not is_last:
                    stack.enter_context(wrapped.no_sync())  # gradients meet once an update
                with autocast(device, precision):
                    loss, count = loss_function(wrapped, batch)
                # This process's share of the mean over every process's elements. (DDP averages
                # gradients over processes, hence the factor.)
                sums = distributed.sum_tensor(torch.stack([loss.detach() * count, count.float()]))
                share = n_processes * count / sums[1] if n_processes > 1 else 1.0
                scaler.scale(loss * share / accumulation_steps).backward()
                update_loss += sums[0] / sums[1] / accumulation_steps
            position.examples_seen += len(batch["index"]) * n_processes
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf)
        lr = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        position.step += 1
        recent.append((position.step, update_loss, norm, lr))
        bar.update()

        stopped = distributed.any_process(should_stop())
        is_end = position.step == total_steps
        saves = position.step % save_freq == 0 or is_end
        reports = position.step % eval_freq == 0 or is_end
        position.evaluation_due = reports and evaluate is not None
        if reports or saves or stopped or len(recent) == 10:
            last_loss = report_losses()
            rate = (position.examples_seen - seen) / (time.perf_counter() - since)
            bar.bar_format = _BAR
            bar.set_postfix_str(_shown(last_loss, position.best, lr, rate), refresh=False)
        # Saved before the evaluation, which can fail or be cut off and is then made on resuming.
        if saves or stopped:
            save(checkpoints.save_step, silently=not saves, periodic=saves)
        if position.evaluation_due and not stopped:
            stopped = not evaluate_now(lr, rate)
            bar.set_postfix_str(_shown(last_loss, position.best, lr, rate), refresh=False)
            if stopped and not saves:
                save(checkpoints.save_step, silently=True, periodic=False)
            elif is_end and not stopped:
                save(checkpoints.save_step)  # or the next start would evaluate once more
        elif reports and not stopped:
            log_line("", lr, rate)
        if reports:
            average = Average()
            since, seen = time.perf_counter(), position.examples_seen
    bar.close()
    return position


# Once there is a rate in examples, it takes the place of that in updates: 80 columns are few.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def _shown(loss: float, best: float | None, lr: float, rate: float) -> str:
    """What the progress bar says behind its numbers; where it is cut off, by what matters most."""
    shown_best = "" if best is None else f"best {_short(best)}, "
    return f"{rate:.1f} examples/s, loss {loss:.3f}, {shown_best}lr {lr:.2g}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _evaluate(model: nn.Module, evaluate: Evaluation) -> dict[str, float] | None:
    model.eval()
    try:
        return evaluate()
    finally:
        model.train()


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
