"""How exact search compares queries with a tile of rows."""

import numpy as np
import torch

from src.search.exact import Found, inner_products, vector_lengths

QUERIES_AT_ONCE, TILE_ROWS = 1024, 2048  # of a matrix product, whose scores should be in cache
_LEAST_PENDING = 64  # rows of a query that are worth a merge
_MOST_CANDIDATES = 1 / 8  # of a tile: to score more takes longer than a product in float32


def fastest_type() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it, twice as fast as float32 or more."""
    able = torch.cpu.get_capabilities()
    is_able = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if is_able else torch.float32


class TileSearch:
    """The best passages for a group of queries, block after block of rows.

    A matrix product is ten times as fast as single inner products, but its rounding depends on the
    number of threads and on the row's position in the block. So it only proposes rows. Those that
    could be among the best k, whatever the rounding, get the score of a plain inner product, which
    depends on the two vectors alone: results are the same for any blocks, shards, processes and
    threads, and equal passages get equal scores.

    For a proposal, vectors rounded to bfloat16 are good enough: a few more rows are possible. Where
    embeddings are so alike that too many are, their products are taken in float32 after all.

    Most rows score less than the best k so far, and one comparison discards them: no list of the
    best is kept in order. The others are scored while they are in the cache, and merged when there
    are about twice as many as the best, which raises the floor for the next ones.

    Args: queries: [q, d]; best: the result, changed in place; buffer, mask: for q x TILE_ROWS
        scores and for which of them count; dtype: of the products.
    """

    def __init__(
        self,
        queries: np.ndarray,
        best: Found,
        buffer: torch.Tensor,
        mask: torch.Tensor,
        dtype: torch.dtype,
    ):
        self._queries, self._best, self._k = queries, best, best.scores.shape[1]
        self._buffer, self._mask = buffer, mask
        self._lengths = torch.from_numpy(vector_lengths(queries)).double()
        self._rounded, self._lost = _rounded(torch.from_numpy(queries), dtype)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n_pending = 0  # the most that a query can have

    def add(self, tile: np.ndarray, start: int, longest: float) -> None:
        """Search at most TILE_ROWS rows [b, d].

        Args: start: the position of the first row; longest: the largest length of a row, or more.
        """
        is_full = self._best.scores[0, -1] > -np.inf
        found = self._possible(tile, longest)
        too_many = _MOST_CANDIDATES * len(tile) * len(self._queries)
        if self._rounded.dtype != torch.float32 and is_full and len(found) > too_many:
            self._rounded, self._lost = _rounded(torch.from_numpy(self._queries), torch.float32)
            found = self._possible(tile, longest)
        if len(found):
            rows, numbers = np.divmod(found, len(self._queries))
            scores = inner_products(self._queries, numbers, tile, rows)
            self._pending.append((numbers, rows + start, scores))
            self._n_pending += int(np.bincount(numbers).max())
        if not is_full or self._n_pending > max(2 * self._k, _LEAST_PENDING):
            self.merge()

    def _possible(self, tile: np.ndarray, longest: float) -> np.ndarray:
        """The indices in [b, q], flattened, of rows [b, d] that may be among a query's best."""
        n_queries = len(self._queries)
        rows, lost = _rounded(torch.from_numpy(tile), self._rounded.dtype)
        scores = self._buffer.view(rows.dtype)[: len(tile) * n_queries].view(-1, n_queries)
        torch.mm(rows, self._rounded.T, out=scores)
        # For x = x' + e, a row and what is lost by rounding it, and a query q = q' + f, the
        # products q x and q' x' differ by q e + f x'. The sum of d products in float32 is wrong by
        # at most d / 2^24 of the product of the lengths, and two orders of summation differ by at
        # most twice that.
        lost = float(lost.max()) + tile.shape[1] * 2.0**-23 * longest
        slack = 1.01 * (self._lengths * lost + self._lost * longest)
        floor = torch.from_numpy(self._best.scores[:, -1]).double()  # an equal score is too late
        found = self._at_least(scores, floor - slack)
        if len(found) > 4 * self._k * n_queries and self._k < len(tile):
            # The first rows, or ever better ones: only the best of them are possible.
            last = scores.T.float().topk(self._k).values[:, -1].double()
            last = _below(last, scores.dtype) - slack
            found = self._at_least(scores, torch.maximum(floor, last) - slack)
        return found

    def _at_least(self, scores: torch.Tensor, lowest: torch.Tensor) -> np.ndarray:
        """The indices in scores [b, q], flattened, of those that are a query's lowest [q] or more,
        before they were rounded."""
        mask = self._mask[: scores.numel()].view(scores.shape)  # memory that is mapped already
        torch.ge(scores, _below(lowest, scores.dtype).to(scores.dtype), out=mask)
        return np.flatnonzero(mask.numpy())

    def merge(self) -> None:
        """Merge the collected rows into the best. To be called after the last tile."""
        if not self._pending:
            return
        numbers, rows, scores = map(np.concatenate, zip(*self._pending, strict=True))
        self._pending, self._n_pending = [], 0
        order = np.argsort(numbers.astype(np.int16), kind="stable")  # of 16 bits: a radix sort
        counts = np.bincount(numbers)
        changed = np.flatnonzero(counts)
        counts = counts[changed]
        filled = np.arange(counts.max()) < counts[:, None]
        new = Found.empty(len(changed), int(counts.max()))
        new.scores[filled], new.positions[filled] = scores[order], rows[order]
        best = self._best
        scores = np.concatenate([best.scores[changed], new.scores], axis=1)
        positions = np.concatenate([best.positions[changed], new.positions], axis=1)
        # Positions ascend among the new, and those of the best come before.
        order = _best_first(torch.from_numpy(scores), self._k).numpy()
        best.scores[changed] = np.take_along_axis(scores, order, axis=1)
        best.positions[changed] = np.take_along_axis(positions, order, axis=1)


def _best_first(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The columns of the k largest scores [n, m] float32, equal ones in order: [n, k].

    A stable sort takes three times as long as this: the bits of a score, as a whole number with the
    same order, and below them the column, make all keys different.
    """
    bits, last = (scores + 0.0).view(torch.int32), scores.shape[1] - 1  # -0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) | torch.arange(last, -1, -1)
    return last - (keys.topk(k).values & 0xFFFFFFFF)


def _rounded(vectors: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [n, d] in this type, and the lengths [n] of what they lose."""
    rounded = vectors.to(dtype)
    if rounded is vectors:
        return vectors, torch.zeros(len(vectors), dtype=torch.float64)
    return rounded, rounded.float().sub_(vectors).norm(dim=1).double()


def _below(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """At most what this type rounds to these float64 numbers."""
    return numbers - 0.51 * torch.finfo(dtype).eps * numbers.abs()


def tile_searches(queries: np.ndarray, best: Found) -> list[TileSearch]:
    """Searches of all queries [q, d], in groups, with one buffer for their products."""
    size, dtype, searches = min(len(queries), QUERIES_AT_ONCE) * TILE_ROWS, fastest_type(), []
    buffers = torch.empty(size), torch.empty(size, dtype=torch.bool)
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        group = slice(first, first + QUERIES_AT_ONCE)
        so_far = Found(best.scores[group], best.positions[group])
        searches.append(TileSearch(queries[group], so_far, *buffers, dtype))
    return searches
