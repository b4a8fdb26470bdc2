"""How an encoder's hidden states become embeddings, whoever trained it.

`Settings` are fields of a retriever's config.json. `dpr` and `sentence_transformer` read them from
other projects' folders; `write_modules` lets sentence-transformers embed as we do, or refuse.

Shapes: P texts, L tokens, D size of a hidden state.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from src.data.batches import question_text
from src.models.pretrained import encoder_folder, read_model_json
from src.runtime.errors import InputError, shorten

KINDS = ("bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta")
KINDS += ("xlm-roberta",)
_POOLING = {"cls": "cls_token", "lasttoken": "lasttoken"}  # as older folders say it
_POOLING |= {"mean": "mean_tokens", "max": "max_tokens"}
_MODULE = "sentence_transformers.models."
_LENGTHS = ("max_seq_length", "query_length", "document_length")
_ACTIVATIONS = [
    f"torch.nn.{module}{name}"
    for module in ("", "modules.activation.", "modules.linear.")
    for name in ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
]
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
_PLACES = {key: ["sentence_embedding"] for key in ("module_input_name", "module_output_name")}
# The keys in the JSON files of sentence-transformers that are understood, with the values that are
# (None: all).
_KNOWN: dict[str, dict[str, list | None]] = {
    "Transformer": dict.fromkeys((*_LENGTHS, "do_lower_case"))
    | {"transformer_task": ["feature-extraction"], "modality_config": [{"text": _TEXT}]}
    | {"module_output_name": ["token_embeddings"]},
    "Pooling": dict.fromkeys(("include_prompt", "embedding_dimension", "word_embedding_dimension"))
    | dict.fromkeys(f"pooling_mode_{name}" for name in _POOLING.values())
    | {"pooling_mode": list(_POOLING)},
    "Dense": dict.fromkeys(("in_features", "out_features", "bias"))
    | {"activation_function": _ACTIVATIONS, **_PLACES},
    "Normalize": _PLACES,
    "prompts": dict.fromkeys(("prompts", "default_prompt_name", "__version__"))
    | {"model_type": ["SentenceTransformer"]}
    | {"similarity_fn_name": ["cosine", "dot", "dot_score"]},
}


@dataclasses.dataclass
class Settings:
    """How a retriever embeds. The defaults are those of the original code's checkpoints.

    projection: a linear layer to `indexing_dimension` and a LayerNorm follow the encoder.
    apply_*_mask: padding is masked; else texts are always padded to `*_maxlength`, and all counts.
    extract_cls: the original code's name for the pooling "cls".
    pool_prefix: the tokens of a prefix (see `question_text`, `passage_text`) are pooled too.
    head: linear layers after pooling: `size`, `bias` and `activation` of each.
    side: "questions" or "passages" if it embeds only these.
    """

    indexing_dimension: int = 768
    projection: bool = True
    apply_question_mask: bool = False
    apply_passage_mask: bool = False
    extract_cls: bool = False
    question_maxlength: int = 40
    passage_maxlength: int = 200
    pooling: str = ""
    pool_prefix: bool = True
    head: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    normalize: bool = False
    question_prefix: str | None = None
    passage_prefix: str | None = None
    title_separator: str = " "
    side: str | None = None
    two_towers: bool = False

    def __post_init__(self) -> None:
        self.pooling = self.pooling or ("cls" if self.extract_cls else "mean")
        self.extract_cls = self.pooling == "cls"


def settings_of(config: PreTrainedConfig, path: str) -> dict[str, Any]:
    """The settings in a config. Errors: `InputError` for an impossible value."""
    found = {name: getattr(config, name) for name in vars(Settings()) if hasattr(config, name)}
    for name, value in found.items():
        default = getattr(Settings(), name)
        is_known = isinstance(value, str | None if default is None else type(default))
        if not is_known or (name == "pooling" and value not in _POOLING):
            value = shorten(value)
            raise InputError(f"{path}: in its config.json {name} is {value}; fix its value")
    return vars(Settings(**found))


def describe(config: PreTrainedConfig) -> list[str]:
    """The settings that count in an embedding: the original code's, and others with other values
    than in its checkpoints."""
    values = {name: getattr(config, name) for name in vars(Settings())}
    original, others = sorted([*values][:7]), sorted([*values][7:-2])
    if values["pooling"] in ("cls", "mean"):
        others.remove("pooling")  # `extract_cls` says it
    if values["question_prefix"] == values["passage_prefix"] == "":  # --plain_text
        values |= {"question_prefix": None, "passage_prefix": None}
    changed = [name for name in others if values[name] != getattr(Settings(), name)]
    as_text = {name: json.dumps(values[name], sort_keys=True) for name in changed}
    return [f"{name} {(values | as_text)[name]}" for name in original + changed]


def longest(config: PreTrainedConfig) -> int:
    """The most tokens that an encoder reads: RoBERTa's kin begin to count positions beyond the
    index of the padding token."""
    kin = ("camembert", "mpnet", "roberta", "xlm-roberta")
    return config.max_position_embeddings - 2 * (config.model_type in kin)


# ----------------------------------------------------------------------------------------------
# Layers after the encoder


def pool(states: torch.Tensor, mask: torch.Tensor | None, how: str, skip: int = 0) -> torch.Tensor:
    """Hidden states [P, L, D], real tokens first, and their mask [P, L] (None: all positions count)
    -> [P, D]. The first `skip` tokens do not count."""
    states = states[:, skip:]
    if how == "cls":
        return states[:, 0]
    if mask is None:
        mask = torch.ones_like(states[..., 0])
        if how == "mean":
            return states.mean(dim=1)
    else:
        mask = mask[:, skip:]
    padding, lengths = ~mask.bool().unsqueeze(2), mask.sum(dim=1, keepdim=True)
    if how == "mean":
        return states.masked_fill(padding, 0.0).sum(dim=1) / lengths
    if how == "max":
        return states.masked_fill(padding, -torch.inf).amax(dim=1)
    return states.take_along_dim(lengths.long().unsqueeze(2) - 1, dim=1)[:, 0]  # the last token


def make_head(config: PreTrainedConfig) -> nn.ModuleList:
    """The layers after pooling, with fresh weights."""
    layers, size = nn.ModuleList(), config.hidden_size
    for layer in config.head:
        linear, activation = nn.Linear(size, layer["size"], layer["bias"]), layer["activation"]
        layers.append(nn.Sequential(linear, getattr(nn, activation)()))
        size = layer["size"]
    return layers


# ----------------------------------------------------------------------------------------------
# Reading other projects' folders


def dpr(config: PreTrainedConfig, path: str) -> dict[str, Any]:
    """The settings of a DPR encoder (Karpukhin et al., 2020, section 3): the first token's state of
    a question, or of a title and a text with [SEP] between; with `projection_dim`, a linear layer
    follows."""
    (name,) = config.architectures if len(config.architectures or []) == 1 else [""]
    settings: dict[str, Any] = {"pooling": "cls", "question_prefix": "", "passage_prefix": ""}
    if name == "DPRQuestionEncoder":
        settings |= {"side": "questions"}
    elif name == "DPRContextEncoder":
        settings |= {"side": "passages", "title_separator": " [SEP] "}
    else:
        kinds = "of DPR's models, only question encoders and context encoders can be used"
        raise InputError(f"{path}: {kinds}, not {shorten(config.architectures)}")
    if config.projection_dim:
        layer = {"size": config.projection_dim, "bias": True, "activation": "Identity"}
        settings["head"] = [layer]
    return settings


def sentence_transformer(
    path: str, modules: list[dict[str, str]], longest: int
) -> tuple[dict[str, Any], list[str]]:
    """The settings in a folder of sentence-transformers, whose encoder reads `longest` tokens, and
    the folders inside with the weights of each layer of `head`.

    Errors: `InputError` that names the first thing that is not understood.
    """
    settings, folders, order = {"head": []}, [], []
    for module in modules:
        package, _, kind = str(module.get("type")).rpartition(".")
        order.append(kind if package.startswith("sentence_transformers") else module.get("type"))
        if kind not in ("Pooling", "Dense", "Normalize"):
            continue
        values = _read(path, f"{module['path']}/config.json", kind)
        if kind == "Pooling":
            modes = [how for how, name in _POOLING.items() if values.get(f"pooling_mode_{name}")]
            modes = [values["pooling_mode"]] if "pooling_mode" in values else modes or ["mean"]
            if len(modes) > 1:
                _refuse(path, "pooling", modes)
            settings |= {"pooling": modes[0], "pool_prefix": values.get("include_prompt", True)}
        elif kind == "Dense":
            activation = values.get("activation_function", "torch.nn.Tanh").rpartition(".")[2]
            layer = {"size": values["out_features"], "bias": values.get("bias", True)}
            settings["head"].append(layer | {"activation": activation})
            folders.append(f"{module['path']}/")
    if order[-1] == "Normalize":
        settings["normalize"] = True
        order.pop()
    if order != ["Transformer", "Pooling", *["Dense"] * len(folders)]:
        _refuse(path, "modules.json", order)

    folder, file = encoder_folder(path), "sentence_{}_config.json"
    names = ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")  # of older versions
    file = next((file.format(n) for n in names if read_model_json(folder, file.format(n))), "none")
    most, question, passage = map(_read(folder, file, "Transformer").get, _LENGTHS)
    of_tokenizer = (read_model_json(folder, "tokenizer_config.json") or {}).get("model_max_length")
    most = int(min(most or of_tokenizer or longest, longest))
    settings["question_maxlength"] = min(question or most, most)
    settings["passage_maxlength"] = min(passage or most, most)

    values = _read(path, "config_sentence_transformers.json", "prompts")
    prompts = values.get("prompts") or {}
    default = prompts.get(values.get("default_prompt_name")) or ""
    passages = [prompts[name] for name in ("document", "passage", "corpus") if name in prompts]
    settings["question_prefix"] = prompts.get("query", default)
    settings["passage_prefix"] = passages[0] if passages else default
    return settings, folders


def _read(path: str, file: str, kind: str) -> dict[str, Any]:
    """A JSON file; empty if there is none. Errors: `InputError` for what is not in `_KNOWN`."""
    values, known = read_model_json(path, file) or {}, _KNOWN[kind]
    for key, value in values.items():
        if value and (key not in known or (known[key] is not None and value not in known[key])):
            _refuse(path, f"{key} in {file}", value)
    return values


def _refuse(path: str, what: str, value: Any) -> NoReturn:
    raise InputError(
        f"{path}: {what} is {shorten(value)}, which is not supported in a folder of "
        "sentence-transformers; give another model"
    )


# ----------------------------------------------------------------------------------------------
# Writing what sentence-transformers reads


def write_modules(config: PreTrainedConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write modules.json and what it names. Where the modules of sentence-transformers cannot embed
    as this retriever does, it names one that does not exist: without the file, they would guess."""
    problems = {
        "two_encoders": config.two_towers or config.side,
        "projection_before_pooling": config.projection,
        "unmasked_padding": not (config.apply_question_mask and config.apply_passage_mask),
    }
    files: dict[str, Any] = {"modules.json": []}
    if why := [name for name in problems if problems[name]]:
        modules = [(f"not_in_sentence_transformers.{why[0]}", {}, {})]
    else:
        modules = _modules(config, weights)
        prompts = {"query": question_text("", config.question_prefix)}
        prompts["document"] = config.passage_prefix or ""  # None: the caller writes title: ...
        similarity = "cosine" if config.normalize else "dot"
        file = "config_sentence_transformers.json"
        files[file] = {"prompts": prompts, "similarity_fn_name": similarity}
    for number, (kind, values, tensors) in enumerate(modules):
        path = f"{number}_{kind.rpartition('.')[2]}" if number else ""
        module = {"idx": number, "name": str(number), "path": path, "type": kind}
        files["modules.json"].append(module)
        if values or number:
            files[f"{path}/config.json" if number else "sentence_bert_config.json"] = values
        if tensors:
            (folder / path).mkdir(exist_ok=True)
            save_file(tensors, folder / path / "model.safetensors")
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values, indent=2))


