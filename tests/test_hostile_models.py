"""Model folders that bring code along: it never runs, and nobody is asked whether it may."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import test_reader
from src.models.pretrained import load_config, load_tokenizer
from src.models.reader import load_reader, new_reader
from src.models.retriever import load_retriever
from src.runtime.errors import InputError
from tests.conftest import REFERENCE

CODE = """
from pathlib import Path
Path({marker!r}).write_text("the folder's code has run")
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer
class Config(T5Config): model_type = "hostile"
class Model(T5ForConditionalGeneration): config_class = Config
class Tokenizer(T5Tokenizer): pass
def generate(*args, **kwargs): pass
"""
AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModel": "code.Model",
    "AutoModelForSeq2SeqLM": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
    "AutoProcessor": "code.Tokenizer",
}
NATIVE = {"auto_map": AUTO_MAP}
FOREIGN = {"auto_map": AUTO_MAP, "model_type": "hostile"}


def read_everything(folder: Path) -> None:
    load_reader(str(folder))
    load_tokenizer(str(folder), "none")


def read_tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder), "none")


def read_given_tokenizer(folder: Path) -> None:
    bare = folder.parent / "bare"
    bare.mkdir()
    load_tokenizer(str(bare), str(folder))


# What is added to a plain T5's files, what reads the folder, and how that must end: None where
# the model is read as the T5 that it says it is, with the code left alone.
HOSTILE: dict[str, tuple[dict[str, dict], Callable, str | None]] = {
    "a type of its own": ({"config.json": FOREIGN}, read_everything, "code of its own"),
    "no type": (
        {"config.json": {**NATIVE, "model_type": None}}, read_everything, "code of its own",
    ),
    "as a retriever": (
        {"config.json": FOREIGN}, lambda folder: load_retriever(str(folder)), "code of its own",
    ),
    "as a shape": (
        {"config.json": FOREIGN},
        lambda folder: new_reader(str(folder / "config.json")),
        "code of its own",
    ),
    "another folder's": (
        {"config.json": {"model_type": "x", "auto_map": {"AutoConfig": "FOLDER--code.Config"}}},
        read_everything,
        "code of its own",
    ),
    "a T5 with code": (
        {"config.json": NATIVE, "tokenizer_config.json": NATIVE}, read_everything, None,
    ),
    "a tokenizer": (
        {"config.json": FOREIGN, "tokenizer_config.json": {**NATIVE, "tokenizer_class": "X"}},
        read_given_tokenizer,
        "code of its own",
    ),
    "a tokenizer, as a list": (
        {"config.json": FOREIGN,
         "tokenizer_config.json": {"auto_map": ["code.Tokenizer"] * 2, "tokenizer_class": "X"}},
        read_tokenizer,
        "code of its own",
    ),
    **{
        f"a tokenizer of class {name}": (
            {"config.json": FOREIGN, "tokenizer_config.json": {"tokenizer_class": name},
             "processor_config.json": NATIVE},
            read_tokenizer,
            "code of its own",
        )
        for name in ("AutoConfig", "AutoModel", "AutoProcessor")
    },
    "a tokenizer that is a model": (
        {"tokenizer_config.json": {"tokenizer_class": "T5ForConditionalGeneration"}},
        read_tokenizer,
        "tokenizer_class gives a T5ForConditionalGeneration",
    ),
    "generation": (
        {"generation_config.json": {"custom_generate": "FOLDER"}}, read_everything, None,
    ),
    "an adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "x"}}, read_everything, "an adapter",
    ),
    "quantized": (
        {"config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        read_everything,
        "quantized",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A T5 with a tokenizer, and with Python files next to them."""
    folder = tmp_path_factory.mktemp("plain")
    load_reader(str(REFERENCE / "t5")).save_pretrained(folder)
    load_tokenizer(str(REFERENCE / "t5"), "none").save_pretrained(folder)
    (folder / "custom_generate").mkdir()
    return folder


