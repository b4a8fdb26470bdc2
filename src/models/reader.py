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

import argparse
import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from src.models.decoder import Decoded, Encoded, GreedyDecoder, TransformersDecoder
from src.models.encoder import changed_part, encode_packed, pack, parts_to_compile, prepare
from src.models.plain import FAMILY, changed_decoder_part, gathered
from src.models.positions import CrossAttentionPositions
from src.models.pretrained import (
    build,
    load_config,
    load_tokenizer,
    open_weights,
    quiet_transformers,
    set_up,
    unfilled,
)
from src.models.scores import passage_means, passage_scores
from src.models.stored import FreshWeights, Sources, fit, with_weights
from src.options import GenerationOptions
from src.runtime import distributed
from src.runtime.device import number_format
from src.runtime.errors import InputError

# T5 under transformers 3.0.2 added a table of relative positions to the decoder's cross-attention.
# Published and legacy readers were trained with it; today's T5 drops it without a message.
POSITION_TABLE_KEY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_TABLE = "positions.table.weight"  # its name in `FiDT5`
# The reference's checkpoints wrap the encoder twice: this key, and how keys map to T5's.
_LEGACY_KEY = "encoder.encoder.final_layer_norm.weight"
_LEGACY_NAMES = {r"^encoder\.encoder\.": "encoder.", r"\.module\.layer\.": ".layer."}


class Generated(NamedTuple):
    """Answers to B questions: token ids [B * n_best, T], the start token included, a question's
    answers next to each other, best first; the passages' scores [B, N], or None; the answers'
    log-probabilities [B * n_best]; and, by n, the tokens [B, T] of the best answers from the first
    n passages alone."""

    tokens: torch.Tensor
    scores: torch.Tensor | None
    log_probs: torch.Tensor
    by_context: dict[int, torch.Tensor]
    n_best: int
    encoded: Encoded


