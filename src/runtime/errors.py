"""What a user can get wrong: one exception class, and how a script reports it.

Everything that a user can cause (a missing file, a broken line, an impossible option) is raised as
`InputError` with one line that names the file, the value and the remedy. A script prints that line
and exits with status 2. Ctrl-C ends a script with one line too, and output that is closed early
(`| head`) with none. Any other exception is a bug: it keeps its traceback.
"""

import contextlib
import errno
import functools
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_STDOUT = 1  # its file descriptor
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, quota or file size limit

at_end = contextlib.ExitStack()  # what to do when a command ends, with or without an error


class InputError(ValueError):
    """Bad use or bad input. The message is one line: file, value, remedy."""


def shorten(value: object, width: int = 80) -> str:
    """`repr` of a user's value on one line, cut to `width` characters for an error message."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def first_line(error: BaseException, width: int = 300) -> str:
    """The first line with text in an exception's message (libraries like to write paragraphs)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:width]


_describe_resume: Callable[[], str]  # see on_interrupt


def on_interrupt(describe: Callable[[], str]) -> None:
    """From now on, Ctrl-C's line says that the same command does what `describe` returns, such as
    "resumes after the last finished batch"."""
    global _describe_resume
    _describe_resume = describe


def reports_input_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main` so that an `InputError` becomes one line and exit status 2, Ctrl-C one
    line and status 130, and output that nobody reads any more status 141 (as shells have it)."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        on_interrupt(lambda: "starts again")
        try:
            with at_end:
                _run(main, *args, **kwargs)
        except KeyboardInterrupt:
            _leave_interrupted()

    return wrapped


def _run(main: Callable[..., None], *args, **kwargs) -> None:
    try:
        try:
            main(*args, **kwargs)
        except SystemExit:  # from --help, for one
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except Exception as error:
        # There is nothing left to save: signals may end whatever the way out still waits for.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        _report(error)
        raise


def _leave_interrupted() -> NoReturn:
    """End this process and its children at once: Python's own way out takes a second to put torch
    away, and files are complete or absent at any moment."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_children()
    if process_number() == "0":
        beginning = "\n" if os.isatty(2) else ""  # after "^C" and perhaps a progress bar
        print(
            f"{beginning}stopped by Ctrl-C; the same command {_describe_resume()}",
            file=sys.stderr,
            flush=True,
        )
    os._exit(128 + signal.SIGINT)


def end_children() -> None:
    """Kill the processes that `multiprocessing` started for this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where PyTorch raises an error for each of them
    for child in multiprocessing.active_children():
        child.kill()


def process_number() -> str:
    """This process's rank, from the launcher's environment; "0" without one."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")


def _report(error: Exception) -> None:
    """End with one line for what is no bug; return for anything else."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror}; make room, and the same command resumes")
    if isinstance(error, BrokenPipeError) and drop_unread_output():
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, InputError):
        # A data-loading worker hands on its traceback; the message is on its last line.
        _end(str(error).strip().split("\n")[-1].removeprefix("src.runtime.errors.InputError: "))
    # PyTorch's errors of torch.distributed; what gloo raises is a plain RuntimeError.
    if type(error).__name__.startswith("Dist") or "/gloo/" in first_line(error):
        why = first_line(error).split("] ", 1)[-1].split(". ")[0]  # without the place in its source
        lost = f"lost contact with another process ({why}): the first error in the log may tell why"
        _end(f"{lost}; the same command resumes", status=1)


def drop_unread_output() -> bool:
    """If nobody reads what is printed any more, print to nowhere from now on, and return True."""
    output = select.poll()
    output.register(_STDOUT, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.close(nowhere)
    return True


def _end(message: str, status: int = 2) -> NoReturn:
    # Under torchrun every process may meet the same error; the others give their rank.
    rank = process_number()
    prefix = "error: " if rank == "0" else f"error (process {rank}): "
    print(prefix + message, file=sys.stderr, flush=True)
    drop_unread_output()  # or Python ends with a status of its own for what is still to be printed
    sys.exit(status)
