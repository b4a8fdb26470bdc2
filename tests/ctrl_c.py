"""Ctrl-C while a script is in some function, in a terminal of its own.

    printf '%s' '[["train_reader", ["--train_data", ...], "train_reader:load_reader"], ...]' \\
        | python -m tests.ctrl_c

Each script is run by a copy of this process, which has the libraries already. When it calls the
function that is named last, a module's or a class's, that one waits, and Ctrl-C is pressed. Prints
for each: seconds until the script has left, its exit status, and what it printed after Ctrl-C.
"""

import importlib
import json
import os
import pty
import signal
import sys
import time
import traceback

HANGS = "this hangs now"


def hang(*arguments: object, **more: object) -> None:
    print(HANGS, flush=True)
    time.sleep(600)


def run(script: str, arguments: list[str], function: str) -> None:
    """Run a script, in which a function hangs; never returns."""
    status = 1
    try:
        module, _, place = function.partition(":")
        of_class, _, name = place.rpartition(".")
        owner = importlib.import_module(module)
        setattr(getattr(owner, of_class) if of_class else owner, name, hang)
        importlib.import_module(script).main(arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def press(script: str, arguments: list[str], function: str) -> tuple[float, int, str]:
    """Press Ctrl-C while the function hangs."""
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test may have it ignored
        signal.alarm(60)  # which ends it in any case
        run(script, arguments, function)
    printed, since = "", None
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # no process has the terminal open any more
            piece = b""
        if not piece:
            break
        printed += piece.decode(errors="replace")
        if since is None and HANGS in printed:
            printed = printed.partition(HANGS)[2]
            os.write(terminal, b"\x03")
            since = time.monotonic()
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    passed = time.monotonic() - since if since else 0.0
    return passed, status, printed


def main() -> None:
    cases = json.load(sys.stdin)
    for script in {script for script, _, _ in cases}:
        importlib.import_module(script)
    print(json.dumps([press(*case) for case in cases]))


if __name__ == "__main__":
    main()
