"""Scripts in copies of one process, which has loaded Python's packages once, and ways to kill them.

Nothing has run under the process that is copied: its threads and files would not survive that.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch  # noqa: F401 (loaded before forks, as are the models)
from transformers import BertModel, T5ForConditionalGeneration  # noqa: F401

WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}


def die_writing(number: int) -> None:
    """Kill this process when it changes or opens a file for the `number`-th time."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        if event in WRITING:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    script: str,
    arguments: list[str],
    processes: int,
    prepare: Callable[[int], None],
    cleans_up: bool = False,
) -> list[int]:
    """Run a script's main in copies of this process, after `prepare(rank)`; returns their ids.
    With `cleans_up`, they end as scripts do: with what Python does at exit."""
    children, port = [], free_port()
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if processes > 1:
            job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in job.items()})
        if cleans_up:
            prepare(rank)
            importlib.import_module(script).main(arguments)
            sys.exit()
        status = 1
        try:
            prepare(rank)
            importlib.import_module(script).main(arguments)
            status = 0
        except SystemExit as exited:
            status = exited.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
    return children


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
