"""What targets cost: test_reader.py's work on a question with each, against `attention` alone.

    python bench/bench_targets.py [--passages 20] [--rounds 5]

T5-small's shape, passages of 130 to 190 tokens, answers of 4 tokens. CPU time of one process.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.bench_reader import make_batch, make_reader
from bench.measure import table
from src.models.targets import AGGREGATES, questions, score_passages
from src.options import GenerationOptions

ANSWER = torch.tensor([37, 1023, 912, 1])


def cpu_seconds(task: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        began = time.process_time()
        task()
        seconds.append(time.process_time() - began)
    return sorted(seconds[1:])[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reader = make_reader("small", "ours")[0].eval()
    batch, generation = make_batch(1, options.passages), GenerationOptions(len(ANSWER) + 1)
    ids, mask, decoder = batch["input_ids"], batch["attention_mask"], reader.decoder()

    def read(names: list[str]) -> None:
        found = reader.answer(ids, mask, generation, decoder, "attention")
        for question in questions(found.encoded, mask) if names else []:
            score_passages(decoder, question, ANSWER, names)

    ways = {"attention": [], "all of attention": list(AGGREGATES)}
    ways |= {name: [name] for name in ("perplexity", "leave_one_out")}
    seconds = {
        way: cpu_seconds(lambda n=names: read(n), options.rounds) for way, names in ways.items()
    }
    first = seconds["attention"]
    table([{"target": w, "s a question": s, "of attention": s / first} for w, s in seconds.items()])


if __name__ == "__main__":
    main()
