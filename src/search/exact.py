"""Exact search for the passages nearest to a question, by the inner product of their embeddings.

`Indexer` searches shards straight from disk, one block of rows at a time. A passage's position is
its row in all shards taken together, in their order.

Every kind of search (this one, `gpu.py`, `faiss_index.py`, `bm25.py`) obeys one rule: the list of n
passages begins every longer list, and passages with equal scores keep the collection's order,
whatever the batch of questions, the block size and the number of processes.
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
_NARROWEST = 256  # the width of the first search in `stable_top_k`


class Found(NamedTuple):
    """The best passages of each question, best first: scores float32 and positions int64, [q, k].

    Where there are fewer than k, the positions at the end are -1 and their scores minus infinity.
    """

    scores: np.ndarray
    positions: np.ndarray

    @classmethod
    def empty(cls, n_queries: int, k: int) -> "Found":
        return cls(np.full((n_queries, k), -np.inf, np.float32), np.full((n_queries, k), -1))

    def rows(self) -> list[list[int]]:
        """The positions of each question, without the empty places at the end."""
        return [[position for position in row if position >= 0] for row in self.positions.tolist()]


class Ranked(NamedTuple):
    """The passages of one question: scores and positions [n], best first."""

    scores: np.ndarray
    positions: np.ndarray

    @classmethod
    def empty(cls) -> "Ranked":
        return cls(np.empty(0, np.float32), np.empty(0, np.int64))


def stable_top_k(
    search: Callable[[int], tuple[np.ndarray, np.ndarray]], k: int, n_rows: int
) -> Ranked:
    """The first k passages of a ranking that does not depend on k, by a search that may.

    Approximate searches find other passages when asked for more of them, and an arbitrary subset of
    those tied at the end. So they are asked for fixed numbers, 256, 1,024, ... (`extend`).

    Args: search: from a width w to at most w scores and positions of one question, in any order;
        fewer, or positions of -1, mean that there are no more.
    """
    ranked, width = Ranked.empty(), 0
    while len(ranked.scores) < k and width < n_rows:
        width = next_width(width, n_rows)
        scores, positions = search(width)
        found = positions >= 0
        complete = width == n_rows or found.sum() < width
        ranked = extend(ranked, scores[found], scores[found], positions[found], width, complete)
        if complete:
            break
    return Ranked(ranked.scores[:k], ranked.positions[:k])


def next_width(width: int, n_rows: int) -> int:
    """How many passages to ask for after this many: 256, 1,024, 4,096, ..., all."""
    return min(max(_NARROWEST, 4 * width), n_rows)


def extend(
    ranked: Ranked,
    guesses: np.ndarray,
    scores: np.ndarray,
    positions: np.ndarray,
    width: int,
    complete: bool,
) -> Ranked:
    """Add to a ranking what a search of this width proposed.

    Only the better half of the proposals is used, and none that ties with the last of them, of
    which an arbitrary subset was proposed. Whatever ranks among earlier passages is left out.

    Args:
        guesses: [n] the scores by which passages were proposed.
        scores, positions: [n] of the proposed passages.
        complete: nothing but these could be proposed.
    """
    order = np.lexsort((positions, -scores))
    if not complete and len(order):
        tied = float(scores[guesses == guesses.min()].max())
        order = order[: min(width // 2, int((scores > tied).sum()))]
    scores, positions = scores[order], positions[order]
    if len(ranked.scores):
        last, at = ranked.scores[-1], ranked.positions[-1]
        after = (scores < last) | ((scores == last) & (positions > at))
        scores, positions = scores[after], positions[after]
    return Ranked(
        np.concatenate([ranked.scores, scores]), np.concatenate([ranked.positions, positions])
    )


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
        best = Found.empty(len(queries), k)
        for start, block in self.blocks(part, on_rows) if len(queries) else ():
            longest = self._longest_row(start, block)
            for first in range(0, len(queries), _QUERIES_AT_ONCE):
                group = slice(first, first + _QUERIES_AT_ONCE)
                so_far = Found(best.scores[group], best.positions[group])
                _search_block(queries[group], block, start, longest, so_far)
        return best

    def ids(self, positions: np.ndarray) -> list[list[str]]:
        """The passages' ids for positions [q, k]; -1, which is no passage, is left out."""
        self._check_unchanged()
        found = [[self._shard_of(p) for p in row if p >= 0] for row in positions.tolist()]
        return [[shard.ids[row] for shard, row in rows] for rows in found]

    def _check_unchanged(self) -> None:
        for shard in self.shards:
            shard.check_unchanged()

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
        self._check_unchanged()
        rows = np.empty((len(positions), self.dimension), np.float32)
        borders = np.searchsorted(positions, self._starts)
        for shard, start, begin, end in zip(
            self.shards, self._starts, borders, borders[1:], strict=False
        ):
            rows[begin:end] = shard.embeddings[positions[begin:end] - start]
        return rows

    def _read(self, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        block, done = buffer[: stop - start], 0
        while done < len(block):
            shard, row = self._shard_of(start + done)
            piece = block[done : done + len(shard) - row]
            shard.read(row, piece)
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
