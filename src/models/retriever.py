"""The retriever: an encoder that embeds questions and passages, distilled from the reader.

Izacard and Grave, 2021 (https://arxiv.org/abs/2012.04584), section 3: one encoder for both sides,
the similarity is a scaled dot product, and the loss pulls the softmax of a question's similarities
towards the softmax of the reader's passage scores. Or two encoders, one for each side, as in DPR
(Karpukhin et al., 2020, https://arxiv.org/abs/2004.04906, section 3).

Shapes: B questions, N passages of a question, L tokens, D size of an embedding, P passages of all.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import normalize
from transformers import (
    MODEL_MAPPING,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.data.batches import passage_text, question_text
from src.models import encoders
from src.models.dropout import use_fast_dropout
from src.models.lengths import MIN_TOKENS, length_groups, longest_first
from src.models.pretrained import (
    build,
    check_vocabulary,
    digest,
    encoder_folder,
    load_config,
    load_tokenizer,
    open_weights,
    quiet_transformers,
    read_model_json,
)
from src.models.stored import FreshWeights, Sources, fit, with_weights
from src.runtime.device import full_precision
from src.runtime.errors import InputError

PASSAGE_TOWER = "passage_encoder"  # the folder of a second tower, in that of the first
# The names of weights by the original code and our earlier versions, and by DPR.
_OTHERS = r"^model\.|^(question|ctx)_encoder\.bert_model\."
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
_DROPOUTS += ("embedding_dropout", "mlp_dropout")


class Retriever(nn.Module):
    """The bi-encoder. Its weights are `model.*` (the encoder), `proj.*`, `norm.*`, `head.*`, and
    with two towers `passage_tower.*`, a retriever of its own.

    Args: config: the encoder's, with the fields of `encoders.Settings`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config, self.passage_tower = config, None
        self.sources: Sources = {}  # of weights that are still to be read
        self.skip = {"questions": 0, "passages": 0}  # tokens that are not pooled
        kind, without_pooler = _encoder_class(config)
        self.model = kind(config, **without_pooler)
        use_fast_dropout(self.model)
        self.head = encoders.make_head(config)
        if config.projection:
            self.proj = nn.Linear(config.hidden_size, config.indexing_dimension)
            self.norm = nn.LayerNorm(config.indexing_dimension)
            nn.init.normal_(self.proj.weight, std=config.initializer_range)
            nn.init.zeros_(self.proj.bias)
        elif config.indexing_dimension != _pooled_size(config):
            raise InputError(
                f"without a projection the indexing dimension is the encoder's hidden size "
                f"{config.hidden_size}, not {config.indexing_dimension}: leave out "
                "--indexing_dimension or --no_projection"
            )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of its encoder, or of both."""
        lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList)]
        own = next(part for part in lists if len(part) == self.config.num_hidden_layers)
        return [*own, *(self.passage_tower.layers if self.passage_tower else [])]

    @property
    def texts(self) -> tuple[Callable[[str], str], Callable[..., str]]:
        """What writes its questions, and its passages: title, text, whether to use the title."""
        of, separator = self.config, self.config.title_separator
        passage = functools.partial(passage_text, prefix=of.passage_prefix, separator=separator)
        return functools.partial(question_text, prefix=of.question_prefix), passage

    def embed_questions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask [B, L] -> embeddings [B, D]."""
        return self._embed(ids, mask, self.config.apply_question_mask, self.skip["questions"])

    def embed_passages(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask [P, L] -> embeddings [P, D]."""
        tower = self if self.passage_tower is None else self.passage_tower
        return tower._embed(ids, mask, self.config.apply_passage_mask, self.skip["passages"])

    def _embed(
        self, ids: torch.Tensor, mask: torch.Tensor | None, apply_mask: bool, skip: int
    ) -> torch.Tensor:
        given = mask = mask if apply_mask else None
        c = self.model.config
        if mask is not None and c._attn_implementation == "sdpa" and c.model_type != "modernbert":
            # Of a mask [P, L], Transformers asks whether it masks anything: a GPU would wait.
            given = mask.bool()[:, None, None]
        states = self.model(input_ids=ids, attention_mask=given).last_hidden_state
        if self.config.projection:
            states = self.norm(self.proj(states))
        # Sums of autocast's bf16 would lose digits.
        pooled = encoders.pool(states.float(), mask, self.config.pooling, skip)
        for layer in self.head:
            pooled = layer(pooled.to(self.dtype)).float()
        if self.config.normalize:
            pooled = normalize(pooled, dim=1)
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

    def begin_training(self, tokenizer: PreTrainedTokenizerBase, two_towers: bool) -> None:
        """Embed both sides from now on: with two towers, passages by a copy of the encoder."""
        self.config.side = None  # also a question encoder of DPR learns to embed passages
        if two_towers and self.passage_tower is None:
            self.passage_tower = copy.deepcopy(self)
            self.sources |= {f"passage_tower.{name}": w for name, w in self.sources.items()}
            self.passage_tower.config.side, self.config.two_towers = "passages", True
        self.skip_prefixes(tokenizer)

    def skip_prefixes(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Unless the tokens of prefixes are to be pooled, count them."""
        for side in self.skip if not self.config.pool_prefix else ():
            prefix = getattr(self.config, f"{side[:-1]}_prefix")
            ids = tokenizer(prefix)["input_ids"] if prefix else []
            self.skip[side] = len(ids) - bool(ids and ids[-1] in tokenizer.all_special_ids)

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write config and weights (of `state_dict`, if this process does not have all of them), so
        that Transformers opens the encoder, under its own names, and sentence-transformers opens
        the retriever, or else refuses to. A second tower has a folder of the same kind."""
        state, tower = self.state_dict() if state_dict is None else state_dict, "passage_tower."
        weights = {name.removeprefix("model."): tensor for name, tensor in state.items()
                   if not name.startswith(tower)}  # fmt: skip
        self.model.save_pretrained(folder, state_dict=dict(weights))
        encoders.write_modules(self.config, weights, Path(folder))
        if self.passage_tower is not None:
            of_tower = {k.removeprefix(tower): v for k, v in state.items() if k.startswith(tower)}
            self.passage_tower.save_pretrained(Path(folder) / PASSAGE_TOWER, of_tower)


def _pooled_size(config: PreTrainedConfig) -> int:
    return config.head[-1]["size"] if config.head else config.hidden_size


def _encoder_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], dict[str, bool]]:
    """The class of the encoder, and what it takes to leave out a pooler, which nothing reads."""
    kind = MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in inspect.signature(kind).parameters
    return kind, {"add_pooling_layer": False} if has_pooler else {}


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


def fingerprint(retriever: Retriever, side: str = "passages") -> str:
    """A short text, equal for two retrievers if and only if they embed everything of this side
    ("questions" or "passages") alike."""
    tower = retriever if side == "questions" else retriever.passage_tower or retriever
    return digest(tower, encoders.describe(retriever.config), without="passage_tower.")


def text_settings(config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What embeddings record of a retriever's texts, and of the settings given by options."""
    is_plain = config.question_prefix == config.passage_prefix == ""
    kept = {name: given[name] for name in given if not (is_plain and name.endswith("_prefix"))}
    return {"plain_text": is_plain} | kept | ({"side": config.side} if config.side else {})


# ----------------------------------------------------------------------------------------------
# Loading


def open_retriever(
    path: str, tokenizer: str, option: str = "--tokenizer", **settings: Any
) -> tuple[Retriever, PreTrainedTokenizerBase]:
    """A retriever (see `load_retriever`) with its tokenizer or, if it has none, the one that an
    option names."""
    retriever = load_retriever(path, **settings)
    fallback = tokenizer if tokenizer != "none" else "bert-base-uncased"
    own_tokenizer = load_tokenizer(path, fallback, option)
    check_vocabulary(retriever.config, own_tokenizer, option)
    retriever.skip_prefixes(own_tokenizer)
    return retriever, own_tokenizer


def load_retriever(
    path: str, dropout: float | None = None, by_shares: bool = False, **settings: Any
) -> Retriever:
    """A retriever by folder or hub name: a checkpoint of ours or of the original code; a folder of
    sentence-transformers; a question or context encoder of DPR; or any other encoder, without
    projection and, unless the settings say otherwise, by the mean over real tokens.

    Args:
        by_shares: leave the weights on the meta device; `training/sharding.py` reads them.
        settings: `pooling`, `normalize`, `question_prefix` and `passage_prefix`, for folders that
            do not say. Errors: `InputError` if the folder says something else.
    """
    quiet_transformers()
    encoder = encoder_folder(path)
    config = load_config(encoder, *encoders.KINDS, "dpr")
    found, heads = {}, []
    if hasattr(config, "indexing_dimension"):
        found = encoders.settings_of(config, path)
    elif config.model_type == "dpr":
        found = encoders.dpr(config, path)
        shape = config.to_dict()
        config = BertConfig(**{key: shape[key] for key in shape if key != "model_type"})
    elif modules := read_model_json(path, "modules.json"):
        longest = encoders.longest(config)
        found, heads = encoders.sentence_transformer(path, modules, longest)
    for name, wanted in settings.items():
        has = found.get(name, wanted)
        if has != wanted and (has or not name.endswith("_prefix")):
            raise InputError(
                f"{path}: this retriever has {name} {has}, not {wanted}; leave out --{name}"
            )
    return _with_weights(encoder, config, dropout, found | settings, by_shares, heads, path)


def start_retriever(
    path: str, dropout: float | None = None, by_shares: bool = False, **settings: Any
) -> Retriever:
    """A retriever around a pretrained encoder, or around fresh weights if `path` is a config file.

    Args:
        by_shares: as for `load_retriever`.
        settings: fields of `encoders.Settings`; masks are applied by default, and without a
            projection the indexing dimension is the encoder's hidden size.
    """
    encoder = encoder_folder(path)
    config = load_config(encoder, *encoders.KINDS)
    if hasattr(config, "indexing_dimension") and not Path(path).is_file():
        raise InputError(f"{path}: a retriever already, not a BERT; give it with --model_path")
    kept = encoders.settings_of(config, path) if hasattr(config, "indexing_dimension") else {}
    others = ("pooling", "apply_question_mask", "apply_passage_mask", "side", "two_towers")
    kept = {name: kept[name] for name in kept if name not in others}  # of a retriever's config file
    settings = {"projection": True} | kept | settings
    retriever = _with_weights(encoder, config, dropout, settings, by_shares)
    config = retriever.config
    wanted, longest = max(config.question_maxlength, config.passage_maxlength), encoders.longest
    if wanted > longest(config):
        raise InputError(
            f"{path}: reads at most {longest(config)} tokens, not {wanted}; "
            "lower --question_maxlength or --passage_maxlength"
        )
    return retriever


def check_settings(config: PreTrainedConfig, settings: dict[str, Any], path: str) -> None:
    """An existing retriever keeps its settings: asking for others is an error."""
    for name, wanted in settings.items():
        if getattr(config, name) != wanted:
            raise InputError(
                f"{path}: this retriever has {name} {getattr(config, name)}, not {wanted}; leave "
                "that option out, or start a new one with --retriever_model"
            )


def _with_weights(
    encoder: str,
    config: PreTrainedConfig,
    dropout: float | None,
    settings: dict[str, Any],
    by_shares: bool,
    heads: Sequence[str] = (),
    path: str = "",
) -> Retriever:
    """A retriever with this config and settings around the encoder at a path (fresh if that is a
    config file), and with the projection, the head (its layers in the folders `heads`, if not with
    the encoder) and the second tower at `path` (fresh if empty)."""
    masks = {"apply_question_mask": True, "apply_passage_mask": True, "projection": False}
    for name, value in vars(encoders.Settings(**masks | settings)).items():
        setattr(config, name, value)
    if not config.projection and "indexing_dimension" not in settings:
        config.indexing_dimension = _pooled_size(config)
    for name in _DROPOUTS if dropout is not None else ():
        if hasattr(config, name):
            setattr(config, name, dropout)
    config.dtype, fresh = torch.float32, FreshWeights(draws=not path)
    with fresh:
        retriever = build(Retriever, path or encoder, config)
    sources = fresh.sources(retriever)
    if not Path(encoder).is_file():
        own_name = functools.partial(_own_name, base=retriever.model.base_model_prefix)
        found = open_weights(encoder, own_name, by_shares=by_shares)
        for number, folder in enumerate(heads):
            layer = functools.partial(re.sub, r"^linear\.", f"head.{number}.0.")
            found |= open_weights(path, layer, folder, by_shares)
        if not path:
            found |= {name: sources[name] for name in sources if not name.startswith("model.")}
        sources = fit(retriever, found, path or encoder)
    if config.two_towers and path:
        retriever.passage_tower = tower = load_retriever(
            f"{path}/{PASSAGE_TOWER}", dropout, by_shares
        )
        sources |= {f"passage_tower.{name}": weight for name, weight in tower.sources.items()}
    return with_weights(retriever, sources, by_shares)


def _own_name(key: str, base: str) -> str:
    """The name in `Retriever` of a stored weight, where the encoder's may begin with `base`."""
    key = re.sub(r"^(question|ctx)_encoder\.encode_proj\.", "head.0.0.", key)  # of DPR
    if re.match(r"(proj|norm|head\.\d+\.0)\.", key):
        return key
    key = re.sub(_OTHERS, "", key).removeprefix(f"{base}.")
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
    return "model." + re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
