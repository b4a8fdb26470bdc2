"""The retriever: a BERT that embeds questions and passages, distilled from the reader.

Izacard and Grave, 2021 (https://arxiv.org/abs/2012.04584), section 3: one encoder for both sides,
the similarity is a scaled dot product, and the loss pulls the softmax of a question's similarities
towards the softmax of the reader's passage scores.

Shapes: B questions, N passages of a question, L tokens, D size of an embedding, P passages of all.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.models.lengths import MIN_TOKENS, length_groups, longest_first, token_batches
from src.models.pretrained import build, digest, from_pretrained, load_config
from src.runtime.errors import InputError, shorten


class RetrieverConfig(BertConfig):
    """BERT's shape, and how its hidden states become one embedding.

    Args:
        projection: whether a linear layer to `indexing_dimension` and a LayerNorm follow BERT.
        apply_question_mask, apply_passage_mask: whether padding is masked; without it, texts are
            always padded to their full `*_maxlength`, which every position then has a part in.
        extract_cls: take the first token's state instead of the mean over tokens.
    """

    indexing_dimension: int = 768
    projection: bool = True
    apply_question_mask: bool = False
    apply_passage_mask: bool = False
    extract_cls: bool = False
    question_maxlength: int = 40
    passage_maxlength: int = 200


class Retriever(PreTrainedModel):
    """The bi-encoder. Its weights are `model.*` (BERT), `proj.*` and `norm.*`."""

    config_class = RetrieverConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # BERT's pooler is in the reference's checkpoints, but nothing reads it.
    _keys_to_ignore_on_load_unexpected = (r"model\.pooler\.", r"embeddings\.position_ids")

    def __init__(self, config: RetrieverConfig):
        super().__init__(config)
        self.model = BertModel(config, add_pooling_layer=False)
        if config.projection:
            self.proj = nn.Linear(config.hidden_size, config.indexing_dimension)
            self.norm = nn.LayerNorm(config.indexing_dimension)
        elif config.indexing_dimension != config.hidden_size:
            raise InputError(
                f"without a projection the indexing dimension is BERT's hidden size "
                f"{config.hidden_size}, not {config.indexing_dimension}: leave out "
                "--indexing_dimension or --no_projection"
            )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)

    def embed_questions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask [B, L] -> embeddings [B, D]."""
        return self._embed(ids, mask, self.config.apply_question_mask)

    def embed_passages(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask [P, L] -> embeddings [P, D]."""
        return self._embed(ids, mask, self.config.apply_passage_mask)

    def _embed(self, ids: torch.Tensor, mask: torch.Tensor, apply_mask: bool) -> torch.Tensor:
        output = self.model(input_ids=ids, attention_mask=mask if apply_mask else None)
        states = output.last_hidden_state
        if self.config.projection:
            states = self.norm(self.proj(states))
        if self.config.extract_cls:
            return states[:, 0]
        if not apply_mask:
            return states.mean(dim=1)
        states = states.masked_fill(~mask.bool().unsqueeze(2), 0.0)
        return states.sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def forward(
        self,
        question_ids: torch.Tensor,
        question_mask: torch.Tensor,
        passage_ids: torch.Tensor,
        passage_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Questions [B, L] and their passages [B, N, L'] -> embeddings [B, D] and [B, N, D]."""
        B, N, _ = passage_ids.shape
        ids, mask = passage_ids.flatten(0, 1), passage_mask.flatten(0, 1)
        if self.config.apply_passage_mask:
            passages = self._embed_by_length(ids, mask)
        else:
            passages = self.embed_passages(ids, mask)
        return self.embed_questions(question_ids, question_mask), passages.view(B, N, -1)

    def _embed_by_length(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        order, lengths = longest_first(mask)
        parts = []
        for start, end in length_groups(lengths, 0.1, MIN_TOKENS[ids.device.type]):
            rows, width = order[start:end], lengths[start]
            parts.append(self.embed_passages(ids[rows, :width], mask[rows, :width]))
        return torch.cat(parts)[order.argsort()]


def similarities(questions: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, D] and [B, N, D] -> scaled dot products [B, N] (section 3.1)."""
    return torch.einsum("bd,bnd->bn", questions, passages) / questions.shape[-1] ** 0.5


def distillation_loss(
    scores: torch.Tensor,
    gold_scores: torch.Tensor,
    present: torch.Tensor,
    negatives: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far the retriever's distribution over passages is from the reader's (section 3.3).

    Args:
        scores: the retriever's similarities [B, N].
        gold_scores: the reader's scores [B, N].
        present: [B, N], false where a question has no such passage, which then does not count.
        negatives: similarities [B, M] to other questions' passages, -inf where one is not to
            count; their target is 0. An addition to the paper.

    Returns: the KL divergence, averaged over all present passages of all questions.
    """
    gold = gold_scores.float().masked_fill(~present, -torch.inf).softmax(dim=1)
    candidates = scores.float().masked_fill(~present, -torch.inf)
    if negatives is not None:
        candidates = torch.cat([candidates, negatives.float()], dim=1)
    log_likelihood = candidates.log_softmax(dim=1)[:, : gold.shape[1]]
    # Where the target is 0 the divergence is 0; and -inf * 0 must not become nan.
    log_likelihood = log_likelihood.masked_fill(~present, 0.0)
    divergence = torch.xlogy(gold, gold) - gold * log_likelihood
    return divergence.sum() / present.sum()


class _GatherPassages(torch.autograd.Function):
    """All processes' rows, by rank. Backward: each process's rows get every process's gradient."""

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
    """Similarities of each question to the passages of all other questions of the batch, those of
    other processes included.

    Args:
        questions, passages: embeddings [B, D] and [B, N, D].
        keys: [B, N], a number that says which passage it is; a question's own passages, wherever
            in the batch they stand again, are not its negatives.
        present: [B, N].

    Returns: [B, M], -inf for what is not a negative.
    """
    flat, flat_keys = passages.flatten(0, 1), keys.flatten()
    counts = present.flatten()
    if dist.is_initialized():
        size = torch.tensor(len(flat), device=flat.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)  # ragged batches: padded to the largest
        flat = _GatherPassages.apply(_pad_rows(flat, int(size)))
        flat_keys = _GatherPassages.apply(_pad_rows(flat_keys, int(size)))
        counts = _GatherPassages.apply(_pad_rows(counts.int(), int(size))).bool()
    scores = questions @ flat.T / questions.shape[-1] ** 0.5
    own = ((flat_keys[None, None, :] == keys[:, :, None]) & present[:, :, None]).any(dim=1)
    return scores.masked_fill(own | ~counts, -torch.inf)


def embed(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings [B, D] and [B, N, D] of a `RetrieverCollator`'s batch."""
    return model(
        batch["question_ids"], batch["question_mask"], batch["passage_ids"], batch["passage_mask"]
    )


def retriever_loss(
    model: nn.Module, batch: dict[str, Any], use_negatives: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss of a batch and the number of passages that it is the mean of."""
    questions, passages = embed(model, batch)
    present = batch["present"]
    negatives = None
    if use_negatives:
        negatives = in_batch_negatives(questions, passages, batch["passage_keys"], present)
    scores = similarities(questions, passages)
    return distillation_loss(scores, batch["gold_scores"], present, negatives), present.sum()


def gold_ranks(scores: torch.Tensor, present: torch.Tensor) -> list[list[int]]:
    """The reader's rank of each passage in the retriever's order, a list a question.

    Args:
        scores: the retriever's similarities [B, N] to passages in the reader's order.
        present: [B, N].
    """
    masked = scores.masked_fill(~present, -torch.inf)
    order = masked.argsort(dim=1, descending=True, stable=True).tolist()
    return [ranks[:n] for ranks, n in zip(order, present.sum(dim=1).tolist(), strict=True)]


def fingerprint(retriever: Retriever) -> str:
    """A short text that two retrievers share exactly when they embed everything alike."""
    names = sorted(RetrieverConfig.__annotations__)
    return digest(retriever, [f"{name} {getattr(retriever.config, name)}" for name in names])


class TextEmbedder:
    """Embeds texts, those of like length together, and gives the embeddings in the texts' order.

    A batch has as many tokens, with its padding, as `batch_size` texts of `max_length`.

    Args:
        side: "questions" or "passages".
        max_length: tokens of a text; the rest is cut off.
    """

    def __init__(
        self,
        retriever: Retriever,
        tokenizer: PreTrainedTokenizerBase,
        side: str,
        max_length: int,
        batch_size: int,
        device: torch.device,
    ):
        is_question = side == "questions"
        config = retriever.config
        apply_mask = config.apply_question_mask if is_question else config.apply_passage_mask
        if max_length > config.max_position_embeddings:
            raise InputError(
                f"this retriever reads at most {config.max_position_embeddings} tokens, not "
                f"{max_length}: lower --{side[:-1]}_maxlength"
            )
        self._embed = retriever.embed_questions if is_question else retriever.embed_passages
        self._tokenizer, self._max_length = tokenizer, max_length
        self._shortest = 1 if apply_mask else max_length  # a mean over padding needs all of it
        self._most_tokens = batch_size * max_length
        self._dimension, self._device = config.indexing_dimension, device
        self._dtype = next(retriever.parameters()).dtype

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embeddings [len(texts), D] in the model's number format."""
        return self.begin(self.tokenize(texts))()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The texts' tokens. (It can be another thread's work, but not that of two at a time.)"""
        if not texts:
            return []
        tokens = self._tokenizer(texts, truncation=True, max_length=self._max_length)
        return tokens["input_ids"]

    @torch.no_grad()
    def begin(self, tokens: list[list[int]]) -> Callable[[], np.ndarray]:
        """Begin to embed tokenized texts. The function that is returned waits for the embeddings
        [len(tokens), D]; until it is called, a GPU computes while the caller does something else.
        """
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]), reverse=True)
        lengths = [max(self._shortest, len(tokens[row])) for row in order]
        parts = [torch.empty(0, self._dimension, dtype=self._dtype, device=self._device)]
        for start, end in token_batches(lengths, self._most_tokens):
            ids, mask = self._pad([tokens[row] for row in order[start:end]], lengths[start])
            parts.append(self._embed(ids, mask))
        found, wait = _copy_to_cpu(torch.cat(parts))

        def finish() -> np.ndarray:
            wait()
            rows = np.empty(found.shape, found.numpy().dtype)
            rows[order] = found.numpy()
            return rows

        return finish

    def _pad(self, tokens: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([len(text) for text in tokens])
        mask = torch.arange(length) < lengths[:, None]
        ids = torch.full((len(tokens), length), self._tokenizer.pad_token_id)
        ids[mask] = torch.tensor(list(itertools.chain.from_iterable(tokens)))
        if self._device.type == "cuda":  # from pinned memory, the copies do not wait for the GPU
            ids, mask = ids.pin_memory(), mask.pin_memory()
        return ids.to(self._device, non_blocking=True), mask.to(self._device, non_blocking=True)


def _copy_to_cpu(rows: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """Begin to copy; gives the copy and a function that waits until it is there."""
    if rows.device.type != "cuda":
        return rows, lambda: None
    copied = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copied.copy_(rows, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return copied, there.synchronize


# ----------------------------------------------------------------------------------------------
# Loading


def load_retriever(path: str, dropout: float | None = None) -> Retriever:
    """A retriever from a checkpoint of ours or of the reference, or from any BERT by folder or hub
    name that has no settings of a retriever (Contriever's, for one): then without projection, mean
    over real tokens. DPR's question encoder is read too, by its first token."""
    config = load_config(path, "bert", "dpr")
    if config.model_type == "dpr":
        return _load_dpr(path, config, dropout)
    if not hasattr(config, "indexing_dimension"):
        return start_retriever(path, dropout, projection=False)
    config = RetrieverConfig(**config.to_dict())
    _set_dropout(config, dropout)
    return from_pretrained(Retriever, path, config)


def _load_dpr(path: str, dpr: PreTrainedConfig, dropout: float | None) -> Retriever:
    """DPR's question encoder (Karpukhin et al., 2020, section 3), to search its own embeddings."""
    if dpr.architectures != ["DPRQuestionEncoder"] or dpr.projection_dim:
        raise InputError(
            f"{path}: of DPR's models, question encoders without a projection can be used, not "
            f"{shorten(dpr.architectures)}; give one, and the passages' embeddings as DPR's pickles"
        )
    shape = {key: value for key, value in dpr.to_dict().items() if key != "model_type"}
    settings = {"projection": False, "indexing_dimension": dpr.hidden_size, "extract_cls": True}
    settings |= {"apply_question_mask": True, "apply_passage_mask": True}
    config = RetrieverConfig(**{**shape, **settings})
    _set_dropout(config, dropout)
    retriever = build(Retriever, path, config)
    bert = from_pretrained(
        BertModel,
        path,
        BertConfig(**shape),
        add_pooling_layer=False,
        key_mapping={r"^question_encoder\.bert_model\.": ""},
    )
    retriever.model.load_state_dict(bert.state_dict())
    return retriever


def check_settings(config: RetrieverConfig, settings: dict[str, Any], path: str) -> None:
    """An existing retriever keeps its settings: asking for others is an error."""
    for name, wanted in settings.items():
        if getattr(config, name) != wanted:
            raise InputError(
                f"{path}: this retriever has {name} {getattr(config, name)}, not {wanted}; leave "
                "that option out, or start a new one with --retriever_model"
            )


def start_retriever(path: str, dropout: float | None = None, **settings: Any) -> Retriever:
    """A retriever around a pretrained BERT, or around fresh weights if `path` is a config file.

    Args:
        settings: fields of `RetrieverConfig`; masks are applied unless they say otherwise, and
            without a projection the indexing dimension is BERT's hidden size.
    """
    config = load_config(path, "bert")
    if hasattr(config, "indexing_dimension") and not Path(path).is_file():
        raise InputError(f"{path}: a retriever already, not a BERT; give it with --model_path")
    defaults = {"apply_question_mask": True, "apply_passage_mask": True}
    if not settings.get("projection", True):
        defaults["indexing_dimension"] = config.hidden_size
    config = RetrieverConfig(**{**config.to_dict(), **defaults, **settings})
    _set_dropout(config, dropout)
    retriever = build(Retriever, path, config)
    if not Path(path).is_file():
        bert_config = BertConfig(**load_config(path, "bert").to_dict())
        bert = from_pretrained(BertModel, path, bert_config, add_pooling_layer=False)
        retriever.model.load_state_dict(bert.state_dict())
    longest = max(config.question_maxlength, config.passage_maxlength)
    if longest > config.max_position_embeddings:
        raise InputError(
            f"{path}: reads at most {config.max_position_embeddings} tokens, not {longest}; "
            "lower --question_maxlength or --passage_maxlength"
        )
    return retriever


def _set_dropout(config: RetrieverConfig, dropout: float | None) -> None:
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
