"""Exact search on a GPU: matrix products in half precision propose passages, float32 ranks them.

More passages are proposed than are asked for, and their scores are computed again as in `exact.py`.
The result equals that of a CPU up to rounding in half precision: a passage can be missed only if
more than a hundred others score within about 0.1 % of it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from src.runtime.errors import InputError
from src.search.exact import (
    Found,
    Indexer,
    Proposals,
    check_request,
    inner_products,
    merge,
    stable_search,
)
from src.search.shards import Shard

_SCORES_AT_ONCE = 1 << 27  # bounds the device memory for a block's scores
Part = tuple[int, int]
Block = tuple[int, torch.Tensor, torch.Tensor]  # its first row, rows, and what multiplies scores


class GpuIndexer(Indexer):
    """`Indexer` with its matrix products on a device.

    If all blocks fit into the device's free memory in half precision, they stay there for the next
    search; otherwise they pass through it one at a time.
    """

    def __init__(self, shards: Sequence[Shard], block_rows: int, device: torch.device):
        super().__init__(shards, block_rows)
        self._device = device
        self._cached: dict[Part, list[Block]] = {}

    def search(
        self,
        queries: np.ndarray,
        k: int,
        part: Part = (0, 1),
        on_rows: Callable[[int], None] | None = None,
    ) -> Found:
        """See `Indexer.search`. Errors: also `InputError` when the device's memory is too small."""
        queries, k = check_request(queries, k, self, self.shards[0].path)
        progress = [on_rows]  # of the first pass only

        def propose(numbers: np.ndarray, width: int) -> Iterator[Proposals]:
            some = queries[numbers]
            found = self._propose(some, width, part, progress.pop() if progress else None)
            for query, guesses, positions in zip(some, *found, strict=True):
                rows, numbers = np.unique(positions, return_inverse=True)
                pairs = np.zeros_like(numbers), self.take(rows), numbers
                yield Proposals(guesses, inner_products(query[None], *pairs), positions)

        try:
            return stable_search(propose, len(queries), k, self._n_rows(part), nested=True)
        except torch.OutOfMemoryError:
            raise InputError(
                f"{self._device}: too little memory for blocks of {self._block_rows:,} "
                "embeddings; lower --indexing_batch_size"
            ) from None

    def _n_rows(self, part: Part) -> int:
        index, count = part
        starts = range(index * self._block_rows, len(self), count * self._block_rows)
        return sum(min(self._block_rows, len(self) - start) for start in starts)

    @torch.no_grad()
    def _propose(
        self, queries: np.ndarray, width: int, part: Part, on_rows: Callable[[int], None] | None
    ) -> Found:
        """The highest scores in half precision and their positions, best first."""
        device = self._device
        guesses = torch.full((len(queries), width), -torch.inf, device=device)
        positions = torch.full((len(queries), width), -1, device=device)
        # float16 ends at 65,504: queries, and blocks in float32, are scaled to numbers up to 1.
        scales = np.maximum(np.abs(queries).max(axis=1, initial=0), 1e-30)
        halves = torch.from_numpy(queries / scales[:, None]).to(device, torch.float16)
        at_once = max(1, _SCORES_AT_ONCE // self._block_rows)
        for start, block, scale in self._half_blocks(part, on_rows, 24 * guesses.numel()):
            for first in range(0, len(queries), at_once):
                group = slice(first, first + at_once)
                scores = _products(halves[group], block).mul_(scale)
                best, rows = scores.topk(min(width, len(block)), sorted=False)
                both = torch.cat([guesses[group], best], dim=1)
                sources = torch.cat([positions[group], rows + start], dim=1)
                guesses[group], order = both.topk(width, sorted=False)
                positions[group] = sources.gather(1, order)
        return merge([Found(guesses.cpu().numpy(), positions.cpu().numpy())], width)

    def _half_blocks(
        self, part: Part, on_rows: Callable[[int], None] | None, reserved: int
    ) -> Iterator[Block]:
        """The blocks as in `Indexer.blocks`, on the device in half precision. Other things need
        `reserved` bytes of its memory."""
        cached, kept = self._cached.get(part), []
        keep = not cached and self._fits(self._n_rows(part), reserved)
        for start, block, scale in cached or self._uploaded(part):
            if keep:
                block = block.clone()
                kept.append((start, block, scale))
            yield start, block, scale
            if on_rows:
                on_rows(len(block))
        if keep:
            self._cached[part] = kept

    def _uploaded(self, part: Part) -> Iterator[Block]:
        """The blocks as stored, if in float16, or divided by a scale. While the device works on
        one, the next is read into pinned memory, and copied on a stream of its own.

        Errors: `InputError`, after the last block, for embeddings that are not finite.
        """
        is_half = all(shard.embeddings.dtype == np.float16 for shard in self.shards)
        kind, device = torch.float16 if is_half else torch.float32, self._device
        shape = 2, min(self._block_rows, len(self)), self.dimension
        buffers = torch.empty(shape, dtype=kind, pin_memory=device.type == "cuda")
        slots = torch.empty(shape, dtype=kind, device=device)
        pairs = itertools.cycle(zip(buffers, slots, strict=True))
        backend = torch.get_device_module(device)
        compute, copies, before = backend.current_stream(), backend.Stream(), backend.Event()
        copies.wait_stream(compute)  # which may still use the memory of the slots
        lengths, scale = torch.zeros((), device=device), torch.ones((), device=device)
        for start, rows in self.blocks(part, buffers=buffers.numpy()):
            source, block = (buffer[: len(rows)] for buffer in next(pairs))
            with backend.stream(copies):
                block.copy_(source, non_blocking=True)
            compute.wait_stream(copies)
            lengths += torch.linalg.vector_norm(block, dim=1, dtype=torch.float32).sum()
            if not is_half:
                scale = torch.linalg.vector_norm(block, torch.inf).clamp(min=1e-30)
                block = block.div(scale).half()
            yield start, block, scale
            after = backend.Event()
            after.record()
            before.synchronize()  # the next block overwrites the one before this
            before = after
        if not lengths.isfinite():  # asked once, as the answer has to wait for the device
            for start, rows in self.blocks(part):
                self._longest_row(start, rows)  # names the passage

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
