"""Output files and folders: reserved for one command, and written atomically."""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from src.runtime.errors import InputError, at_end

# Beside an output NAME are `.NAME.lock`, while a command has reserved it, and, while it is written,
# `.NAME.1234abcd.partial`, locked by its writer: if it can be locked, its writer is dead.

Value = TypeVar("Value")
_locks: dict[Path, int] = {}  # this command's lock files and their descriptors


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """A context that turns an `OSError` into an `InputError` naming the path and the remedy."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise InputError(f"{path}: {problem}; {remedy}") from error


def require_regular(*paths: Path, inputs: Iterable[str] = ()) -> None:
    """Only regular files are replaced, and none that the command reads (`inputs`).

    Errors: `OSError` for a path that exists and is something else, or whose name is too long.
    """
    existing = [name for name in inputs if os.path.exists(name)]
    for path in paths:
        if not os.path.lexists(path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(path.with_name(f".{path.name}.12345678.partial"))  # while it is written
            continue
        if any(os.path.exists(path) and os.path.samefile(path, name) for name in existing):
            raise OSError(errno.EEXIST, f"{path.name} is a file that this command reads")
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}
        if not stat.S_ISREG(mode := os.lstat(path).st_mode):
            kind = kinds.get(stat.S_IFMT(mode), "a device, pipe or socket")
            raise OSError(errno.EEXIST, f"{path.name or path} is {kind}, not a regular file")


def claim(target: Path, remedy: str, lock_file: Path | None = None, wait: bool = False) -> None:
    """Reserve an output until this command ends, and remove what killed writers left of it. If this
    command is killed, the kernel frees the output at once.

    Args:
        remedy: what a user can do instead, for the errors.
        lock_file: a lasting file in the target, a folder; none: one is made beside the target, and
            removed at the end. It is locked by `flock`, unless the file system cannot do that.
        wait: for another command that has reserved it, rather than fail.
    Errors: `InputError` when another command has reserved it, or it cannot be written.
    """
    file = (lock_file or _lock_file(target)).absolute()
    if file in _locks:
        return
    with writing(target, remedy):
        file.parent.mkdir(parents=True, exist_ok=True)
        require_regular(file)
        while True:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if _lock(handle, wait) is False:
                os.close(handle)
                problem = "another command is writing it; wait for it"
                raise InputError(f"{target}: {problem}, or {remedy}")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.lstat(file)):
                    break
            os.close(handle)  # the other command has ended, and removed the file
    if not _locks:
        at_end.callback(release)
        # A worker process shares its parent's locks, and may outlive it.
        os.register_at_fork(after_in_child=_close_locks)
    _locks[file] = handle
    remove_leftovers(file.parent, "" if lock_file else target.name)


def claim_output(
    path: str, option: str = "--output_path", beside: Sequence[str] = (), inputs: Iterable[str] = ()
) -> None:
    """Reserve a file that an option names, so that a wrong one is reported at the start.

    Args:
        beside: suffixes of the files that are written next to it.
        inputs: files that the command reads.
    Errors: `InputError` when it cannot be written or replaced, would replace an input, or another
        command writes it.
    """
    target, remedy = Path(path), f"give another {option}"
    with writing(target, remedy):
        require_regular(target, *(Path(f"{target}{suffix}") for suffix in beside), inputs=inputs)
    claim(target, remedy)


def load_or_claim(folder: Path, load: Callable[[], Value | None], remedy: str) -> Value | None:
    """What `load` returns for a folder that is made once. If it is missing or damaged (`load`
    returns None), reserve it, after waiting for a command that may be making it now."""
    remove_leftovers(folder.parent, folder.name)
    _remove_if_dead(_lock_file(folder))  # claims of it wait, so locking it for a moment is harmless
    if os.path.lexists(folder) and (found := load()) is not None:
        return found
    claim(folder, remedy, wait=True)
    return load() if os.path.lexists(folder) else None


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def release() -> None:
    """Give up all outputs that this command has reserved."""
    for file in _locks:
        if file.suffix == ".lock":  # removed before it is unlocked, so that no one gets it
            file.unlink(missing_ok=True)
    _close_locks()


def _close_locks() -> None:
    while _locks:
        os.close(_locks.popitem()[1])


def _lock(handle: int, wait: bool = False) -> bool | None:
    """Lock an open file or folder. Returns whether it could be; None: its file system has no locks.
    (On NFS, that is so for folders.)"""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _new_partial(target: Path, folder: bool = False) -> tuple[Path, int]:
    """A new file, or folder, to write what will be the target. Returns its path and descriptor."""
    while True:
        name = f".{target.name.lstrip('.')}.{secrets.token_hex(4)}.partial"
        partial = target.with_name(name)
        if folder:
            partial.mkdir()
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        else:
            create = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            handle = os.open(partial, create, 0o666)
        if _lock(handle) is not False and partial.exists():
            return partial, handle
        os.close(handle)  # another command took it for a dead process's before it was locked


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes left of files and folders whose names begin with `name`."""
    hidden = f".{glob.escape(name.lstrip('.'))}*."
    for path in folder.glob(f"{hidden}{'[0-9a-f]' * 8}.partial"):
        _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    """Remove a partial or lock file, or partial folder, that no living process has locked."""
    with contextlib.suppress(OSError):
        is_folder = path.is_dir()
        handle = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if is_folder else os.O_RDWR))
        if _lock(handle):
            shutil.rmtree(path) if is_folder else path.unlink()
        os.close(handle)


@contextlib.contextmanager
def atomic_file(target: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the target's name when it is complete and on disk, and is removed when
    writing fails.

    Args: mode: its permissions; None: what the umask gives any new file.
    Errors: `OSError` when it cannot be written, or the target is no regular file.
    """
    partial, handle = _new_partial(target)
    try:
        with open(handle, "w+b") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(handle, mode & 0o666)
            os.fsync(handle)
            require_regular(target)
            partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to be filled, which takes the target's name when it is complete and on disk, and
    is removed when writing fails. A folder that has the name already is replaced.

    Errors: `OSError` when it cannot be written, or the target is something else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, handle = _new_partial(target, folder=True)
    try:
        yield partial
        flush_to_disk(*partial.rglob("*"), partial)
        if os.path.lexists(target):
            if target.is_symlink() or not target.is_dir():
                raise OSError(errno.EEXIST, f"{target.name} is not a folder")
            old, old_handle = _new_partial(target, folder=True)
            target.rename(old)
            os.close(old_handle)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(target)
        flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def flush_to_disk(*paths: Path) -> None:
    """Make sure that files, or the entries of folders, are on disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(
    path: Path, pieces: Iterable[str], remedy: str = "give another path, or make room"
) -> Path:
    """Write a text file atomically: also when it is the pieces that fail, nothing is left.

    Errors: `InputError` when it cannot be written.
    """
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(piece.encode() for piece in pieces)
    return path
