"""Passage scores: how much the reader's decoder looks at each passage, which retrievers learn from.

Add a score by writing a function of `FirstStep` and putting it into `SCORES`.

Shapes: B questions, N passages of a question, L tokens of a padded passage, D model size, H heads,
K head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from src.models.decoder import Encoded
from src.runtime.device import full_precision


class FirstStep(NamedTuple):
    """The decoder's cross-attention when it writes the first token of the answers, in float32:
    each layer's query [B, H * K] and its mean key of each passage [B, N, H * K]; and the mean bias
    of each passage [B, N], 0 without a position table."""

    queries: list[torch.Tensor]
    mean_keys: list[torch.Tensor]
    mean_bias: torch.Tensor
    n_heads: int


def attention_scores(step: FirstStep) -> torch.Tensor:
    """The pre-softmax cross-attention scores [B, N], averaged over all layers, heads and the
    passage's real tokens (Izacard and Grave, 2021, https://arxiv.org/abs/2012.04584, section 3.2).

    A mean of dot products with keys is the dot product with the mean key, so the scores of single
    tokens are never computed.
    """
    products = [
        torch.einsum("bk,bnk->bn", query, mean_key)
        for query, mean_key in zip(step.queries, step.mean_keys, strict=True)
    ]
    return sum(products) / (len(products) * step.n_heads) + step.mean_bias


SCORES: dict[str, Callable[[FirstStep], torch.Tensor]] = {"attention": attention_scores}


class PassageMeans:
    """Means over the real tokens of each passage.

    Args:
        encoded: what the reader's `encode` made of passages with this mask [B, N, L].
    """

    def __init__(self, encoded: Encoded, attention_mask: torch.Tensor):
        _, N, L = attention_mask.shape
        self.counts = attention_mask.sum(dim=2).clamp(min=1)  # [B, N]
        passage = torch.arange(N, device=encoded.mask.device)[:, None]
        of_passage = (encoded.positions // L)[:, None] == passage  # [B, N, S]
        # A product with 0s and 1s sums in a fixed order, unlike `index_add_` on a GPU.
        self._members = (of_passage & encoded.mask[:, None]).float()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States of the tokens [B, S, D] -> their means [B, N, D], in float32; 0 where a question
        has no such passage."""
        with full_precision(states.device):
            return (self._members @ states.float()) / self.counts[:, :, None]


@torch.no_grad()
def passage_scores(
    reader: nn.Module,
    encoded: Encoded,
    attention_mask: torch.Tensor,
    queries: list[torch.Tensor],
    mean_keys: list[torch.Tensor] | None = None,
    score: str = "attention",
) -> torch.Tensor:
    """The passages' scores by a function in `SCORES`, in float32 also inside autocast.

    Args:
        reader: a `FiDT5`.
        encoded: what its `encode` made of passages with this mask [B, N, L].
        queries: each decoder layer's cross-attention query for the first token, [B, H * K].
        mean_keys: each layer's mean key of each passage [B, N, H * K], or None to compute them
            from the mean hidden state, which is the same for plain linear layers.
    Returns: [B, N]; -inf where a question has no such passage.
    """
    _, N, L = attention_mask.shape
    means = PassageMeans(encoded, attention_mask)
    with full_precision(attention_mask.device):
        if mean_keys is None:
            mean_hidden = means(encoded.hidden)
            blocks = reader.t5.decoder.block
            mean_keys = [block.layer[1].EncDecAttention.k(mean_hidden) for block in blocks]
        mean_bias = torch.zeros((), device=attention_mask.device)
        if reader.positions is not None:
            first = torch.zeros(1, dtype=torch.long, device=attention_mask.device)
            keys = torch.arange(N * L, device=attention_mask.device)[None]
            bias = reader.positions(first, keys).float().mean(dim=(0, 1, 2)).view(1, N, L)
            mean_bias = (bias * attention_mask).sum(dim=2) / means.counts
        queries = [query.float() for query in queries]
        scores = SCORES[score](FirstStep(queries, mean_keys, mean_bias, reader.config.num_heads))
    return scores.masked_fill(~attention_mask.any(dim=2), -torch.inf)
