"""Training, generation, embedding and search on a GPU, next to the plain way and the plan.

    bash bench/on_gpu.sh            # --tiny: small shapes, also on a CPU, to try the bench itself

Readers read one question with 100 passages of 130 to 190 tokens, at most 250. The plain way is
Transformers' T5 with SDPA, every passage padded to its full length. Shares of the peak are of
useful operations, those on real tokens. Every row is measured in a process of its own.
"""

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.bench_reader import ANSWER_LENGTH, PlainFiD, make_batch, make_t5, useful_flops
from bench.bench_search import write_shards
from bench.measure import table
from src.data.passages import Passages
from src.models.embedder import TextEmbedder, embed_blocks
from src.models.encoder import parts_to_compile
from src.models.losses import reader_loss
from src.models.reader import FiDT5
from src.models.retriever import start_retriever
from src.runtime.device import autocast, compile_layers, describe, pick_device
from src.search.embeddings import open_shards
from src.search.exact import Indexer
from src.search.gpu import GpuIndexer
from src.tools import footprint, plan
from src.training.loop import move_to
from src.training.optim import build_optimizer

SECONDS = 450  # for all rows together; one may take a quarter
COLUMNS = {"rate": math.nan, "unit": "", "times plain": math.nan, "GB": math.nan}
COLUMNS |= {"planned GB": math.nan, "of peak": math.nan, "note": ""}
WAYS = ["plain bf16", "ours", "ours, --use_checkpoint", "ours, --compile", "plain fp32"]
footprint.T5["tiny"] = (32, 8, 64, 2, 4)
Row = dict[str, Any]


