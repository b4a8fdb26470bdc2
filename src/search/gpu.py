"""Exact search on a GPU: matrix products in half precision propose passages, float32 ranks them.

Half precision rounds scores, so more passages are proposed than are asked for, and their scores are
computed again as in `exact.py`. The result equals that of a CPU up to this rounding: a passage can
be missed only if hundreds of others score within about 0.1 % of it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from src.runtime.errors import InputError
from src.search.exact import (
    Found,
    Indexer,
    Ranked,
    check_request,
    extend,
    inner_products,
    next_width,
)
from src.search.shards import Shard

_SCORES_AT_ONCE = 1 << 27  # bounds what the scores of a block take on the device


class GpuIndexer(Indexer):
    """`Indexer` with its matrix products on a device.

    Where all blocks that are to be searched fit into the device's free memory in half precision,
    they stay there for the next search; otherwise one at a time is there.
    """

    def __init__(self, shards: Sequence[Shard], block_rows: int, device: torch.device):
        super().__init__(shards, block_rows)
        self._device = device
        self._cached: dict[tuple[int, int], list[tuple[int, torch.Tensor, float]]] = {}  # by part

    def search(
        self,
        queries: np.ndarray,
        k: int,
        part: tuple[int, int] = (0, 1),
        on_rows: Callable[[int], None] | None = None,
    ) -> Found:
        """See `Indexer.search`. Errors: also `InputError` when the device's memory is too small."""
        queries, k = check_request(queries, k, self, self.shards[0].path)
        ranked, waiting = [Ranked.empty()] * len(queries), np.arange(len(queries) if k else 0)
        last_width, n_rows = 0, self._n_rows(part)
        while len(waiting) and last_width < n_rows:
            widths = [next_width(last_width, n_rows)]
            while widths[-1] < min(2 * k, n_rows):
                widths.append(next_width(widths[-1], n_rows))
            last_width = widths[-1]
            try:
                guesses, rows = self._propose(queries[waiting], last_width, part, on_rows)
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{self._device}: too little memory for blocks of {self._block_rows:,} "
                    "embeddings; lower --indexing_batch_size"
                ) from None
            at_once = max(1, self._block_rows // last_width)
            for first in range(0, len(waiting), at_once):
                group = slice(first, first + at_once)
                scores = self._score(queries[waiting[group]], rows[group])
                for query, *lists in zip(
                    waiting[group], guesses[group], scores, rows[group], strict=True
                ):
                    for width in widths:
                        nearest = (array[:width] for array in lists)
                        ranked[query] = extend(ranked[query], *nearest, width, width == n_rows)
            # Too many passages have equal scores where the proposals end: propose more for these.
            waiting = np.array([q for q in waiting if len(ranked[q].scores) < k], np.int64)
            on_rows = None
        found = Found.empty(len(queries), k)
        for query, (scores, positions) in enumerate(ranked):
            found.scores[query, : len(scores)] = scores[:k]
            found.positions[query, : len(positions)] = positions[:k]
        return found

    def _n_rows(self, part: tuple[int, int]) -> int:
        """The number of rows in every n-th block from the i-th."""
        index, count = part
        starts = range(index * self._block_rows, len(self), count * self._block_rows)
        return sum(min(self._block_rows, len(self) - start) for start in starts)

    @torch.no_grad()
    def _propose(
        self,
        queries: np.ndarray,
        width: int,
        part: tuple[int, int],
        on_rows: Callable[[int], None] | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the highest scores in half precision: scores and positions [q, width],
        the highest first, and those with equal scores by position."""
        device, half = self._device, torch.float16
        guesses = torch.full((len(queries), width), -torch.inf, device=device)
        positions = torch.full((len(queries), width), -1, device=device)
        # float16 ends at 65,504: each query and each block is scaled to numbers up to 1.
        scales = np.maximum(np.abs(queries).max(axis=1, initial=0), 1e-30)
        asked = torch.from_numpy(queries / scales[:, None]).to(device, half)
        at_once = max(1, _SCORES_AT_ONCE // self._block_rows)
        for start, block, scale in self._half_blocks(part, on_rows, 24 * guesses.numel()):
            for first in range(0, len(queries), at_once):
                group = slice(first, first + at_once)
                scores = _products(asked[group], block).mul_(scale)
                best, rows = scores.topk(min(width, len(block)), sorted=False)
                both = torch.cat([guesses[group], best], dim=1)
                places = torch.cat([positions[group], rows + start], dim=1)
                guesses[group], order = both.topk(width, sorted=False)
                positions[group] = places.gather(1, order)
        arrays = guesses.cpu().numpy(), positions.cpu().numpy()
        order = np.lexsort((arrays[1], -arrays[0]), axis=-1)
        return tuple(np.take_along_axis(array, order, axis=1) for array in arrays)

    def _score(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The inner products [q, w] of queries [q, d] with the rows at positions [q, w]."""
        rows, numbers = np.unique(positions, return_inverse=True)
        pairs = np.repeat(np.arange(len(queries)), positions.shape[1]), numbers.reshape(-1)
        return inner_products(queries, pairs[0], self.take(rows), pairs[1]).reshape(positions.shape)

    def _half_blocks(
        self, part: tuple[int, int], on_rows: Callable[[int], None] | None, reserved: int
    ) -> Iterator[tuple[int, torch.Tensor, float]]:
        """The blocks as in `Indexer.blocks`, on the device in half precision, divided by a scale.

        Args: reserved: bytes of the device that are not for blocks.
        """
        if part in self._cached:
            for start, block, scale in self._cached[part]:
                yield start, block, scale
                if on_rows:
                    on_rows(len(block))
            return
        keep, cached = self._fits(self._n_rows(part), reserved), []
        for start, rows in self.blocks(part, on_rows):
            self._longest_row(start, rows)  # names an embedding that is not finite
            scale = max(float(rows.max()), -float(rows.min()), 1e-30)
            block = torch.from_numpy(rows).to(self._device).div(scale).half()
            if keep:
                cached.append((start, block, scale))
            yield start, block, scale
        if keep:
            self._cached[part] = cached

    def _fits(self, n_rows: int, reserved: int) -> bool:
        """Whether these rows can stay on the device, with room for everything else."""
        if self._device.type != "cuda":
            return False
        needed = 2 * self.dimension * (n_rows + 8 * self._block_rows) + reserved
        needed += 4 * 4 * max(_SCORES_AT_ONCE, self._block_rows)
        return needed < 0.9 * torch.cuda.mem_get_info(self._device)[0]


def _products(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inner products [q, b] in float32 of vectors in half precision."""
    if queries.device.type == "cuda":
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.float().T
