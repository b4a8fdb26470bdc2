"""Models and tokenizers by folder or hub name: config, weights, tokenizer; errors in one line.

Code in a model folder never runs: weights are safetensors, or `.bin` files read with weights_only.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import normalizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from src.data.json_files import read_json
from src.models.pieces import load_pieces
from src.models.stored import Sources, stored_weights, weight_files
from src.runtime import distributed
from src.runtime.device import compile_layers, describe_size
from src.runtime.errors import InputError, first_line, shorten
from src.runtime.terminal import say

Config = TypeVar("Config", bound=PreTrainedConfig)
Model = TypeVar("Model", bound=PreTrainedModel)
_COPY = "was the file cut off? copy it, or make the model, again"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt")
_TOKENIZER_FILES += ("vocab.json", "sentencepiece.bpe.model")


def quiet_transformers() -> None:
    """No progress bars of Transformers in a log file, and no advice."""
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def load_config(path: str, *kinds: str) -> PreTrainedConfig:
    """The config of a model of one of these types: by hub name, folder, or JSON file."""
    _check_path(path)
    with _reporting(path, "no model config can be read there", "give a model's folder or hub name"):
        values = read_json(path) if Path(path).is_file() else {}  # with a byte-order mark, too
        if values.get("model_type") in CONFIG_MAPPING:
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _check_sizes(config)
    if config.model_type not in kinds:
        needed, give = "t5", "a T5 or a reader (model_type t5, mt5 or umt5)"
        if "t5" not in kinds:
            needed = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
            give = "one of these or a retriever"
        raise InputError(
            f"{path}: a {config.model_type} model, but a {needed} is needed here; give {give}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{path}: quantized weights (quantization_config in its config.json) cannot be read "
            "here; give the model in float32, bf16 or fp16"
        )
    config._attn_implementation = None  # a config.json could name a kernel to download and run
    return config


def _check_sizes(config: PreTrainedConfig) -> None:
    """Errors: ValueError for sizes and token ids with which no model works."""
    for name, value in config.to_dict().items():
        is_size = re.fullmatch(r"num_.*(layers|heads)|d_\w+|\w+_size", name)
        if is_size and isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}")
        ids = value if isinstance(value, list) else [value]
        in_use = "token_id" if config.is_encoder_decoder else "pad_token_id"
        if name.endswith(in_use) and not all(
            one is None or (isinstance(one, int) and 0 <= one < config.vocab_size) for one in ids
        ):
            raise ValueError(f"{name} {value} is not among the {config.vocab_size} tokens")


def build(model_class: Callable[[Config], Model], path: str, config: Config) -> Model:
    """A model with fresh weights, in the shape of the config read from `path`."""
    with _reporting(path, "no model can be built by this config", "fix its values"):
        return model_class(config)


def unfilled(model_class: Callable[[Config], Model], path: str, config: Config) -> Model:
    """A model on the meta device, for the weights at `path`."""
    config.dtype = torch.float32
    with torch.device("meta"):
        model = build(model_class, path, config).eval()
    model.generation_config = _generation_settings(path) or model.generation_config
    return model


def open_weights(
    path: str, rename: Callable[[str], str] = str, folder: str = "", by_shares: bool = False
) -> Sources:
    """The weights at a folder or hub name, or in `folder/` inside it.

    Args: by_shares: only the main process opens a `.bin`, which it reads for all.
    Errors: `InputError` if they cannot be read.
    """
    reporting = functools.partial(_reporting, path, "the model's weights cannot be read", _COPY)

    def read() -> Sources:
        with reporting():
            return stored_weights(files, rename)

    with reporting():
        files = weight_files(path, folder)
    if not (by_shares and any(file.endswith(".bin") for file in files)):
        return read()
    own = distributed.run_on_main(read) or {}
    own = {name: weight._replace(by_rows=False) for name, weight in own.items()}
    return distributed.from_main(lambda: {n: w._replace(read=None) for n, w in own.items()}) | own


def _generation_settings(path: str) -> GenerationConfig | None:
    """Errors: `InputError` for those with which Transformers would not save the model."""
    if settings := read_model_json(path, GENERATION_CONFIG_NAME):
        with _reporting(path, "its generation_config.json is refused", "correct or remove it"):
            found = GenerationConfig.from_dict(settings)
            found.validate(strict=True)
            return found
    return None


def encoder_folder(path: str) -> str:
    """The folder of a model's own files: in older folders of sentence-transformers, one inside."""
    modules = None if Path(path).is_file() else read_model_json(path, "modules.json")
    if modules is None:
        return path
    with _reporting(path, "its modules.json cannot be used", "give another model"):
        names = [Path(module["path"]) for module in modules]
        for name in names:
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{shorten(str(name))} is outside its folder")
        if names[0].parts and not Path(path).is_dir():
            raise ValueError("its encoder is in a folder inside: download it, and give its folder")
    return str(Path(path) / names[0]) if names[0].parts else path


