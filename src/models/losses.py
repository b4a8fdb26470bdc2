"""Losses: of the reader, and of the retriever, which learns from the reader's passage scores.

Add a distillation loss by writing a function like `kl_divergence` and putting it into
`DISTILLATION_LOSSES`; training, the dev loss and the options use the table.

Shapes: B questions, N passages of a question, D size of an embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from src.models.retriever import similarities
from src.options import LossOptions
from src.runtime.errors import InputError

KL = LossOptions()
_NEVER = -1e30  # a log-probability; unlike -inf, it has a gradient where there is nothing else


def reader_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The mean cross-entropy of a batch's label tokens, and the logits."""
    return model(batch["input_ids"], batch["attention_mask"], batch["labels"])


def count_labels(batch: dict[str, Any]) -> torch.Tensor:
    """How many tokens `reader_loss` is the mean of."""
    return (batch["labels"] != -100).sum()


def count_elements(batch: dict[str, Any], options: LossOptions = KL) -> torch.Tensor:
    """How many elements `retriever_loss` is the mean of: as many for any similarities."""
    return DISTILLATION_LOSSES[options.loss](batch["gold_scores"], batch, options, None)[1]


def retriever_loss(
    model: nn.Module,
    batch: dict[str, Any],
    options: LossOptions = KL,
    use_negatives: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train or evaluate on a `RetrieverCollator`'s batch: the mean loss, the number of elements
    that it is the mean of, and the similarities [B, N]."""
    questions, passages = model(
        batch["question_ids"], batch["question_mask"], batch["passage_ids"], batch["passage_mask"]
    )
    negatives = None
    if use_negatives:
        keys, present = batch["passage_keys"], batch["present"]
        negatives = in_batch_negatives(questions, passages, keys, present)
    scores = similarities(questions, passages)
    loss, count = DISTILLATION_LOSSES[options.loss](scores, batch, options, negatives)
    return loss, count, scores


def check_dev_loss(not_finite: list[int], file: str) -> None:
    """Errors: `InputError` if there are examples in batches whose loss was not finite."""
    if not_finite:
        raise InputError(
            f"{file}: the dev loss of a batch that begins with example {not_finite[0]} (the first "
            "is 0) is inf or nan; use --precision bf16 or fp32, and scores below 1e38 in size"
        )


# Each loss takes the similarities [B, N]; the batch, whose `gold_scores` [B, N] are the target and
# whose `present` [B, N] is false where a question has no such passage (it counts nowhere); the
# options; and similarities [B, M] to other questions' passages, -inf for those not to count, or
# None. It returns the mean over its elements and their number.
Loss = tuple[torch.Tensor, torch.Tensor]


def _mean(values: torch.Tensor, counted: torch.Tensor) -> Loss:
    """The mean of the values that are counted, and their number."""
    n = counted.sum()
    return values.masked_fill(~counted, 0.0).sum() / n.clamp(min=1), n


def _log_probs(
    scores: torch.Tensor,
    present: torch.Tensor,
    options: LossOptions,
    negatives: torch.Tensor | None = None,
) -> torch.Tensor:
    """The log-softmax [B, N] of scores over a question's passages and the negatives; 0 for missing
    passages, because -inf times a target of 0 would be nan."""
    candidates = scores.float().masked_fill(~present, -torch.inf)
    if negatives is not None:
        candidates = torch.cat([candidates, negatives.float()], dim=1)
    log_probs = (candidates / options.temperature).log_softmax(dim=1)[:, : scores.shape[1]]
    return log_probs.masked_fill(~present, 0.0)


def kl_divergence(
    scores: torch.Tensor,
    batch: dict[str, Any],
    options: LossOptions = KL,
    negatives: torch.Tensor | None = None,
) -> Loss:
    """The divergence of the retriever's distribution over passages from the reader's (Izacard and
    Grave, 2021, https://arxiv.org/abs/2012.04584, section 3.3), averaged over all passages. The
    target of negatives is 0: an addition to the paper."""
    present = batch["present"]
    gold = batch["gold_scores"].float() / options.target_temperature
    gold = gold.masked_fill(~present, -torch.inf).softmax(dim=1)
    gold = gold.masked_fill(~present, 0.0)  # also where a question has no passages at all
    log_probs = _log_probs(scores, present, options, negatives)
    return _mean(torch.xlogy(gold, gold) - gold * log_probs, present)


def mean_squared_error(
    scores: torch.Tensor, batch: dict[str, Any], options: LossOptions, negatives: None = None
) -> Loss:
    """Of the similarities as estimates of the targets, averaged over all passages (2021 paper,
    section 3.3)."""
    return _mean((scores.float() - batch["gold_scores"]).square(), batch["present"])


def margin(
    scores: torch.Tensor, batch: dict[str, Any], options: LossOptions, negatives: None = None
) -> Loss:
    """By how much each pair of a question's passages misses the margin in the target's order,
    summed over pairs and averaged over questions (2021 paper, section 3.3; the averaging is our
    choice)."""
    present, gold, scores = batch["present"], batch["gold_scores"], scores.float()
    order = torch.sign(gold[:, :, None] - gold[:, None])
    misses = (options.margin - order * (scores[:, :, None] - scores[:, None])).clamp(min=0)
    pairs = (present[:, :, None] & present[:, None]).triu(diagonal=1)
    return _mean(misses.masked_fill(~pairs, 0.0).sum(dim=(1, 2)), present.any(dim=1))


def emdr2(
    scores: torch.Tensor, batch: dict[str, Any], options: LossOptions, negatives: None = None
) -> Loss:
    """Minus the log-likelihood of the answer's tokens, each marginalised over passages, averaged
    over tokens: EMDR2 (Sachan et al., 2021, https://arxiv.org/abs/2106.05346) as its authors'
    code and Atlas compute it."""
    tokens, present = batch["token_log_probs"], batch["present"]  # [B, N, T]
    joint = tokens + _log_probs(scores, present, options)[:, :, None]
    likelihood = joint.masked_fill(~present[:, :, None], _NEVER).logsumexp(dim=1)
    return _mean(-likelihood, batch["token_mask"] & present.any(dim=1, keepdim=True))


def emdr2_sequence(
    scores: torch.Tensor, batch: dict[str, Any], options: LossOptions, negatives: None = None
) -> Loss:
    """The same for the answer as a whole, averaged over questions: as in the paper, section 2.3."""
    present = batch["present"]
    answers = (batch["token_log_probs"] * batch["token_mask"][:, None]).sum(dim=2)
    joint = answers + _log_probs(scores, present, options)
    likelihood = joint.masked_fill(~present, _NEVER).logsumexp(dim=1)
    return _mean(-likelihood, present.any(dim=1))


def contrastive(
    scores: torch.Tensor,
    batch: dict[str, Any],
    options: LossOptions,
    negatives: torch.Tensor | None = None,
) -> Loss:
    """Minus the log of the probability of the passages whose target is positive, averaged over the
    questions that have one (as in DPR: Karpukhin et al., 2020,
    https://arxiv.org/abs/2004.04906, section 3.2, where there is one)."""
    positive = (batch["gold_scores"] > 0) & batch["present"]
    log_probs = _log_probs(scores, batch["present"], options, negatives)
    likelihood = log_probs.masked_fill(~positive, _NEVER).logsumexp(dim=1)
    return _mean(-likelihood, positive.any(dim=1))


DISTILLATION_LOSSES: dict[str, Callable[..., Loss]] = {
    "kl": kl_divergence,
    "mse": mean_squared_error,
    "margin": margin,
    "emdr2": emdr2,
    "emdr2_sequence": emdr2_sequence,
    "contrastive": contrastive,
}


class _GatherPassages(torch.autograd.Function):
    """All processes' rows, by rank; backward, the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.n_rows = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.n_rows
        return gradient[first : first + ctx.n_rows]


def _pad_rows(rows: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


def in_batch_negatives(
    questions: torch.Tensor, passages: torch.Tensor, keys: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Similarities [B, M] of each question to the passages of all questions of the batch, in all
    processes (which all have to call it); -inf where a passage is not a negative.

    Args:
        questions, passages: embeddings [B, D] and [B, N, D].
        keys: [B, N], equal numbers for equal passages; a question's own passages are not its
            negatives, wherever in the batch they occur.
        present: [B, N].
    """
    parts = [passages.flatten(0, 1), keys.flatten(), present.flatten().int()]
    if dist.is_initialized():
        size = torch.tensor(keys.numel(), device=keys.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)  # padded to the largest part
        parts = [_GatherPassages.apply(_pad_rows(part, int(size))) for part in parts]
    all_passages, all_keys, counts = parts
    own = ((all_keys == keys[:, :, None]) & present[:, :, None]).any(dim=1)
    return similarities(questions, all_passages).masked_fill(own | (counts == 0), -torch.inf)
