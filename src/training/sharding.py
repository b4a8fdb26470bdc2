"""`--shard`: weights, gradients and optimizer divided among the processes by PyTorch's FSDP2.

Each encoder and decoder block is gathered when it is called, and everything else of the model with
the model itself. Every process must therefore call the model equally often. A checkpoint's weights
are those of an unsharded run; each process writes its own share of the optimizer beside them.
"""

import functools
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from src.models.stored import Weight, fill
from src.runtime import distributed
from src.runtime.errors import InputError, first_line
from src.runtime.terminal import size

SHARES = "optimizer"  # the folder in a checkpoint


def check_fits(model: nn.Module, memory: float, is_sharded: bool) -> None:
    """Errors: `InputError` when weights, gradients and Adam's averages alone, 16 bytes a parameter,
    exceed a GPU's memory in bytes."""
    total = 16 * sum(p.numel() for p in model.parameters())
    needed = total / (distributed.world_size() if is_sharded else 1)
    if needed > memory:
        at_least = int(total // memory) + 1
        raise InputError(
            f"weights, gradients and optimizer alone take {size(needed)} of a GPU's "
            f"{size(memory)}: use --shard with at least {at_least} processes (--plan tells more)"
        )


def shard(model: nn.Module, device: torch.device, precision: str, is_wanted: bool) -> None:
    """If wanted, divide a model on the CPU or on `device` among the processes, in place. In bf16,
    blocks are gathered as bf16; the shares, and sums of gradients, are float32."""
    if not is_wanted or distributed.world_size() == 1:
        model.to(device)
        return
    if precision == "fp16":
        raise InputError("--shard --precision fp16: use bf16 or fp32 with --shard")
    # (Of a block's outputs, which nothing overwrites.)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":  # autocast converts inputs, where products need it
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    fill(model, functools.partial(_read_share, device))


def _read_share(device: torch.device, weight: Weight, share: DTensor) -> DTensor:
    """This process's share of a weight; if it cannot be read by rows, the main process reads and
    deals it out."""
    mesh, placements = share.device_mesh, share.placements
    if not weight.by_rows:
        empty = torch.empty(share.shape, device=device)
        whole = weight.read().to(device) if distributed.is_main() else empty
        return distribute_tensor(whole, mesh, placements)
    n_rows = -(-len(share) // mesh.size())  # as torch.chunk divides them
    first, last = (min((mesh.get_local_rank() + i) * n_rows, len(share)) for i in (0, 1))
    own = weight.read(first, last).to(device)
    form = {"shape": share.shape, "stride": share.stride()}
    return DTensor.from_local(own, mesh, placements, run_check=False, **form)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, which every process must ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A sharded model's state in the main process's memory; empty in the others."""
    weights: dict[str, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}  # once, if tied
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            whole = full(tensor.detach())
            gathered[id(tensor)] = whole.cpu() if distributed.is_main() else whole.new_empty(0)
        weights[name] = gathered[id(tensor)]
    return weights if distributed.is_main() else {}


Named = dict[str, nn.Parameter]  # an optimizer's parameters, by their names in the model


def write_shares(folder: Path, optimizer: torch.optim.Optimizer, parameters: Named) -> None:
    """Write the optimizer's state into a new folder, each process its share.

    Errors: `InputError` in every process when one cannot write.
    """
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier()
    tensors = {
        f"{name}.{key}": value if value.dim() else value.view(1)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    except Exception as error:  # DCP passes on any process's
        raise InputError(
            f"{folder}: the optimizer cannot be written ({first_line(error)}); "
            "earlier checkpoints are intact"
        ) from error


def read_shares(checkpoint: Path, optimizer: torch.optim.Optimizer, parameters: Named) -> None:
    """Give an optimizer the state in a checkpoint of any number of processes."""
    reader = HuggingFaceStorageReader(str(checkpoint / SHARES))
    tensors: dict[str, torch.Tensor] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        parameter = parameters[name.rpartition(".")[0]]
        is_like = found.size == parameter.shape and not name.endswith(".step")
        scalar = torch.zeros(1, device=parameter.device)
        tensors[name] = torch.zeros_like(parameter.detach()) if is_like else scalar
    dcp.load(tensors, storage_reader=reader, no_dist=distributed.world_size() == 1)
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        value = tensor.view(()) if key == "step" else tensor
        optimizer.state[parameters[owner]][key] = value


def divide_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer, sharded or not, the state of one that is not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in saved["state"].items():
        like = parameters[number]
        for key, value in values.items():
            value = value.to(like.device)
            if value.dim() and isinstance(like, DTensor):
                mesh, placements = like.device_mesh, like.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            optimizer.state[like][key] = value