def load_tokenizer(
    path: str, fallback: str, option: str = "--tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder if it has one, else that of `fallback`, a folder or hub
    name (the option's value, or the base model)."""
    folder = Path(encoder_folder(path) if Path(path).is_dir() else path)
    own = not folder.exists() or any((folder / name).exists() for name in _TOKENIZER_FILES)
    source = path if own else fallback
    _check_path(source, needs_config=False)
    source = encoder_folder(source)
    files = {path.name for path in Path(source).glob("*")}
    bare = "vocab.txt" in files and not files & {"tokenizer.json", "tokenizer_config.json"}
    broken = _reporting(source, "no tokenizer can be read there", f"give one with {option}")
    with broken, _panics_unprinted():
        # Old BERTs come with a vocabulary alone, which does not name its class.
        loader = BertTokenizer if bare else AutoTokenizer
        tokenizer = loader.from_pretrained(source, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"its tokenizer_class gives a {type(tokenizer).__name__}")
        if len(tokenizer) <= len(tokenizer.added_tokens_encoder) + 1:  # Transformers made one up
            raise ValueError("it has no vocabulary")
        tokenizer.pieces = load_pieces(tokenizer)
        if (read_model_json(source, "sentence_bert_config.json") or {}).get("do_lower_case"):
            own = tokenizer.backend_tokenizer.normalizer
            parts = [normalizers.Lowercase(), *([own] if own else [])]
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(parts)
        tokenizer.clean_up_tokenization_spaces = True  # whatever the folder says
        getattr(tokenizer, "backend_tokenizer", tokenizer).encode("é 中")  # may find damage
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer, with its `spiece.model`, which Transformers leaves out."""
    tokenizer.save_pretrained(folder)
    pieces = getattr(tokenizer, "pieces", None)
    if pieces is not None:
        (Path(folder) / "spiece.model").write_bytes(pieces.model.serialized_model_proto())


def decode_answers(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> list[str]:
    """Token ids [B, T] -> texts without special tokens and, unless the tokenizer's
    `clean_up_tokenization_spaces` is false, without spaces before punctuation and contractions
    ("Bob 's"), as transformers 3.0.2 decoded."""
    texts = tokenizer.batch_decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if tokenizer.clean_up_tokenization_spaces:
        # (called here: Transformers skips it for some kinds of tokenizers)
        texts = [tokenizer.clean_up_tokenization(text) for text in texts]
    return [text.strip() for text in texts]


def check_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, option: str = "--tokenizer"
) -> None:
    """Errors: `InputError` if the tokenizer has more tokens than the model, so is another model's,
    or lacks the tokens for padding or (for a T5) the end of an answer."""
    for token in ["pad_token", "eos_token"] if "t5" in config.model_type else ["pad_token"]:
        if getattr(tokenizer, f"{token}_id") is None:
            raise InputError(
                f"{tokenizer.name_or_path}: this tokenizer has no {token}; add it to its "
                f"tokenizer_config.json, or give another with {option}"
            )
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"the model's vocab_size {config.vocab_size} is smaller than the {len(tokenizer)} "
            f"tokens of the tokenizer {tokenizer.name_or_path}; give its own with {option}, "
            "or raise vocab_size in --model_config"
        )


def set_up(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    device: torch.device,
    log: logging.Logger,
    source: str,
    layers: Iterable[nn.Module],
    detail: str = "",
) -> None:
    """Check a model against its tokenizer, compile its layers if asked to, move it to the device
    (but for a share of it, which goes there later), and log where it is from."""
    check_vocabulary(model.config, tokenizer)
    if options.compile:
        compile_layers(layers)
    if not options.shard:
        model.to(device)
    if source == getattr(options, "model_config", "none"):  # (a test lacks it)
        source = f"fresh weights of the shape in {source}"
    say(log, "model", "%s, %sfrom %s", describe_size(model), detail, source)


def digest(model: nn.Module, settings: Iterable[str] = (), without: str = "\0") -> str:
    """A short text, equal for two models if and only if their settings and weights (but those whose
    names begin with `without`) are."""
    sources = getattr(model, "sources", {})
    found = hashlib.blake2b(digest_size=16)
    for setting in settings:
        found.update(f"{setting}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(without):
            continue
        tensor = sources[name].read() if tensor.is_meta else tensor
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def read_model_json(path: str, name: str) -> Any:
    """A JSON file of the model at a folder or hub name; None if it has no such file."""
    _check_path(path, needs_config=False)
    with _reporting(path, f"its {name} cannot be read", "give a model's folder or hub name"):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    with _reporting(str(file), "not a JSON file", _COPY):
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))


def _check_path(path: str, needs_config: bool = True) -> None:
    """Report a wrong path without asking the hub."""
    folder, problem = Path(path), None
    if folder.is_file() and folder.suffix != ".json":
        problem = (
            "a file, not a model's folder; a checkpoint of PyTorch, such as DPR's .cp, must be "
            "converted (Transformers has convert_dpr_original_checkpoint_to_pytorch.py)"
        )
    elif folder.is_dir() and needs_config:
        if not (folder / "config.json").exists():
            inner = ("checkpoint/best_dev", "checkpoint/latest", "best_dev", "latest")
            found = [name for name in inner if (folder / name / "config.json").exists()]
            model = f"its model: {folder / found[0]}" if found else "the folder of a model"
            problem = f"no config.json in this folder; give {model}"
        elif (folder / "adapter_config.json").exists():
            problem = (
                "holds an adapter (adapter_config.json); merge it into its model and give that"
            )
    elif not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            problem = "there is no such file or folder; check the path"
        else:
            _ask_hub(path)
    if problem:
        raise InputError(f"{path}: {problem}")


def _ask_hub(name: str) -> None:
    """Where the hub cannot be reached, use the cache, or report it: Transformers asks for each of a
    model's files, for half a minute."""
    if is_offline_mode():
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        pass  # the hub has no such model, or another problem: Transformers explains
    except Exception as error:  # of the HTTP library, or of an impossible name
        with contextlib.suppress(ValueError):  # an impossible name
            kept = [
                try_to_load_from_cache(name, file) for file in ("config.json", *_TOKENIZER_FILES)
            ]
            if any(isinstance(path, str) for path in kept):
                constants.HF_HUB_OFFLINE = True
                return
        raise InputError(
            f"{name}: there is no such folder, and the hub cannot be asked for a model of this "
            f"name ({first_line(error)}); give a model's folder"
        ) from error


@contextlib.contextmanager
def _panics_unprinted():
    """Leave out what Rust prints about a panic before Python gets it as an exception."""
    with tempfile.TemporaryFile() as printed, contextlib.closing(os.fdopen(os.dup(2), "wb")) as out:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ == "PanicException":
                printed.truncate(0)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(out.fileno(), 2)
            printed.seek(0)
            out.write(printed.read())


@contextlib.contextmanager
def _reporting(path: str, what: str, cure: str):
    """Turn any exception of a library about a broken or missing file into one line.

    Transformers loads some things by names in a folder's JSON files without passing on
    `trust_remote_code=False`, and asks on stdin whether to run the folder's code. With no time for
    an answer, it refuses.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # each library has its own; a panic in Rust is no Exception
        why = first_line(error, 200)
        if isinstance(error, pickle.UnpicklingError):  # torch.load advises to run the file's code
            why = "refused: more than tensors in it, or damaged"
        elif "tiktoken" in str(error):  # which Transformers takes a damaged one for
            why = "its spiece.model is damaged"
        elif "trust_remote_code" in str(error):
            what = "it needs Python code of its own, which is never run here"
            why, cure = "auto_map", "give a T5 or BERT that Transformers reads without it"
        raise InputError(f"{path}: {what} ({why}); {cure}") from error
