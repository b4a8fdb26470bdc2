"""Outputs: reserved for one command, written atomically, replacing nothing but regular files."""

import contextlib
import errno
import fcntl
import importlib
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from src.data import outputs
from src.data.outputs import atomic_folder, claim, claim_output, load_or_claim, write_whole
from src.data.passages import Passages
from src.evaluation.results import AnswerFile, check_results
from src.options import train_reader_parser
from src.runtime.errors import InputError, reports_input_errors
from src.search.shards import ShardWriter, remove_unfinished
from src.training.metrics import Metrics, start_log, write_options

OTHER = "another command is writing it; wait for it, or give another --output_path"


@pytest.fixture(autouse=True)
def nothing_reserved() -> Iterator[None]:
    yield
    outputs.release()


@contextlib.contextmanager
def another_process(task: Callable[[], None]) -> Iterator[int]:
    """A process that has run the task and waits; it is killed at the end."""
    done, say = os.pipe()
    child = os.fork()
    if not child:
        task()
        os.write(say, b"x")
        signal.pause()
        os._exit(0)
    os.read(done, 1)
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        kill(child)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# ----------------------------------------------------------------------------------------------
# Two commands


def test_an_output_is_one_commands_until_it_dies(tmp_path):
    target = tmp_path / "found.json"
    with another_process(lambda: claim_output(str(target))) as child:
        with pytest.raises(InputError, match=rf"found\.json: {OTHER}"):
            claim_output(str(target))
        claim_output(str(tmp_path / "found.jsonl"))  # another file in the same folder
        kill(child)
        claim_output(str(target))
        claim_output(str(target))  # which is this command's already
    assert sorted(os.listdir(tmp_path)) == [".found.json.lock", ".found.jsonl.lock"]
    outputs.release()
    assert os.listdir(tmp_path) == []


def test_a_runs_folder_is_locked_by_its_log(tmp_path):
    log = tmp_path / "run" / "run.log"
    with another_process(lambda: start_log(log).info("first")) as child:
        with pytest.raises(InputError, match=r"run: another command .*--name"):
            start_log(log)
        assert "first" in log.read_text()
        kill(child)
        start_log(log)
    outputs.release()
    assert os.listdir(log.parent) == ["run.log"]


def test_worker_processes_do_not_hold_locks_of_their_parent(tmp_path):
    """A loader's worker outlives a killed command by some seconds."""
    workers = tmp_path / "worker"

    def reserve_and_fork() -> None:
        claim(tmp_path / "out", "give another --output_path")
        child = os.fork()
        if not child:
            signal.pause()
        workers.write_text(str(child))

    with another_process(reserve_and_fork) as child:
        kill(child)
        try:
            claim(tmp_path / "out", "give another --output_path")
        finally:
            os.kill(int(workers.read_text()), signal.SIGKILL)


def test_an_index_that_is_being_built_is_waited_for(tmp_path):
    """Its maker reserves it and ends; the one that waited finds it, and does not make it again."""
    folder = tmp_path / "passages.tsv.bm25"
    with another_process(lambda: load_or_claim(folder, lambda: None, "")) as maker:
        with open(tmp_path / ".passages.tsv.bm25.lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.mkdir()
        assert load_or_claim(folder, lambda: "made", "") == "made"
        folder.rmdir()
        kill(maker)
        assert load_or_claim(folder, lambda: "made", "") is None


def test_a_dead_commands_lock_is_swept_only_where_others_wait(tmp_path, monkeypatch):
    """Otherwise a command that claims it at that moment would take the sweep for another writer."""
    lock = tmp_path / ".out.lock"
    lock.touch()
    outputs.remove_leftovers(tmp_path, "out")
    assert lock.exists()
    (tmp_path / "out").mkdir()
    assert load_or_claim(tmp_path / "out", lambda: "made", "") == "made"
    assert os.listdir(tmp_path) == ["out"]


def test_where_a_file_system_has_no_locks_they_are_done_without(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    leftover = tmp_path / ".out.0123abcd.partial"  # perhaps of a process that is alive
    with another_process(lambda: claim(tmp_path / "out", "")):
        leftover.touch()
        monkeypatch.setattr(fcntl, "flock", flock)
        claim(tmp_path / "out", "")
    write_whole(tmp_path / "out", ["text"])
    assert leftover.exists()


def test_what_is_reserved_is_given_up_however_a_command_ends(tmp_path):
    @reports_input_errors
    def main() -> None:
        claim(tmp_path / "out", "")
        raise InputError("no")

    with pytest.raises(SystemExit):
        main()
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------
# What is not replaced


def make(kind: str, path: Path) -> None:
    victim = path.parent / "victim"
    victim.write_text("mine")
    if kind == "folder":
        path.mkdir()
    elif kind == "symbolic link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)


def writers(folder: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """By what is written: the file, and who writes it."""
    shard = folder / "wiki_00", 2, 4, np.float16, {}
    return {
        "a text": ("out", lambda: write_whole(folder / "out", ["text"])),
        "an option's": ("out", lambda: claim_output(str(folder / "out"))),
        "beside it": ("out.x", lambda: claim_output(str(folder / "out"), beside=[".x"])),
        "a lock": (".out.lock", lambda: claim(folder / "out", "")),
        "the log": ("run.log", lambda: start_log(folder / "run.log")),
        "options": ("options.json", lambda: write_options(folder, {})),
        "metrics": ("metrics.jsonl", lambda: Metrics(folder, 0)),
        "answers": ("final_output.txt", lambda: check_results(folder)),
        "scores": ("dataset_wscores.json", lambda: check_results(folder)),
        "a part": (".answers.part-0.jsonl", lambda: AnswerFile(folder, 0, {})),
        "a shard": ("wiki_00", lambda: ShardWriter(*shard)),
        "its rows": (".wiki_00.partial", lambda: ShardWriter(*shard)),
        "its progress": (".wiki_00.progress.json", lambda: ShardWriter(*shard)),
    }


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe"])
@pytest.mark.parametrize("what", writers(Path()))
def test_only_regular_files_are_replaced(what, kind, tmp_path):
    name, write = writers(tmp_path)[what]
    make(kind, tmp_path / name)
    before = os.lstat(tmp_path / name)
    with pytest.raises(InputError) as caught:
        write()
    assert f"{name} is a" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.path.samestat(os.lstat(tmp_path / name), before)
    assert (tmp_path / "victim").read_text() == "mine"
    outputs.release()
    assert sorted(os.listdir(tmp_path)) == sorted([name, "victim"])


def test_a_pipe_that_appears_while_a_file_is_written_is_not_replaced(tmp_path):
    def pieces() -> Iterator[str]:
        os.mkfifo(tmp_path / "out")
        yield "text"

    with pytest.raises(InputError, match="out is a device, pipe or socket, not a regular file"):
        write_whole(tmp_path / "out", pieces())
    assert stat.S_ISFIFO(os.lstat(tmp_path / "out").st_mode)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["pipe", "symbolic link"])
def test_a_cache_in_place_of_something_else_is_made_elsewhere(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "p.tsv").write_text("1\ttext\ttitle\n")
    make(kind, tmp_path / ".p.tsv.offsets")
    assert len(Passages(tmp_path / "p.tsv")) == 1
    assert len(list((tmp_path / "cache").rglob("*.offsets"))) == 1
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "..", "/x", "a/b", "n" * 256, "a\0b"])
def test_a_name_is_one_folders(name, refused):
    line = refused(train_reader_parser().parse_args, ["--train_data", "x", "--name", name])
    assert line.startswith("error: argument --name: ")


