"""Passage embeddings on disk, in shards.

A shard is one `safetensors` file: `embeddings` [n, d] in float16 or float32, and the passages' ids
as `id_bytes` (concatenated UTF-8) with `id_offsets` [n + 1]. All of it is memory-mapped: 21 million
passages take no memory until they are read.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from src.data.outputs import flush_to_disk, require_regular, write_whole, writing
from src.runtime.errors import InputError, first_line, shorten
from src.runtime.terminal import size

# The metadata in which all shards of a collection, and an index of them, must agree.
FINGERPRINTS = ("model", "passages", "options")
_RESUMES = "make room, and the same command resumes after the last finished block"
_VERSION = {"format_version": "1"}
_READ_BYTES = 1 << 22  # per read
_DTYPES = {name: np.dtype(code) for name, code in (("F16", "<f2"), ("F32", "<f4"))}
_DTYPES |= {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}

# ----------------------------------------------------------------------------------------------
# Reading


def shard_path(output_path: str, shard_id: int) -> Path:
    """The path of a shard: `folder`, `./folder` or `folder/` gives `folder/wiki_00`; a path with a
    further component is a prefix: `dir/passages` gives `dir/passages_00`."""
    folder, name = os.path.split(re.sub("^([.]/+)+(?=[^/])", "", output_path))
    if not folder or not name:
        folder, name = folder or name, "wiki"
    return Path(folder) / f"{name}_{shard_id:02d}"


class StoredIds(Sequence[str]):
    """The ids in a shard, decoded when they are read; a slice gives a list."""

    def __init__(self, path: str, offsets: np.ndarray, content: np.ndarray):
        self._path, self._offsets, self._content = path, offsets, content

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._offsets[index : index + 2].tolist()
        try:
            return self._content[start:end].tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise InputError(f"{self._path}: the id of row {index} is not text") from None


@dataclasses.dataclass(frozen=True)
class Shard:
    """An opened shard. `embeddings` [n, d] is a memory map; a legacy pickle has no metadata.

    Args: opened_as: size and time of the mapped file, to notice when it changes.
    """

    path: str
    ids: Sequence[str]
    embeddings: np.ndarray
    metadata: dict[str, str]
    opened_as: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def read(self, first: int, out: np.ndarray) -> None:
        """Copy the rows from `first` on into `out` [r, d], float32.

        A memory map is read as a file: its pages would count as this process's memory, and touching
        them after the file was truncated kills the process. Errors: `InputError` if it has changed.
        """
        source = self.embeddings
        if not isinstance(source, np.memmap):
            out[:] = source[first : first + len(out)]
            return
        row_bytes = source.itemsize * source.shape[1]
        at_once = max(1, _READ_BYTES // max(1, row_bytes))
        try:
            with open(source.filename, "rb", buffering=0) as file:
                self.check_unchanged()
                file.seek(source.offset + first * row_bytes)
                for start in range(0, len(out), at_once):
                    rows = out[start : start + at_once]
                    stored = rows if source.dtype == out.dtype else np.empty(rows.shape, "<f2")
                    if file.readinto(stored) != stored.nbytes:
                        raise self._changed()
                    rows[:] = stored
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

    def read_ahead(self, first: int, n_rows: int) -> None:
        """Ask the system to read these rows into its memory, without waiting for them."""
        if isinstance(self.embeddings, np.memmap) and hasattr(os, "posix_fadvise"):
            row_bytes = self.embeddings.itemsize * self.embeddings.shape[1]
            span = self.embeddings.offset + first * row_bytes, n_rows * row_bytes
            with contextlib.suppress(OSError), open(self.embeddings.filename, "rb") as file:
                os.posix_fadvise(file.fileno(), *span, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Errors: `InputError` when the file is not the one that was opened."""
        if self.opened_as is not None:
            try:
                stat = os.stat(self.embeddings.filename)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
            if self.opened_as != (stat.st_size, stat.st_mtime_ns):
                raise self._changed()

    def _changed(self) -> InputError:
        return InputError(
            f"{self.path}: the file changed while it was being searched; run the command again "
            "when it is complete"
        )

    def number(self, key: str) -> int | None:
        """A number from the metadata (`shard_id`, `num_shards`, `first`), or None."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not re.fullmatch("[0-9]{1,18}", value):
            raise InputError(f"{self.path}: its {key} is {shorten(value)}, not a number")
        return int(value)


def read_shard(path: str | Path) -> Shard:
    """Open a shard. Errors: `InputError` when it is missing, truncated, broken or not a shard."""
    path = str(path)
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            with safetensors.safe_open(path, "numpy") as checked:  # sizes, shapes and types
                metadata = checked.metadata() or {}
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        offsets = _map_tensor(path, entries["id_offsets"], 8 + length, ["I64"])
        embeddings = _map_tensor(path, entries["embeddings"], 8 + length, ["F16", "F32"])
        content = _map_tensor(path, entries["id_bytes"], 8 + length, ["U8"])
        if embeddings.ndim != 2 or offsets.shape != (len(embeddings) + 1,):
            raise ValueError("its ids do not match its embeddings")
        if metadata.get("format_version") != _VERSION["format_version"]:
            raise ValueError("it has another version")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not a complete shard of embeddings ({first_line(error)}); make it again "
            "with generate_passage_embeddings.py"
        ) from None
    is_mapped = isinstance(embeddings, np.memmap)
    opened_as = (stat.st_size, stat.st_mtime_ns) if is_mapped else None
    return Shard(path, StoredIds(path, offsets, content), embeddings, metadata, opened_as)


def _map_tensor(path: str, entry: dict, data_start: int, dtypes: list[str]) -> np.ndarray:
    if entry["dtype"] not in dtypes:
        raise ValueError(f"a tensor has dtype {entry['dtype']}")
    dtype, shape, start = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0]
    if not math.prod(shape):  # an empty map is impossible
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", data_start + start, shape)


# ----------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes one shard block by block, and resumes where a killed writer stopped.

    The shard grows in a hidden file. After each block has reached the disk, a small JSON file
    records how many rows are finished. `finish` renames: a shard is complete or absent.

    Args:
        path: the shard's path, from `shard_path`.
        rows, dimension: of the whole shard.
        dtype: float16 or float32.
        metadata: texts: `FINGERPRINTS`, `shard_id`, `num_shards` and `first` (position of row 0).
    Attributes:
        position: how many rows are finished; `append` continues there.
        discarded: why a partial file was not continued, for the log, or None.
    Errors: `InputError` when the file cannot be written, or the disk is or will be full.
    """

    def __init__(
        self, path: str | Path, rows: int, dimension: int, dtype: Any, metadata: dict[str, str]
    ):
        self.path, self.discarded = Path(path), None
        self._partial, self._progress = _unfinished(self.path)
        self._kind = {2: "F16", 4: "F32"}[np.dtype(dtype).itemsize]
        self._shape, self._metadata = (rows, dimension), {**_VERSION, **metadata}
        self._row_bytes = dimension * _DTYPES[self._kind].itemsize
        # Everything of known size comes first, so only the end of the ids' text moves. Its length
        # is in the header, which is written last, into room for any length.
        self._offsets_start = 0
        self._offsets_start = len(self._header(1 << 62))
        self._vectors_start = self._offsets_start + 8 * (rows + 1)
        self._text_start = self._vectors_start + rows * self._row_bytes
        self._file: Any = None
        with writing(self.path, "use another --output_path"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            require_regular(self.path, self._partial, self._progress)
            self.position, self._text_bytes = self._find_progress()
            if not self.position:
                remove_unfinished(self.path)
            needed = (rows - self.position) * (self._row_bytes + 8)
            free = shutil.disk_usage(self.path.parent).free
            if needed > free:
                raise InputError(
                    f"{self.path}: needs {size(needed)} more, but its disk has "
                    f"{size(free)} left; make room, or use another --output_path"
                )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Add the next rows [len(ids), d] as one finished block. It waits for the disk, so blocks
        should have thousands of rows. Errors: `InputError` for embeddings that are not finite."""
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(vectors, _DTYPES[self._kind])
        if block.shape != (len(ids), self._shape[1]) or self.position + len(ids) > self._shape[0]:
            raise ValueError(f"{block.shape} rows and {len(ids)} ids do not go into {self._shape}")
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            passage = shorten(ids[int(finite.argmin())])
            raise InputError(
                f"{self.path}: the embedding of passage {passage} is not finite in {block.dtype}; "
                "embed with --no_fp16, or repair the model"
            )
        texts = [text.encode("utf-8", "surrogatepass") for text in ids]
        ends = self._text_bytes + np.cumsum([len(text) for text in texts], dtype="<i8")
        with writing(self.path, _RESUMES):
            self._write(self._offsets_start + 8 * (self.position + 1), ends.tobytes())
            self._write(self._vectors_start + self._row_bytes * self.position, block.data)
            self._write(self._text_start + self._text_bytes, b"".join(texts))
            _flush(self._file)
            self.position += len(ids)
            self._text_bytes += sum(map(len, texts))
            progress = {**self._identity(), "rows": self.position, "text_bytes": self._text_bytes}
            write_whole(self._progress, [json.dumps(progress)], _RESUMES)

    def finish(self) -> Path:
        """Complete the shard, and return its path."""
        if self.position != self._shape[0]:
            raise ValueError(f"{self.path}: {self.position} of {self._shape[0]} rows are written")
        with writing(self.path, _RESUMES):
            self._write(0, self._header(self._text_bytes))
            _flush(self._file)
            self._file.close()
            require_regular(self.path)
            self._partial.replace(self.path)
            flush_to_disk(self.path.parent)
            remove_unfinished(self.path)
        return self.path

    def _identity(self) -> dict[str, Any]:
        return {"shape": list(self._shape), "dtype": self._kind, "metadata": self._metadata}

    def _find_progress(self) -> tuple[int, int]:
        """How many rows, and bytes of their ids, an earlier writer of this shard finished."""
        try:
            progress = json.loads(self._progress.read_text())
            size = self._partial.stat().st_size
            found = int(progress.pop("rows")), int(progress.pop("text_bytes"))
        except FileNotFoundError:
            return 0, 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.discarded = f"{self._progress} cannot be read ({first_line(error)})"
            return 0, 0
        if progress != self._identity():
            self.discarded = f"{self._partial} is of another model, collection or options"
        elif size < self._text_start + found[1]:
            self.discarded = f"{self._partial} is shorter than it was"
        return (0, 0) if self.discarded else found

    def _header(self, text_bytes: int) -> bytes:
        rows, dimension = self._shape
        entries: dict[str, Any] = {"__metadata__": self._metadata}
        begin = 0
        for name, kind, shape in (
            ("id_offsets", "I64", [rows + 1]),
            ("embeddings", self._kind, [rows, dimension]),
            ("id_bytes", "U8", [text_bytes]),
        ):
            end = begin + math.prod(shape) * _DTYPES[kind].itemsize
            entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(entries).encode()
        room = max(self._offsets_start - 8, math.ceil(len(text) / 8) * 8)
        return room.to_bytes(8, "little") + text.ljust(room)

    def _write(self, position: int, content: bytes | memoryview) -> None:
        if self._file is None:
            new = 0 if self.position else os.O_CREAT | os.O_EXCL
            handle = os.open(self._partial, os.O_RDWR | os.O_NOFOLLOW | new, 0o666)
            self._file = open(handle, "r+b")  # noqa: SIM115
            self._file.truncate(self._text_start + self._text_bytes)
        self._file.seek(position)
        self._file.write(content)


def is_finished(path: str | Path, metadata: dict[str, str]) -> bool:
    """Whether there is a complete shard with this metadata."""
    try:
        return read_shard(path).metadata == {**_VERSION, **metadata}
    except InputError:
        return False


def remove_unfinished(path: Path) -> None:
    """Remove what a stopped writer left of a shard."""
    for unfinished in _unfinished(path):
        unfinished.unlink(missing_ok=True)


def _unfinished(path: Path) -> tuple[Path, Path]:
    """The files of an unfinished shard: its rows so far, and their number."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.progress.json")


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
