"""Pickled embeddings of the original, DPR and Contriever, read without trusting the pickle.

An ordinary unpickler imports and calls whatever the file names. This one builds text, numbers,
lists and tuples, and knows the five names that numpy needs for an array of numbers, which stand for
functions of this module: nothing is imported. It is the Python unpickler, because the one in C
cannot leave out instructions, and fills 34 GB of memory when nine bytes claim a large memo.
"""

import mmap
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.runtime.errors import InputError, first_line, shorten

_ALLOWED = [pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE]
_ALLOWED += [pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BININT, pickle.BININT1]
_ALLOWED += [pickle.BININT2, pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE]
_ALLOWED += [pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_TUPLE, pickle.TUPLE]
_ALLOWED += [pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.BINGET, pickle.LONG_BINGET]
_ALLOWED += [pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL]
# Instructions that take more memory than room in the file: each is charged, and the sum bounded.
_COSTLY = {pickle.MARK, pickle.EMPTY_LIST, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2}
_COSTLY |= {pickle.TUPLE3, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.LONG1}
_COSTLY |= {pickle.BINUNICODE, pickle.SHORT_BINUNICODE}
_COST, _FREE = 32, 1 << 20  # bytes
_MOST_ROWS = 1 << 40


class _Refused(Exception):
    """The pickle asks for something that is not on the list."""


# ----------------------------------------------------------------------------------------------
# What numpy's own pickles are made of


class _Dtype:
    """`numpy.dtype(code, ...)`, and the byte order that the pickle sets afterwards."""

    def __init__(self, code: object, *flags: object):
        codes = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
        if type(code) is not str or code not in codes:
            # An array of objects would hold pointers. Only text is printed: the `repr` of lists in
            # lists can be endless.
            shown = shorten(code) if type(code) is str else type(code).__name__
            raise _Refused(f"a numpy array of dtype {shown}")
        self.dtype = np.dtype(code)

    def set_state(self, version: object, order: object, *more: object) -> None:
        if order not in ("<", ">", "=", "|"):
            raise ValueError("bad byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """`numpy.ndarray`, empty until the pickle sets its state."""

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    def set_state(self, _: object, shape: tuple, dtype: _Dtype, fortran: int, data: object) -> None:
        self.array = _frombuffer(data, dtype, shape, "F" if fortran else "C")


def _reconstruct(*kind_shape_code: object) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    """An array on bytes of the file, which must be exactly as many as its shape says."""
    if type(shape) is not tuple or len(shape) > 2 or order not in ("C", "F"):
        raise ValueError("bad array shape")
    if any(type(size) is not int or not 0 <= size <= _MOST_ROWS for size in shape):
        raise ValueError("bad array shape")
    array = np.frombuffer(data, dtype.dtype)
    if len(array) != (shape[0] if shape else 1) * (shape[1] if len(shape) > 1 else 1):
        raise ValueError(f"an array of shape {shape} does not fit its {len(data)} bytes")
    return array.reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: Any) -> np.generic:
    return _frombuffer(data, dtype, (1,), "C")[0]


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which protocol 2 writes bytes; `bytes()` stands for none."""
    if encoding != "latin1":
        raise ValueError("bad encoding of bytes")
    return text.encode("latin1")


_NDARRAY = object()  # stands for `numpy.ndarray`, which is only ever an argument
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _NAMES[f"{_core}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = lambda *state: _Array(_frombuffer(*state))
_FUNCTIONS = {id(value) for value in _NAMES.values()} - {id(_NDARRAY)}


class _Instructions(dict[bytes, Any]):
    """The handlers of the allowed instructions."""

    def __missing__(self, code: int) -> Any:
        known = pickletools.code2op.get(chr(code))
        raise _Refused(f"the pickle instruction {known.name if known else code}")


def _handler(code: bytes) -> tuple[int, Any]:
    """The number of an instruction, and its handler, charged where it is costly."""
    plain = pickle._Unpickler.dispatch[code[0]]

    def charged(self: "_Unpickler") -> None:
        self.spend()
        plain(self)

    return code[0], charged if code in _COSTLY else plain


class _Unpickler(pickle._Unpickler):
    def __init__(self, file: mmap.mmap):
        super().__init__(file)
        self._file, self._view = file, memoryview(file)
        self._budget = 2 * len(file) + _FREE

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _NAMES:
            raise _Refused(shorten(f"{module}.{name}"))
        return _NAMES[module, name]

    def spend(self, n_bytes: int = _COST) -> None:
        self._budget -= n_bytes
        if self._budget < 0:
            raise ValueError("it would take many times its size in memory")

    def load_frame(self) -> None:
        self.read(8)  # a hint to read ahead; the instructions follow it all the same

    def load_inst(self) -> None:
        self.find_class(*(self.readline()[:-1].decode("ascii") for _ in range(2)))
        raise _Refused("an instance")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if id(self.stack[-1]) not in _FUNCTIONS or type(arguments) is not tuple:
            raise _Refused("to call something that is no function")
        self.stack[-1] = result = self.stack[-1](*arguments)
        self.spend(len(result) if type(result) is bytes else _COST)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Dtype | _Array) or type(state) is not tuple:
            raise _Refused("to set the state of something that is no array")
        self.stack[-1].set_state(*state)

    def load_bytes(self, length: str) -> None:
        """Bytes as a view of the file: nothing is allocated, however many a file claims."""
        self.spend()
        (size,) = struct.unpack(length, self.read(struct.calcsize(length)))
        start = self._file.tell()
        if size > len(self._file) - start:
            raise EOFError(f"it claims {size} bytes where {len(self._file) - start} are left")
        self._file.seek(start + size)
        self.append(self._view[start : start + size])

    dispatch = _Instructions(map(_handler, _ALLOWED))
    dispatch |= {pickle.FRAME[0]: load_frame, pickle.INST[0]: load_inst}
    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}
    dispatch[pickle.SHORT_BINBYTES[0]] = lambda self: self.load_bytes("<B")
    dispatch[pickle.BINBYTES[0]] = lambda self: self.load_bytes("<I")
    dispatch[pickle.BINBYTES8[0]] = lambda self: self.load_bytes("<Q")
    dispatch[pickle.BYTEARRAY8[0]] = lambda self: self.load_bytes("<Q")


