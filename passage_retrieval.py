"""Find the passages for questions, with a retriever or with BM25.

    python passage_retrieval.py --model_path checkpoint/retriever/checkpoint/best_dev \\
        --passages psgs_w100.tsv --passages_embeddings "wikipedia_embeddings/wiki_*" \\
        --data data.json --output_path retrieved_data.json --n-docs 100

    python passage_retrieval.py --bm25 --passages psgs_w100.tsv --data data.json \\
        --output_path retrieved_data.json --n-docs 100

Writes the questions with their passages as `ctxs`, the reader's input, or a TREC run; prints and
writes recall: how many questions have an answer in their first 1, 5, 20 and 100 passages.
`--from_trec RUN` takes the passages that another system found.
"""

from src.options import SearchOptions, passage_retrieval_parser, select
from src.runtime.errors import reports_input_errors
from src.tools.footprint import parse_args

if __name__ == "__main__":
    reports_input_errors(parse_args)(passage_retrieval_parser())  # --help and --plan

import logging
import time
from pathlib import Path

from src.data.examples import load_data, read_example
from src.data.outputs import claim_output
from src.data.passages import Passages
from src.evaluation import retrieved
from src.runtime import distributed
from src.runtime.device import describe
from src.runtime.terminal import count, duration, say, say_next
from src.search.embeddings import shard_paths
from src.search.retrieve import open_search
from src.training.metrics import passing_bar, start_log


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    options = parse_args(passage_retrieval_parser(), arguments)
    search_options = select(SearchOptions, options)

    # Environment
    device = distributed.join(options)
    part = distributed.rank(), distributed.world_size()
    beside = retrieved.MADE_BY, retrieved.RECALL
    inputs = options.data, options.passages, options.from_trec
    inputs += tuple(shard_paths(options.passages_embeddings))
    distributed.run_on_main(lambda: claim_output(options.output_path, beside=beside, inputs=inputs))
    log = start_log(None)
    is_found = options.from_trec != "none"
    method = options.from_trec if is_found else "BM25" if options.bm25 else "a retriever"
    say(log, "retrieve", "passages for questions, with %s", method)
    say(log, "device", "%s; %s", describe(device), count(part[1], "process", "processes"))
    say(log, "results", "%s", options.output_path)

    # Data
    reading = {"bar": passing_bar, "regex_answers": options.regex_answers}
    data = distributed.raise_on_all(lambda: load_data(options.data, *part, **reading))
    of = f"{len(data):,} of {count(len(data), 'question')}"
    found_each = f"{count(options.n_docs, 'passage')} for each"
    say(log, "data", "%s of %s, %s", of, options.data, found_each)
    passages = distributed.main_first(lambda: Passages(options.passages, passing_bar))
    say(log, "passages", "%s of %s", count(len(passages), "passage"), options.passages)
    if options.output_format == "trec":
        distributed.raise_on_all(lambda: retrieved.check_trec_ids(data, passages))
    examples = (read_example(data, index) for index in range(len(data)))
    questions = [example.id if is_found else example.question for example in examples]

    # Search
    search = open_search(search_options, passages, device, log)
    found = search.search(questions, options.n_docs)
    if search_options.factory:
        share = 100 * search.recall(questions, options.n_docs)
        factory = search_options.factory
        say(log, "index", "%s finds %.1f %% of what exact search does", factory, share)

    # Files
    if distributed.is_main():
        path, as_trec = Path(options.output_path), options.output_format == "trec"
        with passing_bar(len(data), "question", "looking for answers") as bar:
            made_by = {**search.made_by, "options": vars(options)}
            results = path, data, passages, found.positions, found.scores
            workers = options.validation_workers
            firsts = retrieved.write_retrieved(*results, workers, made_by, as_trec, bar.update)
        recalls = retrieved.write_recall(path, firsts, options.n_docs)
        shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in recalls.items())
        say(log, "answers", "%s", shown or "the data has none to look for")
        n_empty = int((found.positions < 0).all(axis=1).sum())
        if options.bm25 and n_empty:
            of = f"{n_empty:,} of {count(len(data), 'question')}"
            say(log, "no match", "%s share no word with any passage", of)
        took = duration(time.perf_counter() - started)
        say(log, "done", "%s in %s: %s", count(len(data), "question"), took, path)
        print_next_steps(log, path, options.n_docs, as_trec, bool(recalls))
    distributed.barrier()
    distributed.stop()


def print_next_steps(
    log: logging.Logger, path: Path, n_docs: int, as_trec: bool, has_answers: bool
) -> None:
    """What to do with the retrieved data."""
    if as_trec:
        judge = ["-m", "src.tools.evaluate", "--qrels", "QRELS.txt", path]
        say_next(log, "judge the run, as trec_eval does", judge)
        return
    if has_answers:
        train = ["train_reader.py", "--train_data", path, "--eval_data", "DEV_DATA.json"]
        say_next(log, "train a reader on what was found", [*train, "--n_context", n_docs])
    test = ["test_reader.py", "--model_path", "READER", "--eval_data", path]
    say_next(log, "answer the questions", [*test, "--n_context", n_docs, "--write_results"])


if __name__ == "__main__":
    main()
