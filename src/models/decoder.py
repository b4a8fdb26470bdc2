"""Decoding over encoded passages: answers, token by token.

`GreedyDecoder` gives the same tokens as Transformers' `generate` (the tests hold the two equal),
faster: queries, keys and values of the answers are one product, and when half of a batch's answers
have ended, it continues with the others alone. `TransformersDecoder` runs `generate`
itself: for beam search, and for a decoder that was changed (adapters, hooks, other modules).

The greedy decoder never computes keys and values of the passages. A query's product with a key,
W_k h, is the product of W_k^T q with the hidden state h; and a weighted sum of values, W_v h, is
W_v times the weighted sum of the h. So each layer looks at the hidden states themselves, and
projects a few queries and sums instead of the tokens of a hundred passages.

Shapes: B questions (in a step, the unfinished ones), N passages, S tokens of a question's passages,
T tokens of an answer, D model size, H heads, K head size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from src.models.encoder import fused_norm
from src.models.plain import output_scale
from src.runtime.device import full_precision
from src.runtime.errors import InputError


class Encoded(NamedTuple):
    """A batch's passages for the decoder: hidden states [B, S, D] of real tokens; `mask` [B, S],
    false where a question has fewer tokens than another; and `positions` [B, S], each token's
    index in the padded layout [N * L]."""

    hidden: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def first(self, n_positions: int) -> "Encoded":
        """What was encoded at the first positions of the padded layout: the first passages."""
        return self._replace(mask=self.mask & (self.positions < n_positions))


class Decoded(NamedTuple):
    """Answers' token ids [B, T], padded after their ends; their log-probabilities [B], ends
    included; `finite` [B], false where a logit was inf or nan; and each layer's cross-attention
    query [B, H * K] for the first token after the start, or None. With `n_best` answers for each
    question, tokens and log-probabilities have n_best * B rows, a question's next to each other."""

    tokens: torch.Tensor
    log_probs: torch.Tensor
    finite: torch.Tensor
    queries: list[torch.Tensor] | None


# (query positions [T], key positions [B, S]) -> bias of the cross-attention scores [B, H, T, S].
PositionBias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# A layer's keys [B, H, K, T] and values [B, H, T, K] of the answers so far.
Cache = tuple[torch.Tensor, torch.Tensor]


class Layer(NamedTuple):
    """One layer of the decoder. Matrices are [in, out]; `qkv` holds three side by side, `wi` one
    or, where the activation is gated, two."""

    norms: list[nn.Module]  # before self-attention, cross-attention and feed-forward
    qkv: torch.Tensor
    self_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cross_out: torch.Tensor
    wi: list[torch.Tensor]
    activation: nn.Module
    wo: torch.Tensor

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the last part of the layer adds to states [..., D]."""
        normed = fused_norm(self.norms[2], hidden)
        inner = self.activation(normed @ self.wi[0])
        for gate in self.wi[1:]:
            inner = inner * (normed @ gate)
        return _multiply(inner, self.wo)


class _Passages:
    """The hidden states of the passages' tokens, which cross-attention reads.

    Each question's are cut into parts, [B, parts, S / parts, D]: a product of a few queries with
    one long matrix runs in one thread of a CPU, several products in as many.

    A question can be answered from several views, each a mask of its tokens. Its views share the
    hidden states, as heads do: their queries make one product.
    """

    def __init__(self, encoded: Encoded, views: torch.Tensor, n_parts: int, dtype: torch.dtype):
        B, S, D = encoded.hidden.shape
        missing = -S % n_parts
        self.hidden = pad(encoded.hidden.to(dtype), (0, 0, 0, missing)).view(B, n_parts, -1, D)
        self.positions = pad(encoded.positions, (0, missing))
        self.mask: torch.Tensor | None = None  # to be added to attention scores, [views, 1, S]
        self.n_views = views.shape[1]
        real = pad(views, (0, missing)).flatten(0, 1)
        if not real.all():
            mask = torch.zeros(real.shape, device=real.device)
            self.mask = mask.masked_fill(~real, torch.finfo(mask.dtype).min)[:, None]

    def keep(self, questions: torch.Tensor, rows: torch.Tensor) -> None:
        """Continue with these questions, whose views are these rows."""
        self.hidden, self.positions = self.hidden[questions], self.positions[questions]
        self.mask = None if self.mask is None else self.mask[rows]

    def bias(self, step: int, position_bias: PositionBias | None) -> torch.Tensor | None:
        """What to add to the scores of this step's queries, [B, H or 1, S]."""
        if position_bias is None:
            return self.mask
        here = torch.tensor([step], device=self.positions.device)
        bias = position_bias(here, self.positions)[:, :, 0]
        bias = bias if self.n_views == 1 else bias.repeat_interleave(self.n_views, dim=0)
        return bias if self.mask is None else bias + self.mask

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries [views, H, D] -> their products with all tokens [views, H, S]."""
        _, H, D = queries.shape
        queries = queries.reshape(len(self.hidden), 1, -1, D)
        products = queries @ self.hidden.transpose(2, 3)  # [B, parts, views * H, S / parts]
        return products.transpose(1, 2).flatten(2).unflatten(1, (-1, H)).flatten(0, 1)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights [views, H, S] -> the weighted sums of all tokens [views, H, D]."""
        (_, H, _), (B, parts, size, _) = weights.shape, self.hidden.shape
        weights = weights.to(self.hidden.dtype).reshape(B, -1, parts, size).transpose(1, 2)
        return (weights @ self.hidden).sum(dim=1).unflatten(1, (-1, H)).flatten(0, 1)


