"""Where a model runs and in which number format; no device is assumed anywhere else."""

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import nn

from src.runtime.errors import InputError
from src.runtime.terminal import count

_AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(local_rank: int) -> torch.device:
    """GPU number `local_rank` of those that this process sees, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine sees only {torch.cuda.device_count()} GPU(s): "
            "start one process per GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # cuDNN's attention builds a plan for every new shape, and nearly every batch has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` means bf16 on a GPU with bf16 arithmetic, else fp32; other values are returned as
    they are. Errors: `InputError` for bf16 on a GPU that only emulates it."""
    if precision not in ("auto", "bf16") or device.type != "cuda":
        return "fp32" if precision == "auto" else precision
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    if precision == "bf16":
        raise InputError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic "
            "(compute capability 8.0 or later); use --precision fp32 or fp16"
        )
    return "fp32"


def gpu_memory(device: torch.device) -> float:
    """A GPU's memory in bytes; for a CPU, which has swap, infinity."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """A context in which matrix products run in `precision` while weights stay in fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST_TYPES[precision])


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which float32 tensors are multiplied in float32, also inside `autocast`."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # which costs nothing
    return torch.autocast(device.type, enabled=False)


def number_format(tensor: torch.Tensor) -> torch.dtype:
    """The format of matrix products with this tensor: autocast's where it is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Let PyTorch compile like layers, in place, on their first calls. Layer by layer, because a
    layer is compiled once for all of them, and for any number of texts and tokens."""
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def describe_size(model: nn.Module) -> str:
    """The size of a model in a few words, for the log."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"


def describe(device: torch.device) -> str:
    """The device in a few words, for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count(torch.get_num_threads(), 'thread')}"
