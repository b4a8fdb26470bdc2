"""A training run: all that the two training scripts share, from the first log line to the last.

To shard a large model, change `State`: it wraps the model, averages gradients, and collects and
restores what a checkpoint holds.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from src.data.batches import evaluation_batches, make_loader, training_batches
from src.data.examples import Examples, describe_passages, load_data, skip_unscored
from src.models.pretrained import quiet_transformers, save_tokenizer
from src.options import LoopOptions, OptimOptions, select
from src.runtime import distributed
from src.runtime.device import gpu_memory, resolve_precision
from src.runtime.errors import on_interrupt
from src.runtime.launch import StopRequest
from src.runtime.terminal import count, duration, say
from src.training import sharding
from src.training.checkpoint import (
    Checkpoints,
    describe_resume,
    read_meta,
    read_state,
    resume_point,
)
from src.training.loop import Evaluation, LossFunction, Position, check_finite, train
from src.training.metrics import Metrics, announce, passing_bar, start_log, write_options
from src.training.optim import build_optimizer, build_schedule

Batch = dict[str, Any]
Result = TypeVar("Result")


@dataclasses.dataclass
class Run:
    """A run that has started. `folder` is `checkpoint_dir/name`."""

    options: argparse.Namespace
    folder: Path
    log: logging.Logger
    device: torch.device
    precision: str
    stop: StopRequest
    started: float

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def started_with(self) -> dict[str, Any]:
        """The options and the number of processes, as they are saved."""
        return {**vars(self.options), "processes": distributed.world_size()}

    @property
    def target(self) -> str | None:
        """The target that a retriever learns from; None: the data's only or first one."""
        if getattr(self.options, "loss", "") == "contrastive":
            return "has_answer"
        return getattr(self.options, "target", None)

    @functools.cached_property
    def resumed_from(self) -> Path | None:
        """The checkpoint to resume from, if there is one."""
        return resume_point(self.checkpoints, self.started_with, self.log)

    @property
    def by_shares(self) -> bool:
        """Whether each process holds only its share of the weights."""
        return self.options.shard and distributed.world_size() > 1

    @property
    def is_fresh(self) -> bool:
        """Whether the model starts from random weights."""
        return self.options.model_config != "none" and not self.resumed_from

    def load_data(self, needs_scores: bool = False) -> tuple[Examples, Examples | None]:
        """The checked training and dev data; with `needs_scores`, examples whose passages have
        none are skipped. The dev data is None with `--eval_data none`."""
        n_context, path = self.options.n_context, self.options.eval_data
        needed_to = f"train with --n_context {n_context}" if n_context > 1 else ""
        scores = n_context if needs_scores else 0
        train_data = self._load("data", "training", self.options.train_data, scores, needed_to)
        dev_data = None if path == "none" else self._load("dev data", "evaluating", path, scores)
        return train_data, dev_data

    def _load(self, name: str, doing: str, path: str, scores: int, needed_to: str = "") -> Examples:
        rank, world_size = distributed.rank(), distributed.world_size()
        needs_target = doing == "training" and not scores
        data = distributed.raise_on_all(
            lambda: load_data(
                path, rank, world_size, needs_target, scores, passing_bar, self.target
            )
        )
        total = len(data)
        if scores:
            data = skip_unscored(data, distributed.all_gather(data.unscored), self.log, self.target)
        passages = describe_passages(data, self.options.n_context, needed_to)
        numbers = f"{len(data):,}", f"{total:,}", path
        say(self.log, name, f"{doing} on %s of %s examples of %s, %s", *numbers, passages)
        return data

    def loader(
        self, dataset: Dataset, batches: Iterable[list], collate: Callable[[list], Batch]
    ) -> DataLoader:
        pin, n_workers = self.device.type == "cuda", self.options.num_workers
        # With several processes, an update's micro-batches are needed at once.
        n_ahead = self.options.accumulation_steps // max(n_workers, 1) + 2
        return make_loader(dataset, batches, collate, n_workers, pin, n_ahead)

    def dev_results(
        self,
        dataset: Dataset,
        collate: Callable[[list], Batch],
        judge: Callable[[Iterator[Batch]], Iterator[Result]],
    ) -> Iterator[Result]:
        """Yield what `judge` yields for each of this process's dev batches. The processes keep in
        step: an `InputError` in one is raised in all, and a request to stop one stops all.

        All judge the same number of batches, which sharded models and negatives of other processes
        need. One without a batch of its own judges a filler, and drops the result.
        """
        n_examples, size = len(dataset.examples), self.options.per_gpu_batch_size
        world_size = distributed.world_size()
        own = evaluation_batches(n_examples, size, distributed.rank(), world_size)
        n_rounds = math.ceil(n_examples / (size * world_size))
        fillers = [[(0, 0)]] * (n_rounds - len(own))

        def batches() -> Iterator[Batch]:
            for number, batch in enumerate(self.loader(dataset, own + fillers, collate)):
                if number >= len(own) and "present" in batch:
                    batch["present"].zero_()  # a filler's passages are no negatives
                yield batch

        results = judge(batches())
        with passing_bar(n_rounds, "batch", "evaluating") as bar:
            for number in range(n_rounds):
                if distributed.any_process(self.stop.requested):
                    return
                result = distributed.raise_on_all(lambda: next(results))
                if number < len(own):
                    yield result
                bar.update()

    def weights(self) -> Path:
        """The best checkpoint, or the newest without evaluations."""
        best = self.checkpoints / "best_dev"
        return best if best.exists() else self.checkpoints / "latest"


