"""Exact search: the passages with the largest inner products, streamed from disk.

`Indexer` searches shards one block of rows at a time. A passage's position is its row in all shards
taken together.

Every kind of search (this one, `gpu.py`, `faiss_index.py`, `bm25.py`) obeys one rule: the list of n
passages begins every longer list, and passages with equal scores keep the collection's order,
whatever the batch of questions, the block size and the number of processes.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

from src.models.lengths import prefetch_one
from src.runtime.errors import InputError, shorten
from src.search.shards import Shard

_QUERIES_AT_ONCE, _TILE_ROWS = 1024, 2048  # of a matrix product, whose scores should be in cache
_LEAST_PENDING = 64  # rows of a query that are worth a merge
_NARROWEST = 256  # the width of the first search in `stable_search`


class Found(NamedTuple):
    """Each question's passages, best first: scores float32 and positions int64, [q, k].

    Rows with fewer than k passages end in positions of -1 and scores of minus infinity.
    """

    scores: np.ndarray
    positions: np.ndarray

    @classmethod
    def empty(cls, n_queries: int, k: int) -> "Found":
        return cls(np.full((n_queries, k), -np.inf, np.float32), np.full((n_queries, k), -1))

    def rows(self) -> list[list[int]]:
        """The positions for each question, without the empty ones at the end."""
        return [[position for position in row if position >= 0] for row in self.positions.tolist()]


class Proposals(NamedTuple):
    """What an approximate search proposes for one question, [n] each: `guesses` are the scores that
    it went by, `scores` the final ones."""

    guesses: np.ndarray
    scores: np.ndarray
    positions: np.ndarray


def stable_search(
    propose: Callable[[np.ndarray, int], Iterable[Proposals]],
    n_queries: int,
    k: int,
    n_rows: int,
    nested: bool = False,
) -> Found:
    """The first k passages of a ranking that does not depend on k, by a search that may.

    Approximate searches find other passages when asked for more of them, and an arbitrary subset of
    those tied at the end. So they are always asked for 256, then 1,024, 4,096, ... passages. Only
    the better half of each list is used, without those that tie with its last passage.

    Args:
        propose: gives query numbers [q] and a width at most that many proposals for each query;
            fewer mean that there are no more.
        nested: the proposals come best guess first, and a wide list begins with the narrow ones.
    """
    found, lengths = Found.empty(n_queries, k), np.zeros(n_queries, np.int64)
    waiting, width = np.arange(n_queries if k else 0), 0
    while len(waiting) and width < n_rows:
        widths = [_next_width(width, n_rows)]
        while nested and widths[-1] < min(2 * k, n_rows):
            widths.append(_next_width(widths[-1], n_rows))
        width = widths[-1]
        for query, proposals in zip(waiting, propose(waiting, width), strict=True):
            for narrow in widths:
                part = Proposals(*(array[:narrow] for array in proposals))
                complete = narrow == n_rows or len(part.scores) < narrow
                row = Found(found.scores[query], found.positions[query])
                lengths[query] = _extend(row, lengths[query], part, narrow, complete)
                if complete:
                    lengths[query] = k
        waiting = np.flatnonzero(lengths < k)
    return found


def _next_width(width: int, n_rows: int) -> int:
    return min(max(_NARROWEST, 4 * width), n_rows)


def _extend(row: Found, n_found: int, part: Proposals, width: int, complete: bool) -> int:
    """Append proposals to the first n passages in a row of `Found` [k]. Returns the new n."""
    order = np.lexsort((part.positions, -part.scores))
    if not complete:
        tied = part.scores[part.guesses == part.guesses.min()].max()
        order = order[: min(width // 2, int((part.scores > tied).sum()))]
    scores, positions = part.scores[order], part.positions[order]
    if n_found:  # leave out what ranks among those already found
        last, at = row.scores[n_found - 1], row.positions[n_found - 1]
        after = (scores < last) | ((scores == last) & (positions > at))
        scores, positions = scores[after], positions[after]
    end = min(n_found + len(scores), len(row.scores))
    row.scores[n_found:end] = scores[: end - n_found]
    row.positions[n_found:end] = positions[: end - n_found]
    return end


def merge(parts: Sequence[Found], k: int) -> Found:
    """The best k of results over parts of one collection."""
    scores = np.concatenate([part.scores for part in parts], axis=1)
    positions = np.concatenate([part.positions for part in parts], axis=1)
    order = np.lexsort((positions, -scores), axis=-1)[:, :k]
    return Found(
        np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)
    )


class Indexer:
    """Exact search over opened shards, with two half blocks of embeddings in memory.

    Args: shards: from `open_shards`; block_rows: rows in a block (`--indexing_batch_size`).
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
            part: (i, n) searches every n-th block from the i-th: `merge` makes the results of n
                processes equal to those of one.
            on_rows: called with the number of rows of each block searched.
        Errors: `InputError` for another dimension, or embeddings that are not finite.
        """
        queries, k = check_request(queries, k, self, self.shards[0].path)
        best = Found.empty(len(queries), k)
        buffer = torch.empty(min(len(queries), _QUERIES_AT_ONCE) * _TILE_ROWS)
        searches = []
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            group = slice(first, first + _QUERIES_AT_ONCE)
            so_far = Found(best.scores[group], best.positions[group])
            searches.append(_Search(queries[group], so_far, buffer))
        for start, block in self.blocks(part, on_rows) if searches else ():
            longest = self._longest_row(start, block)
            for search in searches:
                search.add(block, start, longest)
        return best

    def ids(self, positions: np.ndarray) -> list[list[str]]:
        """The passages' ids for positions [q, k], without the empty ones (-1)."""
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

        They cross the borders of shards, whose number therefore makes no difference. Each has half
        of `block_rows`: a thread reads the next one while the caller uses this one, which is then
        overwritten.
        """
        index, count = part
        half = -(-min(self._block_rows, len(self)) // 2)
        buffers = np.empty((2, half, self.dimension), np.float32)

        def spans() -> Iterator[tuple[int, int]]:
            for start in range(index * self._block_rows, len(self), count * self._block_rows):
                stop = min(start + self._block_rows, len(self))
                yield from ((first, min(first + half, stop)) for first in range(start, stop, half))

        with ThreadPoolExecutor(1) as thread:
            reads = (
                thread.submit(self._read, *span, buffers[number % 2])
                for number, span in enumerate(spans())
            )
            for read in prefetch_one(reads):
                start, block = read.result()
                yield start, block
                if on_rows:
                    on_rows(len(block))

    def _read(self, start: int, stop: int, buffer: np.ndarray) -> tuple[int, np.ndarray]:
        """The rows from `start` to `stop` in the buffer, after the first one's position."""
        block, done = buffer[: stop - start], 0
        while done < len(block):
            shard, row = self._shard_of(start + done)
            piece = block[done : done + len(shard) - row]
            shard.read(row, piece)
            done += len(piece)
        return start, block

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


