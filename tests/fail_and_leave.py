"""Training scripts in which something raises: do all their processes end, and how?

    printf '%s' '[["train_reader", ["--train_data", ...], "torch.nn.utils:clip_grad_norm_", 3, 1,
        0], ...]' | python -m tests.fail_and_leave

Each case is a script, its options, a function (of a module or its class), the number of the call
that fails, the number of processes, and which of them fails. Prints for each case the exit
statuses, what went to standard error, and how many processes are left.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from tests.forks import start


def arm(function: str, number: int) -> None:
    """Make the `number`-th call of a function fail, in this process or a child of it."""
    module, _, path = function.partition(":")
    of_class, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    owner = getattr(owner, of_class) if of_class else owner
    original, calls = getattr(owner, name), [0]

    def failing(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            raise LookupError("a bug")
        return original(*args, **kwargs)

    setattr(owner, name, failing)


def left_behind(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = status.read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, IndexError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(status.parent.name))
    return found


def run(
    script: str, arguments: list[str], function: str, number: int, processes: int, victim: int
) -> tuple[list[int], str, int]:
    """A case in its processes."""
    with tempfile.TemporaryFile("w+") as errors:

        def prepare(rank: int) -> None:
            os.setsid()
            signal.alarm(100)  # which ends it in any case
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors.fileno(), 2)
            if rank == victim:
                arm(function, number)

        children = start(script, arguments, processes, prepare, cleans_up=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        left = [process for child in children for process in left_behind(child)]
        for process in left:
            os.kill(process, signal.SIGKILL)
        errors.seek(0)
        return statuses, errors.read(), len(left)


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    for script in {script for script, *_ in cases}:
        importlib.import_module(script)
    print(json.dumps([run(*case) for case in cases]))
