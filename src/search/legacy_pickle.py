"""Pickled embeddings of the reference, DPR and Contriever, read without trusting the pickle.

An ordinary unpickler imports and calls whatever the file names. This one knows the instructions
that build strings, bytes, numbers, lists and tuples, and the five names that numpy needs for an
array of numbers; these stand for functions of this module, so that nothing is ever imported.
Whatever else a file asks for is refused by name. The numbers of an array stay in the file, which
is memory-mapped.
"""

import math
import mmap
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.runtime.errors import InputError, first_line, shorten


class _Refused(Exception):
    """The pickle asks for something that is not on the list."""


# ----------------------------------------------------------------------------------------------
# What numpy's own pickles are made of


class _Dtype:
    """`numpy.dtype(code, ...)`, and the byte order that the pickle sets afterwards."""

    def __init__(self, code: str, *flags: object):
        # Only numbers: an array of objects would hold pointers, or call what makes the objects.
        if not isinstance(code, str) or not re.fullmatch("f[248]|[iu][1248]", code):
            raise _Refused(f"a numpy array of dtype {shorten(code)}")
        self.code, self.order = code, "|"

    def set_state(self, state: tuple) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise ValueError("bad byte order")
        self.order = order

    def make(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """`numpy.ndarray`, empty until the pickle sets its state."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def set_state(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _frombuffer(data, dtype, shape, "F" if fortran else "C")


_NDARRAY = object()  # stands for the name `numpy.ndarray`, which is only ever an argument


def _reconstruct(kind: object, *shape_and_code: object) -> _Array:
    if kind is not _NDARRAY:
        raise TypeError("only a plain numpy array can be reconstructed")
    return _Array()


def _frombuffer(data: memoryview, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    """An array on bytes of the file. Its shape must account for exactly the bytes there are, so
    that a false shape costs nothing."""
    kind = dtype.make()
    if any(type(size) is not int or size < 0 for size in shape) or order not in ("C", "F"):
        raise ValueError("bad array shape")
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of shape {shorten(shape)} does not fit its {len(data)} bytes")
    return np.frombuffer(data, dtype=kind).reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: memoryview) -> np.generic:
    return _frombuffer(data, dtype, (1,), "C")[0]


def _no_bytes() -> bytes:
    """`bytes()`, by which protocol 2 writes no bytes."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which it writes others."""
    if encoding != "latin1":
        raise ValueError("bad encoding of bytes")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Dtype}
_NAMES |= {("_codecs", "encode"): _encode, ("__builtin__", "bytes"): _no_bytes}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _NAMES[f"{_core}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _frombuffer
_FUNCTIONS = [value for value in _NAMES.values() if value is not _NDARRAY]


# ----------------------------------------------------------------------------------------------
# The reader


class _Instructions(dict[int, Callable]):
    """The handlers of the pickle instructions that are allowed."""

    def __missing__(self, code: int) -> Callable:
        known = pickletools.code2op.get(chr(code))
        raise _Refused(f"the pickle instruction {known.name if known else code}")


# The Python unpickler, not the one in C, for two reasons. Its instructions can be left out one by
# one. And the memo of the one in C is a list as long as the largest index that a file claims: nine
# bytes make it fill 34 GB. Here the memo is a dict.
class _Unpickler(pickle._Unpickler):
    dispatch = _Instructions(
        {
            code[0]: pickle._Unpickler.dispatch[code[0]]
            for code in (
                *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
                *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
                *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4),
                *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
                *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
                *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
                *(pickle.BINGET, pickle.LONG_BINGET),
                *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
                *(pickle.GLOBAL, pickle.STACK_GLOBAL),
            )
        }
    )

    def __init__(self, file: mmap.mmap):
        super().__init__(file)
        self._file = file
        self._view = memoryview(file)

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _NAMES:
            raise _Refused(shorten(f"{module}.{name}"))
        return _NAMES[module, name]

    def _load_frame(self) -> None:
        self.read(8)  # a hint to read ahead: the instructions go on behind it all the same

    def _load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        raise _Refused(shorten(f"{module}.{name}"))

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is known for known in _FUNCTIONS) or type(arguments) is not tuple:
            raise _Refused("to call something that is no function")
        self.stack[-1] = function(*arguments)

    def _load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Dtype | _Array) or type(state) is not tuple:
            raise _Refused("to set the state of something that is no array")
        self.stack[-1].set_state(state)

    def _load_bytes(self, length: str) -> None:
        """Bytes as a view of the file: nothing is allocated, however many a file claims."""
        (size,) = struct.unpack(length, self.read(struct.calcsize(length)))
        start = self._file.tell()
        if size > len(self._file) - start:
            raise EOFError(f"it claims {size} bytes where {len(self._file) - start} are left")
        self._file.seek(start + size)
        self.append(self._view[start : start + size])

    dispatch[pickle.FRAME[0]] = _load_frame
    dispatch[pickle.INST[0]] = _load_inst
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.SHORT_BINBYTES[0]] = lambda self: self._load_bytes("<B")
    dispatch[pickle.BINBYTES[0]] = lambda self: self._load_bytes("<I")
    dispatch[pickle.BINBYTES8[0]] = lambda self: self._load_bytes("<Q")
    dispatch[pickle.BYTEARRAY8[0]] = lambda self: self._load_bytes("<Q")


