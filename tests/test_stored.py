"""Weights read by our own code are those that Transformers reads, to the bit, however they are
stored; and what cannot be read is reported in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from src.models.encoders import KINDS as ENCODERS
from src.models.plain import FAMILY
from src.models.reader import POSITION_TABLE_KEY, load_reader
from src.models.retriever import load_retriever
from src.runtime.errors import InputError
from tests.test_encoders import make_encoder
from tests.test_t5_kinds import KINDS as READERS
from tests.test_t5_kinds import make_model

Weights = dict[str, torch.Tensor]
LAYOUTS = [
    "safetensors", "safetensors float16", "split safetensors", "bin", "old bin", "split bin",
    "split old bin bfloat16",
]  # fmt: skip


def write(weights: Weights, folder: Path, layout: str) -> None:
    """Replace a folder's weights."""
    for file in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        file.unlink()
    is_bin, kind = "bin" in layout, "bin" if "bin" in layout else "safetensors"
    stem = "pytorch_model" if is_bin else "model"
    for dtype in ("float16", "bfloat16"):
        if layout.endswith(f" {dtype}"):
            weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    files = dict.fromkeys(weights, f"{stem}.{kind}")
    if "split" in layout:
        files = {name: f"part-{number % 2}.{kind}" for number, name in enumerate(weights)}
        index = json.dumps({"metadata": {}, "weight_map": files})
        (folder / f"{stem}.{kind}.index.json").write_text(index)
    for file in set(files.values()):
        own = {name: tensor for name, tensor in weights.items() if files[name] == file}
        if is_bin:
            torch.save(own, folder / file, _use_new_zipfile_serialization="old" not in layout)
        else:
            own = {name: tensor.clone() for name, tensor in own.items()}
            save_file(own, folder / file, {"format": "pt"})


def check_equal(ours: nn.Module, theirs: PreTrainedModel) -> None:
    """All weights and buffers, which of them are tied, and that they can be trained."""
    weights, buffers = dict(theirs.state_dict()), dict(theirs.named_buffers())
    found, own_buffers = ours.state_dict(), dict(ours.named_buffers())
    extra = {name for name in weights.keys() - found.keys() if not name.startswith("pooler.")}
    assert not extra
    assert found.keys() <= weights.keys()
    assert own_buffers.keys() == buffers.keys()
    for name, tensor in [*found.items(), *own_buffers.items()]:
        expected = (weights | buffers)[name]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
    parameters, expected = (
        dict(model.named_parameters(remove_duplicate=False)) for model in (ours, theirs)
    )
    assert all(p.requires_grad and p.is_contiguous() for p in parameters.values())
    for name, parameter in parameters.items():
        tied = [other for other in parameters if parameters[other] is parameter]
        assert tied == [other for other in parameters if expected[other] is expected[name]]


# --- encoders


def task_model(kind: str, task: str, folder: Path) -> PreTrainedModel:
    """The encoder in a folder with a head for a task (none: as it is), saved there."""
    config = AutoConfig.from_pretrained(folder)
    model_class = MODEL_MAPPING[type(config)]
    if task:
        name = model_class.__name__.removesuffix("Model")
        model_class = getattr(transformers, f"{name}For{task}")
    model = model_class(config)
    model.save_pretrained(folder)
    return model


def with_old_names(weights: Weights) -> Weights:
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    pattern = re.compile("(LayerNorm.weight|LayerNorm.bias)$")
    return {pattern.sub(lambda m: names[m[0]], name): w for name, w in weights.items()}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_equal_transformers(kind, tmp_path):
    """As saved for each task, with or without the names of 2018, and with a buffer of 2020."""
    make_encoder(tmp_path, kind)
    tasks = ["", "MaskedLM", "SequenceClassification"]
    for number, layout in enumerate(LAYOUTS, ENCODERS.index(kind)):
        model = task_model(kind, tasks[number % 3], tmp_path)
        weights = dict(model.state_dict())
        prefix = f"{model.base_model_prefix}." if number % 3 else ""
        weights[f"{prefix}embeddings.position_ids"] = torch.arange(34)[None]
        if number % 2:
            weights = with_old_names(weights)
        write(weights, tmp_path, layout)
        theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
        check_equal(load_retriever(str(tmp_path)).model, theirs)


# --- readers

COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
# Which of a T5's embeddings and head are stored; "= other": with other values than `shared`.
STORED = {
    "one": "shared.weight",
    "one and a head": "shared.weight, lm_head.weight",
    "all": f"shared.weight, {COPIES[0]}, {COPIES[1]}, lm_head.weight",
    "own head": "shared.weight, lm_head.weight = other",
    "all, own head": f"shared.weight, {COPIES[0]}, {COPIES[1]}, lm_head.weight = other",
    "copies": f"{COPIES[0]}, {COPIES[1]}",
    "copies, own head": f"{COPIES[0]}, {COPIES[1]}, lm_head.weight = other",
    "last copy, own head": f"{COPIES[1]}, lm_head.weight = other",
    "head": "lm_head.weight",
    "own decoder": f"shared.weight, {COPIES[1]} = other, lm_head.weight",
}


@pytest.mark.parametrize("kind", READERS)
def test_readers_equal_transformers(kind, reference, tmp_path):
    """With all ways to store what T5 ties, whatever the config says about it, and with a table that
    T5 drops."""
    t5 = make_model(kind, reference / "data.json", tmp_path)
    embedding, other = t5.shared.weight.detach(), torch.randn(t5.shared.weight.shape)
    rest = {
        name: tensor
        for name, tensor in t5.state_dict().items()
        if name not in ("shared.weight", *COPIES, "lm_head.weight")
    }
    rest[POSITION_TABLE_KEY] = torch.ones(32, 4)
    config = json.loads((tmp_path / "config.json").read_text())
    for number, (name, stored) in enumerate(STORED.items()):
        for is_tied in (True, False):
            values = config | {"tie_word_embeddings": is_tied}
            (tmp_path / "config.json").write_text(json.dumps(values))
            named = [part.partition(" = ") for part in stored.split(", ")]
            own = {key: other if value else embedding for key, _, value in named}
            write(own | rest, tmp_path, LAYOUTS[(number + is_tied) % len(LAYOUTS)])
            theirs = FAMILY[config["model_type"]].from_pretrained(tmp_path, dtype=torch.float32)
            ours = load_reader(str(tmp_path)).t5
            check_equal(ours, theirs)
            scale = [getattr(t5.config, "scale_decoder_outputs", None) for t5 in (ours, theirs)]
            assert scale[0] == scale[1], name
            settings = [t5.generation_config.to_dict() for t5 in (ours, theirs)]
            assert settings[0] == settings[1], name


# --- what cannot be read


def break_one(case: str, folder: Path) -> None:
    """From a folder with `model.safetensors`."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    first = min(name for name in weights if "block" in name or "layer" in name)
    if case == "missing":
        write({name: weights[name] for name in weights if name != first}, folder, "safetensors")
    elif case == "shape":
        write(weights | {first: weights[first][:-1]}, folder, "split bin")
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif case == "cut bin":
        write(weights, folder, "old bin")
        file = folder / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:-9])
    elif case == "lost part":
        write(weights, folder, "split safetensors")
        (folder / "part-1.safetensors").unlink()
    else:
        file.rename(folder / case)


CASES = {
    "missing": r"the weights lack 1 tensor, such as .*; give the config\.json that was saved",
    "shape": r"by its config\.json .* but in the weights it is .*; give the config\.json that was",
    "cut": "the model's weights cannot be read .*; was the file cut off",
    "cut bin": "the model's weights cannot be read .*; was the file cut off",
    "lost part": r"part-1\.safetensors.*; was the file cut off",
    "tf_model.h5": r"no file named model\.safetensors or pytorch_model\.bin.*; was the file cut",
    "flax_model.msgpack": r"no file named model\.safetensors or pytorch_model\.bin.*; was the",
}


@pytest.mark.parametrize("load", [load_reader, load_retriever])
def test_weights_that_cannot_be_used_are_reported(load, reference, tmp_path):
    """The same without and with --shard."""
    if load is load_reader:
        make_model("T5", reference / "data.json", tmp_path / "good")
    else:
        make_encoder(tmp_path / "good", "bert")
    for case, message in CASES.items():
        shutil.copytree(tmp_path / "good", tmp_path / case)
        break_one(case, tmp_path / case)
        for by_shares in (False, True):
            with pytest.raises(InputError, match=message) as caught:
                load(str(tmp_path / case), by_shares=by_shares)
            assert str(tmp_path / case) in str(caught.value)
            assert "\n" not in str(caught.value)
