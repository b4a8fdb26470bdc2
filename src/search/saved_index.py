"""An index kept in a folder: saved atomically, verified when opened, rebuilt when damaged."""

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from src.data.outputs import atomic_folder, load_or_claim, writing
from src.runtime.errors import InputError

Index = TypeVar("Index")
DESCRIPTION = "index.json"  # what the index was made from; size and checksum of each other file
_REMEDY = "leave out --save_or_load_index"


def load_or_build(
    folder: Path | None,
    names: set[str],
    load: Callable[[], Index | None],
    build: Callable[[], Index],
    log: logging.Logger,
) -> Index:
    """Open the index in a folder; if it is missing or damaged, build it and save it there.

    Args:
        folder: None builds an index that is not saved.
        names: of the index's files; a folder that holds any other file is never replaced.
        load: returns None for an index that must be rebuilt.
        build: returns an index with a method `save(folder)`.
    Errors: `InputError` when the folder cannot be read, replaced or written.
    """
    if folder is not None:
        index = load_or_claim(folder, load, _REMEDY)
        if index is not None:
            log.info("loaded %s", folder)
            return index
        if folder.exists():
            _check_replaceable(folder, names)
            damage = "incomplete, altered, of another collection or made with other options"
            log.info("%s is %s: building it again", folder, damage)
    index = build()
    if folder is not None:
        index.save(folder)
        log.info("saved %s", folder)
    return index


def _check_replaceable(folder: Path, names: set[str]) -> None:
    try:
        others = sorted({path.name for path in folder.iterdir()} - names - {DESCRIPTION})
    except OSError as error:
        raise InputError(f"{folder}: not an index ({error.strerror}); remove it") from None
    if others:
        raise InputError(
            f"{folder}: not a complete index, and it holds {others[0]}; remove it to build it again"
        )


def save_index(folder: Path, made_from: dict[str, Any], write: Callable[[Path], object]) -> None:
    """Save an index atomically. `write` writes its files into the folder that it is given.

    Errors: `InputError` when it cannot be written.
    """
    with writing(folder, f"make room, or {_REMEDY}"), atomic_folder(folder) as partial:
        write(partial)
        files = {path.name: _stamp(path) for path in sorted(partial.iterdir())}
        text = json.dumps({**made_from, "files": files}, indent=1)
        (partial / DESCRIPTION).write_text(text + "\n")


def read_description(folder: Path, verify: bool = True) -> dict[str, Any] | None:
    """What a saved index was made from; None if it is incomplete or altered.

    Args: verify: compare checksums, which reads all files (about 1 GB a second), not only sizes.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        for name, (size, checksum) in description["files"].items():
            if [size, checksum] != _stamp(folder / name, None if verify else checksum):
                return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return description


def _stamp(path: Path, checksum: int | None = None) -> list[int]:
    """Size and CRC-32 of a file; the CRC is computed unless it is given."""
    if checksum is None:
        checksum = 0
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                checksum = zlib.crc32(piece, checksum)
    return [path.stat().st_size, checksum]
