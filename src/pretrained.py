"""Models and tokenizers by folder or hub name: config, weights, tokenizer, with errors that help.

Nothing here unpickles freely: weights are safetensors, or `.bin` files read with weights_only.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from src.errors import InputError, first_line

Model = TypeVar("Model", bound=PreTrainedModel)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt")


def quiet_transformers() -> None:
    """No progress bars of Transformers' own in a log file, and no advice that is not an error."""
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def load_config(path: str, model_type: str) -> PreTrainedConfig:
    """The config of the wanted kind at a hub name, in a folder, or in a JSON file."""
    _check_path(path)
    with _reporting(path, "no model config can be read there; give a model's folder or hub name"):
        config = AutoConfig.from_pretrained(path)
    if config.model_type != model_type:
        raise InputError(f"{path}: a {config.model_type} model, but a {model_type} is needed here")
    return config


def from_pretrained(
    model_class: type[Model], path: str, config: PreTrainedConfig, **kwargs: Any
) -> Model:
    """A model in float32 with every one of its weights read from `path`."""
    with _reporting(path, "the model's weights cannot be read"):
        model, report = model_class.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{path}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


def load_tokenizer(path: str, fallback: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder when it has one, else that of `fallback`, a folder or hub
    name (`--tokenizer`, or the base model)."""
    folder = Path(path)
    own = not folder.exists() or any((folder / name).exists() for name in _TOKENIZER_FILES)
    source = path if own else fallback
    _check_path(source, needs_config=False)
    files = {path.name for path in Path(source).glob("*")}
    bare = "vocab.txt" in files and not files & {"tokenizer.json", "tokenizer_config.json"}
    with _reporting(source, "no tokenizer can be read there; give one with --tokenizer"):
        # A vocabulary alone, as BERT's of its time came, does not say whose it is.
        return (BertTokenizer if bare else AutoTokenizer).from_pretrained(source)


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that knows more tokens than the model has embeddings belongs to another model."""
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"the model's vocab_size {config.vocab_size} is smaller than the {len(tokenizer)} "
            f"tokens of the tokenizer {tokenizer.name_or_path}; give its own with --tokenizer, "
            "or raise vocab_size in --model_config"
        )


def read_bin(path: str) -> dict[str, Any] | None:
    """The tensors of a folder's `pytorch_model.bin`; None when it has none, or has safetensors."""
    file = Path(path) / "pytorch_model.bin"
    if not file.exists() or (Path(path) / "model.safetensors").exists():
        return None
    with _reporting(str(file), "not a file of weights"):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_tensor(path: str, key: str) -> torch.Tensor | None:
    """One tensor, in float32, of the weights at a folder or hub name; None when not among them."""
    weights = read_bin(path)
    if weights is not None:
        tensor = weights.get(key)
        return None if tensor is None else tensor.float()
    file = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor(key).float() if key in list(stored.keys()) else None


def _check_path(path: str, needs_config: bool = True) -> None:
    """What can be said about a wrong path without asking the hub."""
    folder = Path(path)
    if folder.is_dir():
        if needs_config and not (folder / "config.json").exists():
            raise InputError(f"{path}: no config.json in this folder; give the folder of a model")
    elif not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InputError(f"{path}: there is no such file or folder")


@contextlib.contextmanager
def _reporting(path: str, what: str):
    """Turn whatever a library raises for a broken or missing file into one line."""
    try:
        yield
    except Exception as error:  # hub, safetensors, torch.load and tokenizers each have their own
        raise InputError(f"{path}: {what} ({first_line(error)})") from error
