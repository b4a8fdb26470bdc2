"""Approximate search: FAISS codes of the embeddings, for collections too large or slow to scan.

A saved index is a folder with the codes and a description of what they were made from; the codes
are memory-mapped when it is loaded.
"""

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from src.runtime.errors import InputError, shorten
from src.search import saved_index
from src.search.embeddings import require_same
from src.search.exact import Found, Indexer, Proposals, check_request, inner_products, stable_search
from src.search.shards import FINGERPRINTS

_FILE = "index.faiss"


class CompressedIndexer:
    """Approximate search over codes of the embeddings of `exact`."""

    def __init__(self, index: faiss.Index, exact: Indexer, factory: str):
        self.dimension, self._index, self._exact, self._factory = index.d, index, exact, factory
        core = _core(index)
        if isinstance(core, faiss.IndexIVF):  # FAISS searches only one inverted list by default
            core.nprobe = min(core.nlist, max(8, core.nlist // 32))

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
        Errors: `InputError` when FAISS rejects it for this dimension and number of passages.
        """
        try:
            index = _empty_index(factory, exact.dimension)
            n_training = min(len(exact), _training_rows(index))
            draw = np.random.default_rng(seed).choice(len(exact), n_training, replace=False)
            index.train(exact.take(np.sort(draw)))
            for _, block in exact.blocks(on_rows=on_rows):
                index.add(block)
        except RuntimeError as error:
            raise _factory_error(factory, exact.dimension, error) from None
        return cls(index, exact, factory)

    def search(self, queries: np.ndarray, k: int) -> Found:
        """As `Indexer.search`, approximately; an index can find fewer than k.

        Each question is searched alone, on a thread of its own, because FAISS's rounding depends on
        how many are searched together.
        """
        queries, k = check_request(queries, k, self, "the index")
        # FAISS's own threads inside these would only compete with them.
        n_threads = faiss.omp_get_max_threads()
        with ThreadPoolExecutor(n_threads, "faiss", faiss.omp_set_num_threads, (1,)) as pool:

            def propose(numbers: np.ndarray, width: int) -> list[Proposals]:
                return list(pool.map(lambda n: self._propose(queries[n : n + 1], width), numbers))

            return stable_search(propose, len(queries), k, len(self))

    def _propose(self, query: np.ndarray, width: int) -> Proposals:
        """What FAISS finds for one query [1, d]."""
        if not isinstance(self._index, faiss.IndexRefine):
            return _faiss_search(self._index, query, width)
        # FAISS would refine an arbitrary subset of the passages whose codes are tied.
        base = functools.partial(_faiss_search, self._index.base_index, query)
        rows = stable_search(lambda _, n: [base(n)], 1, width, len(self)).rows()[0]
        vectors = self._index.refine_index.reconstruct_batch(np.array(rows, np.int64))
        scores = inner_products(query, np.zeros(len(rows)), vectors, np.arange(len(rows)))
        return Proposals(scores, scores, np.array(rows, np.int64))

    def save(self, folder: Path) -> None:
        """Errors: `InputError` when the index cannot be written."""

        def write(partial: Path) -> None:
            try:
                faiss.write_index(self._index, str(partial / _FILE))
            except RuntimeError as error:  # FAISS's only kind of exception
                raise OSError(_reason(error)) from error

        saved_index.save_index(folder, _made_from(self._exact, self._factory), write)

    @classmethod
    def load(
        cls,
        folder: Path,
        exact: Indexer,
        factory: str,
        allow_mismatch: bool = False,
        verify: bool = True,
    ) -> "CompressedIndexer | None":
        """Open a saved index, its codes memory-mapped; None if it is incomplete or altered.

        Args: verify: see `saved_index.read_description`.
        Errors: `InputError` when it was made from something else than `exact` and `factory`.
        """
        description = saved_index.read_description(folder, verify)
        if description is None:
            return None
        if not allow_mismatch:
            for key, value in _made_from(exact, factory).items():
                found = description.get(key)
                require_same(key, str(folder), found, exact.shards[0].path, value)
        try:
            index = faiss.read_index(str(folder / _FILE), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError:
            return None
        fits = (index.ntotal, index.d) == (len(exact), exact.dimension)
        return cls(index, exact, factory) if fits else None


def load_or_build(
    exact: Indexer,
    factory: str,
    keep: bool,
    allow_mismatch: bool,
    log: logging.Logger,
    on_rows: Callable[[int], None] | None = None,
) -> CompressedIndexer:
    """The index saved beside the shards; built, and saved there, if it is missing or damaged.

    Args: keep: False builds an index and does not save it. Others as in `CompressedIndexer`.
    """
    folder = index_folder(exact, factory)
    return saved_index.load_or_build(
        folder if keep else None,
        {_FILE},
        lambda: CompressedIndexer.load(folder, exact, factory, allow_mismatch),
        lambda: CompressedIndexer.build(exact, factory, on_rows=on_rows),
        log,
    )


def index_folder(exact: Indexer, factory: str) -> Path:
    """Where the index of these embeddings is saved."""
    return Path(exact.shards[0].path).parent / f"index_{factory.replace(',', '_')}"


def _made_from(exact: Indexer, factory: str) -> dict[str, Any]:
    sources = [[Path(s.path).name, os.path.getsize(s.path)] for s in exact.shards]
    made_by = {key: exact.shards[0].metadata.get(key) for key in FINGERPRINTS}
    sizes = {"rows": len(exact), "dimension": exact.dimension}
    return {"factory": factory, **sizes, **made_by, "shards": sources}


def _faiss_search(index: faiss.Index, query: np.ndarray, width: int) -> Proposals:
    scores, positions = (array[0] for array in index.search(query, width))
    found = positions >= 0
    return Proposals(scores[found], scores[found], positions[found])


def _empty_index(factory: str, dimension: int) -> faiss.Index:
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    core = _core(index)
    if isinstance(core, faiss.IndexPQ):
        # This renumbers centroids for a kind of search that we do not use, and takes ten times as
        # long as learning them.
        core.do_polysemous_training = False
    return index


def _core(index: faiss.Index) -> faiss.Index:
    """The index proper, inside a rotation or a refinement."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _core(index.index)
    return _core(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def _training_rows(index: faiss.Index) -> int:
    """FAISS warns below 39 rows a centroid and uses at most 256; this takes 64."""
    core = _core(index)
    codes = core.pq.ksub if hasattr(core, "pq") else 0
    return max(65_536, 64 * getattr(core, "nlist", 0), 64 * codes)


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the C++ source line before it."""
    return str(error).strip().rsplit(": ", 1)[-1]


def _factory_error(factory: str, dimension: int, error: RuntimeError) -> InputError:
    return InputError(
        f"--index_factory {shorten(factory)}: FAISS cannot make it of embeddings of dimension "
        f"{dimension} ({_reason(error)}); leave it (or --n-subquantizers) out for exact search"
    )


def expected_memory(rows: int, dimension: int, block_rows: int, factory: str = "") -> int:
    """Bytes that a search takes, building its index included, estimated from sizes alone."""
    if not factory:  # tiles.py: 2,048 embeddings, and the same rounded, twice; 1,024 scores of each
        return min(rows, 2048) * (10 * dimension + 13 * 1024)
    block = 4 * min(rows, block_rows) * dimension
    try:
        index = _empty_index(factory, dimension)
    except RuntimeError as error:
        raise _factory_error(factory, dimension, error) from None
    core, row_bytes = _core(index), 8  # a position
    if isinstance(core, faiss.IndexHNSW):
        row_bytes += core.storage.sa_code_size() + 4 * core.hnsw.nb_neighbors(0)
    else:
        row_bytes += index.sa_code_size()
    return block + rows * row_bytes + 4 * min(rows, _training_rows(index)) * dimension


def recall(found: Found, exact: Found) -> float:
    """The share of the exact top k that a search found, by positions."""
    pairs = zip(exact.positions, found.positions, strict=True)
    hits = sum(len(np.intersect1d(*rows)) for rows in pairs)
    return hits / exact.positions.size if exact.positions.size else 1.0
