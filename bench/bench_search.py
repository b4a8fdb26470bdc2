"""Exact search streamed from disk against FAISS's IndexFlatIP, which holds it all in memory.

    python bench/bench_search.py [--rows 1000000] [--dimension 256] [--questions 1000] [--k 100]

Embeddings are random, in three shards on disk. Each way runs in a fresh process: once to read the
files, then timed, the two taking turns. Memory is the largest anonymous one (RssAnon) beyond what
the process had after its imports, the result included. Pages of the files that the system keeps in
memory are not counted: it takes them back when they are needed. The peak is the fastest product of
two large matrices.

The ids must be equal. IndexFlatIP rounds in another way when many questions are asked at once, so
where two passages' scores are equal but for that, it is asked again to add up products one by one.
Three processes that share the blocks must find the same.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import matrix_peak, table
from src.search.embeddings import open_shards
from src.search.exact import Found, Indexer, merge
from src.search.shards import ShardWriter


def anonymous_memory() -> float:
    """MB of this process that are not pages of a file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


def watched(task: Callable[[], Any]) -> tuple[Any, float]:
    """The task's result, and the most anonymous memory seen while it ran, looked at each 2 ms."""
    peak, done = [anonymous_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = task()
    done.set()
    watcher.join()
    return result, peak[0]


def search(
    way: str, pattern: str, queries: np.ndarray, k: int, rows: int, pipe: Connection
) -> None:
    """In a process of its own: answer each empty list with the seconds of one more search, and
    each list of questions with what a search without matrix products finds for them."""
    before = anonymous_memory()
    shards = open_shards(pattern)
    if way == "IndexFlatIP":

        def load() -> faiss.Index:
            index = faiss.IndexFlatIP(queries.shape[1])
            for shard in shards:
                index.add(shard.embeddings)
            return index

        index, peak = watched(load)

        def task(queries: np.ndarray = queries) -> np.ndarray:
            return merge([Found(*index.search(queries, k))], k).positions  # equal scores: in order
    else:
        index, peak = Indexer(shards, rows), 0.0

        def task() -> np.ndarray:
            return index.search(queries, k).positions

    positions, peak_of_search = watched(task)
    pipe.send((positions, max(peak, peak_of_search) - before))
    while (asked_again := pipe.recv()) is not None:
        if len(asked_again):
            faiss.cvar.distance_compute_blas_threshold = 1 << 30
            pipe.send(task(queries[asked_again]))
        else:
            began = time.perf_counter()
            task()
            pipe.send(time.perf_counter() - began)


def write_shards(folder: str, n_rows: int, dimension: int, dtype: type) -> None:
    """Three shards of random embeddings. (Blocks differ by signs, which takes less time than to
    draw each.)"""
    draw = np.random.default_rng(0)
    base = draw.standard_normal((min(50_000, n_rows), dimension), np.float32)
    for shard in range(3):
        first, last = (n_rows * (shard + i) // 3 for i in (0, 1))
        with ShardWriter(f"{folder}/wiki_{shard:02}", last - first, dimension, dtype, {}) as writer:
            for start in range(first, last, len(base)):
                ids = [str(i) for i in range(start, min(start + len(base), last))]
                signs = draw.choice(np.float32([-1, 1]), dimension)
                writer.append(ids, base[: len(ids)] * signs)
            writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--indexing_batch_size", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((options.questions, options.dimension), np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, options.rows, options.dimension, np.float32)
        pattern = f"{folder}/wiki_*"
        pipes, found, seconds = {}, {}, {}
        for way in ("IndexFlatIP", "streamed"):
            pipes[way], theirs = multiprocessing.Pipe()
            multiprocessing.get_context("spawn").Process(
                target=search,
                args=(way, pattern, queries, options.k, options.indexing_batch_size, theirs),
                daemon=True,
            ).start()
            theirs.close()
            found[way] = pipes[way].recv()
            seconds[way] = []
        peak = 0.0
        for _ in range(options.rounds):
            peak = max(peak, matrix_peak())  # in turn with the others, or it may be slower
            for way, pipe in pipes.items():
                pipe.send([])
                seconds[way].append(pipe.recv())
        flat, ours = found["IndexFlatIP"][0], found["streamed"][0]
        differ = np.flatnonzero((flat != ours).any(axis=1))
        print(f"{len(differ)} of {len(flat)} questions differ in rounding")
        if len(differ):
            pipes["IndexFlatIP"].send(differ)
            flat[differ] = pipes["IndexFlatIP"].recv()
        if not (flat == ours).all():
            sys.exit("the two ways find other passages")
        exact = Indexer(open_shards(pattern), options.indexing_batch_size)
        parts = [exact.search(queries, options.k, (i, 3)) for i in range(3)]
        if not (merge(parts, options.k).positions == ours).all():
            sys.exit("three processes find other passages than one")
        for pipe in pipes.values():
            pipe.send(None)
    flops = 2 * options.questions * options.rows * options.dimension
    for way, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "exact search": way,
                "s": median,
                "time": median / statistics.median(seconds["IndexFlatIP"]),
                "anonymous MB": found[way][1],
                "of peak FLOPs": flops / median / peak,
            }
        )
    table(rows)


if __name__ == "__main__":
    main()