# ----------------------------------------------------------------------------------------------
# Partial files


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "out", ["old"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_whole(tmp_path / "out", ["new"])
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_what_dead_writers_left_is_removed(tmp_path):
    def write_and_stay() -> None:
        outputs._new_partial(tmp_path / "out")
        outputs._new_partial(tmp_path / "out", folder=True)

    with another_process(write_and_stay) as child:
        for name in (".out.lock", ".out.x.0123abcd.partial", ".other.0123abcd.partial", "out"):
            (tmp_path / name).touch()
        alive = set(os.listdir(tmp_path)) - {".out.x.0123abcd.partial"}
        claim(tmp_path / "out", "")
        assert set(os.listdir(tmp_path)) == alive
        outputs.release()
        kill(child)
        claim(tmp_path / "out", "")
        outputs.release()
    assert set(os.listdir(tmp_path)) == {"out", ".other.0123abcd.partial"}


def test_what_a_killed_shard_writer_left_goes_with_the_shard(tmp_path):
    path = tmp_path / "wiki_00"
    with ShardWriter(path, 4, 2, np.float32, {}) as writer:
        writer.append(["a", "b"], np.ones((2, 2)))
    ShardWriter(path, 4, 2, np.float32, {"model": "another"}).__exit__()
    assert os.listdir(tmp_path) == []
    (tmp_path / ".wiki_00.progress.json").touch()  # killed between the shard's renaming and this
    remove_unfinished(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", ["text"])
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "file").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == 0o666 & ~mask
    assert stat.S_IMODE(os.stat(tmp_path / "folder").st_mode) == 0o777 & ~mask


def test_a_folder_takes_anothers_name_whole(tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "index") as folder:
            (folder / "file").write_text(text)
        assert (tmp_path / "index" / "file").read_text() == text
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "index"):
        raise ZeroDivisionError
    assert (tmp_path / "index" / "file").read_text() == "two"
    (tmp_path / "link").symlink_to(tmp_path / "index")
    with pytest.raises(OSError, match="link is not a folder"), atomic_folder(tmp_path / "link"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["index", "link"]


RUN = "--checkpoint_dir {at} --name run --model_path x"
COMMANDS = {  # by script: its output, and options that are wrong otherwise
    "train_reader": ("run", f"{RUN} --train_data x"),
    "train_retriever": ("run", f"{RUN} --train_data x"),
    "test_reader": ("run", f"{RUN} --eval_data x"),
    "generate_passage_embeddings": (
        "wiki_00", "--output_path {at}/wiki --passages x --model_path x",
    ),
    "passage_retrieval": ("o.json", "--output_path {at}/o.json --passages x --bm25 --data x"),
}  # fmt: skip


@pytest.mark.parametrize("script", COMMANDS)
def test_each_script_reserves_its_output_first(script, tmp_path, refused):
    name, options = COMMANDS[script]
    lock_file = tmp_path / "run" / "run.log" if name == "run" else None
    with another_process(lambda: claim(tmp_path / name, "", lock_file)):
        line = refused(importlib.import_module(script).main, options.format(at=tmp_path).split())
    assert f"{name}: another command is writing it; wait for it, or " in line