class GreedyDecoder:
    """A plain T5's decoder with its present weights: after they change, another has to be made.

    Args:
        t5: one in which `changed_decoder_part` finds nothing.
        position_bias: the position table of legacy readers, or None.
        dtype: number format of products, autocast's where it is on. As in `WideLinear`, the head is
            kept in float32, and so is `wo` if the format is fp16.
    """

    def __init__(
        self, t5: T5ForConditionalGeneration, position_bias: PositionBias | None, dtype: torch.dtype
    ):
        config = t5.config
        self.config, self.embed = config, t5.decoder.embed_tokens
        self.blocks = t5.decoder.block
        self.position_bias, self._dtype = position_bias, dtype
        self.heads = config.num_heads, config.d_kv
        # The first has the position bias of all; umT5's each have their own.
        attentions = [block.layer[0].SelfAttention for block in t5.decoder.block]
        self._biased = [a for a in attentions if a.has_relative_attention_bias]
        self._final_norm = t5.decoder.final_layer_norm
        self._scale = output_scale(config)
        self.layers = [self._lay_out_layer(block) for block in t5.decoder.block]
        self._head = _lay_out(torch.float32, t5.lm_head)

    def _lay_out_layer(self, block: nn.Module) -> Layer:
        dtype = self._dtype
        attention, across = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        dense = block.layer[2].DenseReluDense

        def by_head(linear: nn.Linear) -> torch.Tensor:
            """[H * K, D] -> [H, K, D]"""
            return linear.weight.detach().to(dtype).unflatten(0, self.heads)

        return Layer(
            norms=[layer.layer_norm for layer in block.layer],
            qkv=_lay_out(dtype, attention.q, attention.k, attention.v),
            self_out=_lay_out(dtype, attention.o),
            query=_lay_out(dtype, across.q),
            key=by_head(across.k),
            value=by_head(across.v).transpose(1, 2),
            cross_out=_lay_out(dtype, across.o),
            wi=[_lay_out(dtype, wi) for name, wi in dense.named_children() if name[:2] == "wi"],
            activation=dense.act,
            wo=_lay_out(torch.float32 if dtype == torch.float16 else dtype, dense.wo),
        )

    @torch.no_grad()
    def decode(
        self, encoded: Encoded, max_length: int, views: torch.Tensor | None = None
    ) -> Decoded:
        """The likeliest next token, again and again, until every answer has ended or has
        `max_length` tokens, including the start token.

        Args:
            views: masks [B, V, S] of the tokens to answer from; None: once, from all that are real.
        Returns: as many answers for each question as there are views.
        """
        config, device = self.config, encoded.hidden.device
        views = encoded.mask[:, None] if views is None else views
        n_views = views.shape[1]
        B = len(encoded.hidden) * n_views
        n_parts = torch.get_num_threads() if device.type == "cpu" else 1
        passages = _Passages(encoded, views, n_parts, self._dtype)
        shape, kind = (B, *self.heads, max_length), {"dtype": self._dtype, "device": device}
        caches = [
            (torch.zeros(shape, **kind), torch.zeros(shape, **kind).mT.contiguous())
            for _ in self.layers
        ]
        own_biases = self.own_biases(max_length)

        tokens = torch.full((B, max_length), config.pad_token_id, device=device)
        tokens[:, 0] = config.decoder_start_token_id
        rows = torch.arange(B, device=device)  # the answers that are being decoded
        finished = torch.zeros(B, dtype=torch.bool, device=device)  # of these
        logit_sums = torch.zeros(B, device=device)  # not finite once a logit is not
        log_probs = torch.zeros(B, device=device)
        first_queries: list[torch.Tensor] = []
        for step in range(max_length - 1):
            bias = passages.bias(step, self.position_bias)
            own = [own_bias[:, :, step, : step + 1] for own_bias in own_biases]
            logits, queries = self._step(tokens[rows, step], step, caches, passages, own, bias)
            first_queries = first_queries or queries
            logit_sums[rows] += logits.sum(dim=1).masked_fill(finished, 0.0)
            best, chosen = logits.max(dim=1)
            log_probs[rows] += (best - logits.logsumexp(dim=1)).masked_fill(finished, 0.0)
            chosen = chosen.masked_fill(finished, config.pad_token_id)
            tokens[rows, step + 1] = chosen
            finished |= chosen == config.eos_token_id
            complete = finished.view(-1, n_views).all(dim=1)  # questions
            n_complete = int(complete.sum())
            if n_complete == len(complete):
                tokens = tokens[:, : step + 2]
                break
            if 2 * n_complete >= len(complete):
                unfinished = (~complete).repeat_interleave(n_views).nonzero()[:, 0]
                rows, finished = rows[unfinished], finished[unfinished]
                passages.keep((~complete).nonzero()[:, 0], unfinished)
                caches = [(keys[unfinished], values[unfinished]) for keys, values in caches]
        return Decoded(tokens, log_probs, logit_sums.isfinite(), first_queries)

    def _step(
        self,
        tokens: torch.Tensor,
        step: int,
        caches: list[Cache],
        passages: _Passages,
        own_biases: list[torch.Tensor],
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The answers' tokens [B] at this step -> logits [B, V] of the next ones, in float32, and
        each layer's cross-attention query [B, H * K]."""
        hidden = self.embed(tokens)  # [B, D]
        heads = (len(tokens), *self.heads)
        queries = []
        for layer, (keys, values), own_bias in zip(self.layers, caches, own_biases, strict=True):
            query, key, value = (fused_norm(layer.norms[0], hidden) @ layer.qkv).chunk(3, dim=1)
            keys[..., step], values[:, :, step] = key.view(heads), value.view(heads)
            scores = query.view(heads)[:, :, None] @ keys[..., : step + 1]
            weights = (scores + own_bias[:, :, None]).softmax(dim=3).to(value.dtype)
            mixed = (weights @ values[:, :, : step + 1]).flatten(1)
            hidden = hidden + mixed @ layer.self_out

            query = fused_norm(layer.norms[1], hidden) @ layer.query
            queries.append(query)
            queries_by_head = query.view(heads).transpose(0, 1)  # [H, B, K]
            scores = passages.scores((queries_by_head @ layer.key).transpose(0, 1))
            weights = (scores if bias is None else scores + bias).softmax(dim=2)
            mixed = passages.mix(weights).transpose(0, 1) @ layer.value  # [H, B, K]
            hidden = hidden + mixed.transpose(0, 1).flatten(1) @ layer.cross_out

            hidden = hidden + layer.feed_forward(hidden)
        return self.logits(hidden), queries

    def own_biases(self, length: int) -> list[torch.Tensor]:
        """The position bias of each layer's self-attention [1, H, length, length]."""
        device = self.embed.weight.device
        biases = [a.compute_bias(length, length, device) for a in self._biased]
        return biases if len(biases) == len(self.layers) else biases * len(self.layers)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's states [..., D] -> logits [..., V] in float32."""
        return _multiply(fused_norm(self._final_norm, hidden) * self._scale, self._head)


def _lay_out(dtype: torch.dtype, *linears: nn.Linear) -> torch.Tensor:
    """The weights of linear layers, [out, in] -> [in, out], side by side."""
    weights = [linear.weight.detach() for linear in linears]
    return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype).t()


