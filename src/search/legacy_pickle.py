"""Pickled embeddings of the original code, DPR and Contriever, read without trusting the pickle.

An ordinary unpickler imports and calls whatever the file names. Here, first every instruction is
checked: only those that build text, numbers, lists, tuples and arrays are allowed. Then the names
that numpy's arrays need stand for functions of this module, so nothing is imported.
"""

import mmap
import pickle
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.runtime.errors import InputError, first_line, shorten

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE "
    "SHORT_BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL "
    "STACK_GLOBAL REDUCE BUILD"
)
_ALLOWED = set(_INSTRUCTIONS.split())
_TOO_MUCH = "it would take many times its size in memory"


class _Refused(Exception):
    """The pickle asks for something that is not on the list."""


class _Dtype:
    """`numpy.dtype(code, ...)`, and the byte order that the pickle sets afterwards."""

    def __init__(self, code: object, *flags: object):
        if type(code) is not str or code not in ("f2", "f4", "f8", "i4", "i8"):
            # An array of objects would hold pointers. The `repr` of lists in lists can be endless.
            shown = shorten(code) if type(code) is str else type(code).__name__
            raise _Refused(f"a numpy array of dtype {shown}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError("bad byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """`numpy.ndarray`, empty until the pickle sets its state."""

    def __init__(self, *kind_shape_code: object):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if type(shape) is not tuple or len(shape) > 2:
            raise ValueError("its array is not [n, d]")
        if any(type(size) is not int or not 0 <= size < 1 << 48 for size in shape):
            raise ValueError("its array has an impossible size")
        array = np.frombuffer(data, dtype.dtype)  # a view; `reshape` compares the sizes
        self.array = array.reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: object, dtype: _Dtype, shape: object, order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


_NAMES: dict[str, Any] = {"numpy.ndarray": None, "numpy.dtype": _Dtype}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _NAMES[f"{_core}.multiarray._reconstruct"] = _Array
    _NAMES[f"{_core}.multiarray.scalar"] = lambda dtype, data: np.frombuffer(data, dtype.dtype)[0]
    _NAMES[f"{_core}.numeric._frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: mmap.mmap):
        super().__init__(file)
        self._left_to_encode = len(file)

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name == "_codecs.encode":
            return self._encode
        if full_name not in _NAMES:
            raise _Refused(shorten(full_name))
        return _NAMES[full_name]

    def _encode(self, text: str, encoding: str) -> bytes:
        """What protocol 2 makes bytes with. One text can be encoded a million times."""
        self._left_to_encode -= len(text)
        if encoding != "latin1" or self._left_to_encode < 0:
            raise ValueError(_TOO_MUCH)
        return text.encode("latin1")


def _check_instructions(file: mmap.mmap) -> None:
    """Errors: `_Refused`; ValueError for instructions that would fill the memory.

    An instruction takes up to 100 bytes; real files have at least 8 bytes for each. The memo is an
    array as long as its largest index.
    """
    most = len(file) // 8 + 100_000
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name not in _ALLOWED:
            raise _Refused(f"the pickle instruction {opcode.name}")
        limit = {"LONG_BINPUT": most, "FRAME": len(file)}.get(opcode.name)
        if number > most or (limit is not None and argument > limit):
            raise ValueError(_TOO_MUCH)
    file.seek(0)


class LegacyEmbeddings(NamedTuple):
    """`vectors[i]` belongs to `ids[i]`: an array [n, d], or a list of arrays [d]."""

    ids: list[str]
    vectors: np.ndarray | list[np.ndarray]


def read_legacy_embeddings(path: str | Path) -> LegacyEmbeddings:
    """Read a pickled `(ids, array [n, d])`, or DPR's list of `(id, vector [d])`.

    Errors: `InputError` that names the file and what it asks for, or what is wrong with it.
    """
    remedy = "make them again with generate_passage_embeddings.py, or copy them again"
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _check_instructions(content)
        return _as_embeddings(_Unpickler(content).load(), len(content))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except _Refused as error:
        raise InputError(
            f"{path}: refused, because this pickle asks for {error}, and embeddings are arrays of "
            f"numbers, text, lists and tuples; {remedy}"
        ) from None
    # A broken pickle fails in as many ways as there are instructions in it.
    except (
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
        *(OverflowError, MemoryError, RecursionError),
    ) as error:
        problem = f"not embeddings that can be read ({first_line(error)})"
        raise InputError(f"{path}: {problem}; {remedy}") from None


def _as_embeddings(content: Any, file_size: int) -> LegacyEmbeddings:
    """Errors: ValueError when the content has another form. None of it is printed."""

    def is_pair(item: object) -> bool:
        return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[1], _Array)

    if is_pair(content):
        ids, vectors = content[0], content[1].array
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            found = f"{vectors.dtype} {list(vectors.shape)}"
            raise ValueError(f"its array is {found}, not float [n, d]")
    elif isinstance(content, list | tuple) and content and all(map(is_pair, content)):
        ids, vectors = [item[0] for item in content], [item[1].array for item in content]
        kinds = {(vector.shape, vector.dtype) for vector in vectors}
        if len(kinds) > 1 or vectors[0].ndim != 1 or vectors[0].dtype.kind != "f":
            raise ValueError("its vectors are not all float [d] of the same kind")
        if len(vectors) * vectors[0].nbytes > file_size:  # one can be named a million times
            raise ValueError(_TOO_MUCH)
    else:
        raise ValueError("it holds neither (ids, array) nor a list of (id, vector)")
    ids = list(ids.array) if isinstance(ids, _Array) else ids
    is_list = isinstance(ids, list | tuple)
    if not is_list or not all(isinstance(item, str | int | np.integer) for item in ids):
        raise ValueError("its ids are not texts or whole numbers")
    if len(ids) != len(vectors):
        raise ValueError(f"it holds {len(ids)} ids, but {len(vectors)} embeddings")
    texts = list(map(str, ids))
    if sum(map(len, texts)) > 4 * file_size:  # one can be named a million times
        raise ValueError(_TOO_MUCH)
    return LegacyEmbeddings(texts, vectors)
