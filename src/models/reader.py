"""The reader: Fusion-in-Decoder around Transformers' T5.

Every passage is encoded on its own, together with the question; the decoder attends over all of
them, concatenated (Izacard and Grave, 2020, https://arxiv.org/abs/2007.01282, section 3). The same
cross-attention tells how much each passage mattered: the passage scores that the retriever learns
from (Izacard and Grave, 2021, https://arxiv.org/abs/2012.04584, section 3.2).

Passages come padded to one length, and nothing is spent on the padding: `encoder.py` packs their
real tokens, and the decoder gets these only, one passage's after the other's.

Shapes: B questions, N passages of a question, L tokens of a padded passage, S real tokens of a
question's passages (as many as the longest of the batch has), T tokens of an answer, D model,
H heads, K size of a head.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from src.models.decoder import Encoded, GreedyDecoder
from src.models.encoder import encode_packed
from src.models.pretrained import (
    build,
    check_shapes,
    decode_answers,
    from_pretrained,
    load_config,
    read_bin,
    read_tensor,
)
from src.runtime.device import autocast, number_format
from src.runtime.errors import InputError

# T5 under transformers 3.0.2 added a table of relative positions to the decoder's cross-attention.
# Published and legacy readers were trained with it; today's T5 has no place for it and drops it.
POSITION_TABLE_KEY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_LEGACY_ENCODER = "encoder.encoder."  # how the reference's checkpoints begin their encoder's keys


class CrossAttentionPositions(nn.Module):
    """Adds the position table of legacy readers to the decoder's cross-attention scores.

    The distance counts from a token's place in the decoder's sequence to a key's place in the
    concatenated passages as they were padded. Keys after the query, nearly all of them, share
    bucket 0; so the table speaks about the first passage only, and only late in an answer.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.n_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.table = nn.Embedding(self.n_buckets, config.num_heads)

    def forward(self, query_places: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
        """Places [T] and [B, S] -> what to add to the scores, [B, H, T, S]."""
        distance = (query_places[None, :, None] - key_places[:, None, :]).clamp(min=0)
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
        self.use_checkpoint = False
        for module in t5.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True  # nothing else reads the product that it is applied to
        self.positions: CrossAttentionPositions | None = None
        self._places: torch.Tensor | None = None  # [B, S] of the passages encoded last
        if position_table is not None:
            self.positions = CrossAttentionPositions(t5.config)
            self.positions.table.weight.data.copy_(position_table)
            # The first block's bias is handed on to all others by T5 itself.
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
        query_places = torch.arange(queries.shape[1], device=queries.device) + first
        n_beams = len(keys) // len(self._places)  # with beams, each question stands repeated
        key_places = self._places.repeat_interleave(n_beams, dim=0)
        kwargs["position_bias"] = self.positions(query_places, key_places).to(queries.dtype)
        return args, kwargs

    def checkpoint_encoder(self) -> None:
        """Recompute the encoder's activations in the backward pass instead of keeping them."""
        self.use_checkpoint = True

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        """Passages [B, N, L], their real tokens first, and the mask of these -> `Encoded`."""
        B, N, L = input_ids.shape
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        tokens, places = encode_packed(self.t5.encoder, ids, mask, self.use_checkpoint)

        lengths = attention_mask.sum(dim=(1, 2))  # of the questions
        S = int(lengths.max())
        # Where a token goes: as many places into its question as real tokens are before it there.
        before = attention_mask.flatten(1).cumsum(dim=1).flatten()[places] - 1
        where = places // (N * L) * S + before
        real = torch.arange(S, device=ids.device) < lengths[:, None]
        hidden = tokens.new_zeros(B * S, tokens.shape[1]).index_copy(0, where, tokens)
        self._places = places.new_zeros(B * S).index_copy(0, where, places % (N * L)).view(B, S)
        return Encoded(hidden.view(B, S, -1), real, self._places)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passages [B, N, L], mask [B, N, L], labels [B, T] (-100: not counted) -> the mean
        cross-entropy over the labels' tokens, and the logits [B, T, vocabulary]."""
        encoded = self.encode(input_ids, attention_mask)
        output = self.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
            attention_mask=encoded.mask,
            labels=labels,
            use_cache=False,
        )
        return output.loss, output.logits

    def decoder(self) -> GreedyDecoder:
        """The decoder laid out for generation with the weights as they are now, to be handed to
        `generate` batch by batch. Inside autocast, in its number format."""
        return GreedyDecoder(self.t5, self.positions, number_format(self.t5.shared.weight))

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int = 50,
        num_beams: int = 1,
        decoder: GreedyDecoder | None = None,
    ) -> torch.Tensor:
        """Passages [B, N, L] -> answers' token ids [B, at most `max_length`], the start token
        included, greedily or by beam search.

        Args: decoder: what `decoder()` gave; None lays one out for this batch alone.
        """
        tokens, _ = self._generate(input_ids, attention_mask, max_length, num_beams, decoder, False)
        return tokens

    def generate_with_scores(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int = 50,
        num_beams: int = 1,
        decoder: GreedyDecoder | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `generate` gives, and the passages' scores [B, N] (see `passage_scores`)."""
        return self._generate(input_ids, attention_mask, max_length, num_beams, decoder, True)

    @torch.no_grad()
    def _generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int,
        num_beams: int,
        decoder: GreedyDecoder | None,
        with_scores: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded = self.encode(input_ids, attention_mask)
        if num_beams > 1:
            tokens = self._generate_by_transformers(encoded, max_length, num_beams)
            max_length = 2  # greedily, the first token alone: its queries give the scores
        if num_beams == 1 or with_scores:
            greedy, queries = (decoder or self.decoder()).greedy(encoded, max_length)
            tokens = greedy if num_beams == 1 else tokens
        if not with_scores:
            return tokens, None
        return tokens, passage_scores(self, encoded, attention_mask, queries)

    def _generate_by_transformers(
        self, encoded: Encoded, max_length: int, num_beams: int
    ) -> torch.Tensor:
        """The answers' token ids, by beam search (or greedily, with one beam)."""
        # Settings of our own: those saved with a model may hold another task's lengths.
        settings = GenerationConfig(
            max_length=max_length,
            num_beams=num_beams,
            do_sample=False,
            decoder_start_token_id=self.config.decoder_start_token_id,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
        )
        # A cache that grows by the layer: Transformers would count the encoder's layers, and fail
        # where the decoder has more.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return self.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
            attention_mask=encoded.mask,
            generation_config=settings,
            past_key_values=cache,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights under plain T5 keys, so that T5 itself opens them too."""
        weights = self.t5.state_dict()
        if self.positions is not None:
            weights[POSITION_TABLE_KEY] = self.positions.table.weight
        self.config.fid_position_table = self.positions is not None
        self.t5.save_pretrained(folder, state_dict=weights)


@torch.no_grad()
def passage_scores(
    reader: FiDT5, encoded: Encoded, attention_mask: torch.Tensor, queries: list[torch.Tensor]
) -> torch.Tensor:
    """How much the decoder looks at each passage when it writes the first token of the answer.

    The score of a passage is the pre-softmax cross-attention score, averaged over all decoder
    layers, heads and the passage's real tokens (Izacard and Grave, 2021, section 3.2). A mean of
    dot products with keys is the dot product with the mean key, and a mean of keys is the key of
    the mean hidden state: so the [B, H, N*L] scores are never built, and it costs next to nothing.

    Args:
        encoded: what `encode` made of passages with this mask [B, N, L].
        queries: each decoder layer's cross-attention query for the first token, [B, H * K].
    Returns: [B, N], in float32; -inf where a question has no such passage.
    """
    B, N, L = attention_mask.shape
    count = attention_mask.sum(dim=2)  # [B, N]
    passage = torch.arange(B, device=count.device)[:, None] * N + encoded.places // L  # of a token
    total = torch.zeros(B * N, encoded.hidden.shape[2], device=count.device)
    total.index_add_(0, passage[encoded.mask], encoded.hidden[encoded.mask].float())
    mean_hidden = total.view(B, N, -1) / count[:, :, None]

    layers = [block.layer[1].EncDecAttention for block in reader.t5.decoder.block]
    scores = torch.zeros(B, N, device=count.device)
    for query, layer in zip(queries, layers, strict=True):
        mean_key = layer.k(mean_hidden)  # [B, N, H*K]
        scores += torch.einsum("bk,bnk->bn", query.float(), mean_key.float())
    scores = scores / (len(layers) * reader.config.num_heads)
    if reader.positions is not None:
        first = torch.zeros(1, dtype=torch.long, device=count.device)
        keys = torch.arange(N * L, device=count.device)[None]
        bias = reader.positions(first, keys).float().mean(dim=(0, 1, 2)).view(1, N, L)
        scores = scores + (bias * attention_mask).sum(dim=2) / count
    return scores.masked_fill(count == 0, -torch.inf)


# ----------------------------------------------------------------------------------------------
# Loss and answers


def reader_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss of a batch and the number of label tokens that it is the mean of."""
    loss, _ = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return loss, (batch["labels"] != -100).sum()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the reader says to the question at place `index` of a file; `scores` of its passages
    in reading order, or None when they were not asked for."""

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
) -> Iterator[list[Answer]]:
    """Read batches of a `ReaderCollator`, each when it is due, and give the answers of each."""
    was_training = reader.training
    reader.eval()
    try:
        with autocast(device, precision):
            decoder = reader.decoder()
        for batch in batches:
            ids = batch["input_ids"].to(device, non_blocking=True)
            mask = batch["attention_mask"].to(device, non_blocking=True)
            with autocast(device, precision):
                if with_scores:
                    tokens, scores = reader.generate_with_scores(
                        ids, mask, max_length, num_beams, decoder
                    )
                else:
                    tokens = reader.generate(ids, mask, max_length, num_beams, decoder)
            rows = scores.tolist() if with_scores else [None] * len(tokens)
            texts = decode_answers(tokenizer, tokens)
            yield [
                Answer(index, text, row)
                for index, text, row in zip(batch["index"], texts, rows, strict=True)
            ]
    finally:
        reader.train(was_training)


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
