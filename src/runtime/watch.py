"""Notice that another process of the job has died, and say which, instead of waiting for ever.

Every process beats: once a second it counts up a key of its own in the store through which the
processes met. A thread of every other process looks whether it still does. A process that is gone
is named in two ways: when a collective fails, as gloo's do at once when a connection closes, or,
where nothing fails because everyone waits (nccl, a machine that has frozen), after the timeout.
"""

import contextlib
import os
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn

from torch.distributed import Store

INTERVAL = 1.0  # seconds between two beats
SILENT = 4.0  # seconds without a beat after which a process is taken for dead, once one failed
LEFT = b"left"  # the last beat of a process that ended in order


class Watch:
    """This process's beats, and its eye on the others'.

    Args:
        store: where the processes meet; used by this object's thread alone.
        timeout: seconds without a beat after which a process ends all others.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float):
        self._store, self._rank, self._timeout = store, rank, timeout
        self._others = [other for other in range(world_size) if other != rank]
        now = time.monotonic()
        self._last = dict.fromkeys(self._others, (b"", now))  # last beat, and when it came
        self._store_lost: float | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        self._next_hook = sys.excepthook

    def explain_exceptions(self) -> None:
        """From now on, say of an exception that nothing caught if it came because another process
        is gone. (To be called when the process group stands: PyTorch sets a hook of its own.)"""
        self._next_hook, sys.excepthook = sys.excepthook, self._on_exception

    def leave(self) -> None:
        """Stop watching; the others will not miss this process."""
        self._ended.set()
        self._thread.join()
        sys.excepthook = self._next_hook
        with contextlib.suppress(RuntimeError):  # the store's host may have left before us
            self._store.set(self._key(self._rank), LEFT)

    def silent(self, seconds: float) -> list[int]:
        """The processes that have neither left nor beaten for so many seconds."""
        now = time.monotonic()
        with self._lock:
            if self._store_lost is not None and now - self._store_lost > seconds:
                # The first process hosts the store.
                return [0] if self._last.get(0, (LEFT, 0))[0] != LEFT else []
            return [
                other
                for other, (beat, since) in self._last.items()
                if beat != LEFT and now - since > seconds
            ]

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat/{rank}"

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._look()
            lost = self.silent(self._timeout)
            if lost:
                self._end(lost, self._timeout)

    def _look(self) -> None:
        """Beat once, and see who else has."""
        self._count += 1
        try:
            self._store.set(self._key(self._rank), str(self._count))
            begun = [
                other
                for other in self._others
                if self._last[other][0] or self._store.check([self._key(other)])
            ]
            beats = self._store.multi_get([self._key(other) for other in begun])
        except RuntimeError:
            with self._lock:
                self._store_lost = self._store_lost or time.monotonic()
            return
        now = time.monotonic()
        with self._lock:
            self._store_lost = None
            for other, beat in zip(begun, beats, strict=True):
                if beat != self._last[other][0]:
                    self._last[other] = (beat, now)

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, RuntimeError):
            deadline = time.monotonic() + SILENT + 2 * INTERVAL
            while time.monotonic() < deadline:
                if lost := self.silent(SILENT):
                    self._end(lost, SILENT)
                time.sleep(INTERVAL / 4)
        self._next_hook(kind, error, trace)

    def _end(self, lost: list[int], seconds: float) -> NoReturn:
        """Leave without waiting for anything: the process group is broken."""
        who = "process " + " and ".join(map(str, lost)) + (" has" if len(lost) == 1 else " have")
        print(
            f"error (process {self._rank}): {who} died or cannot be reached (silent for "
            f"{seconds:.0f} s): look for the first error in the log; the same command goes on "
            "from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
