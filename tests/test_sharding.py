"""`--shard`: K processes that share weights, gradients and optimizer train like one without."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from src.models.pretrained import digest
from src.models.reader import load_reader, new_reader
from src.models.retriever import load_retriever, start_retriever
from src.runtime import distributed
from src.runtime.errors import InputError
from src.training import sharding
from tests.conftest import run_well
from tests.test_distributed import read_metrics
from tests.test_encoders import make_folder

STEPS = 20


@pytest.fixture
def data(reference: Path, tmp_path: Path) -> Path:
    examples = json.loads((reference / "data.json").read_text())[:9]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(examples))
    return file


def train(folder: Path, data: Path, reference: Path, processes: int, *more: object) -> Path:
    """20 updates of 4 questions; returns the last checkpoint."""
    shared = [] if processes == 1 else ["--shard"]
    run_well(
        "train_reader.py", "--train_data", data, "--eval_data", data, "--n_context", 3,
        "--model_path", reference / "t5", "--legacy_position_table", "--text_maxlength", 48,
        "--per_gpu_batch_size", 4 // processes, "--total_steps", STEPS, "--eval_freq", 10,
        "--dropout", 0, "--lr", 1e-3, "--scheduler", "linear", "--warmup_steps", 2,
        "--scheduler_steps", 30, "--num_workers", 0, "--generation_max_length", 6,
        "--checkpoint_dir", folder, "--name", "run", *shared, *more, processes=processes,
    )  # fmt: skip
    return folder / "run" / "checkpoint" / "latest"


def read_shares(rank: int, models: list[tuple], meeting: Path) -> None:
    """In one of 2 processes: each model loaded by shares has the weights of an ordinary one."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    loaded, torch_load = [], torch.load
    torch.load = lambda file, **how: loaded.append(file) or torch_load(file, **how)
    for load, path, n_towers in models:
        torch.manual_seed(7)
        whole = load(str(path))
        torch.manual_seed(7)
        loaded.clear()
        model = load(str(path), by_shares=True)
        is_bin = any(path.glob("*.bin*"))
        assert bool(loaded) == (is_bin and rank == 0)
        for one in (whole, model) if n_towers == 2 else ():
            one.begin_training(None, True)
        # (Readers' norms of ones are small enough to be held.)
        assert all(p.is_meta for p in model.parameters() if p.dim() > 1)
        assert distributed.from_main(partial(digest, model)) == digest(whole)
        sharding.shard(model, torch.device("cpu"), "fp32", True)
        held = sum(p.to_local().numel() for p in model.parameters())
        assert held < 0.6 * sum(p.numel() for p in whole.parameters())
        found = {name: sharding.full(p) for name, p in model.state_dict(keep_vars=True).items()}
        assert found.keys() == whole.state_dict().keys()
        assert all(torch.equal(found[name], p) for name, p in whole.state_dict().items()), path
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], b) for name, b in whole.named_buffers())
        tied = [len(set(map(id, one.parameters()))) for one in (model, whole)]
        assert tied[0] == tied[1]
        assert model.config.to_dict() == whole.config.to_dict()
    distributed.stop()


def write_split(weights: dict[str, torch.Tensor], folder: Path, kind: str) -> None:
    """Two files and their index; as .bin in bf16, one of them in the format of before 2020."""
    folder.mkdir()
    index = {name: f"part-{number % 2}.{kind}" for number, name in enumerate(weights)}
    for part in set(index.values()):
        tensors = {name: weights[name] for name in weights if index[name] == part}
        if kind == "bin":
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
            is_new = part.startswith("part-0")
            torch.save(tensors, folder / part, _use_new_zipfile_serialization=is_new)
        else:
            save_file(tensors, folder / part, {"format": "pt"})
    stem = "pytorch_model" if kind == "bin" else "model"
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.{kind}.index.json").write_text(text)


