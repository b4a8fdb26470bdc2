"""How exact search compares queries with a block of rows: one tile of their products at a time."""

import numpy as np
import torch

from src.search.exact import Found, inner_products, vector_lengths

_QUERIES_AT_ONCE, _TILE_ROWS = 1024, 2048  # of a matrix product, whose scores should be in cache
_LEAST_PENDING = 64  # rows of a query that are worth a merge


class TileSearch:
    """The best passages for a group of queries, block after block of rows.

    A matrix product is ten times as fast as single inner products, but its rounding depends on the
    number of threads and on the row's position in the block. So it only proposes rows. Those that
    could be among the best k, whatever the rounding, get the score of a plain inner product, which
    depends on the two vectors alone: results are the same for any blocks, shards, processes and
    threads, and equal passages get equal scores.

    Most rows score less than the best k so far, and one comparison discards them: no list of the
    best is kept in order. Rows that may score more are collected, and scored when there are about
    as many as the best; this raises the floor for the next ones.

    Args: queries: [q, d]; best: the result, changed in place; buffer, mask: for q x _TILE_ROWS
        scores and for which of them count.
    """

    def __init__(self, queries: np.ndarray, best: Found, buffer: torch.Tensor, mask: torch.Tensor):
        self._queries, self._best, self._k = queries, best, best.scores.shape[1]
        self._queries_t, self._lengths = torch.from_numpy(queries).T, vector_lengths(queries)
        self._buffer, self._mask = buffer, mask
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
            found = self._at_least(scores, floor)
            if len(found) > 4 * self._k * n_queries and self._k < len(tile):
                # The first rows, or ever better ones: only the best of them are possible.
                last = scores.T.contiguous().topk(self._k).values[:, -1].numpy()
                floor = np.maximum(floor, last - 2 * slack)  # twice: the last is a guess, too
                found = self._at_least(scores, floor)
            if len(found):
                rows, numbers = np.divmod(found, n_queries)
                self._n_pending += int(np.bincount(numbers).max())
                self._pending.append((numbers, rows + first))
            if self._n_pending > max(2 * self._k, _LEAST_PENDING):
                self._settle(block, start)
        self._settle(block, start)

    def _at_least(self, scores: torch.Tensor, floor: np.ndarray) -> np.ndarray:
        """The indices in scores [b, q], flattened, of those that may reach a query's floor [q]."""
        lowest = np.nextafter(floor.astype(np.float32), np.float32(-np.inf))  # not rounded up
        mask = self._mask[: scores.numel()].view(scores.shape)  # memory that is mapped already
        torch.ge(scores, torch.from_numpy(lowest), out=mask)
        return np.flatnonzero(mask.numpy())

    def _settle(self, block: np.ndarray, start: int) -> None:
        """Score the collected rows, and merge them into the best."""
        if not self._pending:
            return
        numbers, rows = map(np.concatenate, zip(*self._pending, strict=True))
        order = np.argsort(numbers.astype(np.int16), kind="stable")  # of 16 bits: a radix sort
        numbers, rows = numbers[order], rows[order]
        self._pending, self._n_pending = [], 0
        counts = np.bincount(numbers)
        changed = np.flatnonzero(counts)
        counts = counts[changed]
        filled = np.arange(counts.max()) < counts[:, None]
        new = Found.empty(len(changed), int(counts.max()))
        new.scores[filled] = inner_products(self._queries, numbers, block, rows)
        new.positions[filled] = rows + start
        best = self._best
        scores = np.concatenate([best.scores[changed], new.scores], axis=1)
        positions = np.concatenate([best.positions[changed], new.positions], axis=1)
        # Positions ascend among the new, and those of the best come before.
        ranked = torch.from_numpy(scores).sort(dim=1, descending=True, stable=True)
        order = ranked.indices[:, : self._k].numpy()
        best.scores[changed] = np.take_along_axis(scores, order, axis=1)
        best.positions[changed] = np.take_along_axis(positions, order, axis=1)


def tile_searches(queries: np.ndarray, best: Found) -> list[TileSearch]:
    """Searches of all queries [q, d], in groups, with one buffer for their products."""
    size, searches = min(len(queries), _QUERIES_AT_ONCE) * _TILE_ROWS, []
    buffers = torch.empty(size), torch.empty(size, dtype=torch.bool)
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        group = slice(first, first + _QUERIES_AT_ONCE)
        so_far = Found(best.scores[group], best.positions[group])
        searches.append(TileSearch(queries[group], so_far, *buffers))
    return searches
