"""T5's encoder over the real tokens of many passages, packed end to end.

All that an encoder does but attention it does to each token on its own: so it does it to all
passages' tokens at once, and none is padding. Attention runs in groups of passages: on a CPU of
equal length, elsewhere of like length, padded to their longest for the length of that call. The
weights and the modules that hold them are those of Transformers' T5.

Shapes: R passages, L tokens of a padded one, P real tokens of all, D model, H heads, K size of a
head; G passages of a group, W tokens of its longest.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from src.models.lengths import length_groups, longest_first
from src.runtime.device import number_format

# How much padding, in passages of a group at most, and in groups of how many tokens at least.
# A CPU loses more by padding than by calls; a GPU the other way round.
GROUPING = {"cpu": (0.0, 1), "cuda": (0.1, 8192)}


class _Group(NamedTuple):
    """Neighbouring passages among the packed ones. `bias` is what to add to their attention's
    scores, [1, H, W, W] or, where some are shorter than others, [G, H, W, W]; then `places` [p]
    are those of their p real tokens in [G * W]."""

    shape: tuple[int, int]  # G, W
    n_tokens: int
    bias: torch.Tensor
    places: torch.Tensor | None


def encode_packed(
    encoder: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    use_checkpoint: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode passages, each on its own.

    Args:
        encoder: a T5's.
        input_ids, attention_mask: [R, L], each passage's real tokens first.
        use_checkpoint: in training, recompute a layer's activations in the backward pass.
    Returns: the hidden states of the real tokens [P, D], and each one's place in [R * L].
    """
    order, lengths = longest_first(attention_mask)
    lengths = lengths[: len(lengths) - lengths.count(0)]  # missing passages
    rows = order[: len(lengths)]
    L = attention_mask.shape[1]
    places = (rows[:, None] * L + torch.arange(L, device=rows.device))[attention_mask[rows].bool()]
    groups = _make_groups(encoder, lengths, input_ids.device)

    hidden = encoder.dropout(encoder.embed_tokens(input_ids.flatten()[places]))
    for block in encoder.block:
        if use_checkpoint and encoder.training:
            hidden = checkpoint(_layer, block, hidden, groups, use_reentrant=False)
        else:
            hidden = _layer(block, hidden, groups)
    return encoder.dropout(normalize(encoder.final_layer_norm, hidden)), places


def parts_to_compile(encoder: nn.Module) -> list[nn.Module]:
    """The modules of an encoder that gain by being compiled: those of several steps, token by
    token."""
    return [block.layer[-1].DenseReluDense for block in encoder.block]


def normalize(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """T5's layer norm, in one kernel on a GPU instead of six."""
    return rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _make_groups(encoder: nn.Module, lengths: list[int], device: torch.device) -> list[_Group]:
    """Groups of passages of these lengths, longest first; all layers use the first one's bias."""
    attention = encoder.block[0].layer[0].SelfAttention
    # T5's bias depends on how far apart two tokens are: that of a shorter passage is a corner.
    bias = attention.compute_bias(lengths[0], lengths[0], device)
    bias = bias.to(number_format(bias))
    groups = []
    for start, end in length_groups(lengths, *GROUPING[device.type]):
        own, width = lengths[start:end], lengths[start]
        corner, places = bias[:, :, :width, :width], None
        if own[-1] != width:
            real = torch.arange(width) < torch.tensor(own)[:, None]
            places = real.flatten().nonzero()[:, 0].to(device)
            real = real[:, None, None].to(device)
            corner = corner.where(real, torch.finfo(bias.dtype).min)
        groups.append(_Group((end - start, width), sum(own), corner.contiguous(), places))
    return groups


def _layer(block: nn.Module, hidden: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
    """One layer of the encoder over packed tokens, [P, D] -> [P, D]."""
    own, feed_forward = block.layer
    attention = own.SelfAttention
    normed = normalize(own.layer_norm, hidden)
    queries, keys, values = attention.q(normed), attention.k(normed), attention.v(normed)
    sizes = [group.n_tokens for group in groups]
    dropout = attention.dropout if attention.training else 0.0
    mixed = [
        _attend(group, query, key, value, attention.n_heads, dropout)
        for group, query, key, value in zip(
            groups, queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True
        )
    ]
    hidden = hidden + own.dropout(attention.o(torch.cat(mixed)))
    normed = normalize(feed_forward.layer_norm, hidden)
    return hidden + feed_forward.dropout(feed_forward.DenseReluDense(normed))


def _attend(
    group: _Group,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_heads: int,
    dropout: float,
) -> torch.Tensor:
    """Attention within each passage of a group, [p, H * K] -> [p, H * K]."""
    G, W = group.shape

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        """[p, H * K] -> [G, H, W, K]"""
        if group.places is not None:
            padded = tokens.new_zeros(G * W, tokens.shape[1])
            tokens = padded.index_copy(0, group.places, tokens)
        return tokens.view(G, W, n_heads, -1).transpose(1, 2)

    mixed = scaled_dot_product_attention(
        heads(query), heads(key), heads(value), group.bias, dropout, scale=1.0
    )
    mixed = mixed.transpose(1, 2).reshape(G * W, -1)
    return mixed if group.places is None else mixed.index_select(0, group.places)