class LegacyEmbeddings(NamedTuple):
    """`vectors[i]` belongs to `ids[i]`; vectors are float16 or float32 [n, d], read-only."""

    ids: list[str]
    vectors: np.ndarray


def read_legacy_embeddings(path: str | Path) -> LegacyEmbeddings:
    """Read a pickled `(ids, array [n, d])`, or DPR's list of `(id, vector [d])`.

    The array of the first form is a memory map; the vectors of the second are copied into one.
    Errors: `InputError` that names the file and what it asked for, or what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise InputError(f"{path}: the file is empty; make or copy it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        return _as_embeddings(_Unpickler(content).load(), len(content))
    except _Refused as error:
        raise InputError(
            f"{path}: refused, because this pickle asks for {error}, and embeddings hold arrays "
            "of numbers, strings, lists and tuples alone; make them again with "
            "generate_passage_embeddings.py"
        ) from None
    # A broken pickle fails in as many ways as there are instructions in it.
    except (
        *(pickle.UnpicklingError, EOFError, struct.error, ValueError, TypeError, AttributeError),
        *(LookupError, OverflowError, MemoryError, RecursionError),
    ) as error:
        raise InputError(
            f"{path}: not embeddings that can be read ({first_line(error)}); make them again with "
            "generate_passage_embeddings.py, or copy them again"
        ) from None


def _as_embeddings(content: Any, file_size: int) -> LegacyEmbeddings:
    """Errors: ValueError when the content is built otherwise. Nothing of it is printed: the
    `repr` of hostile lists in lists is endless."""
    content = _built(content)
    if not isinstance(content, list | tuple):
        raise ValueError(f"it holds a {type(content).__name__}")
    if len(content) == 2 and isinstance(_built(content[1]), np.ndarray):
        ids, vectors = _built(content[0]), _built(content[1])
    else:
        if not content or not all(isinstance(item, list | tuple) for item in content):
            raise ValueError("it holds neither (ids, array) nor a list of (id, vector)")
        if any(len(item) != 2 for item in content):
            raise ValueError("its items are not all (id, vector)")
        ids, vectors = [item[0] for item in content], _stack(content, file_size)
    if isinstance(ids, np.ndarray):
        ids = list(ids)
    if not isinstance(ids, list | tuple):
        raise ValueError("its ids are no list")
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise ValueError(f"its array is {vectors.dtype} {list(vectors.shape)}, not float [n, d]")
    if len(ids) != len(vectors):
        raise ValueError(f"it holds {len(ids)} ids, but {len(vectors)} embeddings")
    kind = np.dtype(np.float16 if vectors.dtype.itemsize == 2 else np.float32)
    return LegacyEmbeddings([_id_text(item) for item in ids], vectors.astype(kind, copy=False))


def _built(value: Any) -> Any:
    return value.array if isinstance(value, _Array) else value


def _stack(pairs: list | tuple, file_size: int) -> np.ndarray:
    """DPR's vectors, each of its own, as one array [n, d]."""
    vectors = [_built(pair[1]) for pair in pairs]
    if not all(isinstance(vector, np.ndarray) and vector.ndim == 1 for vector in vectors):
        raise ValueError("its vectors are not all one-dimensional arrays")
    # One vector can be named a million times over, in two bytes each.
    if sum(vector.nbytes for vector in vectors) > file_size:
        raise ValueError("its vectors are more than the file can hold")
    return np.stack(vectors)


def _id_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, memoryview | bytes):
        return bytes(value).decode()
    # No id has more than 128 bits; to write out a number of a million digits takes minutes.
    if isinstance(value, int | np.integer) and abs(int(value)) < 1 << 128:
        return str(int(value))
    raise ValueError(f"an id is a {type(value).__name__}")
