"""Greedy decoding over encoded passages: T5's decoder, one token of every answer at a time.

Transformers' `generate` gives the same tokens (the tests hold the two equal); this one spends less
on a step. Weights are laid out once, for many batches, as a product with a few rows reads them
fastest; keys and values of the passages are computed once a question; and when half of a batch's
answers are finished, the others go on without them.

Shapes: B questions (of those, the unfinished ones), S tokens of a question's passages, T tokens of
an answer, D model, H heads, K size of a head, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import T5ForConditionalGeneration


class Encoded(NamedTuple):
    """A batch's passages for the decoder: hidden states [B, S, D] of real tokens, `mask` [B, S]
    (false where a question has fewer tokens than another), and `places` [B, S], where each token
    stands in the padded layout [N * L]."""

    hidden: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor


# (query places [T], key places [B, S]) -> what to add to the cross-attention scores [B, H, T, S].
Positions = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Layer(NamedTuple):
    """One layer of the decoder. Matrices are [in, out]; `qkv` holds three side by side, `wide` one
    or, where the activation is gated, two."""

    self_norm: nn.Module
    qkv: torch.Tensor
    self_out: torch.Tensor
    cross_norm: nn.Module
    query: torch.Tensor
    cross_out: torch.Tensor
    wide_norm: nn.Module
    wide: list[torch.Tensor]
    activation: nn.Module
    narrow: torch.Tensor
    key_of: nn.Linear
    value_of: nn.Linear


@dataclasses.dataclass
class _Memory:
    """What a layer's attention looks at: keys [B, H, K, S] and values [B, H, S, K] of the passages,
    and keys [B, H, K, T] and values [B, H, T, K] of the answers so far, filled step by step."""

    passage_keys: torch.Tensor
    passage_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def keep(self, rows: torch.Tensor) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


class GreedyDecoder:
    """A T5's decoder as it is now: weights that change later are not seen.

    Args:
        positions: the position table of legacy readers, or None.
        dtype: number format of the weights' copies, that of autocast where it is on.
    """

    def __init__(
        self, t5: T5ForConditionalGeneration, positions: Positions | None, dtype: torch.dtype
    ):
        config = t5.config
        self._config, self._embed, self._positions = config, t5.decoder.embed_tokens, positions
        self._n_heads, self._head_size = config.num_heads, config.d_kv
        self._first_attention = t5.decoder.block[0].layer[0].SelfAttention  # has the position bias
        self._final_norm = t5.decoder.final_layer_norm
        self._scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0

        def lay_out(*weights: torch.Tensor) -> torch.Tensor:
            """[out, in] matrices -> [in, out], side by side."""
            joint = weights[0] if len(weights) == 1 else torch.cat(weights)
            turned = joint.detach().to(dtype).t()
            # With few rows to multiply, a CPU takes up to twice the time over matrices whose lines
            # in memory are the short ones.
            copy = turned.device.type == "cpu" and turned.shape[1] > turned.shape[0]
            return turned.contiguous() if copy else turned

        self._layers = []
        for block in t5.decoder.block:
            own, cross, feed_forward = block.layer
            attention, across = own.SelfAttention, cross.EncDecAttention
            dense = feed_forward.DenseReluDense
            wide = [dense.wi_0, dense.wi_1] if hasattr(dense, "wi_0") else [dense.wi]
            self._layers.append(
                _Layer(
                    self_norm=own.layer_norm,
                    qkv=lay_out(attention.q.weight, attention.k.weight, attention.v.weight),
                    self_out=lay_out(attention.o.weight),
                    cross_norm=cross.layer_norm,
                    query=lay_out(across.q.weight),
                    cross_out=lay_out(across.o.weight),
                    wide_norm=feed_forward.layer_norm,
                    wide=[lay_out(linear.weight) for linear in wide],
                    activation=dense.act,
                    narrow=lay_out(dense.wo.weight),
                    key_of=across.k,
                    value_of=across.v,
                )
            )
        self._head = lay_out(t5.lm_head.weight)

    @torch.no_grad()
    def greedy(self, encoded: Encoded, max_length: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The likeliest next token, again and again, until every answer has ended.

        Args: max_length: tokens of an answer at most, the start token included.
        Returns: token ids [B, at most `max_length`], padded behind their ends; and each layer's
            cross-attention query [B, H * K] for the first token after the start.
        """
        config, device = self._config, encoded.hidden.device
        B = len(encoded.hidden)
        memories = [self._remember(layer, encoded.hidden, max_length) for layer in self._layers]
        own_bias = self._first_attention.compute_bias(max_length, max_length, device)
        mask = None
        if not encoded.mask.all():
            mask = torch.zeros(encoded.mask.shape, device=device)
            mask = mask.masked_fill(~encoded.mask, torch.finfo(mask.dtype).min)[:, None, None]
        places = encoded.places

        tokens = torch.full((B, max_length), config.pad_token_id, device=device)
        tokens[:, 0] = config.decoder_start_token_id
        rows = torch.arange(B, device=device)  # the questions that are worked on
        finished = torch.zeros(B, dtype=torch.bool, device=device)  # of these
        first_queries: list[torch.Tensor] = []
        for place in range(max_length - 1):
            bias = mask
            if self._positions is not None:
                here = torch.tensor([place], device=device)
                bias = self._positions(here, places) + (0.0 if mask is None else mask)
            logits, queries = self._step(
                tokens[rows, place], place, memories, own_bias[:, :, place, : place + 1], bias
            )
            first_queries = first_queries or queries
            chosen = logits.argmax(dim=1).masked_fill(finished, config.pad_token_id)
            tokens[rows, place + 1] = chosen
            finished |= chosen == config.eos_token_id
            n_finished = int(finished.sum())
            if n_finished == len(rows):
                return tokens[:, : place + 2], first_queries
            if 2 * n_finished >= len(rows):
                going_on = (~finished).nonzero()[:, 0]
                rows, places, finished = rows[going_on], places[going_on], finished[going_on]
                mask = None if mask is None else mask[going_on]
                for memory in memories:
                    memory.keep(going_on)
        return tokens, first_queries

    def _remember(self, layer: _Layer, hidden: torch.Tensor, max_length: int) -> _Memory:
        B, S, _ = hidden.shape
        shape = (B, S, self._n_heads, self._head_size)
        keys = layer.key_of(hidden).view(shape).permute(0, 2, 3, 1).contiguous()
        values = layer.value_of(hidden).view(shape).transpose(1, 2).contiguous()
        own = (B, self._n_heads, self._head_size, max_length)
        return _Memory(
            keys, values, keys.new_zeros(own), keys.new_zeros(own).transpose(2, 3).contiguous()
        )

    def _step(
        self,
        tokens: torch.Tensor,
        place: int,
        memories: list[_Memory],
        own_bias: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The tokens [B] at a place of the answers -> logits [B, V] of the next ones, and each
        layer's cross-attention query [B, H * K]."""
        hidden = self._embed(tokens)  # [B, D]
        heads = (len(tokens), self._n_heads, self._head_size)
        queries = []
        for layer, memory in zip(self._layers, memories, strict=True):
            query, key, value = (layer.self_norm(hidden) @ layer.qkv).chunk(3, dim=1)
            memory.keys[..., place] = key.view(heads)
            memory.values[:, :, place] = value.view(heads)
            scores = query.view(heads)[:, :, None] @ memory.keys[..., : place + 1]
            weights = (scores + own_bias[:, :, None]).softmax(dim=3)
            hidden = hidden + self._mix(weights, memory.values[:, :, : place + 1], layer.self_out)

            query = layer.cross_norm(hidden) @ layer.query
            queries.append(query)
            scores = query.view(heads)[:, :, None] @ memory.passage_keys
            weights = (scores if bias is None else scores + bias).softmax(dim=3)
            hidden = hidden + self._mix(weights, memory.passage_values, layer.cross_out)

            normed = layer.wide_norm(hidden)
            wide = layer.activation(normed @ layer.wide[0])
            for gate in layer.wide[1:]:
                wide = wide * (normed @ gate)
            hidden = hidden + wide @ layer.narrow
        return (self._final_norm(hidden) * self._scale) @ self._head, queries

    @staticmethod
    def _mix(weights: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Attention weights [B, H, 1, S] and values [B, H, S, K] -> [B, D]."""
        return (weights.to(values.dtype) @ values).flatten(1) @ out
