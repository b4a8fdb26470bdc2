"""The reader: Fusion-in-Decoder around Transformers' T5.

Every passage is encoded on its own, together with the question; the decoder attends to all of
them, concatenated (Izacard and Grave, 2020, https://arxiv.org/abs/2007.01282, section 3). The same
cross-attention shows how much each passage mattered (`scores.py`).

Passages come padded to one length, and nothing is spent on the padding: `encoder.py` packs their
real tokens, and the decoder reads these only, one passage's after the other's.

Shapes: B questions, N passages of a question, L tokens of a padded passage, S real tokens of a
question's passages (as many as the longest of the batch has), T tokens of an answer, D model size,
H heads, K head size.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from src.models.decoder import Encoded, GreedyDecoder, TransformersDecoder
from src.models.encoder import changed_part, choose_inplace, encode_packed, prepare
from src.models.plain import changed_decoder_part
from src.models.pretrained import (
    build,
    check_shapes,
    decode_answers,
    from_pretrained,
    load_config,
    read_bin,
    read_tensor,
)
from src.models.scores import passage_means, passage_scores
from src.runtime.device import autocast, number_format
from src.runtime.errors import InputError

# T5 under transformers 3.0.2 added a table of relative positions to the decoder's cross-attention.
# Published and legacy readers were trained with it; today's T5 drops it without a message.
POSITION_TABLE_KEY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_LEGACY_ENCODER = "encoder.encoder."  # prefix of the encoder's keys in the reference's checkpoints


class CrossAttentionPositions(nn.Module):
    """Adds the position table of legacy readers to the decoder's cross-attention scores.

    The distance is between a token's position in the decoder's sequence and a key's position in
    the concatenated, padded passages. Keys after the query, nearly all of them, share bucket 0, so
    the table distinguishes tokens of the first passage only, and only late in an answer.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.n_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.table = nn.Embedding(self.n_buckets, config.num_heads)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Positions [T] and [B, S] -> the bias of the scores, [B, H, T, S]."""
        distance = (query_positions[None, :, None] - key_positions[:, None, :]).clamp(min=0)
        half = self.n_buckets // 2  # exact buckets for small distances, logarithmic ones beyond
        ratio = torch.log(distance.clamp(min=1).float() / half)
        ratio = ratio / math.log(self.max_distance / half) * (self.n_buckets - half)
        large = half + ratio.long()
        bucket = torch.where(distance < half, distance, large.clamp(max=self.n_buckets - 1))
        return self.table(bucket).permute(0, 3, 1, 2)


class FiDT5(nn.Module):
    """Fusion-in-Decoder: a `T5ForConditionalGeneration` that reads many passages a question.

    `positions` is the legacy cross-attention position table, or None (see POSITION_TABLE_KEY).
    """

    def __init__(self, t5: T5ForConditionalGeneration, position_table: torch.Tensor | None = None):
        super().__init__()
        self.t5 = t5
        self._with_relu = prepare(t5)
        self._warned: set[str] = set()
        self.positions: CrossAttentionPositions | None = None
        self._key_positions: torch.Tensor | None = None  # [B, S] of the passages encoded last
        if position_table is not None:
            self.positions = CrossAttentionPositions(t5.config)
            self.positions.table.weight.data.copy_(position_table)
            # T5 itself passes the first block's bias on to all others.
            first_cross_attention = t5.decoder.block[0].layer[1]
            first_cross_attention.register_forward_pre_hook(self._add_positions, with_kwargs=True)

    @property
    def config(self) -> T5Config:
        return self.t5.config

    def _add_positions(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        queries, keys = args[0], kwargs["key_value_states"]
        cache = kwargs.get("past_key_values")
        # By now the self-attention before this layer has put the queries' own keys in the cache.
        first = 0 if cache is None else cache.get_seq_length() - queries.shape[1]
        query_positions = torch.arange(queries.shape[1], device=queries.device) + first
        n_beams = len(keys) // len(self._key_positions)  # beam search repeats each question
        key_positions = self._key_positions.repeat_interleave(n_beams, dim=0)
        kwargs["position_bias"] = self.positions(query_positions, key_positions).to(queries.dtype)
        return args, kwargs

    def checkpoint_encoder(self) -> None:
        """Recompute the encoder's activations in the backward pass instead of keeping them."""
        self.t5.encoder.activation_checkpointing_enable({"use_reentrant": False})

    def _warn_once(self, part: str, consequence: str) -> None:
        if consequence not in self._warned:
            self._warned.add(consequence)
            logging.getLogger("fid").warning("%s of the reader was changed: %s", part, consequence)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        """Passages [B, N, L], their real tokens first, and the mask of these -> `Encoded`."""
        B, N, L = input_ids.shape
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        choose_inplace(self._with_relu)
        changed = changed_part(self.t5.encoder)
        if changed is not None:
            self._warn_once(changed, "the encoder runs with padding, which is slower")
        tokens, indices = encode_packed(self.t5.encoder, ids, mask, changed is None)

        lengths = attention_mask.sum(dim=(1, 2))  # of the questions
        S = int(lengths.max())
        # A token's index in its question is the number of real tokens before it there.
        before = attention_mask.flatten(1).cumsum(dim=1).flatten()[indices] - 1
        target = indices // (N * L) * S + before
        real = torch.arange(S, device=ids.device) < lengths[:, None]
        hidden = tokens.new_zeros(B * S, tokens.shape[1]).index_copy(0, target, tokens)
        positions = indices.new_zeros(B * S).index_copy(0, target, indices % (N * L))
        self._key_positions = positions.view(B, S)
        return Encoded(hidden.view(B, S, -1), real, self._key_positions)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        generation: tuple | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Passages [B, N, L], mask [B, N, L], labels [B, T] (-100: not counted) -> the mean
        cross-entropy over the labels' tokens, and the logits [B, T, vocabulary]. (`generate` goes
        through here as well, because FSDP gathers weights when a module is called.)"""
        if generation is not None:
            return self._generate(input_ids, attention_mask, *generation)
        encoded = self.encode(input_ids, attention_mask)
        output = self.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
            attention_mask=encoded.mask,
            labels=labels,
            use_cache=False,
        )
        return output.loss, output.logits

    def decoder(self, kind: str = "fast") -> GreedyDecoder | TransformersDecoder:
        """What generates the answers, to be passed to `generate` batch by batch.

        "fast" is our own decoder, laid out with the present weights and, inside autocast, in its
        number format; or Transformers' if something in the T5's decoder was changed, which only
        calling its modules respects. "transformers" is always the latter.
        """
        if kind == "fast":
            changed = changed_decoder_part(self.t5, self._add_positions)
            if changed is None:
                dtype = number_format(self.t5.shared.weight)
                return GreedyDecoder(self.t5, self.positions, dtype)
            self._warn_once(changed, "answers come from Transformers' generate, which is slower")
        return TransformersDecoder(self.t5)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int = 50,
        num_beams: int = 1,
        decoder: GreedyDecoder | TransformersDecoder | None = None,
    ) -> torch.Tensor:
        """Passages [B, N, L] -> answers' token ids [B, at most `max_length`], the start token
        included, greedily or by beam search.

        Args: decoder: what `decoder()` returned; None makes one for this batch alone.
        Errors: `InputError` if logits are not finite.
        """
        generation = max_length, num_beams, decoder, None
        tokens, _, finite = self(input_ids, attention_mask, generation=generation)
        check_finite(finite, range(len(finite)))
        return tokens

    def generate_with_scores(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int = 50,
        num_beams: int = 1,
        decoder: GreedyDecoder | TransformersDecoder | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `generate` returns, and the passages' scores [B, N] (see `passage_scores`)."""
        generation = max_length, num_beams, decoder, "attention"
        tokens, scores, finite = self(input_ids, attention_mask, generation=generation)
        check_finite(finite, range(len(finite)))
        return tokens, scores

    @torch.no_grad()
    def _generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int,
        num_beams: int,
        decoder: GreedyDecoder | TransformersDecoder | None,
        score: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Token ids, the passages' scores of this name in `SCORES` (or None), and a flag [B] per
        question: false if a logit or score is not finite."""
        encoded = self.encode(input_ids, attention_mask)
        decoder = decoder or self.decoder()
        if num_beams > 1 or isinstance(decoder, TransformersDecoder):
            decoded = TransformersDecoder(self.t5).decode(encoded, max_length, num_beams)
        else:
            decoded = decoder.decode(encoded, max_length)
        if score is None:
            return decoded.tokens, None, decoded.finite
        if isinstance(decoder, TransformersDecoder):
            mean = functools.partial(passage_means, encoded, attention_mask)
            queries, mean_keys = decoder.first_step(encoded, mean)
        else:  # (after beam search, decoding one token gives the queries)
            queries, mean_keys = decoded.queries or decoder.decode(encoded, 2).queries, None
        scores = passage_scores(self, encoded, attention_mask, queries, mean_keys, score)
        finite = (scores.isfinite() | ~attention_mask.any(dim=2)).all(dim=1)
        return decoded.tokens, scores, decoded.finite & finite

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights under plain T5 keys, so that T5 itself opens them too."""
        weights = self.t5.state_dict()
        if self.positions is not None:
            weights[POSITION_TABLE_KEY] = self.positions.table.weight
        self.config.fid_position_table = self.positions is not None
        self.t5.save_pretrained(folder, state_dict=weights)


