"""A collection's embeddings: shards opened by a pattern, and checked to belong together."""

import dataclasses
import glob
import itertools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.data.files import Source, made_once
from src.runtime.errors import InputError, shorten
from src.search.legacy_pickle import read_legacy_embeddings
from src.search.shards import FINGERPRINTS, Shard, ShardWriter, read_shard

_OR_ALLOW = "or say --allow_mismatch"


def open_shards(pattern: str | Path, allow_mismatch: bool = False) -> list[Shard]:
    """Open the shards that a path or glob names, in the order of their numbers.

    Errors: `InputError` when it finds nothing, when two shards have different dimensions, and,
    without `allow_mismatch`, when fingerprints differ or a shard is missing or doubled.
    """
    paths = shard_paths(pattern)
    if not paths:
        raise InputError(
            f"{pattern}: there are no embeddings of this name; "
            "make them with generate_passage_embeddings.py"
        )
    if os.path.isdir(paths[0]):
        raise InputError(f'{paths[0]}: a folder; name its shards, like "{paths[0]}/wiki_*"')
    shards = sorted(map(open_shard, paths), key=_order)
    for shard in shards:
        ours, theirs = shards[0].embeddings.shape[1], shard.embeddings.shape[1]
        if ours != theirs:
            raise InputError(
                f"{shards[0].path} and {shard.path}: their embeddings have {ours} and {theirs} "
                "dimensions; search those of one model at a time"
            )
    if not allow_mismatch:
        _check_together(shards)
    return shards


def shard_paths(pattern: str | Path) -> list[str]:
    """The files of a name: the name itself, or with [ meaning itself, or as any pattern."""
    paths = [str(pattern)] if os.path.exists(pattern) else []
    for attempt in (str(pattern).replace("[", "[[]"), str(pattern)):
        paths = paths or sorted(glob.glob(attempt))
    return paths


def _order(shard: Shard) -> tuple[int, str]:
    """Shards are sorted by number, not by name: wiki_100 comes after wiki_99."""
    number = shard.number("shard_id")
    if number is None:
        digits = re.search("[0-9]{1,18}$", shard.path)
        number = int(digits.group()) if digits else -1
    return number, shard.path


def _check_together(shards: list[Shard]) -> None:
    first = shards[0]
    for shard in shards:
        for key in (*FINGERPRINTS, "num_shards"):
            values = first.metadata.get(key), shard.metadata.get(key)
            require_same(key, first.path, values[0], shard.path, values[1])
    present, total = {shard.number("shard_id") for shard in shards}, first.number("num_shards") or 0
    missing = next((number for number in range(total) if number not in present), None)
    if missing is not None:
        raise InputError(
            f"{first.path} to {shards[-1].path}: shard {missing} of {total} is missing; "
            f"make it with --shard_id {missing}, {_OR_ALLOW}"
        )
    for before, shard in itertools.pairwise(shards):
        start, next_start = before.number("first"), shard.number("first")
        number = shard.number("shard_id")
        if number is not None and number == before.number("shard_id"):
            both = f"{before.path} and {shard.path} are both shard {number}"
            raise InputError(f"{both}; leave one out, {_OR_ALLOW}")
        if start is not None and start + len(before) != next_start:
            raise InputError(
                f"{before.path} ends at passage {start + len(before):,}, but {shard.path} begins "
                f"at {next_start:,}; make both again, {_OR_ALLOW}"
            )


def check_count(shards: Sequence[Shard], collection: str, n_passages: int) -> None:
    """Each passage must have an embedding; pickles record no other sign of a missing shard.

    Errors: `InputError` that names shards and collection when their sizes differ.
    """
    rows = sum(map(len, shards))
    if rows != n_passages and not all(shard.metadata for shard in shards):
        others = f" to {shards[-1].path}" if len(shards) > 1 else ""
        raise InputError(
            f"{shards[0].path}{others}: {rows:,} embeddings, but {collection} has "
            f"{n_passages:,} passages; give all shards of this collection, {_OR_ALLOW}"
        )


def require_same(what: str, path: str, value: object, other_path: str, other: object) -> None:
    """Errors: `InputError` that names both files when two fingerprints differ."""
    if value != other:
        raise InputError(
            f"{path} and {other_path} do not belong together: {what} is {shorten(value)} in the "
            f"first and {shorten(other)} in the second; make both in one way, {_OR_ALLOW}"
        )


def open_shard(path: str | Path) -> Shard:
    """Open a shard, or a pickle of the original code, DPR or Contriever.

    A pickle is converted once to a shard, a hidden file beside it. If that cannot be written, the
    embeddings stay in memory.
    """
    source = Source(str(path))
    head = source.read(0, min(9, source.size))
    if head[8:] == b"{" or head[:1] != b"\x80":
        return read_shard(path)
    in_memory: list[Shard] = []

    def convert(target: Path) -> None:
        ids, vectors = read_legacy_embeddings(path)
        half = len(vectors) and vectors[0].itemsize == 2
        embeddings = np.asarray(vectors).astype(np.float16 if half else np.float32, copy=False)
        in_memory.append(Shard(str(path), ids, embeddings, {}))
        with ShardWriter(target, *embeddings.shape, embeddings.dtype, {}) as writer:
            for start in range(0, len(ids), 1 << 14):
                rows = slice(start, start + (1 << 14))
                writer.append(ids[rows], embeddings[rows])
            writer.finish()

    try:
        converted = read_shard(made_once(source, "converted", convert))
    except InputError as error:
        if not in_memory:
            raise
        logging.getLogger("fid").warning("%s; reading the pickle each time", error)
        return in_memory[0]
    return dataclasses.replace(converted, path=str(path), metadata={})