def test_each_process_reads_its_share(reference, tmp_path):
    """Of readers: from safetensors, split or not, with a position table or a head of its own; from
    .bin files, which only one process opens; and from the reference's, whose encoder is wrapped. Of
    retrievers: with a projection, a head, two towers. And of random weights."""
    legacy = reference / "legacy_reader/checkpoint/step-20"
    reader = load_reader(str(legacy))
    reader.save_pretrained(tmp_path / "one")
    shape = json.loads((reference / "t5/config.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(shape | {"tie_word_embeddings": False}))
    reader = new_reader(str(tmp_path / "own.json"))
    assert reader.t5.lm_head.weight is not reader.t5.shared.weight
    reader.save_pretrained(tmp_path / "own_head")
    weights = torch.load(reference / "t5/pytorch_model.bin", weights_only=True)
    write_split(load_file(tmp_path / "one/model.safetensors"), tmp_path / "split", "safetensors")
    shutil.copy(tmp_path / "one/config.json", tmp_path / "split")
    write_split(weights, tmp_path / "split_bin", "bin")
    shutil.copy(reference / "t5/config.json", tmp_path / "split_bin")
    folders = [tmp_path / name for name in ("one", "split", "own_head", "split_bin")]
    models = [(load_reader, folder, 1) for folder in (legacy, *folders)]
    models += [(new_reader, tmp_path / "own.json", 1)]
    retriever = load_retriever(str(reference / "legacy_retriever_mask_mean"))
    retriever.begin_training(None, True)
    retriever.save_pretrained(tmp_path / "two")
    (tmp_path / "dense").mkdir()
    make_folder(tmp_path / "dense", {}, "Transformer Pooling Dense")
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    BertModel(BertConfig(**shape, intermediate_size=48)).save_pretrained(tmp_path / "bert")
    kinds = ("legacy_retriever_mask_mean", "legacy_retriever_cls")
    models += [(load_retriever, reference / name, 1) for name in kinds]
    models += [(load_retriever, tmp_path / name, 1) for name in ("two", "dense")]
    models += [(load_retriever, tmp_path / "bert", 2), (start_retriever, tmp_path / "bert", 1)]
    models += [(start_retriever, tmp_path / "bert/config.json", 2)]
    multiprocessing.spawn(read_shares, (models, tmp_path / "meet"), nprocs=2)


def test_random_weights_are_those_of_transformers(reference, tmp_path):
    """With the same seed, though each is made only when it is read."""
    config = T5Config.from_pretrained(reference / "t5")
    torch.manual_seed(3)
    expected, after = T5ForConditionalGeneration(config).state_dict(), torch.rand(1)
    torch.manual_seed(3)
    found = new_reader(str(reference / "t5/config.json")).t5.state_dict()
    assert torch.equal(torch.rand(1), after)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for kind in ("bert", "modernbert"):
        small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
        shape = CONFIG_MAPPING[kind](**small, vocab_size=90, intermediate_size=48, pad_token_id=0)
        shape.save_pretrained(tmp_path / kind)
        torch.manual_seed(3)
        own = {} if kind == "modernbert" else {"add_pooling_layer": False}
        encoder = MODEL_MAPPING[type(shape)](shape, **own)
        projection = torch.nn.Linear(32, 768).weight.detach().normal_(std=0.02)
        torch.manual_seed(3)
        retriever = start_retriever(str(tmp_path / kind / "config.json"))
        assert torch.equal(retriever.proj.weight, projection)
        state, buffers = encoder.state_dict(), dict(encoder.named_buffers())
        assert all(torch.equal(retriever.model.state_dict()[name], state[name]) for name in state)
        found = dict(retriever.model.named_buffers())
        assert all(torch.equal(found[name], buffers[name]) for name in buffers)


def difference(one: Path, other: Path) -> float:
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    return max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0])


# At a higher rate, Adam makes much of gradients that are 0 but for rounding: at 1e-3, the norms of
# a batch's and its halves' gradients differ by up to 2e-4 at update 15, in float64 by 4e-13.
KINDS = {
    "adam": ["--accumulation_steps", 2, "--clip", 0.1, "--lr", 1e-4],
    "adamw": ["--optim", "adamw", "--use_checkpoint", "--lr", 1e-4],
}


