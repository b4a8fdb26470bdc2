"""Find the passages for questions, with a retriever or with BM25.

    python passage_retrieval.py --model_path checkpoint/retriever/checkpoint/best_dev \\
        --passages psgs_w100.tsv --passages_embeddings "wikipedia_embeddings/wiki_*" \\
        --data data.json --output_path retrieved_data.json --n-docs 100

    python passage_retrieval.py --bm25 --passages psgs_w100.tsv --data data.json \\
        --output_path retrieved_data.json --n-docs 100

Writes the questions with their passages as `ctxs`, which the reader reads, or a TREC run; prints,
and keeps beside them, how many questions have an answer in their first 1, 5, 20 and 100 passages.
"""

import json
import os
from pathlib import Path

from src import distributed
from src.bm25 import BM25
from src.compressed import CompressedIndexer, expected_memory, factory_string, recall
from src.data import question_text
from src.device import describe, pick_device
from src.errors import InputError, reports_input_errors
from src.examples import check_place, load_data
from src.index import Indexer, merge
from src.metrics import progress_bar, start_log
from src.options import passage_retrieval_parser
from src.passages import Passages
from src.pretrained import check_vocabulary, load_tokenizer, quiet_transformers
from src.results import check_trec_ids, write_recall, write_retrieved
from src.retriever import TextEmbedder, fingerprint, load_retriever
from src.shards import check_count, open_shards, require_same
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
    made_from = passages.fingerprint()
    made_by = {"model": "bm25", "passages": made_from, "options": vars(options)}

    # Search
    if options.bm25:
        folder = Path(f"{options.passages}.bm25") if options.save_or_load_index else None
        bm25 = BM25.load_or_build(passages, folder, log)
        found = bm25.search(questions, options.n_docs)
        places = found.positions.tolist()
    else:
        shards = open_shards(options.passages_embeddings, options.allow_mismatch)
        if not options.allow_mismatch:
            check_count(shards, passages.path, len(passages))
        exact = Indexer(shards, options.indexing_batch_size)
        memory = expected_memory(len(exact), exact.dimension, options.indexing_batch_size, factory)
        log.info(
            "%d embeddings of size %d in %d shard(s); %s search takes about %.1f GB",
            len(exact),
            exact.dimension,
            len(shards),
            factory or "exact",
            memory.building / 1e9,
        )
        retriever = load_retriever(options.model_path)
        base = options.tokenizer if options.tokenizer != "none" else "bert-base-uncased"
        tokenizer = load_tokenizer(options.model_path, base)
        check_vocabulary(retriever.config, tokenizer)
        embeddings, first = shards[0].metadata, shards[0].path
        made_by |= {"model": fingerprint(retriever), "embeddings": embeddings}
        if embeddings and not options.allow_mismatch:
            require_same(
                "the model", options.model_path, made_by["model"], first, embeddings.get("model")
            )
            require_same(
                "the collection", options.passages, made_from, first, embeddings.get("passages")
            )
            plain = json.loads(embeddings.get("options", "{}")).get("plain_text", False)
            require_same("--plain_text", "this command", options.plain_text, first, plain)
        half = device.type == "cuda" and not options.no_fp16
        retriever = (retriever.half() if half else retriever).to(device).eval()
        max_length = options.question_maxlength or retriever.config.question_maxlength
        embed = TextEmbedder(
            retriever, tokenizer, "questions", max_length, options.per_gpu_batch_size, device
        )
        queries = embed([question_text(question, options.plain_text) for question in questions])
        log.info("%d questions embedded", len(queries))
        bar = progress_bar(len(exact), unit="passage")
        if factory:
            folder = Path(shards[0].path).parent / f"index_{factory.replace(',', '_')}"
            if options.save_or_load_index and folder.exists():
                index = CompressedIndexer.load(folder, exact, factory, options.allow_mismatch)
                log.info("loaded %s", folder)
            else:
                index = CompressedIndexer.build(exact, factory, on_rows=bar.update)
                if options.save_or_load_index and distributed.is_main():
                    index.save(folder)
                    log.info("saved %s", folder)
            found = index.search(queries, options.n_docs)
            share = recall(index, exact, queries, options.n_docs)
            log.info("%s finds %.1f %% of what exact search does", factory, 100 * share)
            ids = index.ids(found.positions)
        else:
            found = exact.search(queries, options.n_docs, part, on_rows=bar.update)
            found = merge(distributed.share(found), found.scores.shape[1])
            ids = exact.ids(found.positions)
        bar.close()
        places = [passages.find(row) for row in ids]

    # Files
    if distributed.is_main():
        log.info("looking for answers in the passages")
        flags = write_retrieved(
            Path(options.output_path),
            data,
            passages,
            places,
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