class FiDT5(nn.Module):
    """Fusion-in-Decoder: a `T5ForConditionalGeneration` that reads many passages a question.

    `positions` is the legacy cross-attention position table, or None (see POSITION_TABLE_KEY).
    """

    def __init__(self, t5: T5ForConditionalGeneration, position_table: torch.Tensor | None = None):
        super().__init__()
        self.t5 = t5
        prepare(t5)
        self._warned: set[str] = set()
        self.positions: CrossAttentionPositions | None = None
        self._key_positions: torch.Tensor | None = None  # [B, S] of the passages encoded last
        self.sources: Sources = {}  # of weights that are still to be read
        if position_table is not None:
            self.positions = CrossAttentionPositions(t5.config)
            self.positions.table.weight.data.copy_(position_table)
        self._attach_positions()

    @property
    def config(self) -> T5Config:
        return self.t5.config

    def _attach_positions(self) -> None:
        """Make T5 use the position table, also in a layer that replaced the one that had it."""
        first = self.t5.decoder.block[0]  # T5 itself passes its bias on to all other blocks
        hooks = [hook for module in first.modules() for hook in module._forward_pre_hooks.values()]
        if self.positions is not None and self._add_positions not in hooks:
            first.layer[1].register_forward_pre_hook(self._add_positions, with_kwargs=True)

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

    def checkpoint_blocks(self) -> None:
        """Recompute all blocks' activations in the backward pass instead of keeping them."""
        for stack in (self.t5.encoder, self.t5.decoder):
            stack.activation_checkpointing_enable({"use_reentrant": False})
            stack.disable_input_require_grads()  # a hook, for frozen embeddings

    def _warn_once(self, part: str, consequence: str) -> None:
        if consequence not in self._warned:
            self._warned.add(consequence)
            logging.getLogger("fid").warning("%s of the reader was changed: %s", part, consequence)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Encoded:
        """Passages [B, N, L], their real tokens first, and the mask of these -> `Encoded`. (A mask
        on the CPU spares waiting for a GPU.)"""
        B, N, L = input_ids.shape
        self._attach_positions()
        if changed := changed_part(self.t5.encoder):
            self._warn_once(changed, "the encoder runs with padding, which is slower")
        mask = attention_mask.cpu()
        packing = pack(mask.flatten(0, 1))
        indices, lengths = packing.indices, mask.sum(dim=(1, 2))  # lengths of the questions
        S = int(lengths.max())
        # A token's index in its question is the number of real tokens before it there.
        before = mask.flatten(1).cumsum(dim=1).flatten()[indices] - 1
        target = indices // (N * L) * S + before
        real = torch.arange(S) < lengths[:, None]
        positions = indices.new_zeros(B * S).index_copy(0, target, indices % (N * L)).view(B, S)
        ids = input_ids.flatten(0, 1)
        move = functools.partial(torch.Tensor.to, device=ids.device, non_blocking=True)
        indices, target, real, self._key_positions = map(move, (indices, target, real, positions))
        tokens = encode_packed(self.t5.encoder, ids, packing, indices, changed is None)
        hidden = tokens.new_zeros(B * S, tokens.shape[1]).index_copy(0, target, tokens)
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
        encoded = self.encode(input_ids, attention_mask)
        if generation is not None:
            return self._generate(encoded, attention_mask.to(input_ids.device), *generation)
        mask = None  # with four dimensions, for Transformers waits for a GPU to look at others
        if len(encoded.mask) > 1:
            mask = torch.zeros_like(encoded.mask, dtype=number_format(encoded.hidden))
            mask = mask.masked_fill(~encoded.mask, torch.finfo(mask.dtype).min)[:, None, None]
        output = self.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden),
            attention_mask=mask,
            labels=labels,
            use_cache=False,
        )
        return output.loss, output.logits

    def decoder(self, kind: str = "fast") -> GreedyDecoder | TransformersDecoder:
        """What generates the answers, to be passed to `generate` batch by batch: "fast" is our own
        decoder, with the present weights, in autocast's number format inside it; or
        Transformers' if something in the T5's decoder was changed, which only calling its modules
        respects. "transformers" is always the latter."""
        self._attach_positions()
        if kind == "fast":
            changed = changed_decoder_part(self.t5, self._add_positions)
            if changed is None:
                dtype = number_format(self.t5.shared.weight)
                return GreedyDecoder(gathered(self.t5, dtype), self.positions, dtype)
            self._warn_once(changed, "answers come from Transformers' generate, which is slower")
        return TransformersDecoder(self.t5)

    def generate(self, *passages: torch.Tensor, **options: Any) -> torch.Tensor:
        """The first of what `generate_with_scores` returns, which also has the arguments."""
        return self.generate_with_scores(*passages, score=None, **options)[0]

    def generate_with_scores(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_length: int = 50,
        num_beams: int = 1,
        decoder: GreedyDecoder | TransformersDecoder | None = None,
        score: str | None = "attention",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Passages [B, N, L] -> answers' token ids [B, at most `max_length`], the start token
        included, greedily or by beam search; and the passages' scores [B, N]. See `answer`."""
        options = GenerationOptions(max_length, num_beams)
        found = self.answer(input_ids, attention_mask, options, decoder, score)
        return found.tokens, found.scores

    @torch.no_grad()
    def answer(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        options: GenerationOptions,
        decoder: GreedyDecoder | TransformersDecoder | None = None,
        score: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Generated:
        """Answers to questions with passages [B, N, L].

        Args:
            decoder: what `decoder()` returned; None makes one for this batch alone.
            score: a name in `SCORES`; None: no scores.
            names: of the questions, for errors.
        Errors: `InputError` for the first question with a logit or score that is not finite.
        """
        found, finite = self(input_ids, attention_mask, generation=(options, decoder, score))
        if not finite.all():
            index = finite.tolist().index(False)
            name = names[index] if names else f"example {index} (the first is 0)"
            raise InputError(
                f"{name}: the reader's logits or passage scores are inf or nan; use --precision "
                "bf16 or fp32, or another model if that does not help"
            )
        return found

    def _generate(
        self,
        encoded: Encoded,
        attention_mask: torch.Tensor,
        options: GenerationOptions,
        decoder: GreedyDecoder | TransformersDecoder | None,
        score: str | None,
    ) -> tuple[Generated, torch.Tensor]:
        """Also a flag [B]: whether a question's logits and scores are finite."""
        decoder = decoder or self.decoder()
        decoded, by_context = self._decode(encoded, attention_mask.shape[2], options, decoder)
        found = Generated(
            decoded.tokens, None, decoded.log_probs, by_context, options.n_best, encoded
        )
        if score is None:
            return found, decoded.finite
        if isinstance(decoder, TransformersDecoder):
            mean = functools.partial(passage_means, encoded, attention_mask)
            queries, mean_keys = decoder.first_step(encoded, mean)
        else:  # (after beam search, decoding one token gives the queries)
            queries, mean_keys = decoded.queries or decoder.decode(encoded, 2).queries, None
        blocks = getattr(decoder, "blocks", self.t5.decoder.block)
        scores = passage_scores(self, encoded, attention_mask, queries, mean_keys, score, blocks)
        finite = (scores.isfinite() | ~attention_mask.any(dim=2)).all(dim=1)
        return found._replace(scores=scores), decoded.finite & finite

    def _decode(
        self,
        encoded: Encoded,
        L: int,
        options: GenerationOptions,
        decoder: GreedyDecoder | TransformersDecoder,
    ) -> tuple[Decoded, dict[int, torch.Tensor]]:
        """The answers, and the tokens of the best ones from the first n passages alone for each n
        of the curve."""
        contexts, n_beams = options.contexts, options.num_beams
        longest = options.generation_max_length
        parts = [encoded.first(n * L) for n in contexts]
        if n_beams > 1 or isinstance(decoder, TransformersDecoder):
            beams = TransformersDecoder(self.t5)
            found, *of_parts = (
                beams.decode(part, longest, n_beams, options.n_best) for part in (encoded, *parts)
            )
            tokens = [part.tokens[:: options.n_best] for part in of_parts]
            return found, dict(zip(contexts, tokens, strict=True))
        V = len(parts) + 1
        views = torch.stack([part.mask for part in (encoded, *parts)], dim=1)
        found = decoder.decode(encoded, longest, views)
        tokens = found.tokens.unflatten(0, (-1, V)).unbind(1)
        finite = found.finite.view(-1, V).all(dim=1)
        queries = [query[::V] for query in found.queries]
        answers = Decoded(tokens[0], found.log_probs[::V], finite, queries)
        return answers, dict(zip(contexts, tokens[1:], strict=True))

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write config and weights (of `state_dict`, if this process does not have all of them)
        under plain T5 keys, so that T5 itself opens them too."""
        state = self.state_dict() if state_dict is None else state_dict
        weights = {k.removeprefix("t5."): v for k, v in state.items() if k.startswith("t5.")}
        if self.positions is not None:
            weights[POSITION_TABLE_KEY] = state[_TABLE]
        self.config.fid_position_table = self.positions is not None
        self.t5.save_pretrained(folder, state_dict=weights, save_original_format=False)


# ----------------------------------------------------------------------------------------------
# Loading


def load_reader(
    path: str,
    dropout: float | None = None,
    use_position_table: bool = False,
    by_shares: bool = False,
) -> FiDT5:
    """A reader from a checkpoint of ours or of the reference, or any T5 by folder or hub name.

    Args:
        dropout: replaces the dropout in the model's config.
        use_position_table: use the cross-attention position table that T5 weights of 2020 carry,
            as the reference did when it started from them. Readers that were trained with one (the
            reference's, and ours that began from them) always keep theirs.
        by_shares: leave the weights on the meta device; `training/sharding.py` reads them.

    Errors: `InputError` when there is no such model, or it is not a T5.
    """
    config = reader_config(path, dropout)
    t5 = unfilled(FAMILY[config.model_type], path, config)
    found = open_weights(path, _own_name, by_shares=by_shares)
    is_wanted = use_position_table or getattr(config, "fid_position_table", False)
    if is_wanted and _TABLE not in found:
        raise InputError(
            f"{path}: its weights hold no cross-attention position table ({POSITION_TABLE_KEY}); "
            "leave out --legacy_position_table"
        )
    is_wanted = is_wanted or any(weight.key == _LEGACY_KEY for weight in found.values())
    with torch.device("meta"):
        has_table = is_wanted and _TABLE in found
        reader = FiDT5(t5, torch.empty(found[_TABLE].shape) if has_table else None)
    return with_weights(reader, fit(reader, found, path), by_shares)


def _own_name(key: str) -> str:
    """The name of a stored weight in `FiDT5`."""
    for pattern, new in _LEGACY_NAMES.items():
        key = re.sub(pattern, new, key)
    return _TABLE if key == POSITION_TABLE_KEY else f"t5.{key}"


def new_reader(config_file: str, dropout: float | None = None, by_shares: bool = False) -> FiDT5:
    """A reader with fresh random weights, shaped by a T5 config file (JSON)."""
    config, fresh = reader_config(config_file, dropout), FreshWeights()
    with fresh:
        t5 = build(FAMILY[config.model_type], config_file, config)
        if config.model_type != "t5" or not config.scale_decoder_outputs:
            # tie_word_embeddings is false (T5 v1.1, Flan-T5, ByT5, mT5, umT5), but Transformers
            # ties fresh weights all the same, and would save them as tied.
            head = torch.empty_like(t5.shared.weight).normal_(std=config.initializer_factor)
            t5.lm_head.weight = nn.Parameter(head)
    reader = FiDT5(t5)
    return with_weights(reader, fresh.sources(reader), by_shares)


def reader_config(path: str, dropout: float | None) -> T5Config:
    """The config of a T5, mT5 or umT5, with this dropout unless it is None."""
    config = load_config(path, *FAMILY)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # as every T5 has it
    if dropout is not None:
        config.dropout_rate = dropout
    return config


def open_reader(
    options: argparse.Namespace,
    device: torch.device,
    log: logging.Logger,
    newest: Path | None = None,
) -> tuple[FiDT5, PreTrainedTokenizerBase]:
    """The reader that the options of a script name, on its device, and its tokenizer.

    Args: newest: the checkpoint to resume training from, which goes before what options name.
    """
    quiet_transformers()
    base = f"t5-{options.model_size}"
    path = options.model_path if options.model_path != "none" else base
    fallback = options.tokenizer if options.tokenizer != "none" else base
    dropout = getattr(options, "dropout", None)  # (a test lacks the options of training)
    shape = getattr(options, "model_config", "none")
    by_shares = options.shard and distributed.world_size() > 1
    if newest is None and shape != "none":
        source, path = shape, fallback
        reader = new_reader(shape, dropout, by_shares)
    else:
        source = path = str(newest or path)
        table = newest is None and getattr(options, "legacy_position_table", False)
        reader = load_reader(path, dropout, table, by_shares)
    tokenizer = load_tokenizer(path, fallback)
    tokenizer.clean_up_tokenization_spaces = not options.no_clean_up
    layers = parts_to_compile(reader.t5.encoder)
    set_up(reader, tokenizer, options, device, log, source, layers)
    if getattr(options, "use_checkpoint", False):
        reader.checkpoint_blocks()
    return reader, tokenizer
