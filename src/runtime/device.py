"""Where a model runs and in which number format; no device is assumed anywhere else."""

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from src.runtime.errors import InputError
from src.runtime.terminal import count

_AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this process (`local_rank` counts the processes of one machine), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine finds only {torch.cuda.device_count()} GPU(s): "
            "start as many processes as there are GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` means bf16 on a GPU that computes in it, else fp32; the rest stays as it is."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """A context in which matrix products run in `precision` while weights stay in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST_TYPES[precision])


def number_format(tensor: torch.Tensor) -> torch.dtype:
    """What matrix products with this tensor come out in: its own format or, inside `autocast`,
    the latter's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Let PyTorch compile like layers, in place, on their first calls. Layer by layer, because a
    layer is compiled once for all of them, and for any number of texts and tokens."""
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def describe(device: torch.device) -> str:
    """The device in a few words, for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count(torch.get_num_threads(), 'thread')}"
