"""T5's encoder over the real tokens of many passages, packed end to end.

Everything in an encoder but attention treats each token on its own, so it runs over all passages'
tokens at once and nothing is computed on padding. Attention runs over groups of passages: of equal
length on a CPU, elsewhere of similar length, padded for that one call.

Blocks and linear layers are called as modules, so hooks, FSDP, activation checkpointing and
adapters on them apply. If anything that the packed layer bypasses was changed, the encoder is
called the ordinary way, with padding.

Shapes: R passages, L tokens of a padded passage, P real tokens in total, D model size, H heads, K
head size; G passages of a group, W tokens of its longest, p its real tokens.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention
from transformers.models.mt5.modeling_mt5 import MT5Attention, MT5Block
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5ForConditionalGeneration,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Stack,
)
from transformers.models.umt5.modeling_umt5 import UMT5Block

from src.models.dropout import dropout, use_fast_dropout
from src.models.lengths import length_groups, longest_first
from src.models.plain import has_own_methods, is_plain, original_class
from src.runtime.device import full_precision, number_format

# The largest share of padding in a group, and the fewest tokens for which padding is avoided.
# A CPU loses more to padding than to extra calls; a GPU the other way round.
GROUPING = {"cpu": (0.0, 1), "cuda": (0.1, 8192)}
# A GPU's attention copies a bias whose rows do not begin at multiples of 8 numbers, in each layer.
ALIGNMENT = {"cpu": 1, "cuda": 8}


class _Group(NamedTuple):
    """Neighbouring passages among the packed ones. If some are shorter than the longest, `real`
    [G, W] is true on their real tokens and `positions` [p] are these tokens' indices in [G * W]."""

    shape: tuple[int, int]  # G, W
    n_tokens: int
    real: torch.Tensor | None
    positions: torch.Tensor | None


class _Packed:
    """What makes a block of T5's encoder also accept packed passages."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        groups: list[_Group] | None = None,
        biases: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any, Any]:
        """As in T5; or, with `groups`, packed tokens [P, D] -> hidden states [P, D], the groups'
        attention biases (made by the first block, then passed on), and None."""
        dense = getattr(self.layer[-1], "DenseReluDense", None)
        if original_class(dense) is T5DenseActDense and type(dense.act) is nn.ReLU:
            # It may overwrite its input, unless something is attached to the layer that made it.
            dense.act.inplace = is_plain(dense.wi, nn.Linear)
        if groups is None:
            return super().forward(hidden_states, *args, **kwargs)
        return _packed_layer(self, hidden_states, groups, biases)


class PackedBlock(_Packed, T5Block):
    stands_for = T5Block


class PackedMT5Block(_Packed, MT5Block):
    stands_for = MT5Block


class PackedUMT5Block(_Packed, UMT5Block):
    stands_for = UMT5Block


_PACKED = {kind.stands_for: kind for kind in (PackedBlock, PackedMT5Block, PackedUMT5Block)}


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 where autocast's format is not enough: `wo`, whose
    outputs exceed 65,504, the largest number in fp16; and the head, whose largest logit decides."""

    stands_for = nn.Linear
    is_head = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        is_wide = number_format(self.weight) == torch.float16 or (
            self.is_head and not self.training
        )
        if self.weight.dtype != torch.float32 or not is_wide:
            return super().forward(hidden)
        with full_precision(hidden.device):
            return linear(hidden.float(), self.weight, self.bias)


class FeedForward(T5DenseActDense):
    """T5's without its conversion of `wo`'s input to float32, which autocast takes back."""

    stands_for = T5DenseActDense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.wo(self.dropout(self.act(self.wi(hidden))))


class GatedFeedForward(T5DenseGatedActDense):
    stands_for = T5DenseGatedActDense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.wo(self.dropout(self.act(self.wi_0(hidden)) * self.wi_1(hidden)))


_FEED_FORWARDS = {kind.stands_for: kind for kind in (FeedForward, GatedFeedForward)}


