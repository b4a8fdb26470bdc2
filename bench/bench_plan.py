"""What `--plan` says a command takes against what it takes: peak memory of a process on this CPU.

    python bench/bench_plan.py [--only reader]

Three shapes each of training a reader, training a retriever, and searching. A measured process has
fresh weights and made-up tokens or embeddings, and makes two updates or one search. Freed tensors
go back to the system: what glibc keeps between others (a fifth in training) is no part of a plan.
(FLOPs are compared with PyTorch's counter in tests/test_plan.py.)
"""

import argparse
import json
import logging
import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, T5Config

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import peak_memory, table
from src import options as options_of
from src.models import reader as readers
from src.models.losses import reader_loss, retriever_loss
from src.models.retriever import start_retriever
from src.search.shards import ShardWriter
from src.tools import plan
from src.training.optim import build_optimizer

SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
GATED = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 6}
GATED |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MINI = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
MINI |= {"intermediate_size": 1536}
DEEP = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12}
CASES = {  # a shape, and options
    "reader": [
        (SMALL, "--n_context 10 --text_maxlength 250 --answer_maxlength 8"),
        (SMALL, "--n_context 40 --text_maxlength 120 --use_checkpoint --answer_maxlength 8"),
        (GATED, "--n_context 5 --per_gpu_batch_size 4 --text_maxlength 100 --dropout 0"),
    ],
    "retriever": [
        (MINI, "--n_context 20 --passage_maxlength 200"),
        (MINI, "--n_context 10 --per_gpu_batch_size 8 --passage_maxlength 100 --dropout 0"),
        (DEEP, "--n_context 10 --passage_maxlength 250 --per_gpu_batch_size 2"),
    ],
    "search": [
        ((100_000, 384), "--n-docs 100"),
        ((200_000, 128), "--n-docs 20 --indexing_batch_size 200000"),
        ((150_000, 256), "--n-docs 100 --index_factory PQ32"),
    ],
}


def train(kind: str, words: list[str]) -> None:
    """Two updates by the options' model and batch size."""
    is_reader = kind == "reader"
    make = options_of.train_reader_parser if is_reader else options_of.train_retriever_parser
    options = make().parse_args(words)
    B, N = options.per_gpu_batch_size, options.n_context
    if is_reader:
        model, W = readers.new_reader(options.model_config, options.dropout), options.text_maxlength
        if options.use_checkpoint:
            model.checkpoint_blocks()
        T = options.answer_maxlength if options.answer_maxlength > 0 else plan.ANSWER
        ids = {"input_ids": torch.randint(5, 1000, (B, N, W))}
        batch = ids | {"labels": torch.randint(5, 1000, (B, T))}
        batch["attention_mask"] = torch.ones(B, N, W, dtype=torch.bool)
    else:
        model, W = start_retriever(options.model_config, options.dropout), options.passage_maxlength
        batch = {"question_ids": torch.randint(5, 1000, (B, 40))}
        batch |= {"passage_ids": torch.randint(5, 1000, (B, N, W))}
        batch |= {f"{k}_mask": torch.ones_like(batch[f"{k}_ids"]) for k in ("question", "passage")}
        batch |= {"gold_scores": torch.randn(B, N), "present": torch.ones(B, N, dtype=torch.bool)}
    optimizer = build_optimizer(model.train(), "adam", 1e-4, 0.0)
    for _ in range(2):
        loss, *_ = (reader_loss if is_reader else retriever_loss)(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def search(folder: str, words: list[str]) -> None:
    """Embed the questions, and search."""
    from passage_retrieval import main

    logging.disable()
    main([*words, "--validation_workers", "1"])


def make_search(folder: Path, rows: int, dimension: int) -> list[str]:
    """A retriever, a collection and its embeddings, and 500 questions; their options."""
    from transformers import BertTokenizer

    config = {"model_type": "bert", "hidden_size": dimension, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "intermediate_size": 512}
    (folder / "bert.json").write_text(json.dumps(config))
    retriever = start_retriever(str(folder / "bert.json"), projection=False)
    retriever.save_pretrained(folder / "retriever")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "retriever")
    text = "".join(f"{n}\ta b c d\te\n" for n in range(rows))
    (folder / "passages.tsv").write_text("id\ttext\ttitle\n" + text)
    questions = [{"question": "a b", "answers": ["c"]} for _ in range(500)]
    (folder / "data.json").write_text(json.dumps(questions))
    (folder / "embeddings").mkdir()
    with ShardWriter(folder / "embeddings/wiki_00", rows, dimension, np.float32, {}) as writer:
        draw = np.random.default_rng(0)
        for start in range(0, rows, 10_000):
            n = min(10_000, rows - start)
            ids = [str(row) for row in range(start, start + n)]
            writer.append(ids, draw.standard_normal((n, dimension), np.float32))
        writer.finish()
    named = ["--model_path", folder / "retriever", "--passages", folder / "passages.tsv"]
    named += ["--data", folder / "data.json", "--passages_embeddings", folder / "embeddings/wiki_*"]
    return [
        str(word) for word in [*named, "--output_path", folder / "out.json", "--allow_mismatch"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES)
    only = parser.parse_args().only
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the processes measured
    rows = []
    for kind in [only] if only else CASES:
        for shape, text in CASES[kind]:
            with tempfile.TemporaryDirectory() as name:
                folder, words = Path(name), shlex.split(text)
                if kind == "search":
                    words += make_search(folder, *shape)
                    options = options_of.passage_retrieval_parser().parse_args(words)
                    measured = peak_memory(search, name, words)
                else:
                    made = T5Config(**shape) if kind == "reader" else BertConfig(**shape)
                    values = made.to_diff_dict() | {"model_type": made.model_type} | shape
                    (folder / "config.json").write_text(json.dumps(values))
                    words += ["--model_config", str(folder / "config.json")]
                    is_reader = kind == "reader"
                    make = "train_reader_parser" if is_reader else "train_retriever_parser"
                    options = getattr(options_of, make)().parse_args(words)
                    measured = peak_memory(train, kind, words)
                planned = plan.plan(options, plan.find_device("this")).memory
                megabytes = sum(planned.values()) / 2**20
                row = {"command": f"{kind} {text}", "measured MB": round(measured)}
                rows.append(row | {"planned MB": round(megabytes), "ratio": megabytes / measured})
                print({k: round(v / 2**20) for k, v in planned.items()}, rows[-1], flush=True)
    table(rows)


if __name__ == "__main__":
    main()
