"""Exact search on a GPU: matrix products in half precision propose passages, plain inner products
in float32 decide. The result is that of `src/search/exact.py`'s `Indexer`, to the bit.

Half precision rounds a score, so rows are ranked by what their scores could be at most. The device
keeps the best of these for each question over all blocks, more than are asked for. They are ranked
again at the end by the inner product that `Indexer` uses. A question for which a row that was not
kept could belong to the best is searched again with a longer list, then by `Indexer` itself.

float16 has three more bits than bfloat16, so its bounds are eight times as tight, and it holds the
embeddings of float16 shards as they are. What it lacks is range: each question, and each block, is
multiplied by a power of two, which rounds nothing, so that the largest number is below 2^15. What
is lost at the other end is measured, and counted with what rounding changes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from src.runtime.errors import InputError
from src.search.exact import Found, Indexer, check_request, inner_products, merge
from src.search.shards import Shard

_SPARE_ROWS = 128  # how many more rows than 2 k are kept for a question
_WIDER = 8  # how many times as many the second time
_SCORES_AT_ONCE = 1 << 27  # bounds what the scores of a block take on the device
_TOP = 15  # numbers in half precision are below 2^15


class _Half(NamedTuple):
    """Vectors [n, d] times 2^exponent, in half precision; and, of the vectors so multiplied, their
    lengths (2-norms) [n] and those of what half precision lost of them."""

    vectors: torch.Tensor
    exponent: int | np.ndarray
    lengths: torch.Tensor
    losses: torch.Tensor


class _Proposed(NamedTuple):
    """Rows for each query [q, w]: bounds of their scores in float64 (minus infinity where there
    are fewer rows than w), and positions. Of other rows no score is above the lowest `upper`.
    And the largest distance [q] of a row's bounds from what was computed."""

    upper: np.ndarray
    lower: np.ndarray
    positions: np.ndarray
    slack: np.ndarray


