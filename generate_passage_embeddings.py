"""Embed a passage collection with a retriever.

    python generate_passage_embeddings.py --model_path RETRIEVER --passages psgs_w100.tsv

Writes one shard (wikipedia_embeddings/wiki_00); jobs for different shards can run in parallel. The
same command resumes after the last finished block.
"""

from src.options import ENCODING, changed, encoding, passage_embeddings_parser
from src.runtime.errors import on_interrupt, reports_input_errors
from src.tools.footprint import parse_args

if __name__ == "__main__":
    reports_input_errors(parse_args)(passage_embeddings_parser())  # --help and --plan

import json
import time
from argparse import ArgumentParser, Namespace
from glob import escape

from src.data.outputs import claim, claim_output
from src.data.passages import Passages
from src.models.embedder import TextEmbedder, embed_blocks
from src.models.retriever import fingerprint, open_retriever, text_settings
from src.runtime import distributed
from src.runtime.device import compile_layers, describe_size
from src.runtime.launch import StopRequest
from src.runtime.terminal import count, duration, say, say_next
from src.search.shards import ShardWriter, is_finished, remove_unfinished, shard_path
from src.training.metrics import announce, passing_bar, progress_bar, start_log


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = passage_embeddings_parser()
    options = parse_args(parser, arguments)

    # Environment
    stop_request, device = StopRequest(), distributed.join(options)
    precision = "fp16" if device.type == "cuda" and not options.no_fp16 else "fp32"
    log = start_log(None)
    path = shard_path(options.output_path, options.shard_id)
    announce(log, "embed", "a collection of passages with a retriever", device, precision, path)
    distributed.run_on_main(lambda: claim(path, "use another --output_path or --shard_id"))

    # Data
    passages = distributed.main_first(lambda: Passages(options.passages, passing_bar))
    first = len(passages) * options.shard_id // options.num_shards
    last = len(passages) * (options.shard_id + 1) // options.num_shards
    of = f"{last - first:,} of {count(len(passages), 'passage')} of {options.passages}"
    say(log, "data", "shard %d of %d: %s", options.shard_id, options.num_shards, of)

    # Model
    own = encoding(options)
    retriever, tokenizer = open_retriever(options.model_path, options.tokenizer, **own)
    dimension = retriever.config.indexing_dimension
    facts = f"{describe_size(retriever)}, embeddings of size {dimension}"
    say(log, "model", "%s, from %s", facts, options.model_path)
    max_length = options.passage_maxlength or retriever.config.passage_maxlength
    settings = {"title": not options.no_title, "max_length": max_length, "precision": precision}
    metadata = {"model": fingerprint(retriever), "passages": passages.fingerprint()}
    metadata["options"] = json.dumps(settings | text_settings(retriever.config, own))
    numbers = {"shard_id": options.shard_id, "num_shards": options.num_shards, "first": first}
    metadata |= {name: str(number) for name, number in numbers.items()}
    if is_finished(path, metadata):
        distributed.run_on_main(lambda: remove_unfinished(path))
        say(log, "done", "%s is complete already", path)
        say_next(log, *next_step(parser, options))
        distributed.stop()
        return
    distributed.run_on_main(lambda: claim_output(str(path), inputs=[options.passages]))
    retriever = (retriever.half() if precision == "fp16" else retriever).to(device).eval()
    compile_layers(retriever.layers if options.compile else [])
    n = options.per_gpu_batch_size
    embed = TextEmbedder(retriever, tokenizer, "passages", max_length, n, device)

    # Loop: every process embeds a block, the main one writes the blocks of all
    shard = path, last - first, dimension, f"float{precision.removeprefix('fp')}", metadata
    writer = distributed.run_on_main(lambda: ShardWriter(*shard))
    if writer and (writer.discarded or writer.position):
        log.info(writer.discarded or f"resuming after {writer.position} passages")
    before = int(distributed.sum_numbers(writer.position if writer else 0)[0])
    on_interrupt(lambda: "resumes after the last finished block")
    bar = progress_bar(last - first, "passage", initial=before)
    rows = range(first + before, last)
    for block in embed_blocks(embed, passages, rows, not options.no_title, retriever.texts[1]):
        distributed.run_on_main(lambda block=block: writer.append(*block))
        bar.update(writer.position - bar.n if writer else 0)
        if distributed.any_process(stop_request.requested):
            bar.close()
            where = f"after {writer.position if writer else 0} passages"
            distributed.leave(stop_request, log, where)
    bar.close()

    # File and next step
    distributed.run_on_main(lambda: writer.finish())
    stop_request.finish()
    distributed.stop()
    took = duration(time.perf_counter() - started)
    say(log, "done", "%s in %s: %s", count(len(rows), "passage"), took, path)
    say_next(log, *next_step(parser, options))


def next_step(parser: ArgumentParser, options: Namespace) -> tuple[str, list]:
    """What to do next, and the command for it: embed the next missing shard, or else retrieve."""
    shards = [shard_path(options.output_path, n) for n in range(options.num_shards)]
    if missing := [n for n, shard in enumerate(shards) if not shard.exists()]:
        command = changed(parser, {**vars(options), "shard_id": missing[0]})
        what = f"embed the next shard ({len(missing)} of {count(len(shards), 'shard')} to go)"
        return what, ["generate_passage_embeddings.py", *command]
    command = ["passage_retrieval.py", "--model_path", options.model_path]
    command += changed(parser, vars(options), [*ENCODING, "tokenizer", "no_fp16", "passages"])
    command += ["--passages_embeddings", f"{escape(str(shards[0]).removesuffix('00'))}*"]
    command += ["--data", "QUESTIONS.json", "--output_path", "RETRIEVED.json"]
    return "find passages for questions", command


if __name__ == "__main__":
    main()
