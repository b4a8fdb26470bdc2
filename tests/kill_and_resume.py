"""Start a training script again and again, killing it each time, until it has been killed enough.

    python -m tests.kill_and_resume PROCESSES KILLS SEED train_reader.py [options of the script]

A program of its own, because it forks: Python and its packages are loaded once, and every start
of the script is a copy of this process, under which nothing has run yet. Half of the kills come in
the middle of an update, half when a file is opened, renamed or removed in the run's folder, that is
while a checkpoint is written. SIGKILL all of them; with several processes, one dies at that moment
and the others are killed after it, as when a machine fails. Says at the end how often it killed.
"""

import functools
import importlib
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertModel, T5ForConditionalGeneration  # noqa: F401 (loaded before forks)

WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}


def die_in_update(number: int) -> None:
    """Kill this process before the weights change for the `number`-th time."""
    left = [number]
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = step


def die_writing(number: int, folder: str) -> None:
    """Kill this process when it does something to a file in the folder for the `number`-th time."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        if event in WRITING and str(arguments[0]).startswith(folder):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(
    script: str, arguments: list[str], rank: int, world_size: int, port: int, arm: Callable
) -> int:
    """Run the script's main in a copy of this process, after `arm`; returns the copy's number."""
    child = os.fork()
    if child:
        return child
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    status = 1
    try:
        arm()
        importlib.import_module(Path(script).stem).main(arguments)
        status = 0
    except SystemExit as exited:
        status = exited.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(children: list[int]) -> bool:
    """Wait until all have ended; true if one was killed, after which the others are killed too."""
    running, killed = set(children), False
    while running:
        child, status = os.wait()
        running.discard(child)
        if os.WIFSIGNALED(status):
            killed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
        elif os.WEXITSTATUS(status) != 0 and not killed:
            sys.exit(f"a process ended with status {os.WEXITSTATUS(status)}")
    return killed


def main() -> None:
    processes, kills, seed = map(int, sys.argv[1:4])
    script, *arguments = sys.argv[4:]
    folder = arguments[arguments.index("--checkpoint_dir") + 1]
    importlib.import_module(Path(script).stem)
    draw = random.Random(seed)
    for number in range(kills + 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        victim, arm = draw.randrange(processes), lambda: None
        if number < kills and number % 2 == 0:
            arm = functools.partial(die_in_update, draw.randrange(1, 5))
        elif number < kills:  # the first process is the one that writes
            victim, arm = 0, functools.partial(die_writing, draw.randrange(1, 50), folder)
        children = [
            start(script, arguments, rank, processes, port, arm if rank == victim else lambda: None)
            for rank in range(processes)
        ]
        if wait(children) != (number < kills):
            sys.exit(f"start {number}: the run should have been killed {kills} times, and was not")
    print(f"killed {kills} times")


if __name__ == "__main__":
    main()
