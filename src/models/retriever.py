"""The retriever: a BERT that embeds questions and passages, distilled from the reader.

Izacard and Grave, 2021 (https://arxiv.org/abs/2012.04584), section 3: one encoder for both sides,
the similarity is a scaled dot product, and the loss pulls the softmax of a question's similarities
towards the softmax of the reader's passage scores.

Shapes: B questions, N passages of a question, L tokens, D size of an embedding, P passages of all.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.models.lengths import MIN_TOKENS, length_groups, longest_first
from src.models.pretrained import (
    build,
    check_vocabulary,
    digest,
    from_pretrained,
    load_config,
    load_tokenizer,
    quiet_transformers,
)
from src.runtime.device import full_precision
from src.runtime.errors import InputError, shorten


class RetrieverConfig(BertConfig):
    """BERT's shape, and how its hidden states become one embedding.

    Args:
        projection: whether a linear layer to `indexing_dimension` and a LayerNorm follow BERT.
        apply_question_mask, apply_passage_mask: whether padding is masked; without it, texts are
            always padded to `*_maxlength`, and all positions count.
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
        states = states.float()  # sums of autocast's bf16 would lose digits
        if self.config.extract_cls:
            pooled = states[:, 0]
        elif apply_mask:
            states = states.masked_fill(~mask.bool().unsqueeze(2), 0.0)
            pooled = states.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        else:
            pooled = states.mean(dim=1)
        return pooled.to(self.dtype)  # of the weights: half when embedding on a GPU

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
        # (One group if sharded: FSDP needs the same number of calls in every process.)
        slack = 1.0 if isinstance(self, FSDPModule) else 0.1
        for start, end in length_groups(lengths, slack, MIN_TOKENS[ids.device.type]):
            rows, width = order[start:end], lengths[start]
            parts.append(self.embed_passages(ids[rows, :width], mask[rows, :width]))
        return torch.cat(parts)[order.argsort()]


def similarities(questions: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, D] and passages [B, N, D] or [M, D] -> scaled dot products (section 3.1)
    [B, N] or [B, M], in float32 also inside autocast."""
    with full_precision(questions.device):
        questions, passages = questions.float(), passages.float()
        formula = "bd,bnd->bn" if passages.dim() == 3 else "bd,md->bm"
        return torch.einsum(formula, questions, passages) / questions.shape[-1] ** 0.5


def gold_ranks(scores: torch.Tensor, present: torch.Tensor) -> list[list[int]]:
    """The retriever's similarities [B, N] to passages in the reader's order (those `present`
    [B, N]) -> for each question, the reader's ranks in the retriever's order."""
    masked = scores.masked_fill(~present, -torch.inf)
    order = masked.argsort(dim=1, descending=True, stable=True).tolist()
    return [ranks[:n] for ranks, n in zip(order, present.sum(dim=1).tolist(), strict=True)]


def fingerprint(retriever: Retriever) -> str:
    """A short text, equal for two retrievers if and only if they embed everything alike."""
    names = sorted(RetrieverConfig.__annotations__)
    return digest(retriever, [f"{name} {getattr(retriever.config, name)}" for name in names])


# ----------------------------------------------------------------------------------------------
# Loading


def open_retriever(
    path: str, tokenizer: str, option: str = "--tokenizer"
) -> tuple[Retriever, PreTrainedTokenizerBase]:
    """A retriever with its tokenizer or, if it has none, the one that an option names."""
    quiet_transformers()
    retriever = load_retriever(path)
    fallback = tokenizer if tokenizer != "none" else "bert-base-uncased"
    own_tokenizer = load_tokenizer(path, fallback, option)
    check_vocabulary(retriever.config, own_tokenizer, option)
    return retriever, own_tokenizer


def load_retriever(path: str, dropout: float | None = None) -> Retriever:
    """A retriever by folder or hub name: a checkpoint of ours or of the reference; any other BERT
    (such as Contriever), without projection and by the mean over real tokens; or DPR's question
    encoder (Karpukhin et al., 2020, section 3), by its first token."""
    bert = load_config(path, "bert", "dpr")
    if bert.model_type == "dpr":
        if bert.architectures != ["DPRQuestionEncoder"] or bert.projection_dim:
            raise InputError(
                f"{path}: of DPR's models, only question encoders without a projection can be "
                f"used, not {shorten(bert.architectures)}; give one, and the passages' embeddings "
                "as DPR's pickles"
            )
        return _around_bert(path, bert, dropout, projection=False, extract_cls=True)
    if not hasattr(bert, "indexing_dimension"):
        return start_retriever(path, dropout, projection=False)
    return from_pretrained(Retriever, path, _retriever_config(bert, dropout))


def start_retriever(path: str, dropout: float | None = None, **settings: Any) -> Retriever:
    """A retriever around a pretrained BERT, or around fresh weights if `path` is a config file.

    Args: settings: fields of `RetrieverConfig`; masks are applied by default, and without a
        projection the indexing dimension is BERT's hidden size.
    """
    bert = load_config(path, "bert")
    if hasattr(bert, "indexing_dimension") and not Path(path).is_file():
        raise InputError(f"{path}: a retriever already, not a BERT; give it with --model_path")
    retriever = _around_bert(path, bert, dropout, **settings)
    config = retriever.config
    longest = max(config.question_maxlength, config.passage_maxlength)
    if longest > config.max_position_embeddings:
        raise InputError(
            f"{path}: reads at most {config.max_position_embeddings} tokens, not {longest}; "
            "lower --question_maxlength or --passage_maxlength"
        )
    return retriever


def check_settings(config: RetrieverConfig, settings: dict[str, Any], path: str) -> None:
    """An existing retriever keeps its settings: asking for others is an error."""
    for name, wanted in settings.items():
        if getattr(config, name) != wanted:
            raise InputError(
                f"{path}: this retriever has {name} {getattr(config, name)}, not {wanted}; leave "
                "that option out, or start a new one with --retriever_model"
            )


def _around_bert(
    path: str, bert: PreTrainedConfig, dropout: float | None, **settings: Any
) -> Retriever:
    """A retriever around the BERT at `path`, which has this config; fresh if that is its file."""
    defaults = {"apply_question_mask": True, "apply_passage_mask": True}
    if not settings.get("projection", True):
        defaults["indexing_dimension"] = bert.hidden_size
    retriever = build(Retriever, path, _retriever_config(bert, dropout, **defaults | settings))
    if not Path(path).is_file():
        weights = from_pretrained(
            BertModel,
            path,
            BertConfig(**_shape(bert)),
            add_pooling_layer=False,
            key_mapping={r"^question_encoder\.bert_model\.": ""},  # DPR's
        )
        retriever.model.load_state_dict(weights.state_dict())
    return retriever


def _retriever_config(
    bert: PreTrainedConfig, dropout: float | None, **settings: Any
) -> RetrieverConfig:
    config = RetrieverConfig(**_shape(bert) | settings)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return config


def _shape(bert: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in bert.to_dict().items() if key != "model_type"}