class GpuIndexer(Indexer):
    """`Indexer` with its matrix products on a device.

    Where all blocks that are to be searched fit into the device's free memory in half precision,
    they stay there for the next search; else one at a time is there.

    Args:
        dtype: of the products: float16 or bfloat16.
        keep: whether blocks stay on the device; None: where they fit.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        block_rows: int,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        keep: bool | None = None,
    ):
        super().__init__(shards, block_rows)
        self._device, self._dtype, self._keep = device, dtype, keep
        self._kept: dict[tuple[int, int], list[tuple[int, _Half]]] = {}  # by part

    def search(
        self,
        queries: np.ndarray,
        k: int,
        part: tuple[int, int] = (0, 1),
        on_rows: Callable[[int], None] | None = None,
    ) -> Found:
        """See `Indexer.search`. Errors: also `InputError` when the device's memory is too small."""
        queries, k = check_request(queries, k, self, self.shards[0].path)
        best = Found(
            np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        )
        waiting = np.arange(len(queries) if k else 0)
        for times in (1, _WIDER):
            if not len(waiting):
                return best
            width = times * (2 * k + _SPARE_ROWS)
            try:
                proposed = self._propose(queries[waiting], width, part, on_rows)
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{self._device}: too little memory for blocks of {self._block_rows} "
                    "embeddings; lower --indexing_batch_size"
                ) from None
            found, done = self._rank(queries[waiting], k, proposed)
            best.scores[waiting], best.positions[waiting] = found
            waiting, on_rows = waiting[~done], None
        if len(waiting):
            found = super().search(queries[waiting], k, part)
            best.scores[waiting], best.positions[waiting] = found
        return best

    @torch.no_grad()
    def _propose(
        self,
        queries: np.ndarray,
        width: int,
        part: tuple[int, int],
        on_rows: Callable[[int], None] | None,
    ) -> _Proposed:
        """The rows of the blocks whose scores could be highest."""
        shape, device = (len(queries), width), self._device
        upper = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        lower = upper.clone()
        positions = torch.full(shape, -1, device=device)
        widest = torch.zeros(len(queries), dtype=torch.float64, device=device)
        asked = self._halve_queries(queries)
        exponents = torch.from_numpy(asked.exponent).to(device).double()
        at_once = max(1, _SCORES_AT_ONCE // self._block_rows)
        for start, block in self._halved_blocks(part, on_rows, 2 * 24 * upper.numel()):
            longest, most_lost = block.lengths.max(), block.losses.max()
            for first in range(0, len(queries), at_once):
                group = slice(first, first + at_once)
                scores = _products(asked.vectors[group], block.vectors)
                guesses, rows = scores.topk(min(width, scores.shape[1]), sorted=False)
                lengths, losses = asked.lengths[group], asked.losses[group]
                # |<q, x> - <q', x'>| <= |q - q'| |x'| + |q| |x - x'|, by Cauchy and Schwarz.
                slack = losses * (longest + most_lost) + lengths * most_lost
                # Adding up: tensor cores cut sums off, which takes up to 2^-23 of the product of
                # the lengths an addition; twice that, since they are not documented. The plain
                # inner product of `Indexer` rounds by at most half of 2^-23.
                rounding = 2.5 * self.dimension * 2.0**-23
                slack += rounding * (lengths + losses) * (longest + most_lost)
                scale = torch.exp2(-exponents[group] - block.exponent)
                tiny = self.dimension * 2.0**-148  # what float32 cannot hold of a plain product
                slack = 1.01 * slack * scale + tiny  # (lengths are rounded too)
                guesses = guesses.double() * scale[:, None]
                uppers = torch.cat([upper[group], guesses + slack[:, None]], dim=1)
                lowers = torch.cat([lower[group], guesses - slack[:, None]], dim=1)
                places = torch.cat([positions[group], rows + start], dim=1)
                upper[group], order = uppers.topk(width, sorted=False)
                lower[group] = lowers.gather(1, order)
                positions[group] = places.gather(1, order)
                widest[group] = torch.maximum(widest[group], slack)
        tensors = upper, lower, positions, widest
        return _Proposed(*(tensor.cpu().numpy() for tensor in tensors))

    def _rank(self, queries: np.ndarray, k: int, proposed: _Proposed) -> tuple[Found, np.ndarray]:
        """The k best of the proposed rows by plain inner products, and for which queries [q] no
        other row can be among the best."""
        parts, done = [], []
        at_once = max(1, self._block_rows // proposed.upper.shape[1])
        for first in range(0, len(queries), at_once):
            group = slice(first, first + at_once)
            upper, lower, positions, slack = (array[group] for array in proposed)
            floor = np.partition(lower, -k, axis=1)[:, -k]
            possible = (upper >= floor[:, None]) & (positions >= 0)
            rows, places = np.unique(positions[possible], return_inverse=True)
            numbers = np.nonzero(possible)[0]
            scores = np.full(upper.shape, -np.inf, np.float32)
            scores[possible] = inner_products(
                queries[group], numbers, self.take(rows), places.reshape(-1)
            )
            parts.append(merge([Found(scores, np.where(possible, positions, -1))], k))
            lowest = upper.min(axis=1)
            # Near the end of float32's range, a plain sum overflows in its own ways.
            in_range = slack < 1e30  # (it is at least 2^-23 of the product of two lengths)
            done.append(in_range & (np.isneginf(lowest) | (lowest < parts[-1].scores[:, -1])))
        found = Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        return found, np.concatenate(done)

    def _halved_blocks(
        self, part: tuple[int, int], on_rows: Callable[[int], None] | None, reserved: int
    ) -> Iterator[tuple[int, _Half]]:
        """The blocks as in `Indexer.blocks`, on the device, where `reserved` bytes are for others.
        (A kept block is told to `on_rows` like one that is read.)"""
        if part in self._kept:
            for start, block in self._kept[part]:
                yield start, block
                if on_rows:
                    on_rows(len(block.vectors))
            return
        keep, kept = self._keep, []
        if keep is None:
            keep = self._fits(part[1], reserved)
        for start, rows in self.blocks(part, on_rows):
            self._longest_row(start, rows)  # names what is not finite
            exponent = int(_exponents(max(rows.max(), -rows.min())))
            vectors = torch.tensor(rows, device=self._device).mul_(2.0**exponent)
            block = self._halve(vectors, exponent)
            if keep:
                kept.append((start, block))
            yield start, block
        if keep:
            self._kept[part] = kept

    def _halve_queries(self, queries: np.ndarray) -> _Half:
        exponents = _exponents(np.abs(queries).max(axis=1, initial=0))
        scaled = np.ldexp(queries.astype(np.float64), exponents[:, None]).astype(np.float32)
        return self._halve(torch.from_numpy(scaled).to(self._device), exponents)

    def _halve(self, vectors: torch.Tensor, exponent: int | np.ndarray) -> _Half:
        half = vectors.to(self._dtype)
        # Whatever a device makes of numbers below the normal ones: they are left out, and measured.
        half = half.masked_fill_(half.abs() < torch.finfo(self._dtype).tiny, 0.0)
        lengths = vectors.norm(dim=1).double()
        return _Half(half, exponent, lengths, vectors.sub_(half).norm(dim=1).double())

    def _fits(self, n_processes: int, reserved: int) -> bool:
        """Whether a process's share can stay on the device, with room for all else."""
        if self._device.type != "cuda":
            return False
        share = -(-len(self) // n_processes) + self._block_rows
        needed = 2 * self.dimension * share + 24 * self.dimension * self._block_rows
        needed += 4 * 4 * max(_SCORES_AT_ONCE, self._block_rows) + reserved
        return needed < 0.9 * torch.cuda.mem_get_info(self._device)[0]


def _exponents(largest: np.ndarray) -> np.ndarray:
    """By which power of two a vector is multiplied, from its largest absolute number."""
    return np.clip(_TOP - np.frexp(largest)[1].astype(np.int64), -100, 100)


def _products(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inner products [q, b] in float32 of vectors in half precision."""
    if queries.device.type == "cuda":
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.float().T
