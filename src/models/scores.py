"""Passage scores: how much the reader's decoder looks at each passage, which retrievers learn from.

Add a score by writing a function like `attention_scores` and putting it into `SCORES`.

Shapes: B questions, N passages of a question, L tokens of a padded passage, S real tokens of a
question's passages, D model size, H heads, K head size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from src.models.decoder import Encoded
from src.runtime.device import full_precision


def attention_scores(queries: torch.Tensor, mean_keys: torch.Tensor) -> torch.Tensor:
    """The pre-softmax cross-attention scores [B, N] of the first decoded token, averaged over all
    layers, heads and the passage's real tokens (Izacard and Grave, 2021,
    https://arxiv.org/abs/2012.04584, section 3.2).

    A mean of dot products with keys is the dot product with the mean key, so the scores of single
    tokens are never computed.

    Args:
        queries: each layer's cross-attention query [layers, B, H, K].
        mean_keys: each layer's mean key of each passage [layers, B, N, H, K].
    """
    _, _, n_heads, _ = queries.shape
    return torch.einsum("lbhk,lbnhk->bn", queries, mean_keys) / (len(queries) * n_heads)


SCORES: dict[str, Callable[..., torch.Tensor]] = {"attention": attention_scores}


def passage_means(
    encoded: Encoded, attention_mask: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """States of the tokens [B, S, D] -> their means over each passage's real tokens [B, N, D], in
    float32; 0 where a question has no such passage."""
    _, N, L = attention_mask.shape
    passage = torch.arange(N, device=states.device)[:, None]
    of_passage = (encoded.positions // L)[:, None] == passage  # [B, N, S]
    with full_precision(states.device):
        # A product with 0s and 1s sums in a fixed order, unlike `index_add_` on a GPU.
        sums = (of_passage & encoded.mask[:, None]).float() @ states.float()
        return sums / attention_mask.sum(dim=2).clamp(min=1)[:, :, None]


@torch.no_grad()
def passage_scores(
    reader: nn.Module,
    encoded: Encoded,
    attention_mask: torch.Tensor,
    queries: list[torch.Tensor],
    mean_keys: list[torch.Tensor] | None = None,
    score: str = "attention",
    blocks: Sequence[nn.Module] = (),
) -> torch.Tensor:
    """The passages' scores by a function in `SCORES`, in float32 also inside autocast.

    Args:
        reader: a `FiDT5`, whose `encode` gave `encoded` for passages with this mask [B, N, L].
        queries: each decoder layer's cross-attention query for the first token, [B, H * K].
        mean_keys: each layer's mean key of each passage [B, N, H * K], or None to compute them
            from the mean hidden state, which is the same for plain linear layers.
        blocks: the decoder's, if not the reader's own (whose weights may be sharded).
    Returns: [B, N]; -inf where a question has no such passage.
    """
    _, N, L = attention_mask.shape
    device, heads = attention_mask.device, (reader.config.num_heads, -1)
    with full_precision(device):
        if mean_keys is None:
            mean_hidden = passage_means(encoded, attention_mask, encoded.hidden)
            blocks = blocks or reader.t5.decoder.block
            mean_keys = [block.layer[1].EncDecAttention.k(mean_hidden) for block in blocks]
        scores = SCORES[score](
            torch.stack(queries).float().unflatten(-1, heads),
            torch.stack(mean_keys).float().unflatten(-1, heads),
        )
        if reader.positions is not None:
            first = torch.zeros(1, dtype=torch.long, device=device)
            keys = torch.arange(N * L, device=device)[None]
            bias = reader.positions(first, keys).float().mean(dim=(0, 1, 2)).view(1, N, L)
            scores = scores + (bias * attention_mask).sum(dim=2) / attention_mask.sum(dim=2)
    return scores.masked_fill(~attention_mask.any(dim=2), -torch.inf)