# ----------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass(frozen=True)
class Answer:
    """The reader's answer to the question at this index of a file, and the scores of the passages
    that it read, in reading order, or None if they were not asked for."""

    index: int
    text: str
    scores: list[float] | None


def answer_questions(
    reader: FiDT5,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    precision: str = "fp32",
    max_length: int = 50,
    num_beams: int = 1,
    with_scores: bool = False,
    decoder: str = "fast",
    source: str | None = None,
) -> Iterator[list[Answer]]:
    """Read batches of a `ReaderCollator`, each only when its answers are asked for, and yield the
    answers of each.

    Args:
        decoder: see `FiDT5.decoder`.
        source: the data's file, for error messages.
    Errors: `InputError` naming the first example with a logit or score that is not finite.
    """
    was_training = reader.training
    reader.eval()
    score = "attention" if with_scores else None
    try:
        with autocast(device, precision):
            laid_out = reader.decoder(decoder)
        for batch in batches:
            ids = batch["input_ids"].to(device, non_blocking=True)
            mask = batch["attention_mask"].to(device, non_blocking=True)
            with autocast(device, precision):
                generation = max_length, num_beams, laid_out, score
                tokens, scores, finite = reader(ids, mask, generation=generation)
            check_finite(finite, batch["index"], source)
            rows = scores.tolist() if with_scores else [None] * len(tokens)
            counts = batch["attention_mask"].any(dim=2).sum(dim=1).tolist()
            texts = decode_answers(tokenizer, tokens)
            yield [
                Answer(index, text, row and row[:n])
                for index, text, row, n in zip(batch["index"], texts, rows, counts, strict=True)
            ]
    finally:
        reader.train(was_training)