class _Search:
    """The best passages for a group of queries, block after block of rows.

    A matrix product is ten times as fast as single inner products, but its rounding depends on the
    number of threads and on the row's position in the block. So it only proposes rows. Those that
    could be among the best k, whatever the rounding, get the score of a plain inner product, which
    depends on the two vectors alone: results are the same for any blocks, shards, processes and
    threads, and equal passages get equal scores.

    Most rows score less than the best k so far, and one comparison discards them: no list of the
    best is kept in order. Rows that may score more are collected, and scored when there are about
    as many as the best; this raises the floor for the next ones.

    Args: queries: [q, d]; best: the result, changed in place; buffer: for q x _TILE_ROWS scores.
    """

    def __init__(self, queries: np.ndarray, best: Found, buffer: torch.Tensor):
        self._queries, self._best, self._k = queries, best, best.scores.shape[1]
        self._queries_t, self._lengths = torch.from_numpy(queries).T, _lengths(queries)
        self._buffer = buffer
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []  # numbers of queries and rows
        self._n_pending = 0  # the most that a query can have

    def add(self, block: np.ndarray, start: int, longest: float) -> None:
        """Search the rows of a block [b, d].

        Args: start: the position of the block's first row; longest: the largest length of a row.
        """
        # The sum of d products in float32 is wrong by at most d / 2^24 of the product of the
        # lengths, and two orders of summation differ by at most twice that.
        slack = 1.01 * block.shape[1] * 2.0**-23 * longest * self._lengths.astype(np.float64)
        embeddings, n_queries = torch.from_numpy(block), len(self._queries)
        for first in range(0, len(block), _TILE_ROWS):
            tile = embeddings[first : first + _TILE_ROWS]
            scores = self._buffer[: len(tile) * n_queries].view(-1, n_queries)
            torch.mm(tile, self._queries_t, out=scores)
            floor = self._best.scores[:, -1] - slack  # an equal score comes too late
            found = _at_least(scores, floor)
            if len(found) > 4 * self._k * n_queries and self._k < len(tile):
                # The first rows, or ever better ones: only the best of them are possible.
                last = scores.T.contiguous().topk(self._k).values[:, -1].numpy()
                floor = np.maximum(floor, last - 2 * slack)  # twice: the last is a guess, too
                found = _at_least(scores, floor)
            if len(found):
                rows, numbers = np.divmod(found, n_queries)
                self._n_pending += int(np.bincount(numbers).max())
                self._pending.append((numbers, rows + first))
            if self._n_pending > max(2 * self._k, _LEAST_PENDING):
                self._settle(block, start)
        self._settle(block, start)

    def _settle(self, block: np.ndarray, start: int) -> None:
        """Score the collected rows, and merge them into the best."""
        if not self._pending:
            return
        numbers, rows = map(np.concatenate, zip(*self._pending, strict=True))
        order = np.argsort(numbers, kind="stable")
        numbers, rows = numbers[order], rows[order]
        self._pending, self._n_pending = [], 0
        changed, counts = np.unique(numbers, return_counts=True)
        filled = np.arange(counts.max()) < counts[:, None]
        new = Found.empty(len(changed), int(counts.max()))
        new.scores[filled] = inner_products(self._queries, numbers, block, rows)
        new.positions[filled] = rows + start
        best = self._best
        scores = np.concatenate([best.scores[changed], new.scores], axis=1)
        positions = np.concatenate([best.positions[changed], new.positions], axis=1)
        # Positions ascend among the new, and those of the best come before.
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        best.scores[changed] = np.take_along_axis(scores, order, axis=1)
        best.positions[changed] = np.take_along_axis(positions, order, axis=1)


