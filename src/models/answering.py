"""A reader's answers to batches of questions, as texts with their probabilities."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from src.data.batches import encode_texts
from src.models.decoder import GreedyDecoder, is_answer_token
from src.models.pretrained import decode_answers
from src.models.reader import FiDT5, Generated
from src.models.targets import Question, attribution, questions, score_passages
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
    while distributed.any_process((batch := next(own, None)) is not None):
        yield batch


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
        score_by = None
        if with_scores and (targets.needs_answer or targets.attribution):
            is_exact = precision == "fp32" and isinstance(laid_out, GreedyDecoder)
            decoder = laid_out if is_exact else reader.decoder()
            score_by = functools.partial(_with_targets, decoder, tokenizer, targets)
            if not isinstance(decoder, GreedyDecoder):
                raise InputError(
                    "something in the reader's decoder was changed, so of all --targets only "
                    "attention can be computed, and no --attribution"
                )
        for given in _in_step(batches) if isinstance(reader, FSDPModule) else batches:
            batch = given or _FILLER
            ids = batch["input_ids"].to(device, non_blocking=True)
            mask = batch["attention_mask"]  # on the CPU, where the reader looks at it first
            names = [f"{file}example {index} (the first is 0)" for index in batch["index"]]
            with autocast(device, precision):
                found = reader.answer(ids, mask, options, laid_out, score, names)
            if given is None:
                continue
            answers = _as_answers(batch, found, tokenizer, reader.config.eos_token_id)
            if score_by:
                best = found.tokens[:: found.n_best]
                asked = questions(found.encoded, mask.to(device))
                read = zip(answers, asked, best, names, strict=True)
                answers = [score_by(*one, right_answer(one[0].index)) for one in read]
            yield answers
    finally:
        reader.train(was_training)


def _with_targets(
    decoder: GreedyDecoder,
    tokenizer: PreTrainedTokenizerBase,
    targets: TargetOptions,
    answer: Answer,
    question: Question,
    tokens: torch.Tensor,
    name: str,
    right: str | None,
) -> Answer:
    """The answer, of these tokens [T], with the scores that need the right answer or this one."""
    n = int(question.of_passage.any(dim=1).sum())
    question = question._replace(of_passage=question.of_passage[:n])
    own = tokens[1:][is_answer_token(tokens[None], decoder.config.eos_token_id)[0]]
    values: dict[str, list] = {}
    if wanted := [target for target in targets.names if target not in ("attention", "has_answer")]:
        if right is not None:
            ids = encode_texts(tokenizer, [right.rstrip()], None)[0]
            label = torch.tensor([*ids, tokenizer.eos_token_id], device=own.device)
        elif targets.score_own_answer:
            label = own
        else:
            problem = f"no target and no answers to score passages by ({targets.targets})"
            raise InputError(f"{name}: {problem}; add some, or --score_own_answer")
        scores = score_passages(decoder, question, label, wanted, targets.target_sum)
        if not targets.token_log_probs:
            scores.pop("token_log_probs", None)
        if not all(part.isfinite().all() for part in scores.values()):
            raise InputError(f"{name}: a passage's score is inf or nan; use another model")
        values = {target: part.tolist() for target, part in scores.items()}
    if targets.attribution:
        values["attribution"] = attribution(decoder, question, own).tolist()
    if answer.scores is not None:
        values["attention"] = answer.scores
    first = values.get(targets.names[0], answer.scores)
    return dataclasses.replace(answer, scores=first, targets=values)


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