def check_finite(finite: torch.Tensor, indices: Sequence[int], source: str | None = None) -> None:
    """Raise an `InputError` for the first question whose flag [B] is false."""
    if not finite.all():
        index = indices[finite.tolist().index(False)]
        where = f"{source}: " if source else ""
        raise InputError(
            f"{where}example {index} (the first is 0): the reader's logits or passage scores are "
            "inf or nan; use --precision bf16 or fp32, or another model if that does not help"
        )


# ----------------------------------------------------------------------------------------------
# Loading


def load_reader(path: str, dropout: float | None = None, use_position_table: bool = False) -> FiDT5:
    """A reader from a checkpoint of ours or of the reference, or any T5 by folder or hub name.

    Args:
        dropout: replaces the dropout in the model's config.
        use_position_table: use the cross-attention position table that T5 weights of 2020 carry,
            as the reference did when it started from them. Readers that were trained with one (the
            reference's, and ours that began from them) always keep theirs.

    Errors: `InputError` when there is no such model, or it is not a T5.
    """
    config = _reader_config(path, dropout)
    legacy = _legacy_weights(path)
    table = None
    if legacy:
        t5 = build(T5ForConditionalGeneration, path, config)
        wanted = {key: value.shape for key, value in t5.state_dict().items()}
        mismatched = [
            (key, legacy[key].shape, shape)
            for key, shape in sorted(wanted.items())
            if key in legacy and legacy[key].shape != shape
        ]
        check_shapes(path, sorted(set(wanted) - set(legacy)), mismatched)
        table = legacy.pop(POSITION_TABLE_KEY, None)
        t5.load_state_dict({key: legacy[key] for key in t5.state_dict()})
    else:
        t5 = from_pretrained(T5ForConditionalGeneration, path, config)
        if use_position_table or getattr(config, "fid_position_table", False):
            table = read_tensor(path, POSITION_TABLE_KEY)
            if table is None:
                raise InputError(
                    f"{path}: its weights hold no cross-attention position table "
                    f"({POSITION_TABLE_KEY}); leave out --legacy_position_table"
                )
    return FiDT5(t5, table)


def new_reader(config_file: str, dropout: float | None = None) -> FiDT5:
    """A reader with fresh random weights, shaped by a T5 config file (JSON)."""
    config = _reader_config(config_file, dropout)
    t5 = build(T5ForConditionalGeneration, config_file, config)
    if not config.scale_decoder_outputs:
        # So Transformers remembers tie_word_embeddings: false (T5 v1.1, Flan-T5, ByT5), of which
        # it makes nothing else. Weights that it loads may differ; fresh ones it ties all the same.
        head = torch.empty_like(t5.shared.weight).normal_(std=config.initializer_factor)
        t5.lm_head.weight = nn.Parameter(head)
    return FiDT5(t5)


def _reader_config(path: str, dropout: float | None) -> T5Config:
    config = load_config(path, "t5")
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as every T5 has it
    if dropout is not None:
        config.dropout_rate = dropout
    return config


def _legacy_weights(path: str) -> dict[str, torch.Tensor] | None:
    """The weights of a reference checkpoint under T5's keys, or None if this is not one."""
    weights = read_bin(path)
    if weights is None or not any(key.startswith(_LEGACY_ENCODER) for key in weights):
        return None
    renamed = {}
    for key, value in weights.items():
        if key.startswith(_LEGACY_ENCODER):
            key = key.replace(_LEGACY_ENCODER, "encoder.").replace(".module.layer.", ".layer.")
        renamed[key] = value.float()
    return renamed
