"""What a user can get wrong: one exception class, and how a script reports it.

Everything that a user can cause (a missing file, a broken line, an impossible option) is raised as
`InputError` with one line that names the file, the value and the cure. A script prints that line
and exits with status 2; any other exception is a fault of ours and keeps its traceback. Ctrl-C ends
a script with one line too (`src/interrupt.py`).
"""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from src import interrupt

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, quota or file size limit


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
    """Wrap a script's `main` so that an `InputError` becomes one line and exit status 2, and Ctrl-C
    one line and status 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            with interrupt.Interrupts():
                main(*args, **kwargs)
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
    if isinstance(error, InputError):
        # A data-loading worker hands on its traceback; the message is on its last line.
        _end(str(error).strip().split("\n")[-1].removeprefix("src.errors.InputError: "))


def _end(message: str) -> NoReturn:
    # Under torchrun every process may meet the same error; the others say who they are.
    rank = interrupt.process_number(os.environ)
    prefix = "error: " if rank == "0" else f"error (process {rank}): "
    print(prefix + message, file=sys.stderr, flush=True)
    sys.exit(2)
