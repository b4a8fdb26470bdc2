"""A pseudo-terminal with a script in it: what stands on the screen, and Ctrl-C."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

from tests.conftest import ROOT


class Terminal:
    """A script that runs in a terminal of its own.

    Its standard output and standard error are both the terminal, as they are for a person.
    """

    def __init__(
        self, *command: str | Path, processes: int = 1, columns: int = 100, **environment: str
    ):
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += [f"--nproc_per_node={processes}"]
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, columns))
        self.process = subprocess.Popen(
            # (A script that ran in this process may have left signals ignored.)
            ["env", "--default-signal", "setsid", "--ctty", "--wait", *start, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.screen = ""

    def read(self, until: str | None = None, seconds: float = 120) -> str:
        """Read until the screen matches (since the start), or until the script ends."""
        deadline = time.monotonic() + seconds
        while until is None or not re.search(until, self.screen):
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"nothing new in {seconds} s:\n{self.screen}"
            try:
                piece = os.read(self._ours, 65536)
            except OSError:  # no process has the terminal open any more
                piece = b""
            if not piece:
                assert until is None, f"ended without {until!r}:\n{self.screen}"
                break
            self.screen += piece.decode(errors="replace")
        return self.screen

    def type(self, keys: str, until: str) -> str:
        """Type keys when the script waits for them, and read until what is printed from now on
        matches; gives that."""
        self.wait_until_idle()
        before = len(self.screen)
        os.write(self._ours, keys.encode())
        self.read(until=rf"(?s)\A.{{{before}}}.*?{until}")
        return self.screen[before:]

    def wait_until_idle(self) -> None:
        """Until the script waits for a key: Python's readline can pass over what comes while it is
        still busy with one."""
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.read_text().rsplit(")", 1)[1].split()[0] != "S":
            time.sleep(0.01)

    def press_ctrl_c(self) -> tuple[float, int, str]:
        """Press Ctrl-C, and wait until every process has left the terminal: seconds, the exit
        status and what was printed meanwhile."""
        before = len(self.screen)
        since = time.monotonic()
        os.write(self._ours, b"\x03")
        self.read()
        passed = time.monotonic() - since
        return passed, self.process.wait(), self.screen[before:]
