"""Greedy decoding over encoded passages: T5's decoder, one token of every answer at a time.

Transformers' `generate` gives the same tokens (the tests hold the two equal); this one spends less.
Weights are laid out once, for many batches, as a product with a few rows reads them fastest; and
when half of a batch's answers are finished, the others go on without them.

Keys and values of the passages are never computed. A query's product with a key, W_k h, is the
product of W_k^T q with the hidden state h; and a weighted sum of values, W_v h, is W_v times the
weighted sum of the h. So each layer looks at the hidden states themselves, and projects a few
queries and sums where it would have projected the tokens of a hundred passages.

Shapes: B questions (of those, the unfinished ones), S tokens of a question's passages, T tokens of
an answer, D model, H heads, K size of a head, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import T5ForConditionalGeneration

from src.models.encoder import normalize


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
    key: torch.Tensor
    value: torch.Tensor
    cross_out: torch.Tensor
    wide_norm: nn.Module
    wide: list[torch.Tensor]
    activation: nn.Module
    narrow: torch.Tensor


@dataclasses.dataclass
class _Memory:
    """A layer's keys [B, H, K, T] and values [B, H, T, K] of the answers so far, filled step by
    step."""

    keys: torch.Tensor
    values: torch.Tensor

    def keep(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class _Passages:
    """The hidden states of the passages' tokens, for attention to look at.

    Each question's are cut into parts, [B, parts, S / parts, D]: a product of a few queries with
    one long matrix runs in one thread of a CPU, several products in as many.
    """

    def __init__(self, encoded: Encoded, n_parts: int, dtype: torch.dtype):
        B, S, D = encoded.hidden.shape
        missing = -S % n_parts
        self.hidden = pad(encoded.hidden.to(dtype), (0, 0, 0, missing)).view(B, n_parts, -1, D)
        self.places = pad(encoded.places, (0, missing))
        self.mask: torch.Tensor | None = None  # what to add to attention scores, [B, 1, S]
        real = pad(encoded.mask, (0, missing))
        if not real.all():
            mask = torch.zeros(real.shape, device=real.device)
            self.mask = mask.masked_fill(~real, torch.finfo(mask.dtype).min)[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        self.hidden, self.places = self.hidden[rows], self.places[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries [B, H, D] -> their products with all tokens [B, H, S]."""
        products = queries[:, None] @ self.hidden.transpose(2, 3)  # [B, parts, H, S / parts]
        return products.transpose(1, 2).flatten(2)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights [B, H, S] -> the weighted sums of all tokens [B, H, D]."""
        weights = weights.to(self.hidden.dtype).unflatten(2, self.hidden.shape[1:3]).transpose(1, 2)
        return (weights @ self.hidden).sum(dim=1)


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
        self._n_heads, self._head_size, self._dtype = config.num_heads, config.d_kv, dtype
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

        def by_head(weight: torch.Tensor) -> torch.Tensor:
            """[H * K, D] -> [H, K, D]"""
            return weight.detach().to(dtype).unflatten(0, (config.num_heads, config.d_kv))

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
                    key=by_head(across.k.weight),
                    value=by_head(across.v.weight).transpose(1, 2),
                    cross_out=lay_out(across.o.weight),
                    wide_norm=feed_forward.layer_norm,
                    wide=[lay_out(linear.weight) for linear in wide],
                    activation=dense.act,
                    narrow=lay_out(dense.wo.weight),
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
        n_parts = torch.get_num_threads() if device.type == "cpu" else 1
        passages = _Passages(encoded, n_parts, self._dtype)
        empty = encoded.hidden.new_zeros(
            B, self._n_heads, self._head_size, max_length, dtype=self._dtype
        )
        memories = [
            _Memory(empty.clone(), empty.mT.clone(memory_format=torch.contiguous_format))
            for _ in self._layers
        ]
        own_bias = self._first_attention.compute_bias(max_length, max_length, device)

        tokens = torch.full((B, max_length), config.pad_token_id, device=device)
        tokens[:, 0] = config.decoder_start_token_id
        rows = torch.arange(B, device=device)  # the questions that are worked on
        finished = torch.zeros(B, dtype=torch.bool, device=device)  # of these
        first_queries: list[torch.Tensor] = []
        for place in range(max_length - 1):
            bias = passages.mask
            if self._positions is not None:
                here = torch.tensor([place], device=device)
                bias = self._positions(here, passages.places)[:, :, 0]
                bias = bias if passages.mask is None else bias + passages.mask
            logits, queries = self._step(
                tokens[rows, place],
                place,
                memories,
                passages,
                own_bias[:, :, place, : place + 1],
                bias,
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
                rows, finished = rows[going_on], finished[going_on]
                for kept in (passages, *memories):
                    kept.keep(going_on)
        return tokens, first_queries

    def _step(
        self,
        tokens: torch.Tensor,
        place: int,
        memories: list[_Memory],
        passages: _Passages,
        own_bias: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The tokens [B] at a place of the answers -> logits [B, V] of the next ones, and each
        layer's cross-attention query [B, H * K]."""
        hidden = self._embed(tokens)  # [B, D]
        heads = (len(tokens), self._n_heads, self._head_size)
        queries = []
        for layer, memory in zip(self._layers, memories, strict=True):
            query, key, value = (normalize(layer.self_norm, hidden) @ layer.qkv).chunk(3, dim=1)
            memory.keys[..., place] = key.view(heads)
            memory.values[:, :, place] = value.view(heads)
            scores = query.view(heads)[:, :, None] @ memory.keys[..., : place + 1]
            weights = (scores + own_bias[:, :, None]).softmax(dim=3).to(value.dtype)
            mixed = (weights @ memory.values[:, :, : place + 1]).flatten(1)
            hidden = hidden + mixed @ layer.self_out

            query = normalize(layer.cross_norm, hidden) @ layer.query
            queries.append(query)
            queries_by_head = query.view(heads).transpose(0, 1)  # [H, B, K]
            scores = passages.scores((queries_by_head @ layer.key).transpose(0, 1))
            weights = (scores if bias is None else scores + bias).softmax(dim=2)
            mixed = passages.mix(weights).transpose(0, 1) @ layer.value  # [H, B, K]
            hidden = hidden + mixed.transpose(0, 1).flatten(1) @ layer.cross_out

            normed = normalize(layer.wide_norm, hidden)
            wide = layer.activation(normed @ layer.wide[0])
            for gate in layer.wide[1:]:
                wide = wide * (normed @ gate)
            hidden = hidden + wide @ layer.narrow
        return (normalize(self._final_norm, hidden) * self._scale) @ self._head, queries
