"""Losses: of the reader, and of the retriever, which learns from the reader's passage scores.

Add a distillation loss by writing a function like `kl_divergence` and putting it into
`DISTILLATION_LOSSES`; training and the dev loss both use the table.

Shapes: B questions, N passages of a question, D size of an embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from src.models.retriever import similarities
from src.runtime.errors import InputError


def reader_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy of a batch's label tokens, and their number."""
    loss, _ = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return loss, (batch["labels"] != -100).sum()


def retriever_loss(
    model: nn.Module, batch: dict[str, Any], use_negatives: bool = False, name: str = "kl"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of a batch's passages, and their number (see `compare_to_reader`)."""
    loss, count, _ = compare_to_reader(model, batch, use_negatives, name)
    return loss, count


def compare_to_reader(
    model: nn.Module, batch: dict[str, Any], use_negatives: bool = False, name: str = "kl"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train or evaluate on a `RetrieverCollator`'s batch: the mean of the loss `name` over its
    passages, their number, and the similarities [B, N]."""
    questions, passages = model(
        batch["question_ids"], batch["question_mask"], batch["passage_ids"], batch["passage_mask"]
    )
    present, negatives = batch["present"], None
    if use_negatives:
        negatives = in_batch_negatives(questions, passages, batch["passage_keys"], present)
    scores = similarities(questions, passages)
    loss = DISTILLATION_LOSSES[name](scores, batch["gold_scores"], present, negatives)
    return loss, present.sum(), scores


def check_dev_loss(not_finite: list[int], file: str) -> None:
    """Errors: `InputError` if there are examples in batches whose loss was not finite."""
    if not_finite:
        raise InputError(
            f"{file}: the dev loss of a batch that begins with example {not_finite[0]} (the first "
            "is 0) is inf or nan; use --precision bf16 or fp32, and scores below 1e38 in size"
        )


def kl_divergence(
    scores: torch.Tensor,
    gold_scores: torch.Tensor,
    present: torch.Tensor,
    negatives: torch.Tensor | None = None,
) -> torch.Tensor:
    """The divergence of the retriever's distribution over passages from the reader's (Izacard and
    Grave, 2021, https://arxiv.org/abs/2012.04584, section 3.3), averaged over all passages.

    Args:
        scores: the retriever's similarities [B, N].
        gold_scores: the reader's scores [B, N].
        present: [B, N], false where a question has no such passage; it is not counted.
        negatives: similarities [B, M] to other questions' passages, -inf for those not to count;
            their target is 0. An addition to the paper.
    """
    gold = gold_scores.float().masked_fill(~present, -torch.inf).softmax(dim=1)
    gold = gold.masked_fill(~present, 0.0)  # also where a question has no passages at all
    candidates = scores.float().masked_fill(~present, -torch.inf)
    if negatives is not None:
        candidates = torch.cat([candidates, negatives.float()], dim=1)
    log_likelihood = candidates.log_softmax(dim=1)[:, : gold.shape[1]]
    # A passage with target 0 adds nothing, and -inf * 0 must not become nan.
    log_likelihood = log_likelihood.masked_fill(~present, 0.0)
    divergence = torch.xlogy(gold, gold) - gold * log_likelihood
    return divergence.sum() / present.sum().clamp(min=1)


DISTILLATION_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"kl": kl_divergence}


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
    filler = rows.new_zeros(n - rows.shape[0], *rows.shape[1:])
    return torch.cat([rows, filler])


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
    flat, flat_keys = passages.flatten(0, 1), keys.flatten()
    counts = present.flatten()
    if dist.is_initialized():
        size = torch.tensor(len(flat), device=flat.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)  # padded to the largest part
        flat = _GatherPassages.apply(_pad_rows(flat, int(size)))
        flat_keys = _GatherPassages.apply(_pad_rows(flat_keys, int(size)))
        counts = _GatherPassages.apply(_pad_rows(counts.int(), int(size))).bool()
    scores = similarities(questions, flat)
    own = ((flat_keys[None, None, :] == keys[:, :, None]) & present[:, :, None]).any(dim=1)
    return scores.masked_fill(own | ~counts, -torch.inf)
