"""Files that are read by byte positions, and the caches made from them."""

import codecs
import contextlib
import csv
import fcntl
import gzip
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from src.data.outputs import atomic_file, remove_leftovers, require_regular
from src.runtime.errors import InputError, first_line
from src.runtime.terminal import Bar, no_bar

# ----------------------------------------------------------------------------------------------
# Files read by byte positions

SPACE = b" \t\r\n"  # what JSON takes for white space
LONGEST_ROW = 1 << 24  # bytes
_CHUNK = 1 << 20  # bytes read at a time: what numpy makes of them stays in the processor's cache


class Source:
    """A file opened for reading by byte positions. It is not mapped: truncating a mapped file would
    end its readers by SIGBUS. Deleting or replacing the file does no harm; a change in place is an
    error at the next read.

    Args:
        path: names the file in errors.
        plain: the file to open if it is not `path` itself but was made from it.
    Errors: `InputError` when the file cannot be read, is empty, or changes.
    """

    def __init__(self, path: str, plain: str | None = None):
        self.path, self.plain = path, plain or path
        with self._readable():
            self.file = open(self.plain, "rb", buffering=0)  # noqa: SIM115 (open as long as this)
        self.stat = os.fstat(self.file.fileno())
        self.size = self.stat.st_size
        if self.size == 0:
            raise InputError(f"{path}: the file is empty; write or copy it again")
        has_mark = self.read(0, min(3, self.size)) == b"\xef\xbb\xbf"
        self.start = 3 if has_mark else 0  # after a byte-order mark

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); check the path"
            raise InputError(f"{self.path}: {problem}") from None

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`, which must be within the file."""
        handle = self.file.fileno()
        with self._readable():
            data = piece = os.pread(handle, end - start, start)
            while piece and len(data) < end - start:  # one call reads at most 2 GiB
                piece = os.pread(handle, end - start - len(data), start + len(data))
                data += piece
        self.check_unchanged()
        return data

    def check_unchanged(self) -> None:
        """Errors: `InputError` when the file is not what it was when it was first opened."""
        if _identity(os.fstat(self.file.fileno())) != _identity(self.stat):
            raise InputError(f"{self.path} changed while it was being read; run the command again")

    def chunks(self, start: int, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Chunks of bytes with their positions, to the file's end or before `end`.

        Errors: `InputError` for a NUL byte, which no text has: the file is binary, UTF-16, or was
        never fully written; and, to the file's end, for bytes that are not UTF-8.
        """
        stop, decoder = self.size if end is None else end, codecs.getincrementaldecoder("utf-8")()
        for position in range(start, stop, _CHUNK):
            data = self.read(position, min(position + _CHUNK, stop))
            after = position + len(data)
            if b"\0" in data:
                problem = "a NUL byte, so not UTF-8 text; re-encode the file, or copy it again"
                raise self.error(position + data.index(b"\0"), problem)
            try:
                if end is None:
                    decoder.decode(data, final=after == stop)
            except UnicodeDecodeError as error:  # its object begins before a character cut in two
                problem = f"byte {error.object[error.start]:#x} is not UTF-8 text"
                at = after - len(error.object) + error.start
                raise self.error(at, f"{problem}; re-encode the file") from None
            yield position, data

    def skip_blanks(self, start: int) -> int:
        """The position of the first byte from `start` on that is not white space, or the size."""
        for position, data in self.chunks(start):
            if text := data.lstrip(SPACE):
                return position + len(data) - len(text)
        return self.size

    def line_starts(self, start: int) -> Iterator[np.ndarray]:
        """The positions of the lines that are not blank, chunk by chunk."""
        at_start = True
        for position, data in self.chunks(start):
            view = np.frombuffer(data, dtype=np.uint8)
            starts = np.flatnonzero(view[:-1] == ord("\n")) + 1
            starts = np.append(0, starts) if at_start else starts
            at_start = data.endswith(b"\n")
            first = view[starts]
            is_text = first > ord(" ")
            for row in np.flatnonzero(~is_text & (first != ord("\n"))).tolist():
                is_text[row] = not self._is_blank_line(position + int(starts[row]))
            yield starts[is_text] + position

    def _is_blank_line(self, start: int) -> bool:
        for position in range(start, self.size, 4096):
            data = self.read(position, min(position + 4096, self.size))
            line, line_end, _ = data.partition(b"\n")
            if line_end or line.strip():
                return not line.strip()
        return True

    def line_number(self, position: int) -> int:
        """The number, from 1, of the line at a byte position."""
        pieces = range(0, position, _CHUNK)
        return 1 + sum(self.read(p, min(p + _CHUNK, position)).count(b"\n") for p in pieces)

    def error(self, position: int, problem: str) -> InputError:
        return InputError(f"{self.path}, line {self.line_number(position)}: {problem}")


def _identity(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def tsv_reader(lines: Iterable[str]) -> Iterator[list[str]]:
    """`csv.reader` for tabs, with room for fields longer than its 131,072 characters."""
    csv.field_size_limit(LONGEST_ROW)
    return csv.reader(lines, delimiter="\t")


# ----------------------------------------------------------------------------------------------
# Caches made from a file, next to it

_FORMAT = 2  # of caches: raise it when their contents change


def cached_array(
    source: Source, suffix: str, make: Callable[[], Iterator[np.ndarray]]
) -> np.ndarray:
    """The int64 arrays of `make()`, joined; mapped from a cache, which is rebuilt when missing,
    damaged or stale. The cache is next to the source or, where that cannot be written, in the
    user's cache folder.

    The arrays are followed by the format, the source's size, time and inode, the cache's length,
    and the CRC-32 of everything before: a damaged cache would give other passages.
    """
    stamp = [_FORMAT, *_identity(source.stat)]
    path = Path(source.plain).absolute()
    name = f".{path.name.lstrip('.')}{suffix}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    owner = blake2b(os.fsencode(path), digest_size=8).hexdigest()
    targets = [path.with_name(name), cache / "fusion-in-decoder" / f"{owner}{name}"]
    for target in targets:
        remove_leftovers(target.parent, name)
        with contextlib.suppress(OSError, ValueError):  # missing; not a whole number of integers
            require_regular(target)  # opening a pipe would wait forever
            found = np.asarray(np.memmap(target, np.int64, "r"))
            is_current = found[-6:-1].tolist() == [*stamp, len(found)]
            if is_current and found[-1] == zlib.crc32(found[:-2]):
                return found[:-6]
    array = np.concatenate([*make(), stamp]).astype(np.int64, copy=False)
    for target in targets:
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target, source.stat.st_mode) as file:
                file.write(array.data)
                file.write(np.array([len(array) + 2, zlib.crc32(array)], dtype=np.int64).data)
            break
    return array[:-4]


_UNPACK, _LINES, _UTF16 = "unpack it, and give the file in it", "write it as JSONL", "UTF-16 text"
_NO_TEXT = {  # formats by their first bytes, and the remedy
    b"BZh": f"a bzip2 archive; {_UNPACK} (bunzip2 -k)",
    b"\xfd7zXZ\0": f"an xz archive; {_UNPACK} (xz -dk)",
    b"\x28\xb5\x2f\xfd": f"a zstd archive; {_UNPACK} (zstd -dk)",
    b"PK\x03\x04": f"a zip archive; {_UNPACK}",
    b"\xff\xfe": f"{_UTF16}; re-encode it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": f"{_UTF16}; re-encode it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"PAR1": f"a Parquet table; {_LINES} (to_json(..., lines=True) in pandas)",
    b"\xff\xff\xff\xff": f"an Arrow table; {_LINES} (to_json in datasets)",
    b"\x80": f"a Python pickle, which could run code; {_LINES}",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<!DOCTYPE": "a web page; download the file itself",
}


def _check_is_text(path: str, head: bytes) -> None:
    """Errors: `InputError` that names the format of what is known not to be our kind of text."""
    for beginning, name in _NO_TEXT.items():
        if head.startswith(beginning):
            raise InputError(f"{path}: {name}")
    if head[257:262] == b"ustar":
        raise InputError(f"{path}: a tar archive; {_UNPACK} (tar -xf)")


def open_text(path: str, bar: Bar = no_bar) -> Source:
    """A text file, gzipped or not; an archive is unpacked next to it once, since a position in it
    cannot be read without everything before it. Errors: `InputError` also for other formats."""
    source = Source(path)
    head = source.read(0, min(512, source.size))
    if head[:2] != b"\x1f\x8b":
        _check_is_text(path, head)
        return source
    with source.file:
        unpacked = made_once(source, "unpacked", lambda target: _unpack(source, target, bar))
    return Source(path, str(unpacked))


def read_text(path: str | Path) -> str:
    """The text in a file, gzipped or not, with LF at the lines' ends. Errors: `InputError`."""
    source = open_text(str(path))
    data = b"".join(data for _, data in source.chunks(source.start))
    return data.decode().replace("\r\n", "\n")


def made_once(source: Source, kind: str, make: Callable[[Path], object]) -> Path:
    """A file made from a source, next to it: `make` is given its path, unless it exists. Its name
    has the source's size and time; what was made from an earlier version is removed."""
    with contextlib.suppress(OSError):  # where the file system can lock, one process makes it
        fcntl.flock(source.file, fcntl.LOCK_EX)
    path, stat = Path(source.path), source.stat
    target = path.with_name(f".{path.name}.{stat.st_size:x}-{stat.st_mtime_ns:x}.{kind}")
    if not target.is_file():
        remove_leftovers(path.parent, path.name)
        ours = re.compile(rf"\.+{re.escape(path.name.lstrip('.'))}\.[0-9a-f]+-[0-9a-f]+\.{kind}")
        for old in path.parent.glob(f".*.{kind}*"):
            if ours.match(old.name) and target.name not in old.name:
                old.unlink(missing_ok=True)
        logging.getLogger("fid").warning("%s is %s once, to %s", path, kind, target)
        make(target)
    return target


def _unpack(source: Source, target: Path, bar: Bar) -> None:
    archive, path = source.file, source.path
    try:
        with (
            atomic_file(target, source.stat.st_mode) as plain,
            gzip.open(archive) as packed,
            bar(source.size, "B", "unpacking") as shown,
        ):
            position = 0
            while piece := packed.read(_CHUNK):
                if position == 0:
                    _check_is_text(path, piece)
                plain.write(piece)
                shown.update(archive.tell() - position)
                position = archive.tell()
            source.check_unchanged()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        source.check_unchanged()
        problem = f"the archive is cut off or damaged ({first_line(error)}); fetch it again"
        raise InputError(f"{path}: {problem}") from None
    except OSError as error:
        problem = f"cannot be unpacked next to it ({error.strerror})"
        cure = "run gunzip -k on a copy where there is room, and give the result"
        raise InputError(f"{path}: {problem}; {cure}") from None
