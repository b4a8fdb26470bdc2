"""Find the passages for questions, with a retriever or with BM25.

    python passage_retrieval.py --model_path checkpoint/retriever/checkpoint/best_dev \\
        --passages psgs_w100.tsv --passages_embeddings "wikipedia_embeddings/wiki_*" \\
        --data data.json --output_path retrieved_data.json --n-docs 100

    python passage_retrieval.py --bm25 --passages psgs_w100.tsv --data data.json \\
        --output_path retrieved_data.json --n-docs 100

Writes the questions with their passages as `ctxs`, which the reader reads, or a TREC run; prints,
and keeps beside them, how many questions have an answer in their first 1, 5, 20 and 100 passages.
"""

import os
import shlex
import time
from pathlib import Path

from src.data.examples import load_data
from src.data.files import check_place
from src.data.passages import Passages
from src.evaluation.results import check_trec_ids, write_recall, write_retrieved
from src.models.pretrained import quiet_transformers
from src.options import passage_retrieval_parser
from src.runtime import distributed
from src.runtime.device import describe, pick_device
from src.runtime.errors import reports_input_errors
from src.runtime.launch import detect_launch
from src.runtime.terminal import count, duration, has_bars, say, say_next
from src.search import retrieve
from src.search.faiss_index import factory_string
from src.training.metrics import passing_bar, start_log


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    options = passage_retrieval_parser().parse_args(arguments)
    factory = factory_string(options.index_factory, options.n_subquantizers, options.n_bits)
    retrieve.check_way(options.bm25, options.model_path, options.passages_embeddings, factory)
    check_place(options.output_path)

    # Environment
    quiet_transformers()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    distributed.start(launch, options.dist_timeout)
    part = distributed.rank(), distributed.world_size()
    log = start_log(None)
    way = "by words" if options.bm25 else "with a retriever"
    say(log, "retrieve", "passages for questions, %s", way)
    say(log, "device", "%s; %s", describe(device), count(part[1], "process", "processes"))
    say(log, "results", "%s", options.output_path)

    # Data
    data = distributed.raise_on_all(lambda: load_data(options.data, *part, bar=passing_bar))
    of = f"{len(data):,} of {count(len(data), 'question')}"
    found_each = f"{count(options.n_docs, 'passage')} for each"
    say(log, "data", "%s of %s, %s", of, options.data, found_each)
    if distributed.is_main():
        Passages(options.passages, passing_bar)  # the one pass over a new collection is made once
    distributed.barrier()
    passages = Passages(options.passages, passing_bar)
    say(log, "passages", "%s of %s", count(len(passages), "passage"), options.passages)
    if options.output_format == "trec":
        distributed.raise_on_all(lambda: check_trec_ids(data, passages))
    questions = [data[index]["question"] for index in range(len(data))]
    made_by = {"model": "bm25", "passages": passages.fingerprint(), "options": vars(options)}

    # Search
    if options.bm25:
        shown = distributed.is_main() and has_bars()
        words = retrieve.WordSearch(passages, options.save_or_load_index, log, shown)
        found = words.search(questions, options.n_docs)
    else:
        exact = retrieve.open_embeddings(
            options.passages_embeddings,
            passages,
            options.indexing_batch_size,
            options.allow_mismatch,
            device,
        )
        searched = retrieve.describe_search(exact, options.indexing_batch_size, factory)
        say(log, "search", "%s", searched)
        retriever, tokenizer, made_by["model"] = retrieve.load_checked_retriever(
            options.model_path,
            options.tokenizer if options.tokenizer != "none" else "bert-base-uncased",
            passages,
            exact,
            options.plain_text,
            options.allow_mismatch,
        )
        size = sum(p.numel() for p in retriever.parameters()) / 1e6
        say(log, "model", "%.1fM parameters, from %s", size, options.model_path)
        made_by["embeddings"] = exact.shards[0].metadata
        with passing_bar(len(questions), "question", "embedding questions") as bar:
            embed = retrieve.question_embedder(
                retriever,
                tokenizer,
                options.question_maxlength,
                options.per_gpu_batch_size,
                device,
                device.type == "cuda" and not options.no_fp16,
                options.plain_text,
                bar.update,
            )
            queries = embed(questions)
        index = retrieve.VectorSearch(exact, passages)
        if factory:
            with passing_bar(len(exact), "passage", "building the index") as bar:
                index.open_index(
                    factory, options.save_or_load_index, options.allow_mismatch, log, bar.update
                )
        with passing_bar(len(exact), "passage", "searching") as bar:
            found = index.search(queries, options.n_docs, bar.update)
        if factory:
            with passing_bar(len(exact), "passage", "comparing with exact search") as bar:
                share = index.recall(queries, options.n_docs, bar.update)
            say(log, "index", "%s finds %.1f %% of what exact search does", factory, 100 * share)

    # Files
    if distributed.is_main():
        path, as_trec = Path(options.output_path), options.output_format == "trec"
        with passing_bar(len(data), "question", "looking for answers") as bar:
            flags = write_retrieved(
                path,
                data,
                passages,
                found.places,
                found.scores,
                options.validation_workers,
                made_by,
                as_trec,
                bar.update,
            )
        recalls = write_recall(path, flags, options.n_docs)
        shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in recalls.items())
        say(log, "answers", "%s", shown or "the data has none to look for")
        took = duration(time.perf_counter() - started)
        say(log, "done", "%s in %s: %s", count(len(data), "question"), took, path)
        test = ["test_reader.py", "--model_path", "READER", "--eval_data", path]
        read = ["--n_context", options.n_docs]
        train = ["train_reader.py", "--train_data", path, "--eval_data", "DEV_DATA.json"]
        if as_trec:
            say(log, "next", "judge the run: trec_eval QRELS.txt %s", shlex.quote(str(path)))
        elif recalls:
            say_next(log, "train a reader on what was found", [*train, *read])
        if not as_trec:
            say_next(log, "answer the questions", [*test, *read, "--write_results"])
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
