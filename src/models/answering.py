"""A reader's answers to batches of questions, as texts with their probabilities."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from src.models.decoder import is_answer_token
from src.models.pretrained import decode_answers
from src.models.reader import FiDT5, Generated
from src.options import GenerationOptions
from src.runtime.device import autocast


@dataclasses.dataclass(frozen=True)
class Answer:
    """The reader's answer to the question at this index of a file.

    Args:
        scores: of the passages that it read, in reading order; None if they were not asked for.
        log_probability, n_tokens: of the answer's tokens, its end included.
        alternatives: the next best answers, each as text, log-probability and number of tokens.
        by_context: the answers from the first n passages alone, by n (as text, for JSON).
    """

    index: int
    text: str
    scores: list[float] | None = None
    log_probability: float = 0.0
    n_tokens: int = 0
    alternatives: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)
    by_context: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def probability(self) -> float:
        return math.exp(self.log_probability)


def answer_questions(
    reader: FiDT5,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    precision: str = "fp32",
    options: GenerationOptions | None = None,
    with_scores: bool = False,
    source: str | None = None,
) -> Iterator[list[Answer]]:
    """Read batches of a `ReaderCollator`, each only when its answers are asked for, and yield the
    answers of each.

    Args:
        source: the data's file, for error messages.
    Errors: `InputError` naming the first example with a logit or score that is not finite.
    """
    options = options or GenerationOptions()
    was_training = reader.training
    reader.eval()
    score, file = "attention" if with_scores else None, f"{source}: " if source else ""
    try:
        with autocast(device, precision):
            laid_out = reader.decoder(options.decoder)
        for batch in batches:
            ids = batch["input_ids"].to(device, non_blocking=True)
            mask = batch["attention_mask"].to(device, non_blocking=True)
            names = [f"{file}example {index} (the first is 0)" for index in batch["index"]]
            with autocast(device, precision):
                found = reader.answer(ids, mask, options, laid_out, score, names)
            yield _as_answers(batch, found, tokenizer, reader.config.eos_token_id)
    finally:
        reader.train(was_training)


def _as_answers(
    batch: dict[str, Any], found: Generated, tokenizer: PreTrainedTokenizerBase, end: int
) -> list[Answer]:
    texts = decode_answers(tokenizer, found.tokens)
    counts = is_answer_token(found.tokens, end).sum(dim=1).tolist()
    each = list(zip(texts, found.log_probs.tolist(), counts, strict=True))
    curve = {str(n): decode_answers(tokenizer, part) for n, part in found.by_context.items()}
    n_read = batch["attention_mask"].any(dim=2).sum(dim=1).tolist()
    answers = []
    for row, index in enumerate(batch["index"]):
        best, *others = each[row * found.n_best : (row + 1) * found.n_best]
        scores = None if found.scores is None else found.scores[row, : n_read[row]].tolist()
        by_context = {n: part[row] for n, part in curve.items()}
        answers.append(Answer(index, best[0], scores, *best[1:], others, by_context))
    return answers
