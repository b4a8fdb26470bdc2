"""The process group, and collectives on values. In a single process they do nothing."""

import argparse
import datetime
import gc
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from src.runtime.device import pick_device
from src.runtime.errors import InputError, SharedError
from src.runtime.launch import Launch, StopRequest, detect_launch

Value = TypeVar("Value")
_patient_group: dist.ProcessGroup | None = None  # for run_on_main


def start(launch: Launch, timeout: float = 600.0) -> None:
    """Meet the other processes, if any. After `timeout` seconds, waiting for one is an error."""
    if launch.world_size == 1:
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launch.address, str(launch.port)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    global _patient_group
    _patient_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))


def join(options: argparse.Namespace) -> torch.device:
    """Read the launcher's environment, and meet the other processes. Returns our device."""
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    start(launch, options.dist_timeout)
    return device


def stop() -> None:
    """Leave the process group, which nothing should hold any more: a sharded model that is freed
    later can abort the process while it exits."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def stop_together() -> None:
    """Leave the process group when every process is ready to."""
    barrier()
    stop()


def leave(stop_request: StopRequest, log: logging.Logger, where: str) -> NoReturn:
    """End together, as a signal asked one process to."""
    stop_request.leave(log, where, is_main(), stop_together)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the one process that writes and prints for all."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all processes, on the tensor's own device."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def sum_numbers(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    return sum_tensor(torch.tensor(numbers, dtype=torch.float64)).tolist()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process."""
    return sum_numbers(float(flag))[0] > 0 if world_size() > 1 else flag


def gather(value: Value) -> list[Value]:
    """The values of all processes by rank, in the main one; an empty list in the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if is_main() else []
    dist.gather_object(value, values if is_main() else None)
    return values


def all_gather(value: Value) -> list[Value]:
    """The values of all processes by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_main(task: Callable[[], Value]) -> Value | None:
    """Run a task in the main process alone; returns its value there, None elsewhere. The others
    wait for it however long it takes, without the timeout of `start`; if it dies, they end too.

    Errors: an `InputError` of the task, as a `SharedError` in every process.
    """
    if world_size() == 1:
        return task()
    value, message = None, [None]
    if is_main():
        try:
            value = task()
        except InputError as error:
            message = [str(error)]
    dist.broadcast_object_list(message, group=_patient_group)
    if message[0] is not None:
        raise SharedError(message[0])
    return value


def from_main(task: Callable[[], Value]) -> Value:
    """The value of a task that the main process alone runs, in every process."""
    return all_gather(run_on_main(task))[0]


def main_first(task: Callable[[], Value]) -> Value:
    """Run a task in the main process, and then in the others, which find the caches it made."""
    value = run_on_main(task)
    return value if is_main() else task()


def raise_on_all(task: Callable[[], Value]) -> Value:
    """Run a task in every process. An `InputError` in one becomes a `SharedError` in all: none is
    left waiting for another that has ended."""
    if world_size() == 1:
        return task()
    value, message = None, None
    try:
        value = task()
    except InputError as error:
        message = str(error)
    for found in all_gather(message):
        if found is not None:
            raise SharedError(found)
    return value
