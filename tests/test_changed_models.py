"""A T5 that was changed in code (adapters, hooks, other modules, sharding) is never run by stale
weights: what generation, scores and the packed encoder give equals what calling its modules gives.
"""

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention

from src.models.decoder import GreedyDecoder, TransformersDecoder
from src.models.reader import FiDT5, load_reader, new_reader
from tests.make_models import make_t5_config
from tests.test_decoding import some_passages
from tests.test_reader import padded_encode, slow_scores


@pytest.fixture(params=["legacy", "gated"])
def reader(request, reference: Path, tmp_path: Path) -> FiDT5:
    torch.manual_seed(0)
    if request.param == "legacy":
        return load_reader(str(reference / "legacy_reader/checkpoint/step-20")).eval()
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    make_t5_config(tmp_path / "config.json", initializer_factor=3.0, **gated)
    return new_reader(str(tmp_path / "config.json")).eval()


def make_batch() -> dict[str, torch.Tensor]:
    ids, mask = some_passages(2)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 200, (6, 4))}


class Lora(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.delta = nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + 3 * self.delta(hidden)


class Doubled(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


class Negative(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


def own_forward(parent: nn.Module, name: str) -> None:
    module = getattr(parent, name)
    module.forward = lambda hidden: 2 * type(module).forward(module, hidden)


def hook(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_hook(lambda module, args, output: 2 * output)


LINEAR: dict[str, Callable[[nn.Module, str], None]] = {
    "LoRA": lambda parent, name: setattr(parent, name, Lora(getattr(parent, name))),
    "hook": hook,
    "parametrization": lambda parent, name: parametrize.register_parametrization(
        getattr(parent, name), "weight", Negative()
    ),
    "subclass": lambda parent, name: setattr(getattr(parent, name), "__class__", Doubled),
    "own forward": own_forward,
}
SITES = [
    *[f"layer.0.SelfAttention.{name}" for name in "qkvo"],
    *[f"layer.1.EncDecAttention.{name}" for name in "qkvo"],
    *[f"layer.2.DenseReluDense.{name}" for name in ("wi", "wo")],
]


def locate(reader: FiDT5, side: str, site: str) -> tuple[nn.Module, str]:
    stack = getattr(reader.t5, side)
    path, _, name = site.rpartition(".")
    if name == "wi" and not hasattr(stack.block[1].get_submodule(path), "wi"):
        name = "wi_1"
    return stack.block[1].get_submodule(path), name


@torch.no_grad()
def answer_slowly(reader: FiDT5, batch: dict, length: int) -> torch.Tensor:
    """The likeliest token, again and again, by calling the T5 without a cache."""
    encoded = padded_encode(reader, batch)
    tokens = torch.zeros(len(encoded.mask), 1, dtype=torch.long)
    ended = torch.zeros(len(encoded.mask), dtype=torch.bool)
    while tokens.shape[1] < length and not ended.all():
        logits = reader.t5(
            encoder_outputs=(encoded.hidden,),
            attention_mask=encoded.mask,
            decoder_input_ids=tokens,
            use_cache=False,
        ).logits
        chosen = logits[:, -1].argmax(dim=1).masked_fill(ended, 0)
        ended |= chosen == 1
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens


def check_answers(reader: FiDT5) -> None:
    """Answers and scores equal the slow ones, and one line says that the decoder was changed."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("fid")
    log.addHandler(handler)
    try:
        batch = make_batch()
        passages = batch["input_ids"], batch["attention_mask"]
        tokens, scores = reader.generate_with_scores(*passages, 8)
        assert isinstance(reader.decoder(), TransformersDecoder)
    finally:
        log.removeHandler(handler)
    assert len([line for line in lines if "Transformers' generate" in line]) == 1
    assert torch.equal(tokens, answer_slowly(reader, batch, 8))
    with torch.no_grad():
        expected = slow_scores(reader, batch)
    present = batch["attention_mask"].any(dim=2)
    assert torch.allclose(scores[present], expected[present], atol=1e-4)
    assert (scores[~present] == -torch.inf).all()


@pytest.mark.parametrize("number", range(len(SITES) + 1))
def test_changed_linear_layers_of_the_decoder(number, reference):
    """Every layer, and every kind of change."""
    reader = load_reader(str(reference / "legacy_reader/checkpoint/step-20")).eval()
    parent = (reader.t5, "lm_head")
    if number < len(SITES):
        parent = locate(reader, "decoder", SITES[number])
    list(LINEAR.values())[number % len(LINEAR)](*parent)
    check_answers(reader)


class HalfNorm(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / 2


def change_first(module: nn.Module, args: tuple, output: tuple) -> tuple:
    return (output[0] * 1.5, *output[1:])


OTHER: dict[str, Callable[[FiDT5], object]] = {
    "norm": lambda r: setattr(r.t5.decoder.block[1].layer[1], "layer_norm", HalfNorm()),
    "final norm": lambda r: setattr(r.t5.decoder, "final_layer_norm", HalfNorm()),
    "activation": lambda r: setattr(
        r.t5.decoder.block[0].layer[2].DenseReluDense, "act", nn.SiLU()
    ),
    "embedding's hook": lambda r: hook(r.t5.decoder, "embed_tokens"),
    "block's hook": lambda r: r.t5.decoder.block[1].register_forward_hook(change_first),
    "layer left out": lambda r: r.t5.decoder.block.__delitem__(1),
}


@pytest.mark.parametrize("change", OTHER)
def test_other_changes_of_the_decoder(change, reader):
    OTHER[change](reader)
    check_answers(reader)


def test_the_position_table_survives_a_replaced_layer(reference):
    reader = load_reader(str(reference / "legacy_reader/checkpoint/step-20")).eval()
    layers, batch = reader.t5.decoder.block[0].layer, make_batch()
    with torch.no_grad():
        _, expected = reader(**batch)
        layer = T5LayerCrossAttention(reader.config).eval()
        layer.load_state_dict(layers[1].state_dict())
        layers[1] = layer
        # (A layer of Transformers' own computes keys and values, so sums are in another order.)
        assert torch.allclose(reader(**batch)[1], expected, atol=1e-5)
    assert isinstance(reader.decoder(), GreedyDecoder)


def test_an_unchanged_decoder_is_the_fast_one(reader):
    """Also after training mode, new values of the weights and other dropout."""
    assert isinstance(reader.decoder(), GreedyDecoder)
    with torch.no_grad():
        reader.t5.lm_head.weight.mul_(2)
    reader.train()
    for module in reader.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    assert isinstance(reader.decoder(), GreedyDecoder)
    assert isinstance(reader.decoder("transformers"), TransformersDecoder)
    attention = reader.t5.decoder.block[0].layer[1].EncDecAttention
    attention.scaling = 0.5
    assert isinstance(reader.decoder(), TransformersDecoder)


# --- the encoder


def check_encoder(reader: FiDT5, packed: bool) -> None:
    batch = make_batch()
    real = batch["attention_mask"].flatten(1)
    calls = []
    handle = reader.t5.encoder.block[0].register_forward_pre_hook(
        lambda module, args: calls.append(args[0].dim())
    )
    with torch.no_grad():
        encoded = reader.encode(batch["input_ids"], batch["attention_mask"])
        handle.remove()
        expected = padded_encode(reader, batch).hidden
    assert calls == [2 if packed else 3]
    assert torch.allclose(encoded.hidden[encoded.mask], expected[real], atol=1e-4)


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return change_first(self, args, self.block(*args, **kwargs))


ENCODER_SITES = [site for site in SITES if "EncDec" not in site]


@pytest.mark.parametrize("change", LINEAR)
def test_changed_linear_layers_of_the_encoder_are_called(change, reader):
    for site in ENCODER_SITES:
        LINEAR[change](*locate(reader, "encoder", site.replace("layer.2", "layer.1")))
    check_encoder(reader, packed=True)


# What to change, and whether the encoder can still run packed.
ENCODER: dict[str, tuple[Callable[[FiDT5], object], bool]] = {
    "block's hook": (lambda r: r.t5.encoder.block[1].register_forward_hook(change_first), True),
    "norm": (lambda r: setattr(r.t5.encoder.block[1].layer[1], "layer_norm", HalfNorm()), True),
    "final norm's hook": (lambda r: hook(r.t5.encoder, "final_layer_norm"), True),
    "checkpoint": (
        lambda r: r.t5.encoder.block.__setitem__(1, checkpoint_wrapper(r.t5.encoder.block[1])),
        True,
    ),
    "layer's hook": (
        lambda r: r.t5.encoder.block[1].layer[0].register_forward_hook(change_first),
        False,
    ),
    "feed-forward": (
        lambda r: setattr(r.t5.encoder.block[1].layer[1], "DenseReluDense", HalfNorm()),
        False,
    ),
    "block": (lambda r: r.t5.encoder.block.__setitem__(1, Wrapped(r.t5.encoder.block[1])), False),
}


@pytest.mark.parametrize("change", ENCODER)
def test_other_changes_of_the_encoder(change, reader):
    make_change, packed = ENCODER[change]
    make_change(reader)
    check_encoder(reader, packed)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_what_hooks_see_is_not_overwritten(side, reference):
    """(ReLU works in place where nothing is attached.)"""
    reader = load_reader(str(reference / "t5"))
    wi = getattr(reader.t5, side).block[0].layer[-1].DenseReluDense.wi
    seen, gradients = [], []
    wi.register_forward_hook(lambda module, args, output: seen.append(output))
    wi.register_full_backward_hook(lambda module, *given: gradients.append(given))
    reader(**make_batch())[0].backward()
    assert seen[0].min() < 0
    assert len(gradients) == 1


# --- sharding


def sharded_numbers(rank: int, folder: str) -> None:
    """One of two processes: half of the batch through readers sharded by blocks, and in full."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for root in (False, True):
        reader = load_reader(f"{folder}/reader").eval()
        for block in [*reader.t5.encoder.block, *reader.t5.decoder.block]:
            fully_shard(block, mesh=mesh)
        if root:
            fully_shard(reader, mesh=mesh)
        found = numbers(reader, slice(3 * rank, 3 * rank + 3), average_gradients=not root)
        torch.save(found, f"{folder}/{root}-{rank}.pt")
    dist.destroy_process_group()


def numbers(reader: FiDT5, rows: slice, average_gradients: bool = False) -> dict:
    torch.manual_seed(0)
    batch = {name: value[rows] for name, value in make_batch().items()}
    loss, _ = reader(**batch)
    loss.backward()
    squares = 0.0
    for parameter in reader.parameters():
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        elif average_gradients:  # what FSDP does not shard is left to the training loop
            torch.distributed.all_reduce(gradient)
            gradient /= 2
        squares += float(gradient.square().sum())
    tokens, scores = reader.generate_with_scores(batch["input_ids"], batch["attention_mask"], 8)
    return {"loss": loss.item(), "norm": squares**0.5, "tokens": tokens, "scores": scores}


def test_sharded_readers_give_the_numbers_of_one_process(reference, tmp_path):
    reader = load_reader(str(reference / "legacy_reader/checkpoint/step-20"), 0.0)
    reader.save_pretrained(tmp_path / "reader")
    multiprocessing.set_forkserver_preload([__name__])  # the processes need not import it all
    torch.multiprocessing.start_processes(
        sharded_numbers, (str(tmp_path),), nprocs=2, start_method="forkserver"
    )
    one = numbers(reader.eval(), slice(0, 6))
    for root in (False, True):
        halves = [torch.load(tmp_path / f"{root}-{rank}.pt") for rank in range(2)]
        assert sum(half["loss"] for half in halves) / 2 == pytest.approx(one["loss"], rel=1e-5)
        for rank, half in enumerate(halves):
            assert half["norm"] == pytest.approx(one["norm"], rel=1e-5)
            rows = slice(3 * rank, 3 * rank + 3)
            length = half["tokens"].shape[1]
            assert torch.equal(half["tokens"], one["tokens"][rows, :length])
            assert torch.allclose(half["scores"], one["scores"][rows], atol=1e-4)
