"""Exact search: the passages with the largest inner products, streamed from disk.

`Indexer` searches shards block by block. A passage's position is its row in all shards together.

Every kind of search (this one, `gpu.py`, `faiss_index.py`, `bm25.py`) obeys one rule: the list of n
passages begins every longer list, and passages with equal scores keep the collection's order,
whatever the batch of questions, the block size and the number of processes.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np

from src.runtime.errors import InputError, shorten
from src.search.shards import Shard

_MANY_PAIRS = 1 << 18  # that are worth FAISS's threads
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
    """Exact search over opened shards.

    Args: shards: from `open_shards`; block_rows: rows in a block (`--indexing_batch_size`); a CPU
        has one tile of it in memory at a time.
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
        from src.search import tiles  # only a search needs torch

        searches = tiles.tile_searches(queries, best)
        for start, tile in self.blocks(part, on_rows, tiles.TILE_ROWS) if searches else ():
            longest = self._longest_row(start, tile)
            for search in searches:
                search.add(tile, start, longest)
        for search in searches:
            search.merge()
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
        self,
        part: tuple[int, int] = (0, 1),
        on_rows: Callable[[int], None] | None = None,
        at_once: int | None = None,
        buffers: Iterable[np.ndarray] = (),
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks in order: the first row's position, and the rows [b, d] as float32.

        They cross the borders of shards, whose number therefore makes no difference. A block is
        overwritten by the next one, which the system is asked to read from disk in the meantime. (A
        thread that copies it would take a core from the matrix products.)

        Args:
            at_once: gives each block in pieces of so many rows.
            buffers: filled in turn, instead of one in float32.
        """
        index, count = part
        at_once = min(at_once or self._block_rows, self._block_rows)
        shape, step = (min(at_once, len(self)), self.dimension), count * self._block_rows
        turns = itertools.cycle([*buffers] or [np.empty(shape, np.float32)])
        for block_start in range(index * self._block_rows, len(self), step):
            end = min(block_start + self._block_rows, len(self))
            for start in range(block_start, end, at_once):
                rows = next(turns)[: end - start]
                for shard, row, piece in self._pieces(start, rows):
                    shard.read(row, piece)
                for shard, row, piece in self._pieces(start + step, rows):
                    shard.read_ahead(row, len(piece))
                yield start, rows
                if on_rows:
                    on_rows(len(rows))

    def _pieces(self, start: int, block: np.ndarray) -> Iterator[tuple[Shard, int, np.ndarray]]:
        """The parts of a block from `start` on by shard, with their first row there."""
        done = 0
        while done < len(block) and start + done < len(self):
            shard, row = self._shard_of(start + done)
            piece = block[done : done + len(shard) - row]
            yield shard, row, piece
            done += len(piece)

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
        lengths = vector_lengths(block)
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


def inner_products(
    queries: np.ndarray, numbers: np.ndarray, block: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The inner products of pairs: query `numbers[i]` and row `rows[i]` of the block, [m]."""
    products = np.empty(len(rows), np.float32)
    arrays = [queries, numbers.astype(np.int64), block, rows.astype(np.int64), products]
    pointers = [faiss.swig_ptr(array) for array in arrays]
    # FAISS's threads keep their cores busy for a while after each task, which slows down PyTorch's.
    n_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(n_threads if len(rows) > _MANY_PAIRS else 1)
    faiss.pairwise_indexed_inner_product(queries.shape[1], len(rows), *pointers)
    faiss.omp_set_num_threads(n_threads)
    return products


def vector_lengths(vectors: np.ndarray) -> np.ndarray:
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
