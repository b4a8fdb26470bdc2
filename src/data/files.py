"""Files that are there whole or not at all, and files that are made once from another and kept."""

import contextlib
import fcntl
import glob
import gzip
import logging
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from src.runtime.errors import InputError, first_line, shorten
from src.runtime.terminal import Bar


def check_place(path: str, option: str = "--output_path") -> None:
    """Whether a file can be written where an option says: asked at the start, not after hours of
    work. Errors: `InputError` when it cannot."""
    place = Path(path)
    try:
        if place.is_dir():
            raise InputError(f"{option} {shorten(path)}: a folder; name a file in it")
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another {option}"
        ) from None


def write_whole(path: Path, pieces: Iterable[str]) -> Path:
    """Write a file beside its place and rename it: complete or absent, also when it is the pieces
    that fail."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another place, or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never begun
            partial.unlink()
    return path


# ----------------------------------------------------------------------------------------------
# Made once and kept

_FORMAT = 1  # of side files: raise it when what they hold changes
_PIECE = 1 << 20  # bytes looked at, or unpacked, at a time


def open_source(source: str, path: str) -> BinaryIO:
    """A file for reading in binary; errors name `path`, from which it was made, or which it is."""
    try:
        return open(source, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def line_number(data: mmap.mmap, position: int) -> int:
    """The number of the line, from 1, that holds a byte position."""
    buffer = np.frombuffer(data, dtype=np.uint8, count=int(position))
    pieces = range(0, len(buffer), _PIECE)
    return 1 + sum(int(np.count_nonzero(buffer[p : p + _PIECE] == ord("\n"))) for p in pieces)


@contextlib.contextmanager
def _replaced(target: Path, mode: int) -> Iterator[BinaryIO]:
    """A file that takes its place whole or not at all, whoever else writes the same at once."""
    handle, partial = tempfile.mkstemp(".partial", target.name, target.parent)
    try:
        with open(handle, "w+b") as file:
            yield file
            file.flush()
            os.fchmod(handle, mode & 0o666)  # for all who may read the source
            os.fsync(handle)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def kept(
    source: str, stat: os.stat_result, suffix: str, make: Callable[[], Iterator[np.ndarray]]
) -> np.ndarray:
    """The int64 arrays of `make()`, joined and mapped from a side file, which is made if it is not
    there, not whole, or not that of the source as it is now. It lies beside the source, or, where
    that cannot be written, in the user's cache folder, or is this process's own.

    The arrays are followed by the format, the source's size and time, and the side file's length.
    """
    stamp = [_FORMAT, stat.st_size, stat.st_mtime_ns]

    def write(file: BinaryIO) -> np.ndarray:
        for array in make():
            file.write(array.astype(np.int64, copy=False))
        file.write(np.array([*stamp, file.tell() // 8 + 4], dtype=np.int64))
        file.flush()
        return np.asarray(np.memmap(file, np.int64, "r"))[:-4]

    path = Path(source).absolute()
    name = f".{path.name.lstrip('.')}{suffix}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    owner = blake2b(os.fsencode(path), digest_size=8).hexdigest()
    places = [path.with_name(name), cache / "fusion-in-decoder" / f"{owner}{name}"]
    for place in places:
        with contextlib.suppress(OSError, ValueError):  # not there; not a whole number of numbers
            found = np.asarray(np.memmap(place, np.int64, "r"))
            if found[-4:].tolist() == [*stamp, len(found)]:
                return found[:-4]
    for place in places:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with _replaced(place, stat.st_mode) as file:
                return write(file)
    with tempfile.TemporaryFile() as file:
        return write(file)


def unpacked(path: str, bar: Bar) -> str:
    """The path itself, or that of a gzipped file's plain text, which lies beside it and is made if
    it is not there: a place in an archive cannot be read without all that stands before it."""
    with open_source(path, path) as file:
        if file.read(2) != b"\x1f\x8b":
            return path
        with contextlib.suppress(OSError):  # where the file system can lock, one process unpacks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        stat, archive = os.fstat(file.fileno()), Path(path)
        stamp = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
        target = archive.with_name(f".{archive.name}.{stamp}.unpacked")
        if target.exists():
            return str(target)
        logging.getLogger("fid").warning("unpacking %s to %s, once", path, target)
        try:
            with (
                _replaced(target, stat.st_mode) as plain,
                gzip.open(file) as packed,
                bar(stat.st_size, "B", "unpacking") as shown,
            ):
                position = 0
                while piece := packed.read(_PIECE):
                    plain.write(piece)
                    shown.update(file.tell() - position)
                    position = file.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            problem = f"the archive is cut off or damaged ({first_line(error)}); fetch it again"
            raise InputError(f"{path}: {problem}") from None
        except OSError as error:
            problem = f"cannot be unpacked beside itself ({error.strerror})"
            cure = "run gunzip -k on a copy where there is room, and give the result"
            raise InputError(f"{path}: {problem}; {cure}") from None
    for old in archive.parent.glob(glob.escape(f".{archive.name}.") + "*.unpacked*"):
        if not old.name.startswith(target.name):  # that of the archive as it was before
            old.unlink(missing_ok=True)
    return str(target)
