"""What a user can get wrong: one exception class, and how a script reports it.

Everything that a user can cause (a missing file, a broken line, an impossible option) is raised as
`InputError` with one line that names file, value and remedy; a script prints it and exits with
status 2. Any other exception is a bug, and keeps its traceback.
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


class SharedError(InputError):
    """The same in every process: the main one reports it for all."""


def shorten(value: object, width: int = 80) -> str:
    """`repr` of a user's value on one line, cut to `width` characters for an error message."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def first_line(error: BaseException, width: int = 300) -> str:
    """The first line with text in an exception's message (libraries like to write paragraphs), and
    the next if it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines[: 2 if lines and lines[0].endswith(":") else 1]
    return (" ".join(lines) or type(error).__name__)[:width]


_describe_resume: Callable[[], str]  # see on_interrupt


def on_interrupt(describe: Callable[[], str]) -> None:
    """From now on, Ctrl-C's line ends with "the same command" and what `describe` returns, such as
    "resumes after the last finished batch"."""
    global _describe_resume
    _describe_resume = describe


def reports_input_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: an `InputError` becomes one line and exit status 2, Ctrl-C one line
    and 130, and closed output (`| head`) 141, as in shells."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        on_interrupt(lambda: "starts again")
        for stream in (sys.stdout, sys.stderr):  # whatever is printed, in any encoding
            with contextlib.suppress(AttributeError, OSError, ValueError):  # some cannot
                stream.reconfigure(errors="backslashreplace")
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
        # Nothing is left to save: signals may end whatever the exit still waits for.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        _report(error)
        raise


def _leave_interrupted() -> NoReturn:
    """End this process and its children at once: Python's own exit takes a second with torch, and
    files are complete or absent at any moment."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_children()
    if process_number() == "0":
        beginning = "\n" if os.isatty(2) else ""  # after "^C" and perhaps a progress bar
        line = f"{beginning}stopped by Ctrl-C; the same command {_describe_resume()}"
        print(line, file=sys.stderr, flush=True)
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
    """End with one line if it is not a bug."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror}; make room, and the same command resumes")
    if isinstance(error, BrokenPipeError) and drop_unread_output():
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes | os.PathLike):
        _end(f"{os.fsdecode(error.filename)}: {error.strerror}; check the path, and try again")
    if isinstance(error, SharedError) and process_number() != "0":
        sys.exit(2)
    if isinstance(error, InputError):
        # A data-loading worker passes on its traceback, with the message on the last line.
        _end(str(error).strip().split("\n")[-1].removeprefix("src.runtime.errors.InputError: "))
    # Errors of torch.distributed; gloo raises a plain RuntimeError.
    if type(error).__name__.startswith("Dist") or "/gloo/" in first_line(error):
        why = first_line(error).split("] ", 1)[-1].split(". ")[0]  # without its source line
        lost = f"lost contact with another process ({why}): the first error in the log may tell why"
        _end(f"{lost}; the same command resumes", status=1)


def drop_unread_output() -> bool:
    """If the output has been closed, print to nowhere from now on, and return True."""
    output = select.poll()
    output.register(_STDOUT, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.close(nowhere)
    return True


def _end(message: str, status: int = 2) -> NoReturn:
    rank = process_number()  # several processes may have the same error
    prefix = "error: " if rank == "0" else f"error (process {rank}): "
    print(prefix + message, file=sys.stderr, flush=True)
    drop_unread_output()  # or Python's own exit status for unprinted output replaces ours
    sys.exit(status)
