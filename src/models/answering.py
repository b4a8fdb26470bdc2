"""A reader's answers to batches of questions, as texts with their probabilities."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from src.data.batches import encode_texts
from src.models.decoder import GreedyDecoder, TransformersDecoder, is_answer_token
from src.models.pretrained import decode_answers
from src.models.reader import FiDT5, Generated
from src.models.targets import attribution, questions, score_passages
from src.options import GenerationOptions, TargetOptions
from src.runtime import distributed
from src.runtime.device import autocast
from src.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Answer:
    """The reader's answer to the question at this index of a file.

    Args:
        scores: of the passages that it read, in reading order, by the first target; None if they
            were not asked for.
        log_probability, n_tokens: of the answer's tokens, its end included.
        alternatives: the next best answers, each as text, log-probability and number of tokens.
        by_context: the answers from the first n passages alone, by n (as text, for JSON).
        targets: the passages' scores by each target that needs a reader, if there are several;
            also `token_log_probs` and `attribution`.
    """

    index: int
    text: str
    scores: list[float] | None = None
    log_probability: float = 0.0
    n_tokens: int = 0
    alternatives: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)
    by_context: dict[str, str] = dataclasses.field(default_factory=dict)
    targets: dict[str, list] = dataclasses.field(default_factory=dict)

    @property
    def probability(self) -> float:
        return math.exp(self.log_probability)


_FILLER = {"index": [0]} | dict.fromkeys(("input_ids", "attention_mask"), torch.tensor([[[1]]]))


def _in_step(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any] | None]:
    """This process's batches and then None, until every process has had all of its own."""
    own = iter(batches)
    batch = next(own, None)
    while distributed.any_process(batch is not None):
        yield batch
        batch = None if batch is None else next(own, None)


def answer_questions(
    reader: FiDT5,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    precision: str = "fp32",
    options: GenerationOptions | None = None,
    with_scores: bool = False,
    source: str | None = None,
    targets: TargetOptions | None = None,
    right_answer: Callable[[int], str | None] = lambda index: None,
) -> Iterator[list[Answer]]:
    """Read batches of a `ReaderCollator`, each only when its answers are asked for, and yield the
    answers of each.

    Args:
        source: the data's file, for error messages.
        targets: what to score passages by.
        right_answer: the answer to an example that targets are computed with; None: it has none.
    Errors: `InputError` naming the first example with a logit or score that is not finite, or
        without an answer that a target needs.
    """
    options, targets = options or GenerationOptions(), targets or TargetOptions()
    was_training = reader.training
    reader.eval()
    file = f"{source}: " if source else ""
    score = "attention" if with_scores and "attention" in targets.names else None
    try:
        with autocast(device, precision):
            laid_out = reader.decoder(options.decoder)
        scorer = None
        if with_scores and (targets.needs_answer or targets.attribution):
            is_exact = precision == "fp32" and isinstance(laid_out, GreedyDecoder)
            decoder = laid_out if is_exact else reader.decoder()
            scorer = _Scorer(decoder, tokenizer, targets)
        for given in _in_step(batches) if isinstance(reader, FSDPModule) else batches:
            batch = given or _FILLER
            ids = batch["input_ids"].to(device, non_blocking=True)
            mask = batch["attention_mask"].to(device, non_blocking=True)
            names = [f"{file}example {index} (the first is 0)" for index in batch["index"]]
            with autocast(device, precision):
                found = reader.answer(ids, mask, options, laid_out, score, names)
            if given is None:
                continue
            answers = _as_answers(batch, found, tokenizer, reader.config.eos_token_id)
            if scorer:
                right = [right_answer(index) for index in batch["index"]]
                answers = scorer.score(answers, found, mask, right, names)
            yield answers
    finally:
        reader.train(was_training)


class _Scorer:
    """Adds to answers the scores that need the right answer, or their own.

    Errors: `InputError` if something in the reader's decoder was changed: only the scores by
        `attention` follow that.
    """

    def __init__(
        self,
        decoder: GreedyDecoder | TransformersDecoder,
        tokenizer: PreTrainedTokenizerBase,
        targets: TargetOptions,
    ):
        self._tokenizer, self._targets = tokenizer, targets
        self._names = [name for name in targets.names if name not in ("attention", "has_answer")]
        if not isinstance(decoder, GreedyDecoder):
            raise InputError(
                "something in the reader's decoder was changed, so of all --targets only attention "
                "can be computed, and no --attribution"
            )
        self._decoder = decoder

    def score(
        self,
        answers: list[Answer],
        found: Generated,
        mask: torch.Tensor,
        right: list[str | None],
        names: list[str],
    ) -> list[Answer]:
        scored = []
        rows = zip(answers, questions(found.encoded, mask), right, names, strict=True)
        for row, (answer, question, text, name) in enumerate(rows):
            n = len(question.of_passage[question.of_passage.any(dim=1)])
            question = question._replace(of_passage=question.of_passage[:n])
            tokens = found.tokens[row * found.n_best]
            real = is_answer_token(tokens[None], self._decoder.config.eos_token_id)[0]
            own = tokens[1:][real]
            values: dict[str, list] = {}
            if self._names:
                label = self._label(text, own, name)
                scores = score_passages(
                    self._decoder, question, label, self._names, self._targets.target_sum
                )
                if not self._targets.token_log_probs:
                    scores.pop("token_log_probs", None)
                values = {target: part.tolist() for target, part in scores.items()}
                if not all(part.isfinite().all() for part in scores.values()):
                    raise InputError(f"{name}: a passage's score is inf or nan; use another model")
            if self._targets.attribution:
                values["attribution"] = attribution(self._decoder, question, own).tolist()
            if answer.scores is not None:
                values["attention"] = answer.scores
            first = values.get(self._targets.names[0], answer.scores)
            scored.append(dataclasses.replace(answer, scores=first, targets=values))
        return scored

    def _label(self, text: str | None, own: torch.Tensor, name: str) -> torch.Tensor:
        """The token ids of the answer to score by."""
        if text is not None:
            ids = encode_texts(self._tokenizer, [text.rstrip()], None)[0]
            return torch.tensor([*ids, self._tokenizer.eos_token_id], device=own.device)
        if not self._targets.score_own_answer:
            raise InputError(
                f"{name}: no target and no answers to score passages by ({self._targets.targets}); "
                "add some, or --score_own_answer"
            )
        return own


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
