"""A headless Chromium that opens a page and answers questions about it.

It is driven over a pair of pipes (`--remote-debugging-pipe`: JSON messages that end in a zero
byte), so nothing but the browser is needed. Whatever a page writes to the console, asks the network
for or fails to load is kept in `complaints`.
"""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable")
PACKAGE = "chromium-headless-shell"
SECONDS = 60.0  # until an answer that does not come ends a test


def program() -> str | None:
    """A browser of this machine that may read temporary files (as one in a snap may not)."""
    found = filter(None, map(shutil.which, PROGRAMS))
    return next((path for path in found if "/snap" not in os.path.realpath(path)), None)


class Chromium:
    """One browser with one page; `with Chromium(folder) as browser` ends it.

    Args:
        folder: an empty one for the browser's own files.
    """

    def __init__(self, folder: Path):
        # It reads commands from its file 3 and writes answers to its file 4.
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [
            str(program()), "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
            f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "chromium", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []

    def __enter__(self) -> "Chromium":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(TimeoutError, BrokenPipeError):  # it may be gone already
            self._session = ""
            self.call("Browser.close")
            self._process.wait(SECONDS)
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._from, 1 << 20) if ready else b""
            if not piece:
                raise TimeoutError("the browser is gone" if ready else "the browser says nothing")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(message)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"])[:500])
        elif event in ("Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed"):
            self.complaints.append(json.dumps(about)[:500])
        elif event == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if not url.startswith(("file:", "about:")):
                self.complaints.append(f"asks for {url}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def show(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The window's size in pixels, and which colours its user likes."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path, place: str = "") -> None:
        """Open a file as a file:// page, at a place in it, and wait until it is loaded."""
        self.call("Page.navigate", url="about:blank")  # so that another place loads it anew
        self.call("Page.navigate", url=path.resolve().as_uri() + (f"#{place}" if place else ""))
        self.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + SECONDS
        while not self.ask(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {SECONDS:.0f} s: {condition}")
            time.sleep(0.02)

    def type(self, selector: str, text: str) -> None:
        """Type a text into an element, in place of what is there."""
        self.ask(f"document.querySelector({json.dumps(selector)}).select()")
        self.ask(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
