"""The reader against Transformers' own T5 run as Fusion-in-Decoder the plain way.

    python bench/bench_reader.py [--rounds 5] [--shape small] [--passages 10] [--batch 1]

The plain way: eager attention, float32, every passage padded to its full length in encoder and
decoder, unfused AdamW. The same weights, passages and targets for both. Real lengths are 130 to
190 tokens of 250. Ratios are of medians of interleaved runs; peak memory is that of a process of
its own, less that of one that only imports.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import interleaved, matrix_peak, nothing, peak_memory, table
from src.models.losses import reader_loss
from src.models.reader import FiDT5, load_reader
from src.models.targets import attribution, questions
from src.options import GenerationOptions
from src.tools.footprint import T5, Shape, decoder_flops, encoder_flops, reader_shape
from src.training.optim import build_optimizer

TEXT_MAXLENGTH, ANSWER_LENGTH = 250, 8


def make_t5(size: str, attention: str, **settings: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    D, head, F, layers, H = T5[size]
    config = T5Config(d_model=D, d_kv=head, d_ff=F, num_layers=layers, num_heads=H, **settings)
    config.decoder_start_token_id, config._attn_implementation = 0, attention
    return T5ForConditionalGeneration(config)


def make_batch(batch: int, passages: int, most: int = TEXT_MAXLENGTH) -> dict:
    """Questions whose passages have 52 to 76 % of the most tokens."""
    generator = torch.Generator().manual_seed(1)
    shortest, longest = 13 * most // 25, 19 * most // 25
    lengths = torch.randint(shortest, longest + 1, (batch, passages, 1), generator=generator)
    mask = torch.arange(most) < lengths
    ids = torch.randint(3, 32000, (batch, passages, most), generator=generator)
    labels = torch.randint(3, 32000, (batch, ANSWER_LENGTH), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class PlainFiD(torch.nn.Module):
    """Fusion-in-Decoder as one writes it first."""

    def __init__(self, t5: T5ForConditionalGeneration):
        super().__init__()
        self.t5 = t5

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (B, N, L), mask = ids.shape, mask.to(ids.device)
        hidden = self.t5.encoder(input_ids=ids.view(B * N, L), attention_mask=mask.view(B * N, L))
        return hidden.last_hidden_state.view(B, N * L, -1), mask.view(B, N * L)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor):
        hidden, mask = self.encode(ids, mask)
        encoded = BaseModelOutput(last_hidden_state=hidden)
        output = self.t5(
            encoder_outputs=encoded, attention_mask=mask, labels=labels, use_cache=False
        )
        return output.loss, output.logits

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, mask: torch.Tensor, max_length: int) -> torch.Tensor:
        hidden, mask = self.encode(ids, mask)
        settings = GenerationConfig(
            max_length=max_length, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0
        )
        encoded = BaseModelOutput(last_hidden_state=hidden)
        return self.t5.generate(
            encoder_outputs=encoded, attention_mask=mask, generation_config=settings
        )


def make_reader(shape: str, way: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """`plain`, `ours` or `ours, --use_checkpoint`, and its optimizer."""
    if way == "plain":
        reader = PlainFiD(make_t5(shape, "eager"))
        return reader, torch.optim.AdamW(reader.parameters(), lr=1e-4)
    reader = FiDT5(make_t5(shape, "sdpa"))
    if "checkpoint" in way:
        reader.checkpoint_blocks()
    return reader, build_optimizer(reader, "adamw", 1e-4, 0.01)


def training_step(reader: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> float:
    reader.train()
    loss, _ = reader_loss(reader, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train_twice(shape: str, way: str, batch: int, passages: int) -> None:
    reader, optimizer = make_reader(shape, way)
    for _ in range(2):
        training_step(reader, optimizer, make_batch(batch, passages))


def answer_once(folder: str, way: str, batch: int, passages: int) -> None:
    if way == "plain":
        t5 = T5ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        reader = PlainFiD(t5).eval()
    else:
        reader = load_reader(folder).eval()
    tokens = make_batch(batch, passages)
    reader.generate(tokens["input_ids"], tokens["attention_mask"], 20)


def useful_flops(shape: Shape, batch: dict) -> float:
    """Floating-point operations of a forward pass on real tokens alone."""
    lengths = batch["attention_mask"].sum(dim=2)
    of_passages = sum(encoder_flops(shape, 1, length) for length in lengths.flatten().tolist())
    questions = zip(lengths.sum(dim=1).tolist(), batch["labels"], strict=True)
    return of_passages + sum(decoder_flops(shape, 1, S, len(label)) for S, label in questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=T5, default="small")
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    batch = make_batch(options.batch, options.passages)
    ways = ["plain", "ours", "ours, --use_checkpoint"]
    made = {way: make_reader(options.shape, way) for way in ways}
    losses = {way: training_step(*made[way], batch) for way in ways}
    # (Dropout is on, so losses differ a little; the tests compare without it.)
    print(json.dumps({"first losses": losses}))

    steps = {way: lambda way=way: training_step(*made[way], batch) for way in ways}
    seconds = interleaved(steps, options.rounds)
    empty = peak_memory(nothing)
    memory = {
        way: peak_memory(train_twice, options.shape, way, options.batch, options.passages) - empty
        for way in ways
    }
    shape = reader_shape(argparse.Namespace(model_size=options.shape))
    peak, flops = matrix_peak(), 3 * useful_flops(shape, batch)
    rows = [
        {
            "training": way,
            "s a step": seconds[way],
            "speed": seconds["plain"] / seconds[way],
            "peak MB": round(memory[way]),
            "memory": memory[way] / memory["plain"],
            "of peak FLOPs": flops / seconds[way] / peak,
        }
        for way in ways
    ]
    table(rows)

    plain, ours = made["plain"][0].eval(), made["ours"][0].eval()
    with tempfile.TemporaryDirectory() as folder:
        plain.t5.save_pretrained(folder)
        peaks = {
            way: peak_memory(answer_once, folder, way, options.batch, options.passages) - empty
            for way in ("plain", "ours")
        }
    # A head of their own: fresh weights with a tied one repeat the token that they begin with.
    plain.t5.lm_head.weight = torch.nn.Parameter(0.05 * torch.randn_like(plain.t5.shared.weight))
    ours.t5.lm_head.weight = plain.t5.lm_head.weight
    ours.t5.load_state_dict(plain.t5.state_dict())
    ids, mask = batch["input_ids"], batch["attention_mask"]

    decoder = ours.decoder()  # laid out once for a whole file, as test_reader.py does
    if not torch.equal(plain.generate(ids, mask, 20), ours.generate(ids, mask, 20)):
        sys.exit("the two ways answer differently")
    points = ",".join(str(max(1, options.passages * part // 7)) for part in range(1, 8))
    curve = GenerationOptions(20, n_context_curve=points)

    def explain() -> None:
        found = ours.answer(ids, mask, GenerationOptions(20), decoder)
        for question, tokens in zip(questions(found.encoded, mask), found.tokens, strict=True):
            attribution(decoder, question, tokens[1:])

    seconds = interleaved(
        {
            "plain": lambda: plain.generate(ids, mask, 20),
            "ours": lambda: ours.generate(ids, mask, 20, decoder=decoder),
            "ours, scores captured": lambda: ours.generate_with_scores(
                ids, mask, 20, decoder=decoder
            ),
            "ours, a curve of 7 points": lambda: ours.answer(ids, mask, curve, decoder),
            "ours, with attribution": explain,
        },
        options.rounds,
    )
    table(
        [
            {"generation": way, "s": value, "speed": seconds["plain"] / value,
             "of ours": value / seconds["ours"], "peak MB": peaks.get(way, math.nan),
             "memory": peaks.get(way, math.nan) / peaks["plain"]}
            for way, value in seconds.items()
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