def make_hostile(plain: Path, folder: Path, changes: dict[str, dict]) -> Path:
    """Returns the file that the folder's code would make."""
    shutil.copytree(plain, folder)
    marker = folder.parent / "marker"
    for file in ("code.py", "custom_generate/generate.py"):
        (folder / file).write_text(CODE.format(marker=str(marker)))
    for file, values in changes.items():
        file = folder / file
        content = json.loads(file.read_text()) if file.exists() else {}
        text = json.dumps({**content, **values})
        file.write_text(text.replace("FOLDER", str(folder)))
    return marker


@pytest.mark.parametrize("name", HOSTILE)
def test_code_in_a_model_folder_never_runs(name, plain, tmp_path, monkeypatch):
    changes, read, problem = HOSTILE[name]
    folder = tmp_path / "hostile"
    marker = make_hostile(plain, folder, changes)
    stdin = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", stdin)
    if problem is None:
        read(folder)
    else:
        with pytest.raises(InputError, match=problem) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
    assert not marker.exists()
    assert stdin.tell() == 0


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.marker, "the pickle's code has run")


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_never_unpickled_freely(sharded, plain, tmp_path):
    marker = make_hostile(plain, tmp_path / "hostile", {})
    (tmp_path / "hostile" / "model.safetensors").unlink()
    weights = "pytorch_model-1.bin" if sharded else "pytorch_model.bin"
    torch.save({"shared.weight": Hostile(marker)}, tmp_path / "hostile" / weights)
    if sharded:
        index = {"metadata": {}, "weight_map": {"shared.weight": weights}}
        (tmp_path / "hostile" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="more than tensors"):
        load_reader(str(tmp_path / "hostile"))
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_chooses_no_kernel_to_download(key, plain, tmp_path):
    make_hostile(plain, tmp_path / "hostile", {"config.json": {key: "someone/kernel"}})
    assert load_config(str(tmp_path / "hostile"), "t5")._attn_implementation is None
    load_reader(str(tmp_path / "hostile"))


def test_a_tokenizer_without_a_vocabulary(plain, tmp_path):
    """Transformers would make one up, of special tokens alone."""
    make_hostile(plain, tmp_path / "hostile", {})
    (tmp_path / "hostile" / "tokenizer.json").unlink()
    (tmp_path / "hostile" / "spiece.model").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no vocabulary"):
        read_tokenizer(tmp_path / "hostile")


def test_a_damaged_vocabulary(tmp_path):
    """Transformers asks for tiktoken."""
    (tmp_path / "spiece.model").write_bytes((REFERENCE / "t5" / "spiece.model").read_bytes()[:999])
    with pytest.raises(InputError, match=r"no tokenizer .*its spiece\.model is damaged"):
        read_tokenizer(tmp_path)


def test_a_part_of_the_weights_is_missing(plain, tmp_path):
    make_hostile(plain, tmp_path / "model", {})
    (tmp_path / "model" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"shared.weight": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"cannot be read \(model-2\.safetensors is missing\)"):
        load_reader(str(tmp_path / "model"))


def test_a_script_asks_nobody(plain, tmp_path, capfd, monkeypatch):
    """As in `yes | python test_reader.py ...`: one line, status 2, nothing read from stdin."""
    marker = make_hostile(plain, tmp_path / "hostile", {"config.json": FOREIGN})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 20)))
    passages = str(shutil.copy(REFERENCE / "passages.tsv", tmp_path / "passages.tsv"))
    with pytest.raises(SystemExit) as exited:
        test_reader.main(
            ["--interactive", "--bm25", "--passages", passages, "--model_path",
             str(tmp_path / "hostile")]
        )  # fmt: skip
    assert exited.value.code == 2
    printed = capfd.readouterr()
    assert "code of its own" in printed.err
    assert "[y/N]" not in printed.out + printed.err
    assert not marker.exists()


def test_weights_outside_the_model_folder_are_not_read(plain, tmp_path):
    make_hostile(plain, tmp_path / "hostile", {})
    (tmp_path / "hostile" / "model.safetensors").rename(tmp_path / "model.safetensors")
    for outside in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        index = {"metadata": {}, "weight_map": {"shared.weight": outside}}
        (tmp_path / "hostile" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"index\.json: .* is outside its folder"):
            load_reader(str(tmp_path / "hostile"))
