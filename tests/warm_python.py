"""A `python` for tests that start many scripts: each runs in a process of its own, forked from one
that has imported the libraries already, which takes seconds.

    with warm_python(folder, environment) as environment:
        subprocess.run(["bash", "-c", "python train_reader.py ..."], env=environment)

Scripts and `-m` modules run as under the real Python, which does all else (`python -c`). The
libraries see the environment that the fork server was started with; so it is one for all commands.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -IS
import array, json, os, socket, sys
arguments = sys.argv[1:]
if not (arguments and (arguments[0].endswith(".py") or arguments[0] == "-m")):
    os.execv({python!r}, [{python!r}, *arguments])
request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    files = array.array("i", [0, 1, 2])
    server.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    server.sendall(request)
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or b"1"))
"""


@contextlib.contextmanager
def warm_python(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Gives the environment in which `python` and `python3` are forked from a warm process."""
    binaries, address = folder / "bin", str(folder / "python.socket")
    binaries.mkdir()
    client = binaries / "python"
    client.write_text(CLIENT.format(python=sys.executable, socket=address))
    client.chmod(0o755)
    (binaries / "python3").symlink_to(client)
    server = subprocess.Popen([sys.executable, __file__, address], env=environment)
    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the fork server has died"
            time.sleep(0.05)
        yield {**environment, "PATH": f"{binaries}{os.pathsep}{environment['PATH']}"}
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> tuple[list[str], str, dict[str, str]]:
    """Wait for commands. Returns a command's arguments, folder and environment in the process that
    is to run it, with the standard files of who asked; never returns in the server."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)  # who finds it can connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries those who wait
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        _, passed, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        files = array.array("i")
        files.frombytes(passed[0][2])
        request = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # noqa: B023
        child = os.fork()
        if not child:
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return tuple(json.loads(request))
        for file in files:
            os.close(file)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # who asked may have been stopped
            connection.send(str(status % 256).encode())
        os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be `python arguments...`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Python's own were made for the files of the server.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if arguments[0] == "-m":
        sys.path[0], sys.argv = folder, arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    import transformers

    for library in ("bm25s", "faiss", "torch.utils.tensorboard"):
        importlib.import_module(library)
    for name in ("T5ForConditionalGeneration", "BertModel", "AutoTokenizer", "BertTokenizerFast"):
        getattr(transformers, name)  # they are imported when they are first asked for
    gc.freeze()  # else each process would copy all of these objects when it ends
    run(*serve(sys.argv[1]))