def seconds(task: Callable[[], object], times: int) -> float:
    """Of one of several runs that follow each other without a pause, after three to warm up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        task()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        task()
    wait()
    return (time.perf_counter() - start) / times


def measured(rate: float, unit: str, flops: float, precision: str, memory: Row) -> Row:
    """A row.

    Args: flops: in a second; memory: the plan's.
    """
    device = plan.find_device("this")
    row = {"rate": rate, "unit": unit, "of peak": flops / device.flops[precision == "fp32"]}
    if memory:
        row["planned GB"] = sum(memory.values()) / 1e9
    if device.kind == "cuda":
        row["GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def read(task: str, size: str, way: str, passages: int, length: int) -> Row:
    """Training a reader or generation."""
    device, precision = pick_device(0), "fp32" if "fp32" in way else "bf16"
    options = argparse.Namespace(
        model_size=size, n_context=passages, text_maxlength=length, answer_maxlength=ANSWER_LENGTH,
        use_checkpoint="checkpoint" in way, per_gpu_batch_size=1, dropout=0.1,
        accumulation_steps=1, shard=False,
    )  # fmt: skip
    shape, memory = footprint.reader_shape(options), {}
    batch = make_batch(1, passages, length)
    flops, batch = useful_flops(shape, batch), move_to(batch, device)
    with device:  # (A head of their own: fresh weights with a tied one repeat their first token.)
        t5 = make_t5(size, "sdpa", tie_word_embeddings=task == "training")
        model = (PlainFiD(t5) if "plain" in way else FiDT5(t5)).train(task == "training")
    if "compile" in way:
        compile_layers(parts_to_compile(t5.encoder))
    if options.use_checkpoint:
        model.checkpoint_blocks()

    if task == "training":
        optimizer = build_optimizer(model, "adamw", 1e-4, 0.01)

        def update() -> None:
            with autocast(device, precision):
                loss, _ = reader_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        took = seconds(update, 10)
        if "ours" in way:
            memory = footprint.training_memory(shape, options, plan.find_device("this"), precision)
        return measured(1 / took, "updates/s", 3 * flops / took, precision, memory)

    passages_of = batch["input_ids"], batch["attention_mask"]
    with autocast(device, precision):
        answer = partial(model.generate, *passages_of, 20)
        if "ours" in way:
            answer = partial(answer, decoder=model.decoder())
        took = seconds(answer, 5)
    if "ours" in way:
        memory = footprint.answering_memory(shape, options, plan.find_device("this"), precision)
    return measured(1000 * took, "ms/question", flops / took, precision, memory)


def embed(config: dict[str, int], n_passages: int) -> Row:
    """Passages of a file, tokenized on the way, as in generate_passage_embeddings.py."""
    device, batch, draw = pick_device(0), 512, np.random.default_rng(0)
    precision = "fp16" if device.type == "cuda" else "fp32"
    words = np.array([f"w{number}" for number in range(1000, 9000)])
    lengths = draw.integers(128, 188, n_passages)
    with tempfile.TemporaryDirectory() as name:
        vocabulary, bert, file = (f"{name}/{n}" for n in ("vocab.txt", "bert.json", "passages.tsv"))
        Path(vocabulary).write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))
        BertConfig(**config).to_json_file(bert, use_diff=False)
        rows = (" ".join(draw.choice(words, length)) for length in lengths)
        text = "".join(f"{number}\t{row}\tw1234\n" for number, row in enumerate(rows))
        Path(file).write_text("id\ttext\ttitle\n" + text)
        retriever = start_retriever(bert, projection=False).to(device).eval()
        retriever = retriever.half() if precision == "fp16" else retriever
        tokenizer = BertTokenizerFast(vocab=vocabulary)
        embedder = TextEmbedder(retriever, tokenizer, "passages", 200, batch, device)
        passages = Passages(file)
        embedder(["w1234 " * 200] * batch)
        start = time.perf_counter()
        for _ in embed_blocks(embedder, passages, range(n_passages), True, retriever.texts[1]):
            pass
        took = time.perf_counter() - start
        shape = footprint.retriever_shape(argparse.Namespace(model_path=bert))
    flops = sum(footprint.retriever_flops(shape, 1, length) for length in lengths.tolist())
    memory = footprint.embedding_memory(shape, batch * 200, precision)
    return measured(n_passages / took, "passages/s", flops / took, precision, memory)


def search(n_rows: int, dimension: int, n_questions: int, again: int) -> Row:
    """Exact search: the first pass, from disk, or the next one in what has stayed on the GPU."""
    device, queries = pick_device(0), np.random.default_rng(1).standard_normal
    queries = queries((n_questions, dimension), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, n_rows, dimension, np.float16)
        shards = open_shards(f"{folder}/wiki_*")
        index = GpuIndexer(shards, 50_000, device)
        for _ in range(again + 1):
            start = time.perf_counter()
            found = index.search(queries, 100)
            took = time.perf_counter() - start
        few = Indexer(shards, 50_000).search(queries[:4], 100)
    row = measured(took, "s", 2 * n_rows * dimension * n_questions / took, "fp16", {})
    is_same = (few.positions == found.positions[:4]).all()
    return row | {"note": "" if is_same else "finds other passages than the CPU"}


def parts(is_tiny: bool) -> dict[str, Callable[[], Row]]:
    """What to measure, by name."""
    reading = (3, 20) if is_tiny else (100, 250)
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert |= {"intermediate_size": 64}
    rows, n_passages, questions = (3000, 50, 20) if is_tiny else (2_000_000, 40_000, 1000)
    ways = [("training", way) for way in WAYS]
    ways += [("generation", way) for way in ("plain bf16", "ours", "plain fp32")]

    def readers(size: str) -> dict[str, Callable[[], Row]]:
        names = {f"{task} {size}, {way}": (task, size, way) for task, way in ways}
        return {name: partial(read, *values, *reading) for name, values in names.items()}

    found = readers("tiny" if is_tiny else "base")
    found[f"embedding {n_passages:,}"] = partial(embed, bert if is_tiny else {}, n_passages)
    dimension = 32 if is_tiny else 768
    for number, name in enumerate(("from disk", "kept")):
        name = f"search {rows:,} x {dimension}, {questions:,} questions, {name}"
        found[name] = partial(search, rows, dimension, questions, number)
    if not is_tiny:
        found |= readers("large")  # last, as time may run out
    return found


def device() -> Row:
    return {"device": describe(pick_device(0)), "PyTorch": torch.__version__}


def _send(task: Callable[[], Row], pipe: Connection) -> None:
    try:
        pipe.send(task())
    except torch.OutOfMemoryError:
        pipe.send({"note": "out of memory"})


def in_a_process(task: Callable[[], Row], most_seconds: float) -> Row:
    """What a task returns, or a note why it returned nothing. The process is forked, which takes no
    time, and which CUDA allows as long as this one has not used it."""
    if most_seconds <= 0:
        return {"note": "skipped: no time left"}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(task, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(most_seconds) else {"note": "stopped: too slow"}
    except EOFError:
        return {"note": "failed, see above"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    is_tiny = parser.parse_args().tiny
    end, facts = time.monotonic() + SECONDS, in_a_process(device, SECONDS)
    if facts["device"].startswith("CPU") and not is_tiny:
        sys.exit("no GPU here; --tiny tries this bench on a CPU")
    print(*facts.values(), sep=", PyTorch ")
    rows: list[Row] = []
    for name, task in parts(is_tiny).items():
        row = in_a_process(task, min(end - time.monotonic(), SECONDS / 4))
        rows.append({"measured": name} | COLUMNS | row)
        print(name, row, file=sys.stderr, flush=True)
    rates = {row["measured"]: row["rate"] for row in rows}
    for row in rows:
        times = row["rate"] / rates.get(f"{row['measured'].split(',')[0]}, plain bf16", math.nan)
        row["times plain"] = 1 / times if row["unit"] == "ms/question" else times
    table(rows, **facts)
    if any(row["note"].startswith(("failed", "finds")) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
