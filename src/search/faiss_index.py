"""Approximate search: FAISS codes of the embeddings, for collections too large or slow to scan.

An index is a folder with the codes, the ids and a description of what it was made from, and is
loaded memory-mapped, without the embeddings.
"""

import functools
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from src.data.outputs import atomic_folder, load_or_claim
from src.runtime.errors import InputError, shorten
from src.search.embeddings import require_same
from src.search.exact import Found, Indexer, check_request, inner_products, stable_top_k
from src.search.shards import FINGERPRINTS, ShardWriter, checksum, read_shard

_INDEX_FILE, _IDS_FILE, _META_FILE = "index.faiss", "ids.safetensors", "index.json"
_REMEDY = "remove it to build it again"


class DamagedIndex(InputError):
    """A saved index that is incomplete or altered."""


class CompressedIndexer:
    """Approximate search over codes of the embeddings: `build` it, or `load` what `save` wrote."""

    def __init__(self, index: faiss.Index, passages: Indexer, description: dict[str, Any]):
        self.description, self.dimension = description, index.d
        self._index, self._passages = index, passages
        _set_effort(index)

    def __len__(self) -> int:
        return self._index.ntotal

    @classmethod
    def build(
        cls,
        exact: Indexer,
        factory: str,
        seed: int = 0,
        on_rows: Callable[[int], None] | None = None,
    ) -> "CompressedIndexer":
        """Train an index on a random sample of the embeddings and fill it block by block.

        Args: factory: any FAISS factory string (`PQ64`, `IVF4096,PQ64`, `HNSW32`, `SQfp16`).
        Errors: `InputError` when FAISS does not take it for this dimension and number of passages.
        """
        index = _empty_index(factory, exact.dimension)
        n_training = min(len(exact), _training_rows(index))
        draw = np.random.default_rng(seed).choice(len(exact), n_training, replace=False)
        try:
            index.train(exact.take(np.sort(draw)))
            for _, block in exact.blocks(on_rows=on_rows):
                index.add(block)
        except RuntimeError as error:
            raise _factory_error(factory, exact.dimension, error) from None
        return cls(index, exact, _describe(exact, factory))

    def search(self, queries: np.ndarray, k: int) -> Found:
        """As `Indexer.search`, approximately; an index can find fewer than k.

        Each question is searched alone, on a thread of its own, because FAISS rounds scores
        according to how many are asked at once.
        """
        queries, k = check_request(queries, k, self, "the index")
        found = Found.empty(len(queries), k)

        def search_one(row: int) -> None:
            propose = functools.partial(self._propose, queries[row : row + 1])
            scores, positions = stable_top_k(propose, k, len(self))
            found.scores[row, : len(scores)] = scores
            found.positions[row, : len(scores)] = positions

        n_threads = faiss.omp_get_max_threads()
        # Threads of FAISS's own inside of these would only get into their way.
        with ThreadPoolExecutor(n_threads, "faiss", faiss.omp_set_num_threads, (1,)) as pool:
            list(pool.map(search_one, range(len(queries))))
        return found

    def _propose(self, query: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions [width] of one query [1, d]."""
        index = self._index
        if not isinstance(index, faiss.IndexRefine):
            scores, positions = index.search(query, width)
            return scores[0], positions[0]
        # What FAISS would refine depends on how many passages are asked for.
        base = index.base_index
        _, rows = stable_top_k(lambda n: [a[0] for a in base.search(query, n)], width, len(self))
        vectors = index.refine_index.reconstruct_batch(rows)
        numbers = np.zeros(len(rows), np.int64)
        return inner_products(query, numbers, vectors, np.arange(len(rows))), rows

    def ids(self, positions: np.ndarray) -> list[list[str]]:
        """See `Indexer.ids`."""
        return self._passages.ids(positions)

    def save(self, folder: str | Path) -> None:
        """Write the codes, the ids and what they were made from into a folder, whole or not at all.

        Errors: `InputError` when it cannot be written.
        """
        folder = Path(folder)
        try:
            with atomic_folder(folder) as partial:
                faiss.write_index(self._index, str(partial / _INDEX_FILE))
                self._save_ids(partial / _IDS_FILE)
                files = {name: _stamp(partial / name) for name in (_INDEX_FILE, _IDS_FILE)}
                meta = {**self.description, "files": files}
                (partial / _META_FILE).write_text(json.dumps(meta, indent=1) + "\n")
        # FAISS writes by itself, and reports everything with a RuntimeError.
        except (OSError, RuntimeError, InputError) as error:
            raise InputError(f"{folder}: the index cannot be written ({_reason(error)})") from error

    def _save_ids(self, path: Path) -> None:
        # A shard without columns: ids are kept and opened as they are beside embeddings.
        with ShardWriter(path, len(self), 0, np.float16, {}) as writer:
            for shard in self._passages.shards:
                for start in range(0, len(shard), 1 << 16):
                    ids = shard.ids[start : start + (1 << 16)]
                    writer.append(ids, np.empty((len(ids), 0), np.float16))
            writer.finish()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        exact: Indexer | None = None,
        factory: str = "",
        allow_mismatch: bool = False,
        verify: bool = True,
    ) -> "CompressedIndexer":
        """Open a saved index, its codes memory-mapped.

        Args:
            exact, factory: what it must have been made from, where they are known.
            verify: compare checksums, which reads all of it (about 1 GB a second).
        Errors: `DamagedIndex` when it is incomplete or altered, `InputError` when it was made from
            something else.
        """
        folder = Path(folder)
        description = read_description(folder)
        for name, stamp in description["files"].items() if verify else ():
            if stamp != _stamp(folder / name):
                raise DamagedIndex(f"{folder / name}: altered since it was saved; {_REMEDY}")
        if exact is not None and not allow_mismatch:
            for key, value in _describe(exact, factory or description["factory"]).items():
                found = description.get(key)
                require_same(key, str(folder), found, exact.shards[0].path, value)
        try:
            index = faiss.read_index(str(folder / _INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            problem = f"cannot be read ({_reason(error)})"
            raise DamagedIndex(f"{folder / _INDEX_FILE}: {problem}; {_REMEDY}") from None
        passages = Indexer([read_shard(folder / _IDS_FILE)])
        if not index.ntotal == len(passages) == description["rows"]:
            raise DamagedIndex(f"{folder}: its files do not match; {_REMEDY}")
        return cls(index, passages, description)


def load_or_build(
    exact: Indexer,
    factory: str,
    keep: bool,
    allow_mismatch: bool,
    log: logging.Logger,
    on_rows: Callable[[int], None] | None = None,
) -> CompressedIndexer:
    """The index saved beside the shards; built, and saved there, where it is missing or damaged.

    Args: keep: False builds an index and does not save it. Others as in `CompressedIndexer`.
    """
    folder = index_folder(exact, factory)

    def load() -> CompressedIndexer | None:
        try:
            return CompressedIndexer.load(folder, exact, factory, allow_mismatch)
        except DamagedIndex as error:
            if not {path.name for path in folder.iterdir()} <= {_INDEX_FILE, _IDS_FILE, _META_FILE}:
                raise  # whatever else is in there is not to be replaced
            log.info("%s: building it again", str(error).removesuffix(f"; {_REMEDY}"))
            return None

    if keep:
        index = load_or_claim(folder, load, "leave out --save_or_load_index")
        if index is not None:
            log.info("loaded %s", folder)
            return index
    index = CompressedIndexer.build(exact, factory, on_rows=on_rows)
    if keep:
        index.save(folder)
        log.info("saved %s", folder)
    return index


def index_folder(exact: Indexer, factory: str) -> Path:
    """Where the index of these embeddings is saved."""
    return Path(exact.shards[0].path).parent / f"index_{factory.replace(',', '_')}"


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, checksum(path)]


def read_description(folder: str | Path) -> dict[str, Any]:
    """What a saved index says of itself: factory, rows, dimension, sources, fingerprints, files.

    Errors: `DamagedIndex` when there is none, or files are missing or cut off.
    """
    meta_file = Path(folder) / _META_FILE
    try:
        description = json.loads(meta_file.read_text())
        for name, (size, _) in description["files"].items():
            if os.path.getsize(Path(folder) / name) != size:
                raise ValueError(f"{name} has another size than when it was saved")
        if not all(key in description for key in ("factory", "rows", "dimension")):
            raise ValueError("it does not say what it is")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"not a complete index ({_reason(error)})"
        raise DamagedIndex(f"{folder}: {problem}; {_REMEDY}") from None
    return description


def _describe(exact: Indexer, factory: str) -> dict[str, Any]:
    sources = [[Path(s.path).name, os.path.getsize(s.path)] for s in exact.shards]
    made_by = {key: exact.shards[0].metadata.get(key) for key in FINGERPRINTS}
    sizes = {"rows": len(exact), "dimension": exact.dimension}
    return {"factory": factory, **sizes, **made_by, "shards": sources}


def _reason(error: Exception) -> str:
    """What went wrong, without the C++ source line that FAISS puts before it."""
    return str(error).strip().rsplit(": ", 1)[-1] or type(error).__name__


def _factory_error(factory: str, dimension: int, error: Exception) -> InputError:
    return InputError(
        f"--index_factory {shorten(factory)}: FAISS cannot make it of embeddings of dimension "
        f"{dimension} ({_reason(error)}); leave it (or --n-subquantizers) out for exact search"
    )


def _empty_index(factory: str, dimension: int) -> faiss.Index:
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _factory_error(factory, dimension, error) from None
    if isinstance(_core(index), faiss.IndexPQ):
        # It numbers the centroids for a search by bits, which is not ours, in ten times the time
        # that it takes to learn them.
        _core(index).do_polysemous_training = False
    return index


def _core(index: faiss.Index) -> faiss.Index:
    """The index proper, inside a rotation or a refinement."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _core(index.index)
    return _core(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _set_effort(index: faiss.Index) -> None:
    """FAISS looks into one inverted list unless told otherwise: too few."""
    core = _core(index)
    if isinstance(core, faiss.IndexIVF):
        core.nprobe = min(core.nlist, max(8, core.nlist // 32))


def _centroids(index: faiss.Index) -> list[int]:
    """How many centroids each of an index's quantizers learns."""
    core = _core(index)
    lists = [core.nlist] if isinstance(core, faiss.IndexIVF) else []
    return lists + ([core.pq.ksub] if hasattr(core, "pq") else [])


def _training_rows(index: faiss.Index) -> int:
    # FAISS warns below 39 rows a centroid and uses at most 256.
    return max(65_536, *(64 * n for n in _centroids(index)), 0)


class Memory(NamedTuple):
    """Bytes: of an index in use, and of all that its building takes."""

    in_use: int
    building: int


def expected_memory(
    rows: int, dimension: int, block_rows: int = 50_000, factory: str = ""
) -> Memory:
    """What an index of a collection will take, estimated from its size alone.

    Exact search (no factory) takes a block as float32. A saved index that is loaded is
    memory-mapped: it takes pages of its file, which the machine can have back.
    """
    block = 4 * min(rows, block_rows) * dimension
    if not factory:
        return Memory(block, block)
    index = _empty_index(factory, dimension)
    size = rows * _row_bytes(index) + 4 * dimension * sum(_centroids(index))
    return Memory(size, size + block + 4 * min(rows, _training_rows(index)) * dimension)


def _row_bytes(index: faiss.Index) -> int:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _row_bytes(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _row_bytes(index.base_index) + _row_bytes(index.refine_index)
    if isinstance(index, faiss.IndexIVF):
        return index.code_size + 8  # and the position
    if isinstance(index, faiss.IndexHNSW):
        # The links of the lowest level, a few of the higher ones, and where they begin.
        return _row_bytes(index.storage) + 4 * index.hnsw.nb_neighbors(0) + 16
    return index.sa_code_size()


def recall(found: Found, exact: Found) -> float:
    """The share of the exact top k that a search found, by its positions."""
    pairs = zip(exact.positions, found.positions, strict=True)
    hits = sum(len(np.intersect1d(*rows)) for rows in pairs)
    return hits / exact.positions.size if exact.positions.size else 1.0