def start_run(options: argparse.Namespace, title: str) -> Run:
    """Meet the other processes, pick a device, reserve the run's folder and open its log."""
    started = time.perf_counter()
    quiet_transformers()
    stop = StopRequest()
    device = distributed.join(options)
    precision = resolve_precision(options.precision, device)
    folder = Path(options.checkpoint_dir) / options.name
    log = start_log(folder / "run.log")
    run = Run(options, folder, log, device, precision, stop, started)
    write_options(folder, run.started_with)
    announce(log, "train", title, device, precision, folder)
    torch.manual_seed(options.seed)
    return run


class State:
    """What training changes, and a checkpoint restores. `model`, on its device, has the weights;
    call `wrapped` to train it: that one averages gradients over processes. (A sharded model does
    so itself.) `scratch`: a folder for shares of the optimizer on their way into a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        fp16: bool,
        scratch: Path | None = None,
    ):
        self.model = self.wrapped = model
        self.optimizer = optimizer
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.position = Position()
        self.scratch = scratch
        self.is_sharded = isinstance(model, FSDPModule)
        self.weights: dict[str, torch.Tensor] = {}  # all of a sharded model's, while it is saved
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if distributed.world_size() > 1 and not self.is_sharded:
            self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def release(self) -> None:
        """Let go of DDP, before the process group is left. If DDP is the last to hold the group,
        freeing it waits for gloo's thread, which may be waiting for Python: a deadlock."""
        self.wrapped = self.model
        gc.collect()

    def averaging(self, is_last: bool) -> contextlib.AbstractContextManager:
        """The context of a micro-batch: gradients are averaged in the last one of an update.
        (Sharded ones in each: they would take the memory of all until then.)"""
        skips = distributed.world_size() > 1 and not is_last and not self.is_sharded
        return self.wrapped.no_sync() if skips else contextlib.nullcontext()

    def restore(self, checkpoint: Path, seed: int) -> None:
        """Resume from a checkpoint, whose weights the model has already. The optimizer keeps its
        own hyperparameters, which may have changed. The random state is the checkpoint's, unless
        the seed or the number of processes has changed."""
        meta, rank = read_meta(checkpoint), distributed.rank()
        step = meta["step"]
        has_shares = (checkpoint / sharding.SHARES).exists()
        optimizer, scaler, random_states = distributed.raise_on_all(
            lambda: read_state(checkpoint, None if has_shares else self.optimizer, rank, step)
        )
        if has_shares:
            sharding.read_shares(checkpoint, self.optimizer, self._parameters)
        else:
            sharding.divide_state(optimizer, self.optimizer)
        if scaler:  # trained in fp16
            self.scaler.load_state_dict(scaler)
        same_seed = meta["options"].get("seed") == seed
        if same_seed and len(random_states) == distributed.world_size():
            random_state = random_states[rank]
            torch.set_rng_state(random_state["cpu"])
            if "cuda" in random_state and torch.cuda.is_available():
                torch.cuda.set_rng_state(random_state["cuda"])
        self.position = Position(**meta["position"])

    def save(self, write: Callable[..., Path], **kwargs: Any) -> Path | None:
        """Have `write`, a method of `Checkpoints`, save this state; returns the path in the main
        process. Errors: `InputError` when a weight is not finite."""
        check_finite(self.model, f"after update {self.position.step}")
        random_state = {"cpu": torch.get_rng_state()}  # dropout draws from it
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        state: dict[str, Any] = {"optimizer": None, "scaler": self.scaler.state_dict()}
        state["random_states"] = distributed.gather(random_state)
        if self.is_sharded:
            sharding.write_shares(self.scratch, self.optimizer, self._parameters)
            self.weights = sharding.full_weights(self.model)
        else:
            state["optimizer"] = self.optimizer.state_dict()
        if not distributed.is_main():
            return None
        path = write(dataclasses.asdict(self.position), state, **kwargs)
        if self.is_sharded:
            self.weights = {}
            shutil.rmtree(self.scratch, ignore_errors=True)
        return path


