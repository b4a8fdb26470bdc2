"""What each passage is worth to the reader, by every definition that retrievers learn from.

Add a target that is an aggregate of cross-attention by adding a function of `CrossAttention` to
`AGGREGATES`, from where the options have its name.

The answer is given to the decoder (teacher forcing), one question at a time, in float32. Passages
are encoded once for all targets. Keys are never computed for aggregates (see `decoder.py`).

Shapes: N passages of the question, S real tokens of all of them, W of the longest, T tokens of the
answer, n layers, H heads, K head size, D model size, R copies of the answer decoded side by side.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from src.models.decoder import Encoded, GreedyDecoder, Layer
from src.models.encoder import fused_norm
from src.runtime.device import full_precision

_AT_ONCE = 1 << 25  # logits, or scores when passages are left out: bounds the memory


@dataclasses.dataclass
class CrossAttention:
    """Cross-attention from an answer to the tokens of its question's passages."""

    scores: torch.Tensor  # before the softmax [n, H, T, S]
    norms: torch.Tensor | None  # Euclidean lengths of the value vectors [n, H, S], if needed
    of_passage: torch.Tensor  # which passage a token is of [N, S]

    @functools.cached_property
    def probs(self) -> torch.Tensor:
        """The softmax of the scores over all tokens [n, H, T, S]."""
        return self.scores.softmax(dim=3)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Values of tokens [..., S] -> their sums over each passage [..., N]."""
        return values @ self.of_passage.float().T

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.total(values) / self.of_passage.sum(dim=1)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., None, :].masked_fill(~self.of_passage, -torch.inf).amax(dim=-1)


# The names are those of --targets. From Izacard and Grave, 2021 (https://arxiv.org/abs/2012.04584,
# sections 3.2 and 4.3): scores at the first token of the answer, or averaged over `all`.
AGGREGATES: dict[str, Callable[[CrossAttention], torch.Tensor]] = {
    "attention_all": lambda a: a.mean(a.scores.mean(dim=(0, 1, 2))),
    "attention_max_heads": lambda a: a.mean(a.scores[:, :, 0].amax(dim=1).mean(dim=0)),
    "attention_max_layers": lambda a: a.mean(a.scores[:, :, 0].amax(dim=0).mean(dim=0)),
    "attention_max_tokens": lambda a: a.largest(a.scores[:, :, 0]).mean(dim=(0, 1)),
    "attention_first_layer": lambda a: a.mean(a.scores[0, :, 0].mean(dim=0)),
    "attention_last_layer": lambda a: a.mean(a.scores[-1, :, 0].mean(dim=0)),
    # The share of attention that the passage gets; shares add up to 1.
    "attention_mass": lambda a: a.total(a.probs[:, :, 0].mean(dim=(0, 1))),
    "attention_mass_all": lambda a: a.total(a.probs.mean(dim=(0, 1, 2))),
    # Attention times the lengths of the values: ADist of Atlas (Izacard et al., 2022,
    # https://arxiv.org/abs/2208.03299, section 2.2), without its code's division by 256, a constant
    # whatever the length.
    "attention_norm": lambda a: a.total((a.probs * a.norms[:, :, None]).mean(dim=(0, 1, 2))),
}


class Question(NamedTuple):
    """One question's encoded passages: real tokens' states [S, D] in float32, their positions [S]
    in the padded layout [N * L], and which passage each is of [N, S]."""

    hidden: torch.Tensor
    positions: torch.Tensor
    of_passage: torch.Tensor
    L: int


def questions(encoded: Encoded, attention_mask: torch.Tensor) -> list[Question]:
    """The questions of a batch whose passages have this mask [B, N, L]."""
    _, N, L = attention_mask.shape
    numbers = torch.arange(N, device=attention_mask.device)[:, None]
    found = []
    for hidden, real, positions in zip(*encoded, strict=True):
        of_passage = positions[real] // L == numbers
        found.append(Question(hidden[real].float(), positions[real], of_passage, L))
    return found


Cross = Callable[[Layer, torch.Tensor], torch.Tensor]  # queries [R, T, H * K] -> mixed values, same


def _force(decoder: GreedyDecoder, answer: torch.Tensor, R: int, cross: Cross) -> torch.Tensor:
    """Give an answer [T] to the decoder, R times. Returns the last layer's states [R, T, D]."""
    config, T = decoder.config, len(answer)
    tokens = torch.cat([answer.new_full((1,), config.decoder_start_token_id), answer[:-1]])
    hidden = decoder.embed(tokens).float().expand(R, -1, -1)
    future = torch.full((T, T), -torch.inf, device=answer.device).triu(diagonal=1)
    for layer, own_bias in zip(decoder.layers, decoder.own_biases(T), strict=True):
        states = (fused_norm(layer.norms[0], hidden) @ layer.qkv).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, decoder.heads).transpose(1, 2) for part in states)
        mixed = (query @ key.mT + own_bias + future).softmax(dim=3) @ value
        hidden = hidden + mixed.transpose(1, 2).flatten(2) @ layer.self_out
        mixed = cross(layer, fused_norm(layer.norms[1], hidden) @ layer.query)
        hidden = hidden + mixed @ layer.cross_out
        hidden = hidden + layer.feed_forward(hidden)
    return hidden


