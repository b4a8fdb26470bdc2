"""Embed a passage collection with a retriever.

    python generate_passage_embeddings.py --model_path checkpoint/retriever/checkpoint/best_dev \\
        --passages psgs_w100.tsv --output_path wikipedia_embeddings --shard_id 0 --num_shards 4

Writes one shard (wikipedia_embeddings/wiki_00); as many jobs as there are shards can run side by
side. Started again with the same command, it goes on from the last finished block.
"""

from src.options import changed, passage_embeddings_parser
from src.runtime.errors import on_interrupt, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(passage_embeddings_parser().parse_args)()  # answers --help at once

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from src.data.batches import passage_text
from src.data.outputs import claim
from src.data.passages import Passages
from src.models.embedder import TextEmbedder
from src.models.lengths import prefetch_one
from src.models.pretrained import check_vocabulary, load_tokenizer, quiet_transformers
from src.models.retriever import fingerprint, load_retriever
from src.runtime import distributed
from src.runtime.device import compile_layers, describe, pick_device
from src.runtime.launch import StopRequest, detect_launch
from src.runtime.terminal import count, duration, say, say_next
from src.search.shards import ShardWriter, is_finished, remove_unfinished, shard_path
from src.training.metrics import passing_bar, progress_bar, start_log

# A process embeds a block at a time; then the blocks of all are written: this much is lost at most
# when a job is killed. Blocks are those of the whole collection, and a block is sorted into batches
# as a whole, also where a shard begins or ends inside it: so a passage's embedding is the same to
# the bit in any shard, and by any number of processes.
BLOCK_ROWS = 2048


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = passage_embeddings_parser()
    options = parser.parse_args(arguments)

    # Environment
    quiet_transformers()
    stop_request = StopRequest()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    distributed.start(launch, options.dist_timeout)
    rank, world_size = distributed.rank(), distributed.world_size()
    half = device.type == "cuda" and not options.no_fp16
    log = start_log(None)
    precision = "fp16" if half else "fp32"
    path = shard_path(options.output_path, options.shard_id)
    say(log, "embed", "a collection of passages with a retriever")
    processes = count(world_size, "process", "processes")
    say(log, "device", "%s; %s; %s", describe(device), precision, processes)
    say(log, "results", "%s", path)

    remedy = "use another --output_path or --shard_id"
    distributed.run_on_main(lambda: claim(path, remedy))

    # Passages and model
    if distributed.is_main():
        # The one pass over a new collection is made once. Ids that are not unique are found now,
        # and not when all is embedded and searched.
        Passages(options.passages, passing_bar).find([])
    distributed.barrier()
    passages = Passages(options.passages)
    first = len(passages) * options.shard_id // options.num_shards
    last = len(passages) * (options.shard_id + 1) // options.num_shards
    shard = f"shard {options.shard_id} of {options.num_shards}"
    of = f"{last - first:,} of {count(len(passages), 'passage')}"
    say(log, "data", "%s: %s of %s", shard, of, options.passages)
    retriever = load_retriever(options.model_path)
    base = options.tokenizer if options.tokenizer != "none" else "bert-base-uncased"
    tokenizer = load_tokenizer(options.model_path, base)
    check_vocabulary(retriever.config, tokenizer)
    dimension = retriever.config.indexing_dimension
    size = sum(p.numel() for p in retriever.parameters()) / 1e6
    says = "%.1fM parameters, embeddings of size %d, from %s"
    say(log, "model", says, size, dimension, options.model_path)
    max_length = options.passage_maxlength or retriever.config.passage_maxlength
    settings = {"title": not options.no_title, "max_length": max_length, "precision": precision}
    settings["plain_text"] = options.plain_text
    metadata = {
        "model": fingerprint(retriever),
        "passages": passages.fingerprint(),
        "options": json.dumps(settings),
        "shard_id": str(options.shard_id),
        "num_shards": str(options.num_shards),
        "first": str(first),
    }

    def say_what_is_next() -> None:
        shards = [shard_path(options.output_path, n) for n in range(options.num_shards)]
        missing = [n for n, shard in enumerate(shards) if not shard.exists()]
        if missing:
            values = {**vars(options), "shard_id": missing[0]}
            command = ["generate_passage_embeddings.py", *changed(parser, values)]
            still = f"{len(missing)} of {count(options.num_shards, 'shard')}"
            say_next(log, f"embed the next shard ({still} to go)", command)
        else:
            command = ["passage_retrieval.py", "--model_path", options.model_path]
            command += changed(parser, vars(options), ["tokenizer", "plain_text", "no_fp16"])
            command += ["--passages", options.passages]
            command += ["--passages_embeddings", f"{str(shards[0]).removesuffix('00')}*"]
            command += ["--data", "QUESTIONS.json", "--output_path", "RETRIEVED.json"]
            say_next(log, "find passages for questions", command)

    if is_finished(path, metadata):
        if distributed.is_main():
            remove_unfinished(path)
        say(log, "done", "%s is complete already", path)
        say_what_is_next()
        distributed.stop()
        return
    retriever = (retriever.half() if half else retriever).to(device).eval()
    if options.compile:
        compile_layers(retriever.model.encoder.layer)
    embed = TextEmbedder(
        retriever, tokenizer, "passages", max_length, options.per_gpu_batch_size, device
    )

    # Loop: each process embeds a block, the main one writes those of all
    writer = None
    if distributed.is_main():
        writer = ShardWriter(
            path, last - first, dimension, np.float16 if half else np.float32, metadata
        )
        if writer.discarded:
            log.info("beginning anew: %s", writer.discarded)
        elif writer.position:
            log.info("going on after %d passages", writer.position)
    finished = int(distributed.sum_numbers(writer.position if writer else 0)[0])
    before = finished

    def read(start: int) -> tuple[slice, list[str], list[list[int]]]:
        """Of a block: which rows are ours and missing, the ids of these, the tokens of all."""
        block = [passages[row] for row in range(start, min(start + BLOCK_ROWS, len(passages)))]
        texts = [
            passage_text(p.title, p.text, not options.no_title, options.plain_text) for p in block
        ]
        wanted = slice(max(0, first + before - start), max(0, min(len(block), last - start)))
        return wanted, [passage.id for passage in block[wanted]], embed.tokenize(texts)

    begin, step = (first + before) // BLOCK_ROWS * BLOCK_ROWS, world_size * BLOCK_ROWS
    starts = [start + rank * BLOCK_ROWS for start in range(begin, last, step)]
    on_interrupt(lambda: "resumes after the last finished block")
    bar = progress_bar(last - first, "passage", initial=before)
    with ThreadPoolExecutor(1) as thread:  # it reads and tokenizes the block that is next
        blocks = (ready.result() for ready in prefetch_one(thread.submit(read, s) for s in starts))
        begun = ((wanted, ids, embed.begin(tokens)) for wanted, ids, tokens in blocks)
        # A GPU embeds the next block while this one is written.
        for wanted, ids, finish in prefetch_one(begun) if device.type == "cuda" else begun:
            parts = distributed.gather((ids, finish()[wanted]))

            def write(parts: list = parts) -> None:
                if writer is not None:
                    ids = [identity for part_ids, _ in parts for identity in part_ids]
                    writer.append(ids, np.concatenate([rows for _, rows in parts]))

            distributed.raise_on_all(write)
            finished = min(last - first, finished + step - (first + finished) % BLOCK_ROWS)
            bar.update(finished - bar.n)
            if distributed.any_process(stop_request.requested):
                bar.close()
                where = f"after {finished} passages"
                stop_request.leave(log, where, rank == 0, distributed.stop_together)
    bar.close()
    if writer is not None:
        writer.finish()
    stop_request.finish()
    distributed.stop()
    took = time.perf_counter() - started
    say(log, "done", "%s in %s: %s", count(last - first - before, "passage"), duration(took), path)
    say_what_is_next()


if __name__ == "__main__":
    main()