class _Folded:
    """What makes a T5's cross-attention never compute keys and values of the passages, as
    `decoder.py` does. For T tokens of an answer, T <= K / 2, that is at most half the work."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """As in T5: [B, T, D], states of passages [B, S, D] -> [B, T, D]."""
        H, K, T = self.n_heads, self.key_value_proj_dim, hidden_states.shape[1]
        if (
            past_key_values is not None
            or 2 * T > K
            or self.config._attn_implementation != "sdpa"
            or (mask is not None and mask.dtype == torch.bool)  # not one of ours
            or not all(is_plain(linear, nn.Linear) for linear in (self.k, self.v))
        ):
            given = hidden_states, mask, key_value_states, position_bias, past_key_values
            return super().forward(*given, **kwargs)
        by_head = "bthk,hkd->bhtd", "bhtd,hkd->bthk"
        key, value = (linear.weight.unflatten(0, (H, K)) for linear in (self.k, self.v))
        queries = self.q(hidden_states).unflatten(2, (H, K)) * self.scaling
        queries = torch.einsum(by_head[0], queries, key)
        scores = (queries.flatten(1, 2) @ key_value_states.mT).unflatten(1, (H, T))
        for bias in (position_bias, mask):
            scores = scores if bias is None else scores + bias
        weights = scores.softmax(dim=3)
        weights = dropout(weights, self.dropout) if self.training else weights
        mixed = (weights.flatten(1, 2) @ key_value_states).unflatten(1, (H, T))
        mixed = torch.einsum(by_head[1], mixed, value).flatten(2)
        return self.o(mixed), position_bias, None


class FoldedAttention(_Folded, T5Attention):
    stands_for = T5Attention


class FoldedMT5Attention(_Folded, MT5Attention):
    stands_for = MT5Attention


_FOLDED = {kind.stands_for: kind for kind in (FoldedAttention, FoldedMT5Attention)}


def prepare(t5: T5ForConditionalGeneration) -> None:
    """Let a T5's encoder accept packed passages, its cross-attention read them as they are, its
    `wo` layers and head compute in float32 where they must, and its dropout be fast."""
    for block in t5.encoder.block:
        block.__class__ = _PACKED.get(type(block), type(block))
    for block in t5.decoder.block:
        attention = block.layer[1].EncDecAttention
        attention.__class__ = _FOLDED.get(type(attention), type(attention))
    use_fast_dropout(t5)
    dense = [module for module in t5.modules() if original_class(module) in _FEED_FORWARDS]
    for module in dense:
        module.__class__ = _FEED_FORWARDS[original_class(module)]
    for layer in (*(module.wo for module in dense), t5.lm_head):
        if type(layer) is nn.Linear:
            layer.__class__ = WideLinear
            layer.is_head = layer is t5.lm_head


def changed_part(encoder: nn.Module) -> str | None:
    """The name of the first module that packing would bypass although it was changed, or None."""
    if not is_plain(encoder, T5Stack) or not is_plain(encoder.block, nn.ModuleList):
        return "encoder"
    for number, block in enumerate(encoder.block):
        if type(block) is CheckpointWrapper:  # it passes its arguments on
            block = block._checkpoint_wrapped_module
        if not _is_packable(block):
            return f"encoder.block.{number}"
    return None


def _is_packable(block: nn.Module) -> bool:
    # A subclass may add to a block's call (FSDP makes one), but must not have a `forward` of its
    # own. (Transformers wraps that of every subclass.)
    if (
        not isinstance(block, _Packed)
        or inspect.unwrap(type(block).forward) is not inspect.unwrap(_Packed.forward)
        or has_own_methods(block)
        or not is_plain(block.layer, nn.ModuleList)
        or len(block.layer) != 2
    ):
        return False
    own, feed_forward = block.layer
    return (
        is_plain(own, T5LayerSelfAttention)
        and is_plain(own.SelfAttention, T5Attention)
        and is_plain(feed_forward, T5LayerFF)
        and original_class(feed_forward.DenseReluDense) in _FEED_FORWARDS
    )


class Packing(NamedTuple):
    """The passages [R, L] that have tokens, longest first: their rows [r], their lengths, and the
    indices [P] in [R * L] of their tokens, end to end; all on the CPU."""

    rows: torch.Tensor
    lengths: list[int]
    indices: torch.Tensor


def pack(mask: torch.Tensor) -> Packing:
    """How to pack passages with this mask [R, L], real tokens first, which is on the CPU."""
    order, lengths = longest_first(mask)
    lengths = lengths[: len(lengths) - lengths.count(0)]  # missing passages
    rows, L = order[: len(lengths)], mask.shape[1]
    return Packing(rows, lengths, (rows[:, None] * L + torch.arange(L))[mask[rows].bool()])


def encode_packed(
    encoder: nn.Module,
    input_ids: torch.Tensor,
    packing: Packing,
    indices: torch.Tensor,
    is_packable: bool,
) -> torch.Tensor:
    """Encode passages [R, L], each on its own; the ordinary way if not `is_packable`.

    Args: indices: the packing's, on the passages' device.
    Returns: the real tokens' hidden states [P, D].
    """
    lengths, device = packing.lengths, input_ids.device
    if not is_packable:
        # One call, because FSDP needs the same number of calls in every process.
        mask = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]
        mask, ids = mask.to(device), input_ids[packing.rows.to(device), : lengths[0]]
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask]
    groups, biases = _make_groups(lengths, device), None
    hidden = encoder.dropout(encoder.embed_tokens(input_ids.flatten()[indices]))
    for block in encoder.block:
        hidden, biases, _ = block(hidden, groups=groups, biases=biases)
    return encoder.dropout(_normalize(encoder.final_layer_norm, hidden))


def parts_to_compile(encoder: nn.Module) -> list[nn.Module]:
    """The modules that gain by being compiled: several steps on each token."""
    return [block.layer[-1].DenseReluDense for block in encoder.block]


def _normalize(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return fused_norm(norm, hidden) if is_plain(norm, T5LayerNorm) else norm(hidden)


def fused_norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """T5's layer norm, in one kernel on a GPU instead of six."""
    # (Where apex is installed, Transformers uses its norm.)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return rms_norm(hidden, hidden.shape[-1:], norm.weight.to(hidden.dtype), eps)