def _log_probs(decoder: GreedyDecoder, hidden: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """States [R, T, D] -> the log-probabilities of the answer's tokens [R, T]."""
    at_once = max(1, _AT_ONCE // (len(answer) * decoder.config.vocab_size))
    parts = []
    for part in hidden.split(at_once):
        log_probs = decoder.logits(part).log_softmax(dim=2)
        parts.append(log_probs.gather(2, answer.expand(len(part), -1)[..., None])[..., 0])
    return torch.cat(parts)


def _attend(
    layer: Layer,
    query: torch.Tensor,
    hidden: torch.Tensor,
    real: torch.Tensor | None,
    bias: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-attention without keys and values, from queries [R, T, H * K] to states [R, W, D] of
    which some are `real` [R, W]. Returns the scores [R, H, T, W] and mixed values [R, T, H * K]."""
    (R, T, _), (H, K, _) = query.shape, layer.key.shape

    def by_head(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[R, H, T, a] times [H, a, b] -> [R, H, T, b]"""
        product = states.transpose(0, 1).flatten(1, 2) @ weights
        return product.unflatten(1, (R, T)).transpose(0, 1)

    projected = by_head(query.view(R, T, H, K).transpose(1, 2), layer.key)  # [R, H, T, D]
    scores = (projected.flatten(1, 2) @ hidden.mT).unflatten(1, (H, T)) + bias
    seen = scores if real is None else scores.masked_fill(~real[:, None, None], -1e30)
    mixed = (seen.softmax(dim=3).flatten(1, 2) @ hidden).unflatten(1, (H, T))
    return scores, by_head(mixed, layer.value).transpose(1, 2).flatten(2)


def _bias(decoder: GreedyDecoder, T: int, positions: torch.Tensor) -> torch.Tensor | float:
    """The legacy position table's bias [R, H, T, W] for keys at positions [R, W]."""
    if decoder.position_bias is None:
        return 0.0
    return decoder.position_bias(torch.arange(T, device=positions.device), positions).float()


def cross_attention(
    decoder: GreedyDecoder, question: Question, answer: torch.Tensor, with_norms: bool
) -> CrossAttention:
    """Cross-attention while the answer [T] is given to the decoder."""
    scores = []
    bias = _bias(decoder, len(answer), question.positions[None])

    def cross(layer: Layer, query: torch.Tensor) -> torch.Tensor:
        found, mixed = _attend(layer, query, question.hidden[None], None, bias)
        scores.append(found[0])
        return mixed

    _force(decoder, answer, 1, cross)
    norms = None
    if with_norms:
        norms = torch.stack(
            [(question.hidden @ layer.value).norm(dim=2) for layer in decoder.layers]
        )
    return CrossAttention(torch.stack(scores), norms, question.of_passage)


def alone(decoder: GreedyDecoder, question: Question, answer: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [N, T] of the answer's tokens given each passage as the only one."""
    counts = question.of_passage.sum(dim=1)
    hidden, columns = (
        pad_sequence(part.split(counts.tolist()), batch_first=True)  # [N, W, D] and [N, W]
        for part in (question.hidden, question.positions % question.L)
    )
    real = torch.arange(hidden.shape[1], device=hidden.device) < counts[:, None]
    bias = _bias(decoder, len(answer), columns)

    def cross(layer: Layer, query: torch.Tensor) -> torch.Tensor:
        return _attend(layer, query, hidden, real, bias)[1]

    return _log_probs(decoder, _force(decoder, answer, len(counts), cross), answer)


def without(decoder: GreedyDecoder, question: Question, answer: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [N, T] of the answer's tokens given all passages but one, for each.

    All that are left out share keys and values. Without any other passage, cross-attention gives
    nothing."""
    (H, _), T, S = decoder.heads, len(answer), len(question.hidden)
    bias = _bias(decoder, T, question.positions[None])
    bias = bias if isinstance(bias, float) else bias[0, :, None]
    parts = []
    for left_out in question.of_passage.split(max(1, _AT_ONCE // (H * T * S))):

        def cross(
            layer: Layer, query: torch.Tensor, left_out: torch.Tensor = left_out
        ) -> torch.Tensor:
            R, keys = len(left_out), question.hidden @ layer.key.mT  # [H, S, K]
            queries = query.unflatten(2, decoder.heads).permute(2, 0, 1, 3).flatten(1, 2)
            scores = (queries @ keys.mT).unflatten(1, (R, T)) + bias  # [H, R, T, S]
            weights = scores.masked_fill(left_out[:, None], -torch.inf).softmax(dim=3)
            mixed = weights.nan_to_num(nan=0.0).flatten(1, 2) @ (question.hidden @ layer.value)
            return mixed.unflatten(1, (R, T)).permute(1, 2, 0, 3).flatten(2)

        hidden = _force(decoder, answer, len(left_out), cross)
        parts.append(_log_probs(decoder, hidden, answer))
    return torch.cat(parts)


@torch.no_grad()
def attribution(decoder: GreedyDecoder, question: Question, answer: torch.Tensor) -> torch.Tensor:
    """How much the log-probability of an answer [T] drops when each passage is left out [N]."""
    with full_precision(answer.device):
        everything = question._replace(of_passage=torch.zeros_like(question.of_passage[:1]))
        with_all = without(decoder, everything, answer).sum(dim=1)
        return with_all - without(decoder, question, answer).sum(dim=1)


@torch.no_grad()
def score_passages(
    decoder: GreedyDecoder,
    question: Question,
    answer: torch.Tensor,
    names: list[str],
    use_sum: bool = False,
) -> dict[str, torch.Tensor]:
    """The passages' scores [N] by each of these targets, in float32; -inf for a passage without
    real tokens; with `perplexity` also "token_log_probs" [N, T].

    Args:
        decoder: of a reader with a plain decoder, laid out in float32.
        answer: token ids [T], the end included.
        use_sum: for `perplexity`, the sum of the tokens' log-likelihoods instead of their mean.
    """
    found: dict[str, torch.Tensor] = {}
    with full_precision(answer.device):
        if aggregates := [name for name in names if name in AGGREGATES]:
            attention = cross_attention(decoder, question, answer, "attention_norm" in names)
            found |= {name: AGGREGATES[name](attention) for name in aggregates}
        if "perplexity" in names:
            tokens = alone(decoder, question, answer)
            found["perplexity"] = tokens.sum(dim=1) if use_sum else tokens.mean(dim=1)
        if "leave_one_out" in names:
            found["leave_one_out"] = -without(decoder, question, answer).mean(dim=1)
    missing = ~question.of_passage.any(dim=1)
    found = {name: values.masked_fill(missing, -torch.inf) for name, values in found.items()}
    return found | ({"token_log_probs": tokens} if "perplexity" in names else {})
