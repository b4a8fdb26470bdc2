"""Compiled layers compute and save what they are compiled from."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from src.models.encoder import parts_to_compile
from src.models.reader import load_reader
from src.models.retriever import load_retriever
from src.runtime.device import compile_layers, pick_device, resolve_precision
from src.runtime.errors import InputError
from src.runtime.launch import detect_launch


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


@pytest.mark.slow
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


@pytest.fixture
def one_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)


def srun(**variables: str) -> dict[str, str]:
    """The environment of the second of four tasks on a machine."""
    return {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu7",
    } | variables


OWN_GPU = [
    {"SLURM_GPUS_PER_TASK": "a100:1"},
    {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"},
    {"SLURM_TRES_PER_TASK": "gres:gpu:1"},
    {"SLURM_GPU_BIND": "verbose,single:1"},
    {"SLURM_GPU_BIND": "per_task:1"},
    {"SLURM_GPU_BIND": "map_gpu:0,1,2,3"},
    {"SLURM_NTASKS_PER_GPU": "1"},
    {"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "4"},
    {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "0,1,2,3"},
]


@pytest.mark.parametrize("variables", OWN_GPU, ids=str)
def test_a_task_that_sees_its_own_gpu_only_takes_it(variables, one_gpu):
    assert pick_device(detect_launch(srun(**variables)).local_rank) == torch.device("cuda", 0)


SHARED_GPUS = [
    {},
    {"SLURM_TRES_PER_TASK": "cpu=4"},
    {"SLURM_GPU_BIND": "none", "SLURM_GPUS_PER_TASK": "1"},
    {"SLURM_GPU_BIND": "closest"},
    {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"},
    {"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "3"},
    {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"},
    {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_TASK": "1"},
]


@pytest.mark.parametrize("variables", SHARED_GPUS, ids=str)
def test_more_tasks_than_gpus_are_an_error(variables, one_gpu):
    launch = detect_launch(srun(**variables))
    assert launch.local_rank == 1
    with pytest.raises(InputError, match=r"sees only 1 GPU\(s\): start one process per GPU"):
        pick_device(launch.local_rank)


@pytest.mark.parametrize(("capability", "has_bf16"), [((7, 0), False), ((8, 0), True)])
def test_bf16_needs_a_gpu_that_computes_in_it(capability, has_bf16, one_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert resolve_precision("auto", gpu) == ("bf16" if has_bf16 else "fp32")
    assert resolve_precision("fp16", gpu) == "fp16"
    if has_bf16:
        assert resolve_precision("bf16", gpu) == "bf16"
    else:
        with pytest.raises(InputError, match=r"V100 has no bf16 arithmetic.*fp32 or fp16"):
            resolve_precision("bf16", gpu)


def test_cudnn_attention_is_off(one_gpu, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", set_to.append)
    pick_device(0)
    assert set_to == [False]