def _at_least(scores: torch.Tensor, floor: np.ndarray) -> np.ndarray:
    """The indices in scores [b, q], flattened, of those that may reach a query's floor [q]."""
    lowest = np.nextafter(floor.astype(np.float32), np.float32(-np.inf))  # not rounded up
    return np.flatnonzero(scores.ge(torch.from_numpy(lowest)).numpy())


def inner_products(
    queries: np.ndarray, numbers: np.ndarray, block: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The inner products of pairs: query `numbers[i]` and row `rows[i]` of the block, [m]."""
    products = np.empty(len(rows), np.float32)
    arrays = [queries, numbers.astype(np.int64), block, rows.astype(np.int64), products]
    pointers = [faiss.swig_ptr(array) for array in arrays]
    faiss.pairwise_indexed_inner_product(queries.shape[1], len(rows), *pointers)
    return products


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """The length (2-norm) of each vector [n, d], contiguous float32."""
    lengths, (n, d) = np.empty(len(vectors), np.float32), vectors.shape
    faiss.fvec_norms_L2(faiss.swig_ptr(lengths), faiss.swig_ptr(vectors), d, n)
    return lengths


def check_request(queries: np.ndarray, k: int, index: Any, path: str) -> tuple[np.ndarray, int]:
    """Queries [q, d] as FAISS takes them, and k, at most the number of passages.

    Args: index: has a length and a `dimension`. Errors: `InputError` when they do not suit it.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != index.dimension:
        raise InputError(
            f"the questions' embeddings have {queries.shape[-1]} dimensions, but those in {path} "
            f"have {index.dimension}; use the --model_path that the passages were embedded with"
        )
    if not np.isfinite(queries).all():
        raise InputError(
            "the questions' embeddings are not finite; use --no_fp16, or repair the model"
        )
    if k < 1:
        raise InputError(f"--n-docs must be at least 1, not {k}")
    return queries, min(k, len(index))