def _modules(
    config: PreTrainedConfig, weights: dict[str, torch.Tensor]
) -> Iterator[tuple[str, dict[str, Any], dict[str, torch.Tensor]]]:
    """The class, config and weights of each module of sentence-transformers."""
    lengths = config.question_maxlength, config.passage_maxlength
    values = {"max_seq_length": max(lengths), "do_lower_case": False}
    if lengths[0] != lengths[1]:  # older versions, which know no such keys, stop there
        values |= dict(zip(_LENGTHS[1:], lengths, strict=True))
    yield f"{_MODULE}Transformer", values, {}
    values = {f"pooling_mode_{name}": how == config.pooling for how, name in _POOLING.items()}
    values |= {"word_embedding_dimension": config.hidden_size, "include_prompt": config.pool_prefix}
    yield f"{_MODULE}Pooling", values, {}
    size = config.hidden_size
    for number, layer in enumerate(config.head):
        values = {"in_features": size, "out_features": layer["size"], "bias": layer["bias"]}
        values["activation_function"] = f"torch.nn.{layer['activation']}"
        names = ("weight", "bias") if layer["bias"] else ("weight",)
        own = {f"linear.{name}": weights[f"head.{number}.0.{name}"].clone() for name in names}
        yield f"{_MODULE}Dense", values, own
        size = layer["size"]
    if config.normalize:
        yield f"{_MODULE}Normalize", {}, {}
