"""Compiled layers compute and save what they are compiled from."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from src.models.encoder import parts_to_compile
from src.models.reader import load_reader
from src.models.retriever import load_retriever
from src.runtime.device import compile_layers, resolve_precision


def reader_task(reference: Path) -> tuple[nn.Module, Iterable[nn.Module], Callable]:
    reader = load_reader(str(reference / "legacy_reader/checkpoint/step-20"), dropout=0.0)
    mask = torch.arange(12) < torch.tensor([[[12], [7]], [[5], [12]]])
    ids = torch.randint(3, 90, (2, 2, 12), generator=torch.Generator().manual_seed(0)) * mask
    labels = torch.tensor([[5, 1, -100], [9, 8, 1]])
    return reader, parts_to_compile(reader.t5.encoder), lambda: reader(ids, mask, labels)[0]


def retriever_task(reference: Path) -> tuple[nn.Module, Iterable[nn.Module], Callable]:
    retriever = load_retriever(str(reference / "legacy_retriever_mask_mean"), dropout=0.0)
    mask = torch.arange(12) < torch.tensor([[12], [7], [3]])
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0)) * mask
    layers = retriever.model.encoder.layer
    return retriever, layers, lambda: retriever.embed_passages(ids, mask).square().sum()


@pytest.mark.parametrize("task", [reader_task, retriever_task])
def test_compiled_layers_give_the_same_loss_and_gradients(task, reference):
    """(By the backend that traces and differentiates as the default one, and writes no C++.)"""
    results = []
    for backend in (None, "aot_eager"):
        model, layers, loss_of = task(reference)
        names = list(model.state_dict())
        if backend:
            compile_layers(layers, backend)
            assert all(layer._compiled_call_impl is not None for layer in layers)
            assert list(model.state_dict()) == names  # so checkpoints are the same
        loss = loss_of()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *gradients])
    for plain, compiled in zip(*results, strict=True):
        assert torch.allclose(plain, compiled, atol=1e-5)


def test_precision():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
