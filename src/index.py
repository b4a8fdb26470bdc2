"""Exact search for the passages nearest to a question, by the inner product of their embeddings.

`Indexer` searches shards straight from disk, one block of rows at a time; `src/compressed.py` has
the approximate kind. A passage's position is its row in all shards taken together, in their order;
of passages with one score, the one with the lower position comes first.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np

from src.errors import InputError
from src.shards import Shard

_QUERIES_AT_ONCE = 4096  # bounds what a block's scores and their merging take


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
            for first in range(0, len(queries), _QUERIES_AT_ONCE):
                group = slice(first, first + _QUERIES_AT_ONCE)
                if not _search_block(
                    queries[group], block, start, Found(*(x[group] for x in best))
                ):
                    raise InputError(
                        f"{self._shard_of(start)[0].path}: among the {len(block)} embeddings from "
                        f"passage {start} on are some that are not finite; make them again"
                    )
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

    def _shard_of(self, position: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._starts, position) - 1
        return self.shards[number], position - self._starts[number]


def _search_block(queries: np.ndarray, block: np.ndarray, start: int, best: Found) -> bool:
    """Put the rows of a block [b, d], the first of which has position `start`, where they belong
    among the best so far. Returns whether all scores that count are finite.

    FAISS keeps any of the rows that are tied for the last place. One row more than asked for shows
    such a tie; then the question is searched again for all rows of the block.
    """
    k = best.scores.shape[1]
    scores, rows = faiss.knn(queries, block, min(k + 1, len(block)), faiss.METRIC_INNER_PRODUCT)
    if not np.isfinite(scores).all() or rows.min() < 0:  # it gives -1 where a score is no number
        return False
    # Later positions lose ties: what only reaches the worst so far changes nothing.
    worst = best.scores[:, -1]
    better = np.flatnonzero(scores[:, 0] > worst)
    found = merge([Found(scores[better], rows[better])], k)
    if len(block) > k:
        tied = (scores[:, k - 1] == scores[:, k]) & (scores[:, k] > worst)
        for place in np.flatnonzero(tied[better]):
            query = queries[better[place], None]
            every = Found(*faiss.knn(query, block, len(block), faiss.METRIC_INNER_PRODUCT))
            found.scores[place], found.positions[place] = (row[0] for row in merge([every], k))
    before = Found(best.scores[better], best.positions[better])
    after = merge([before, Found(found.scores, found.positions + start)], k)
    best.scores[better], best.positions[better] = after
    return True


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
