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
from pathlib import Path

from src import distributed, search
from src.compressed import factory_string
from src.device import describe, pick_device
from src.errors import InputError, reports_input_errors
from src.examples import check_place, load_data
from src.metrics import progress_bar, start_log
from src.options import passage_retrieval_parser
from src.passages import Passages
from src.pretrained import quiet_transformers
from src.results import check_trec_ids, write_recall, write_retrieved
from src.slurm import detect_launch


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = passage_retrieval_parser().parse_args(arguments)
    factory = factory_string(options.index_factory, options.n_subquantizers, options.n_bits)
    if options.bm25 == (options.model_path != "none"):
        raise InputError("give either --model_path and --passages_embeddings, or --bm25")
    if not options.bm25 and options.passages_embeddings == "none":
        raise InputError('--passages_embeddings is missing, for example "wikipedia_embeddings/*"')
    if options.bm25 and (options.passages_embeddings != "none" or factory):
        raise InputError(
            "--bm25 searches by words alone: leave out --passages_embeddings, --index_factory and "
            "--n-subquantizers"
        )
    check_place(options.output_path)

    # Environment
    quiet_transformers()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    distributed.start(launch, options.dist_timeout)
    part = distributed.rank(), distributed.world_size()
    log = start_log(None)
    log.info("%s, %d process(es)", describe(device), part[1])

    # Data
    data = distributed.together(lambda: load_data(options.data, *part))
    log.info("%d questions of %s", len(data), options.data)
    if distributed.is_main():
        Passages(options.passages)  # the one pass over a new collection is made once
    distributed.barrier()
    passages = Passages(options.passages)
    log.info("%d passages of %s", len(passages), options.passages)
    if options.output_format == "trec":
        distributed.together(lambda: check_trec_ids(data, passages))
    questions = [data[index]["question"] for index in range(len(data))]
    made_by = {"model": "bm25", "passages": passages.fingerprint(), "options": vars(options)}

    # Search
    if options.bm25:
        words = search.WordSearch(passages, options.save_or_load_index, log)
        found = words.search(questions, options.n_docs)
    else:
        exact = search.open_embeddings(
            options.passages_embeddings,
            passages,
            options.indexing_batch_size,
            options.allow_mismatch,
            device,
        )
        log.info(search.describe_search(exact, options.indexing_batch_size, factory))
        retriever, tokenizer, made_by["model"] = search.load_checked_retriever(
            options.model_path,
            options.tokenizer if options.tokenizer != "none" else "bert-base-uncased",
            passages,
            exact,
            options.plain_text,
            options.allow_mismatch,
        )
        made_by["embeddings"] = exact.shards[0].metadata
        embed = search.question_embedder(
            retriever,
            tokenizer,
            options.question_maxlength,
            options.per_gpu_batch_size,
            device,
            device.type == "cuda" and not options.no_fp16,
            options.plain_text,
        )
        queries = embed(questions)
        log.info("%d questions embedded", len(queries))
        index = search.VectorSearch(exact, passages)
        with progress_bar(len(exact), unit="passage") as bar:
            if factory:
                index.open_index(
                    factory, options.save_or_load_index, options.allow_mismatch, log, bar.update
                )
            found = index.search(queries, options.n_docs, bar.update)
            if factory:
                share = index.recall(queries, options.n_docs)
                log.info("%s finds %.1f %% of what exact search does", factory, 100 * share)

    # Files
    if distributed.is_main():
        log.info("looking for answers in the passages")
        flags = write_retrieved(
            Path(options.output_path),
            data,
            passages,
            found.places,
            found.scores,
            options.validation_workers,
            made_by,
            as_trec=options.output_format == "trec",
        )
        recalls = write_recall(Path(options.output_path), flags, options.n_docs)
        for name, value in recalls.items():
            log.info("%s: %.2f %%", name, 100 * value)
        if not recalls:
            log.info("the data has no answers to look for")
        log.info("done: %s", options.output_path)
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
