"""Embed a passage collection with a retriever.

    python generate_passage_embeddings.py --model_path checkpoint/retriever/checkpoint/best_dev \\
        --passages psgs_w100.tsv --output_path wikipedia_embeddings --shard_id 0 --num_shards 4

Writes one shard (wikipedia_embeddings/wiki_00); as many jobs as there are shards can run side by
side. Started again with the same command, it goes on from the last finished block.
"""

import json
import os

import numpy as np

from src import distributed
from src.data import passage_text
from src.device import describe, pick_device
from src.errors import InputError, reports_input_errors
from src.metrics import progress_bar, start_log
from src.options import passage_embeddings_parser
from src.passages import Passages
from src.pretrained import check_vocabulary, load_tokenizer, quiet_transformers
from src.retriever import TextEmbedder, fingerprint, load_retriever
from src.shards import ShardWriter, is_finished, shard_path
from src.slurm import StopRequest, detect_launch

# Passages between two writes: what is lost at most when a job is killed. Blocks are those of the
# whole collection, and a block is sorted into batches as a whole, also where a shard begins or ends
# inside it: so a passage's embedding is the same to the bit in any shard.
BLOCK_ROWS = 2048


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = passage_embeddings_parser().parse_args(arguments)
    if options.shard_id >= options.num_shards:
        raise InputError(
            f"--shard_id {options.shard_id} of --num_shards {options.num_shards}: shards count "
            f"from 0 to {options.num_shards - 1}"
        )
    if options.model_path == "none":
        raise InputError("--model_path is missing: give the folder of a retriever")

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
    log.info("%s, %s, %d process(es)", describe(device), precision, world_size)

    # Passages and model
    if distributed.is_main():
        # The one pass over a new collection is made once. Ids that are not unique are found now,
        # and not when all is embedded and searched.
        Passages(options.passages).find([])
    distributed.barrier()
    passages = Passages(options.passages)
    first = len(passages) * options.shard_id // options.num_shards
    last = len(passages) * (options.shard_id + 1) // options.num_shards
    log.info("shard of %d of %d passages of %s", last - first, len(passages), options.passages)
    retriever = load_retriever(options.model_path)
    base = options.tokenizer if options.tokenizer != "none" else "bert-base-uncased"
    tokenizer = load_tokenizer(options.model_path, base)
    check_vocabulary(retriever.config, tokenizer)
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
    path = shard_path(options.output_path, options.shard_id)
    if is_finished(path, metadata):
        log.info("%s is complete already", path)
        distributed.stop()
        return
    retriever = (retriever.half() if half else retriever).to(device).eval()
    embed = TextEmbedder(
        retriever, tokenizer, "passages", max_length, options.per_gpu_batch_size, device
    )

    # Loop: every process embeds its share of a block's batches, the main one writes
    writer = None
    if distributed.is_main():
        dimension = retriever.config.indexing_dimension
        writer = ShardWriter(
            path, last - first, dimension, np.float16 if half else np.float32, metadata
        )
        if writer.discarded:
            log.info("beginning anew: %s", writer.discarded)
        elif writer.position:
            log.info("going on after %d passages", writer.position)
    position = int(distributed.sum_numbers(writer.position if writer else 0)[0])
    bar = progress_bar(last - first, position, "passage")
    while position < last - first:
        start = (first + position) // BLOCK_ROWS * BLOCK_ROWS
        block = [passages[row] for row in range(start, min(start + BLOCK_ROWS, len(passages)))]
        texts = [
            passage_text(p.title, p.text, not options.no_title, options.plain_text) for p in block
        ]
        parts = distributed.gather(embed(texts, part=(rank, world_size)))
        ours = slice(first + position - start, min(last - start, len(block)))

        def write(block: list = block, parts: list = parts, ours: slice = ours) -> None:
            if writer is not None:
                # Each process has filled the rows of its own batches and left the others 0.
                writer.append([passage.id for passage in block[ours]], sum(parts)[ours])

        distributed.together(write)
        position += ours.stop - ours.start
        bar.update(ours.stop - ours.start)
        if distributed.any_process(stop_request.requested):
            where = f"after {position} passages"
            stop_request.leave(log, where, rank == 0, distributed.stop_together)
    bar.close()
    if writer is not None:
        writer.finish()
    stop_request.finish()
    log.info("done: %s", path)
    distributed.stop()


if __name__ == "__main__":
    main()
