"""The process group, and collectives that take values and return values.

Every function works in a single process too, where it does nothing; none needs an options object,
because the process group knows who is who.
"""

import datetime
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from src.runtime.errors import InputError
from src.runtime.launch import Launch
from src.runtime.watch import Watch

Value = TypeVar("Value")
_watch: Watch | None = None  # of this process, while it is in a group
_store: dist.Store | None = None  # where the processes of the group met
_tasks = 0  # how many `in_main` has had


def start(launch: Launch, timeout: float = 600.0) -> None:
    """Meet the other processes (nothing to do when there is one).

    Args:
        timeout: seconds after which a process that waits for another gives up.
    """
    if launch.world_size == 1:
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launch.address, str(launch.port)
    patience = datetime.timedelta(seconds=timeout)
    meeting = dist.rendezvous("env://", launch.rank, launch.world_size, timeout=patience)
    store, rank, world_size = next(meeting)
    global _watch, _store
    _store = store
    _watch = Watch(store.clone(), rank, world_size, timeout)
    # Numbers that the CPU holds travel by gloo, tensors on a GPU by nccl.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=patience
    )
    _watch.explain_exceptions()


def stop() -> None:
    """Leave the process group."""
    global _watch, _store
    _store = None
    if _watch is not None:
        _watch.leave()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_together() -> None:
    """Leave the process group when every process is ready to."""
    barrier()
    stop()


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


def share(value: Value) -> list[Value]:
    """The values of all processes by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def in_main(task: Callable[[], Value]) -> Value | None:
    """Run a task in the main process alone, and give its value there, None elsewhere. The others
    wait for it, however long it takes: a collective would give up after `start`'s timeout.

    Errors: an `InputError` of the task, in every process.
    """
    if world_size() == 1:
        return task()
    global _tasks
    _tasks += 1
    key, error, value = f"in_main/{_tasks}", None, None
    if is_main():
        try:
            value = task()
        except InputError as found:
            error = found
        _store.set(key, "" if error is None else str(error))
    else:
        while not _store.check([key]):  # (should the main process die, the watch ends this one)
            time.sleep(0.05)
        message = _store.get(key).decode()
        error = InputError(message) if message else None
    barrier()  # the main process may be where the others read
    if error is not None:
        raise error
    return value


def together(task: Callable[[], Value]) -> Value:
    """Run a task that may find bad input in every process. If any does, all end with its error:
    none is left waiting for one that has gone."""
    error, value = None, None
    try:
        value = task()
    except InputError as found:
        error = found
    if world_size() > 1:
        messages = share(None if error is None else str(error))
        first = next((message for message in messages if message is not None), None)
        error = None if first is None else InputError(first)
    if error is not None:
        raise error
    return value
