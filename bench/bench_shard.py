"""Memory of a process in training, with and without `--shard`, on this CPU.

    python bench/bench_shard.py [--processes 2]

A T5-base (223M parameters), loaded from safetensors, and a few tokens, so that weights, gradients
and optimizer are nearly everything. Two updates; resident memory in MB, less that of a process that
only imports. Ends with status 1 if a process holds more than its share while loading: the largest
weight, which may have to be copied, and a tenth are allowed.
"""

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import table
from src.models.losses import reader_loss
from src.models.reader import load_reader
from src.training import sharding
from src.training.optim import build_optimizer


def resident(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def train(rank: int, processes: int, is_sharded: bool, folder: str, pipe: Any) -> None:
    """Send the share, the memory after loading, its peak by then, and its peak in training."""
    torch.set_num_threads(1)
    address = f"file://{folder}/meet-{is_sharded}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    empty = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    reader = load_reader(f"{folder}/t5", by_shares=is_sharded)
    sizes = [p.numel() for p in reader.parameters()]
    share = 4 * (sum(sizes) / (processes if is_sharded else 1) + max(sizes)) / 2**20
    sharding.shard(reader, torch.device("cpu"), "fp32", is_sharded)
    found = [resident("VmRSS") - empty, resident("VmHWM") - empty]
    Path("/proc/self/clear_refs").write_text("5")
    optimizer = build_optimizer(reader, "adam", 1e-4, 0.0)
    ids = torch.randint(3, 1000, (1, 2, 8))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0, :4].contiguous()}
    for _ in range(2):
        reader_loss(reader, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    pipe.send((sum(sizes) / 1e6, share, *found, resident("VmHWM") - empty))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    processes = parser.parse_args().processes
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back to the system
    context, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        shape = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12}
        t5 = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
        t5.save_pretrained(f"{folder}/t5", max_shard_size="300MB")
        del t5
        for is_sharded in (False, True):
            pipes = [context.Pipe() for _ in range(processes)]
            tasks = [
                context.Process(target=train, args=(rank, processes, is_sharded, folder, pipe[1]))
                for rank, pipe in enumerate(pipes)
            ]
            for task in tasks:
                task.start()
            found = [max(values) for values in zip(*(p[0].recv() for p in pipes), strict=True)]
            for task in tasks:
                task.join()
            names = [
                "M parameters",
                "share + largest weight",
                "after loading",
                "peak while loading",
                "peak in training",
            ]
            row = {"training": f"{processes} processes{', --shard' if is_sharded else ''}"}
            rows.append(row | dict(zip(names, map(round, found), strict=True)))
    for row in rows:
        row["of unsharded"] = row["peak in training"] / rows[0]["peak in training"]
    table(rows)
    if rows[1]["peak while loading"] > 1.1 * rows[1]["share + largest weight"]:
        sys.exit("a process held more than its share while loading")


if __name__ == "__main__":
    main()