@pytest.mark.parametrize(("kind", "processes"), [("adam", 2), ("adamw", 4)])
def test_they_train_as_one(kind, processes, data, reference, tmp_path):
    """Losses, gradient norms and weights; and the checkpoint opens as an ordinary T5."""
    one = train(tmp_path / "1", data, reference, 1, *KINDS[kind])
    more = train(tmp_path / "2", data, reference, processes, *KINDS[kind])
    for row, other in zip(*(read_metrics(tmp_path / n / "run") for n in "12"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert difference(one, more) < 1e-5
    t5 = T5ForConditionalGeneration.from_pretrained(more)
    assert torch.equal(t5.shared.weight, load_file(more / "model.safetensors")["shared.weight"])


def test_it_resumes_with_any_number_of_processes(data, reference, tmp_path):
    """Stopped half-way: bit for bit with as many, nearly with more, fewer, or one unsharded."""
    whole = train(tmp_path / "whole", data, reference, 2)
    half = ["--total_steps", STEPS // 2]
    for folder, first, then in (("shares", 2, (2, 1, 4)), ("one", 1, (1, 2))):
        stopped = train(tmp_path / folder, data, reference, first, *half)
        assert (stopped / sharding.SHARES).exists() == (first > 1)
        for processes in then:
            copy = tmp_path / f"{folder}-{processes}"
            shutil.copytree(tmp_path / folder, copy, symlinks=True)
            resumed = train(copy, data, reference, processes)
            whole = resumed if processes == 1 == first else whole
            assert difference(whole, resumed) <= (0 if processes == first else 1e-6), processes
            assert not list(copy.glob("run/checkpoint/.*"))


def test_what_a_gpu_cannot_hold_is_refused():
    with pytest.raises(
        InputError, match=r"take 17 kB of a GPU's 10 kB: use --shard with at least 2"
    ):
        sharding.check_fits(torch.nn.Linear(32, 32), 1e4, False)
    sharding.check_fits(torch.nn.Linear(32, 32), 1e5, False)


def test_a_sharded_reader_answers_and_scores_the_same(data, reference, tmp_path):
    """Also where one process has fewer batches than another, and by Transformers' decoder."""
    found = {}
    for name, processes, more in (
        ("one", 1, []),
        ("two", 2, ["--shard"]),
        ("slow", 2, ["--shard", "--decoder", "transformers"]),
    ):
        text = run_well(
            "test_reader.py", "--eval_data", data, "--n_context", 3, "--text_maxlength", 64,
            "--model_path", reference / "legacy_reader/checkpoint/step-20", "--tokenizer",
            reference / "t5", "--per_gpu_batch_size", 2, "--write_results", "--name", name,
            "--write_crossattention_scores", "--checkpoint_dir", tmp_path, "--num_workers", 0,
            *more, processes=processes,
        )  # fmt: skip
        assert "was changed" not in text  # the fast decoder, with weights gathered once
        folder = tmp_path / name
        scored = json.loads((folder / "dataset_wscores.json").read_text())
        scores = [ctx.get("score", 0.0) for row in scored for ctx in row.get("ctxs", [])]
        found[name] = (folder / "final_output.txt").read_text(), scores
    for name in ("two", "slow"):
        assert found[name][0] == found["one"][0]
        assert found[name][1] == pytest.approx(found["one"][1], abs=1e-4)


def test_a_retriever_is_trained_as_by_one(data, reference, tmp_path):
    scored = [row for row in json.loads(data.read_text()) if row.get("ctxs")]
    data.write_text(json.dumps(scored))
    weights = []
    for processes, more in ((1, []), (2, ["--shard"])):
        folder = tmp_path / str(processes)
        run_well(
            "train_retriever.py", "--train_data", data, "--eval_data", data, "--n_context", 3,
            "--model_path", reference / "legacy_retriever_mask_mean", "--dropout", 0,
            "--tokenizer", reference / "bert", "--per_gpu_batch_size", 4 // processes, "--lr", 1e-4,
            "--total_steps", 6, "--eval_freq", 3, "--checkpoint_dir", folder, "--num_workers", 0,
            "--in_batch_negatives", "--name", "run", *more, processes=processes,
        )  # fmt: skip
        weights.append(folder / "run" / "checkpoint" / "step-6")
    assert difference(*weights) < 1e-5
    for row, other in zip(*(read_metrics(tmp_path / n / "run") for n in "12"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-6)
