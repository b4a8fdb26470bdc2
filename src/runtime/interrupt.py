"""Ctrl-C: a script leaves within two seconds, with one line, status 130 and every file whole.

Python answers SIGINT with a KeyboardInterrupt, but not before its main thread is back from the
library that it is in, which a long update can put off. So a thread, which the signal itself wakes,
ends what has not ended by itself. It can do so at any moment: files are complete or absent.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import NoReturn

LIMIT = 1.2  # seconds after Ctrl-C, when the thread ends the process
SPARE = 0.4  # seconds more for a process that has said its line and is on its way out
STATUS = 128 + signal.SIGINT

_happened, _said = threading.Event(), threading.Event()


def process_number(environ: Mapping[str, str]) -> str:
    """This process's place in the job, as its launcher says; "0" without one."""
    return environ.get("RANK") or environ.get("SLURM_PROCID", "0")


def die_quietly() -> None:
    """Until `Interrupts` takes over, Ctrl-C ends the process without a traceback from among the
    imports. (It stays ignored where it is, as in a shell script's background job.)"""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _starts_again() -> str:
    return "starts again"


_resumes: Callable[[], str] = _starts_again  # see resume_by


class Interrupts:
    """A context in which Ctrl-C raises KeyboardInterrupt, and ends the process after `LIMIT`
    seconds whatever becomes of that."""

    def __enter__(self) -> "Interrupts":
        _happened.clear()
        _said.clear()
        resume_by(_starts_again)
        self._found = signal.getsignal(signal.SIGINT)
        if self._found is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._over = threading.Event()
        self._signals, self._woken_by = os.pipe()
        os.set_blocking(self._woken_by, False)
        self._before = signal.set_wakeup_fd(self._woken_by, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._found)
        signal.set_wakeup_fd(self._before)
        os.close(self._woken_by)  # which ends the thread, unless there was a Ctrl-C
        if not _said.is_set():
            self._over.set()

    def _watch(self) -> None:
        while received := os.read(self._signals, 1):
            if received[0] == signal.SIGINT:
                _happened.set()
                if self._over.wait(LIMIT) or (_said.is_set() and self._over.wait(SPARE)):
                    break
                leave()
        os.close(self._signals)


@contextlib.contextmanager
def only_raised() -> Iterator[None]:
    """A context in which Ctrl-C raises KeyboardInterrupt and does no more, for what waits for a
    person and can go on after it."""
    woken = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)


def resume_by(how: Callable[[], str]) -> None:
    """What the line shall say that the same command does, such as "goes on after the last finished
    batch". `how` is called when it is said, by any thread."""
    global _resumes
    _resumes = how


def happened() -> bool:
    """Whether there was a Ctrl-C."""
    return _happened.is_set()


def said() -> bool:
    """Whether the one line has been said; from now on it has."""
    before = _said.is_set()
    _said.set()
    return before


def leave() -> NoReturn:
    """End this process at once and those that it has started, whatever they are doing. (Python's
    own way out takes a second to put torch away.)"""
    try:
        if not said() and process_number(os.environ) == "0":
            # Past Python's own buffers, whose locks the main thread may hold. In a terminal, "^C"
            # and perhaps a progress bar stand on the line.
            beginning = "\n" if os.isatty(2) else ""
            line = f"{beginning}stopped by Ctrl-C; the same command {_resumes()}\n"
            os.write(2, line.encode())
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(STATUS)
