"""What a user can get wrong: one exception class, and how a script reports it.

Everything that a user can cause (a missing file, a broken line, an impossible option) is raised as
`InputError` with one line that names the file, the value and the cure. A script prints that line
and exits with status 2; any other exception is a fault of ours and keeps its traceback. Ctrl-C ends
a script with one line too (`src/runtime/interrupt.py`), and output that is closed early (`| head`)
with none.
"""

import contextlib
import errno
import functools
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from src.runtime import interrupt

_STDOUT = 1  # its file descriptor
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, quota or file size limit

at_end = contextlib.ExitStack()  # what to do when a command ends, with or without an error


class InputError(ValueError):
    """Bad use or bad input. The message is one line: file, value, cure."""


def shorten(value: object, width: int = 80) -> str:
    """`repr` of a user's value on one line, cut to `width` characters for an error message."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def first_line(error: BaseException, width: int = 300) -> str:
    """The first line with text in an exception's message (libraries like to write paragraphs)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:width]


def reports_input_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main` so that an `InputError` becomes one line and exit status 2, Ctrl-C one
    line and status 130, and output that nobody reads any more status 141 (as shells have it)."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            with interrupt.Interrupts(), at_end:
                try:
                    main(*args, **kwargs)
                except SystemExit:  # from --help, for one
                    sys.stdout.flush()
                    raise
                sys.stdout.flush()
        except KeyboardInterrupt:
            interrupt.leave()
        except Exception as error:
            _report(error)
            if interrupt.happened():  # which is why: another process has left, for one
                interrupt.leave()
            raise

    return wrapped


def _report(error: Exception) -> None:
    """End with one line for what a user can cause; return for anything else."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror}; make room, and the same command goes on")
    if isinstance(error, BrokenPipeError) and drop_unread_output():
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, InputError):
        # A data-loading worker hands on its traceback; the message is on its last line.
        _end(str(error).strip().split("\n")[-1].removeprefix("src.runtime.errors.InputError: "))


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


def _end(message: str) -> NoReturn:
    # Under torchrun every process may meet the same error; the others say who they are.
    rank = interrupt.process_number(os.environ)
    prefix = "error: " if rank == "0" else f"error (process {rank}): "
    print(prefix + message, file=sys.stderr, flush=True)
    drop_unread_output()  # or Python ends with a status of its own for what is still to be printed
    sys.exit(2)