class LegacyEmbeddings(NamedTuple):
    """`vectors[i]` belongs to `ids[i]`: an array [n, d] on the file, or a list of arrays [d]."""

    ids: list[str]
    vectors: np.ndarray | list[np.ndarray]


def read_legacy_embeddings(path: str | Path) -> LegacyEmbeddings:
    """Read a pickled `(ids, array [n, d])`, or DPR's list of `(id, vector [d])`.

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
            f"{path}: refused, because this pickle asks for {error}, and embeddings are arrays of "
            "numbers, text, lists and tuples; make them again with generate_passage_embeddings.py"
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
    """Errors: ValueError when the content is built otherwise. Nothing of it is printed."""
    if not isinstance(content, list | tuple):
        kind = "ndarray" if isinstance(content, _Array) else type(content).__name__
        raise ValueError(f"it holds a {kind}")
    if len(content) == 2 and isinstance(content[1], _Array):
        ids, vectors = content[0], content[1].array
        if vectors is None or vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise ValueError("its array is not float [n, d]")
    else:
        if not content or any(type(i) not in (list, tuple) or len(i) != 2 for i in content):
            raise ValueError("it holds neither (ids, array) nor a list of (id, vector)")
        ids = [item[0] for item in content]
        vectors = [getattr(item[1], "array", None) for item in content]
        if any(v is None or v.ndim != 1 or v.dtype.kind != "f" for v in vectors):
            raise ValueError("its vectors are not all one-dimensional arrays of floats")
        if len({(len(vector), vector.dtype) for vector in vectors}) > 1:
            raise ValueError("its vectors are not all of one size and kind")
        if len(vectors) * vectors[0].nbytes > file_size:  # one can be named a million times
            raise ValueError("its vectors are more than the file can hold")
    if isinstance(ids, _Array):
        ids = list(ids.array)
    if not isinstance(ids, list | tuple):
        raise ValueError("its ids are no list")
    if len(ids) != len(vectors):
        raise ValueError(f"it holds {len(ids)} ids, but {len(vectors)} embeddings")
    texts, room = [], 4 * file_size + _FREE  # one text can be named a million times
    for item in ids:
        texts.append(_id_text(item))
        room -= len(texts[-1])
        if room < 0:
            raise ValueError("its ids are more than the file can hold")
    return LegacyEmbeddings(texts, vectors)


def _id_text(value: object) -> str:
    if type(value) is str:
        return value
    if isinstance(value, memoryview | bytes):
        return bytes(value).decode()
    # No id has more than 128 bits; to write out a number of a million digits takes minutes.
    if isinstance(value, int | np.integer) and abs(int(value)) < 1 << 128:
        return str(int(value))
    raise ValueError(f"an id is a {type(value).__name__}")
