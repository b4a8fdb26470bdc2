"""`--plan`: operations as PyTorch counts them, activations as autograd keeps them, and options that
make a command fit."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import generate_passage_embeddings
import passage_retrieval
import test_reader
import train_reader
import train_retriever
from src import options as options_of
from src.models import plain
from src.models.reader import new_reader
from src.models.retriever import start_retriever
from src.runtime.errors import InputError
from src.tools import footprint, plan
from src.tools.footprint import Device, Format
from tests.make_models import make_t5_config

EMBED = ["--passages", "no", "--model_path", "bert-base-uncased"]
SCRIPTS = {
    "reader": (train_reader, []),
    "retriever": (train_retriever, []),
    "answers": (test_reader, []),
    "embeddings": (generate_passage_embeddings, EMBED),
    "search": (passage_retrieval, [*EMBED, "--output_path", "no", "--passages_embeddings", "no"]),
}
SHAPE = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 512, "num_layers": 3}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2}
B, N, W, T = 2, 5, 40, 8


def reader_of(folder: Path, dropout: float, **shape: object) -> tuple:
    """A reader in training, its shape as the plan has it, the options, and a batch."""
    make_t5_config(folder / "config.json", **SHAPE, **shape)
    words = f"--model_config {folder}/config.json --per_gpu_batch_size {B} --n_context {N}"
    words += f" --text_maxlength {W} --answer_maxlength {T} --dropout {dropout}"
    options = options_of.train_reader_parser().parse_args(words.split())
    ids = torch.randint(3, 500, (B, N, W))
    batch = ids, torch.ones_like(ids, dtype=torch.bool), torch.randint(3, 500, (B, T))
    reader = new_reader(options.model_config, dropout).train()
    return reader, footprint.reader_shape(options), options, batch


def count_flops(loss: object) -> int:
    # (Its hooks on all modules do not count as a change of these.)
    hookless = mock.patch.object(plain, "_has_any_global_hook", return_value=False)
    with hookless, FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def kept_bytes(model: torch.nn.Module, *batch: torch.Tensor) -> int:
    """What autograd keeps after a forward pass, besides the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*batch)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", [{}, GATED], ids=["T5", "T5 v1.1"])
def test_a_reader_in_training(shape, dropout, tmp_path):
    reader, s, options, batch = reader_of(tmp_path, dropout, **shape)
    assert s.parameters == sum(p.numel() for p in reader.parameters())
    f = Format.of(Device("", 1, (1, 1), "cpu"), "fp32", dropout)
    _, planned = footprint.reader_activations(s, f, options)
    assert planned == pytest.approx(kept_bytes(reader, *batch), rel=0.15)
    work = footprint.encoder_flops(s, B * N, W) + footprint.decoder_flops(s, B, N * W, T)
    assert 3 * work == pytest.approx(count_flops(lambda: reader(*batch)[0]), rel=0.05)
    if not dropout:  # (recomputing stops before a block's last product, which nothing needs)
        return
    reader.checkpoint_blocks()
    assert 4 * work == pytest.approx(count_flops(lambda: reader(*batch)[0]), rel=0.05)


def test_a_retriever_in_training(tmp_path):
    config = {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 500}
    config |= {"num_attention_heads": 8, "intermediate_size": 512}
    (tmp_path / "bert.json").write_text(json.dumps(config))
    words = ["--model_config", str(tmp_path / "bert.json"), "--indexing_dimension", "128"]
    options = options_of.train_retriever_parser().parse_args(words)
    retriever = start_retriever(options.model_config, indexing_dimension=128).train()
    s = footprint.retriever_shape(options)
    assert s.parameters == sum(p.numel() for p in retriever.parameters())
    ids = torch.randint(3, 500, (B, 20)), torch.randint(3, 500, (B, N, W))
    batch = ids[0], torch.ones_like(ids[0]), ids[1], torch.ones_like(ids[1])
    work = footprint.retriever_flops(s, B, 20) + footprint.retriever_flops(s, B * N, W)
    found = count_flops(lambda: sum(states.sum() for states in retriever(*batch)))
    assert 3 * work == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_prints_its_plan_and_ends(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, needed = SCRIPTS[name]
    with pytest.raises(SystemExit) as ended:
        script.main([*needed, "--plan", "A100-80GB:4"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert not list(tmp_path.iterdir())
    assert re.findall(r"^(\w+) ", text, re.M) == ["plan", "memory", "time", "disk", "fits"]
    assert "4 x A100-80GB" in text
    assert "fits       yes" in text


# t5-SIZE's parameters, by the models themselves (Raffel et al. round to 0.06, 0.22, 0.77, 2.8, 11).
MILLIONS = {"small": 60.5, "base": 222.9, "large": 737.7, "3b": 2851.6, "11b": 11307.3}


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_are_those_of_t5(name):
    options = options_of.train_reader_parser().parse_args(["--model_size", name])
    assert footprint.reader_shape(options).parameters / 1e6 == pytest.approx(MILLIONS[name], 1e-3)


def test_what_does_not_fit_gets_options_that_do(capsys):
    words = ["--model_size", "11b", "--n_context", "100", "--text_maxlength", "250"]
    words += ["--plan", "H100-80GB:8"]
    with pytest.raises(SystemExit):
        train_reader.main(words)
    found = re.search(r"no; it would with (--[^(]*) \(", capsys.readouterr().out)[1]
    with pytest.raises(SystemExit):
        train_reader.main([*words, *found.split()])
    assert "fits       yes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["A100", "80", "80,x", "80,989,1,2", "H200:0", "H200:x", "0,5"])
def test_other_devices_are_refused(name):
    with pytest.raises(InputError, match=f"--plan {name}: give one of A100-40GB.*GB,TFLOPs"):
        plan.find_device(name)


def test_the_table(capsys):
    plan.main(["80,300:8"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(plan.TABLE)
    assert all(row.count("|") == 5 for row in rows)