def _multiply(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The product in the matrix's own number format, also inside autocast."""
    with full_precision(matrix.device):
        return rows.to(matrix.dtype) @ matrix


class TransformersDecoder:
    """Decoding by Transformers' `generate`, which calls every module."""

    def __init__(self, t5: T5ForConditionalGeneration):
        self._t5 = t5

    @torch.no_grad()
    def decode(
        self, encoded: Encoded, max_length: int, num_beams: int = 1, n_best: int = 1
    ) -> Decoded:
        """The `n_best` answers found by beam search, or greedily with one beam."""
        config = self._t5.config
        # Settings of our own: those saved with a model may hold another task's lengths.
        settings = GenerationConfig(
            max_length=max_length,
            num_beams=num_beams,
            num_return_sequences=n_best,
            do_sample=False,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        B = len(encoded.hidden)
        finite = torch.ones(B, dtype=torch.bool, device=encoded.hidden.device)

        def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            finite.logical_and_(scores.sum(dim=1).isfinite().view(B, -1).all(dim=1))
            return scores

        # Sharded weights are gathered at every step, in which every process has to take part.
        is_sharded = any(isinstance(module, FSDPModule) for module in self._t5.modules())
        tokens = self._t5.generate(
            **_passages(encoded),
            synced_gpus=is_sharded and torch.distributed.get_world_size() > 1,
            generation_config=settings,
            logits_processor=LogitsProcessorList([watch]),
            # A cache that grows by the layer: Transformers would count the encoder's layers, and
            # fail where the decoder has more.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        )
        of_rank = [self._log_probs(encoded, part) for part in tokens.view(B, n_best, -1).unbind(1)]
        return Decoded(tokens, torch.stack(of_rank, dim=1).flatten(), finite, None)

    def _log_probs(self, encoded: Encoded, tokens: torch.Tensor) -> torch.Tensor:
        """The log-probabilities [B] of answers [B, T], given these as the decoder's input."""
        output = self._t5(
            **_passages(encoded), decoder_input_ids=tokens[:, :-1].contiguous(), use_cache=False
        )
        chosen = output.logits.float().log_softmax(dim=2).gather(2, tokens[:, 1:, None])[:, :, 0]
        real = is_answer_token(tokens, self._t5.config.eos_token_id)
        return chosen.masked_fill(~real, 0.0).sum(dim=1)

    @torch.no_grad()
    def first_step(
        self, encoded: Encoded, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each layer's cross-attention query [B, H * K] for the first token after the start, and
        its keys [B, S, H * K] as `reduce` maps them; both as its modules compute them."""
        queries: list[torch.Tensor] = []
        keys: list[torch.Tensor] = []
        handles = []
        try:
            for number, block in enumerate(self._t5.decoder.block):
                cross = getattr(block.layer[1], "EncDecAttention", None)
                if not (hasattr(cross, "q") and hasattr(cross, "k")):
                    raise InputError(
                        f"decoder block {number} has no EncDecAttention with q and k for passage "
                        "scores: leave out --write_crossattention_scores"
                    )
                handles += [
                    cross.q.register_forward_hook(lambda *call: queries.append(call[2][:, 0])),
                    cross.k.register_forward_hook(lambda *call: keys.append(reduce(call[2]))),
                ]
            start = encoded.positions.new_full(
                (len(encoded.hidden), 1), self._t5.config.decoder_start_token_id
            )
            self._t5(**_passages(encoded), decoder_input_ids=start, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return queries, keys


def is_answer_token(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Which of the tokens [B, 1:T] after the start are the answer's: up to its end, included."""
    ends = (tokens[:, 1:] == end).cumsum(dim=1)
    return (ends == 0) | ((ends == 1) & (tokens[:, 1:] == end))


def _passages(encoded: Encoded) -> dict:
    states = BaseModelOutput(last_hidden_state=encoded.hidden)
    return {"encoder_outputs": states, "attention_mask": encoded.mask}
