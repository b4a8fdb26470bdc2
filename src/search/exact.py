"""Exact search for the passages nearest to a question, by the inner product of their embeddings.

`Indexer` searches shards straight from disk, one block of rows at a time; `faiss_index.py` has the
approximate kind. A passage's position is its row in all shards taken together, in their order;
of passages with one score, the one with the lower position comes first.
"""

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np

from src.runtime.errors import InputError, shorten
from src.search.shards import Shard

_QUERIES_AT_ONCE = 4096  # bounds what a block's scores and their merging take
_SPARE_ROWS = 32  # how many more rows than k are looked at, for what rounding may have hidden


class Found(NamedTuple):
    """The best passages of each question, best first: scores float32 and positions int64, [q, k].

    Where there are fewer than k, the positions at the end are -1 and their scores minus infinity.
    """

    scores: np.ndarray
    positions: np.ndarray


def merge(parts: Sequence[Found], k: int) -> Found:
    """The best k of results over parts of one collection, as when it is searched whole."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    positions = np.concatenate([part.positions for part in parts], axis=1)
    order = np.lexsort((positions, -scores), axis=-1)[:, :k]
    return Found(
        np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)
    )


class Indexer:
    """Exact search over opened shards. Of the embeddings, no more than a block is in memory.

    Args: shards: from `open_shards`; block_rows: rows of a block (`--indexing_batch_size`).
    """

    def __init__(self, shards: Sequence[Shard], block_rows: int = 50_000):
        if block_rows < 1:
            raise InputError(f"--indexing_batch_size must be at least 1, not {block_rows}")
        self.shards, self._block_rows = list(shards), block_rows
        self.dimension = self.shards[0].embeddings.shape[1]
        self._starts = [0, *itertools.accumulate(len(shard) for shard in self.shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        part: tuple[int, int] = (0, 1),
        on_rows: Callable[[int], None] | None = None,
    ) -> Found:
        """The k passages with the largest inner products, or all where there are fewer.

        Args:
            queries: [q, d], finite; taken as float32.
            part: (i, n) searches every n-th block from the i-th: the results of n processes,
                put together by `merge`, are those of one.
            on_rows: is told of each block how many rows were searched.
        Errors: `InputError` for another dimension, or embeddings that are not finite.
        """
        queries, k = check_request(queries, k, self, self.shards[0].path)
        best = Found(
            np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        )
        for start, block in self.blocks(part, on_rows) if len(queries) else ():
            longest = self._longest_row(start, block)
            for first in range(0, len(queries), _QUERIES_AT_ONCE):
                group = slice(first, first + _QUERIES_AT_ONCE)
                so_far = Found(best.scores[group], best.positions[group])
                _search_block(queries[group], block, start, longest, so_far)
        return best

    def ids(self, positions: np.ndarray) -> list[list[str]]:
        """The passages' ids for positions [q, k]; places without a passage (-1) are left out."""
        places = [[self._shard_of(p) for p in row if p >= 0] for row in positions.tolist()]
        return [[shard.ids[row] for shard, row in places_of_one] for places_of_one in places]

    def blocks(
        self, part: tuple[int, int] = (0, 1), on_rows: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks in order: the first row's position, and the rows [b, d] as float32.

        Blocks lie across the borders of shards, so that it makes no difference how many there are.
        A block is overwritten by the next.
        """
        index, count = part
        buffer = np.empty((min(self._block_rows, len(self)), self.dimension), np.float32)
        for start in range(index * self._block_rows, len(self), count * self._block_rows):
            stop = min(start + self._block_rows, len(self))
            yield start, self._read(start, stop, buffer)
            if on_rows:
                on_rows(stop - start)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The embeddings at ascending positions [n], as float32 [n, d]."""
        rows = np.empty((len(positions), self.dimension), np.float32)
        borders = np.searchsorted(positions, self._starts)
        for shard, start, begin, end in zip(
            self.shards, self._starts, borders, borders[1:], strict=False
        ):
            rows[begin:end] = shard.embeddings[positions[begin:end] - start]
        return rows

    def _read(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        shard, row = self._shard_of(start)
        piece = shard.embeddings[row : row + stop - start]
        if len(piece) == stop - start and piece.dtype == np.float32:
            flags = piece.flags
            if flags.c_contiguous and flags.aligned:
                return piece  # searched where it lies, in the pages of the file
        block = buffer[: stop - start]
        done = 0
        while done < len(block):
            shard, row = self._shard_of(start + done)
            piece = shard.embeddings[row : row + len(block) - done]
            block[done : done + len(piece)] = piece
            done += len(piece)
        return block

    def _longest_row(self, start: int, block: np.ndarray) -> float:
        lengths = _lengths(block)
        if not np.isfinite(lengths).all():
            shard, row = self._shard_of(start + int(np.isfinite(lengths).argmin()))
            raise InputError(
                f"{shard.path}: the embedding of passage {shorten(shard.ids[row])} is not finite; "
                "make the shard again"
            )
        return float(lengths.max())

    def _shard_of(self, position: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._starts, position) - 1
        return self.shards[number], position - self._starts[number]


def _search_block(
    queries: np.ndarray, block: np.ndarray, start: int, longest: float, best: Found
) -> None:
    """Put rows of a block [b, d] among the best so far, where they belong.

    A matrix product is ten times as fast as inner products one by one, but it rounds a score in
    ways that depend on the number of threads and on where the row stands. So it only proposes
    rows. Those that could be among the best k, for any rounding, get the score of a plain inner
    product, which depends on the two vectors alone. That makes results the same for any blocks,
    shards, processes and threads, and equal passages equal.

    Args:
        start: the position of the block's first row.
        longest: the largest length (2-norm) of a row.
        best: of these queries; changed in place.
    """
    k, n_rows = best.scores.shape[1], len(block)
    width = min(k + _SPARE_ROWS, n_rows)
    with _matrix_products():
        guesses, rows = faiss.knn(queries, block, width, faiss.METRIC_INNER_PRODUCT)
    # In whichever order d products are added up in float32, the sum is wrong by at most d / 2^24
    # of the product of the lengths, and two orders differ by at most twice that.
    slack = 1.01 * block.shape[1] * 2.0**-23 * longest * _lengths(queries)
    floor = best.scores[:, -1].astype(np.float64)  # what has no more than this comes too late
    if k <= n_rows:
        floor = np.maximum(floor, guesses[:, k - 1] - slack)
    possible = guesses + slack[:, None] >= floor[:, None]
    # Where even the last row proposed is possible, so are others that were not proposed.
    too_narrow = possible[:, -1] & (width < n_rows)
    possible[too_narrow] = False
    numbers = np.nonzero(possible)[0]
    scores = np.full(guesses.shape, -np.inf, np.float32)
    scores[possible] = inner_products(queries, numbers, block, rows[possible])
    changed = np.flatnonzero(possible.any(axis=1))
    positions = np.where(possible, rows + start, -1)
    _insert(best, changed, Found(scores[changed], positions[changed]))
    every = np.arange(n_rows)
    for number in np.flatnonzero(too_narrow):
        scores = inner_products(queries, np.full(n_rows, number), block, every)
        _insert(best, np.array([number]), Found(scores[None], every[None] + start))


def _insert(best: Found, numbers: np.ndarray, found: Found) -> None:
    """Put what was found for the queries of these numbers among the best so far, in place."""
    before = Found(best.scores[numbers], best.positions[numbers])
    best.scores[numbers], best.positions[numbers] = merge([before, found], best.scores.shape[1])


def inner_products(
    queries: np.ndarray, numbers: np.ndarray, block: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The inner product of each query with a row: those of `numbers` and `rows`, [m] each."""
    products = np.empty(len(rows), np.float32)
    arrays = [queries, numbers.astype(np.int64), block, rows.astype(np.int64), products]
    pointers = [faiss.swig_ptr(array) for array in arrays]
    faiss.pairwise_indexed_inner_product(queries.shape[1], len(rows), *pointers)
    return products


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """The length (2-norm) of each vector [n, d]."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors))


@contextlib.contextmanager
def _matrix_products() -> Iterator[None]:
    """FAISS forms inner products one by one, unless there are a great many."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def check_request(queries: np.ndarray, k: int, index: Any, path: str) -> tuple[np.ndarray, int]:
    """Queries [q, d] as FAISS takes them, and k, at most the number of passages. `index` has a
    length and a dimension. Errors: `InputError` when they do not suit it."""
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != index.dimension:
        raise InputError(
            f"the questions' embeddings have {queries.shape[-1]} dimensions, but those in {path} "
            f"have {index.dimension}; use the --model_path that the passages were embedded with"
        )
    if not np.isfinite(queries).all():
        raise InputError(
            "the questions' embeddings are not finite; use --no_fp16, or mend the model"
        )
    if k < 1:
        raise InputError(f"--n-docs must be at least 1, not {k}")
    return queries, min(k, len(index))