def fit(
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    loss_function: LossFunction,
    count_elements: Callable[[Batch], torch.Tensor],
    dataset: Dataset,
    collate: Callable[[list], Batch],
    evaluation: Evaluation | None = None,
) -> Path:
    """Train until `--total_steps`. Returns the checkpoint to use; does not return if a signal asks
    the run to stop.

    Args: loss_function: its first result is the mean over as many elements as are counted."""
    options, log, rank = run.options, run.log, distributed.rank()
    shape = options.per_gpu_batch_size, options.accumulation_steps, distributed.world_size()
    torch.manual_seed(options.seed + rank)  # dropout differs between processes
    sharding.check_fits(model, gpu_memory(run.device), options.shard)
    sharding.shard(model, run.device, run.precision, options.shard)
    optimizer = build_optimizer(model, options.optim, options.lr, options.weight_decay)
    scratch = run.checkpoints / ".optimizer.partial"
    state = State(model, optimizer, run.device, run.precision == "fp16", scratch)
    if run.resumed_from:
        state.restore(run.resumed_from, options.seed)
    position, first = state.position, state.position.step
    if first >= options.total_steps and not (position.evaluation_due and evaluation):
        state.release()
        distributed.stop()
        say(log, "done", "all %d updates are done; more needs --total_steps", first)
        say(log, "weights", "%s", run.weights())
        return run.weights()
    text = "%d to %d, of %d x %d x %d questions (a process x accumulated x processes)"
    say(log, "updates", text, first + 1, options.total_steps, *shape)

    order = training_batches(
        len(dataset.examples), shape[0], rank, shape[2], options.seed, position.examples_seen
    )
    loader = run.loader(dataset, order, collate)
    tokenizer_files = _tokenizer_files(tokenizer, run.resumed_from)

    def save_model(folder: Path) -> None:
        model.save_pretrained(folder, **({"state_dict": state.weights} if state.weights else {}))
        if state.is_sharded:
            scratch.rename(folder / sharding.SHARES)
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)

    disable_progress_bar()  # which Transformers shows for each saved checkpoint
    metrics = Metrics(run.folder, first, position.evaluation_due)
    on_interrupt(lambda: describe_resume(run.checkpoints))
    train(
        state,
        loss_function,
        (batch | {"n_elements": int(count_elements(batch))} for batch in loader),
        build_schedule(select(OptimOptions, options)),
        Checkpoints(run.checkpoints, save_model, options.keep_checkpoints, run.started_with),
        metrics,
        log,
        dataclasses.replace(select(LoopOptions, options), precision=run.precision),
        evaluation,
        should_stop=lambda: run.stop.requested,
    )
    metrics.close()
    state.release()
    if position.step < options.total_steps or position.evaluation_due:
        distributed.leave(run.stop, log, f"after update {position.step}")
    run.stop.finish()
    distributed.stop()
    best = ""
    if evaluation and position.best is not None:
        metric = evaluation.metric.replace("_", " ")
        best = f"; the best {metric} on dev is {position.best:.4g}"
    took = duration(time.perf_counter() - run.started)
    say(log, "done", "%s in %s%s", count(position.step - first, "update"), took, best)
    say(log, "weights", "%s", run.weights())
    return run.weights()


def _tokenizer_files(
    tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None
) -> dict[str, bytes]:
    """A tokenizer's files, the same in all checkpoints of a run: Transformers writes other ones
    after a tokenizer has been used, or loaded from what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        files = {path.name: path for path in sorted(Path(folder).iterdir())}
        if checkpoint:
            files |= {name: checkpoint / name for name in files if (checkpoint / name).exists()}
        return {name: path.read_bytes() for name, path in files.items()}