def _make_groups(lengths: list[int], device: torch.device) -> list[_Group]:
    """Groups of passages of these lengths, given longest first."""
    groups = []
    for start, end in length_groups(lengths, *GROUPING[device.type]):
        own, W, real, positions = lengths[start:end], lengths[start], None, None
        if own[-1] != W:
            real = torch.arange(W) < torch.tensor(own)[:, None]
            positions = real.flatten().nonzero()[:, 0].to(device, non_blocking=True)
            real = real.to(device, non_blocking=True)
        groups.append(_Group((end - start, W), sum(own), real, positions))
    return groups


def _make_biases(attention: nn.Module, groups: list[_Group]) -> list[torch.Tensor]:
    """What to add to each group's attention scores: [1, H, W, W] or, with padding, [G, H, W, W]."""
    longest = groups[0].shape[1]
    # T5's bias depends on how far apart two tokens are: that of a shorter passage is a corner.
    bias = attention.compute_bias(longest, longest)
    bias = bias.to(number_format(bias))
    biases = []
    for group in groups:
        W = group.shape[1]
        corner = bias[:, :, :W, :W]
        if group.real is not None:
            corner = corner.where(group.real[:, None, None], torch.finfo(bias.dtype).min)
        spare = -W % ALIGNMENT[bias.device.type]
        biases.append(pad(corner, (0, spare))[..., :W] if spare else corner.contiguous())
    return biases


def _packed_layer(
    block: nn.Module, hidden: torch.Tensor, groups: list[_Group], biases: list[torch.Tensor] | None
) -> tuple[torch.Tensor, list[torch.Tensor], None]:
    own, feed_forward = block.layer
    attention = own.SelfAttention
    if biases is None or attention.has_relative_attention_bias:  # (umT5: every block)
        biases = _make_biases(attention, groups)
    normed = _normalize(own.layer_norm, hidden)
    sizes = [group.n_tokens for group in groups]
    states = [project(normed).split(sizes) for project in (attention.q, attention.k, attention.v)]
    mixed = [
        _attend(attention, group, bias, *parts)
        for group, bias, *parts in zip(groups, biases, *states, strict=True)
    ]
    hidden = hidden + own.dropout(attention.o(torch.cat(mixed)))
    normed = _normalize(feed_forward.layer_norm, hidden)
    return hidden + feed_forward.dropout(feed_forward.DenseReluDense(normed)), biases, None


def _attend(
    attention: nn.Module, group: _Group, bias: torch.Tensor, *states: torch.Tensor
) -> torch.Tensor:
    """Attention within each passage of a group: query, key, value [p, H * K] -> [p, H * K]."""
    G, W = group.shape

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        """[p, H * K] -> [G, H, W, K]"""
        if group.positions is not None:
            padded = tokens.new_zeros(G * W, tokens.shape[1])
            tokens = padded.index_copy(0, group.positions, tokens)
        return tokens.view(G, W, attention.n_heads, -1).transpose(1, 2)

    p = attention.dropout if attention.training else 0.0
    query, key, value = map(heads, states)
    if p and query.device.type == "cpu":  # what PyTorch does there, but for the dropout
        scores = torch.matmul(query * attention.scaling, key.transpose(2, 3)).add_(bias)
        mixed = torch.matmul(dropout(scores.softmax(dim=-1), p), value)
    else:
        mixed = scaled_dot_product_attention(query, key, value, bias, p, scale=attention.scaling)
    mixed = mixed.transpose(1, 2).reshape(G * W, -1)
    return mixed if group.positions is None else mixed.index_select(0, group.positions)
