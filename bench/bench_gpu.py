"""The reader on a GPU in bf16: an update's speed and memory, plain Transformers', and the plan's.

    python bench/bench_gpu.py --size base        # 1 question, 100 passages of at most 250 tokens

Plain Transformers pads every passage to its full length and uses SDPA. Real lengths are 130 to 190
tokens. Shares of peak are of useful operations, those on real tokens.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.bench_reader import TEXT_MAXLENGTH, PlainFiD, make_batch
from bench.measure import table
from src.models.encoder import parts_to_compile
from src.models.losses import reader_loss
from src.models.reader import FiDT5
from src.options import train_reader_parser
from src.runtime.device import autocast, compile_layers, pick_device
from src.tools import footprint, plan
from src.training.loop import move_to
from src.training.optim import build_optimizer

UPDATES = 10


def seconds(task: Callable[[], object], times: int) -> float:
    for _ in range(3):
        task()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        task()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=footprint.T5, default="base")
    parser.add_argument("--passages", type=int, default=100)
    asked = parser.parse_args()
    device, machine = pick_device(0), plan.find_device("this")
    words = f"--model_size {asked.size} --n_context {asked.passages} --use_checkpoint "
    words += f"--text_maxlength {TEXT_MAXLENGTH} --answer_maxlength 8"
    options = train_reader_parser().parse_args(words.split())
    s = footprint.reader_shape(options)
    batch = move_to(make_batch(1, asked.passages), device)
    lengths = batch["attention_mask"].sum(dim=2).flatten().tolist()
    flops = sum(footprint.encoder_flops(s, 1, length) for length in lengths)
    flops = 3 * (flops + footprint.decoder_flops(s, 1, sum(lengths), 8))
    D, head, F, layers, H = footprint.T5[asked.size]
    rows = []
    for way in ("ours", "ours, --compile", "ours, --use_checkpoint", "plain bf16", "plain fp32"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        config = T5Config(
            d_model=D, d_kv=head, d_ff=F, num_layers=layers, num_heads=H, decoder_start_token_id=0
        )
        config._attn_implementation = "sdpa"
        t5 = T5ForConditionalGeneration(config)
        model = (PlainFiD(t5) if "plain" in way else FiDT5(t5)).to(device).train()
        options.use_checkpoint = "checkpoint" in way
        if options.use_checkpoint:
            model.checkpoint_blocks()
        if "compile" in way:
            compile_layers(parts_to_compile(t5.encoder))
        optimizer = build_optimizer(model, "adamw", 1e-4, 0.01)
        precision = "fp32" if "fp32" in way else "bf16"

        def update(
            model: torch.nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            precision: str = precision,
        ) -> None:
            with autocast(device, precision):
                loss, _ = reader_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        row = {"training": f"{asked.size}, {way}"}
        try:
            took = seconds(update, UPDATES)
        except torch.OutOfMemoryError:
            continue  # plain Transformers in float32 needs more than most GPUs have
        finally:
            del model, t5
        row |= {"updates/s": 1 / took, "GB": torch.cuda.max_memory_allocated() / 1e9}
        planned = footprint.training_memory(s, options, machine, precision)
        row["planned GB"] = sum(planned.values()) / 1e9 if "ours" in way else float("nan")
        row["of peak"] = flops / took / machine.flops[precision == "fp32"]
        rows.append(row)
        del optimizer, update
    table(rows)


if __name__ == "__main__":
    main()
