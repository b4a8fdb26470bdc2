"""Answer questions with a reader, judge the answers, and score the passages.

    python test_reader.py --model_path checkpoint/my_experiment/checkpoint/best_dev \\
        --eval_data test.json --n_context 10 --write_results --write_crossattention_scores

Prints exact match and F1; writes the answers (final_output.txt) and the data with the reader's
passage scores (dataset_wscores.json) into `--checkpoint_dir/--name`, in the input's order.

    python test_reader.py --model_path checkpoint/my_experiment/checkpoint/best_dev \\
        --n_context 10 --interactive --passages psgs_w100.tsv --retriever_path RETRIEVER \\
        --passages_embeddings "wikipedia_embeddings/wiki_*"

Answers what you ask from the passages that are found for it, and shows them; keeps no results.
"""

from src.options import changed, conversation_search, test_reader_parser
from src.runtime.errors import InputError, on_interrupt, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(test_reader_parser().parse_args)()  # answers --help at once

import logging
import os
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from src.data.batches import (
    ReaderCollator,
    ReaderDataset,
    evaluation_batches,
    make_loader,
)
from src.data.examples import describe_passages, load_data, read_example
from src.data.passages import Passages
from src.evaluation.answers import SCORES, judge
from src.evaluation.results import (
    AnswerFile,
    check_results,
    remove_parts,
    write_answers,
    write_scores,
)
from src.models.encoder import parts_to_compile
from src.models.pretrained import check_vocabulary, digest, load_tokenizer, quiet_transformers
from src.models.reader import Answer, FiDT5, answer_questions, load_reader
from src.runtime import distributed
from src.runtime.device import compile_layers, describe, pick_device, resolve_precision
from src.runtime.launch import StopRequest, detect_launch
from src.runtime.terminal import count, duration, say, say_next
from src.tools.ask import (
    converse,
    open_find,
    print_replies,
    questions,
)
from src.training.metrics import Average, passing_bar, progress_bar, start_log, write_options


def open_reader(
    path: str,
    size: str,
    tokenizer: str,
    device: torch.device,
    compiled: bool,
    log: logging.Logger,
) -> tuple[FiDT5, PreTrainedTokenizerBase]:
    """The reader on its device, and its tokenizer, by the values of the options ("none": not
    given)."""
    base = f"t5-{size}"
    source = path if path != "none" else base
    reader = load_reader(source).to(device)
    own_tokenizer = load_tokenizer(source, tokenizer if tokenizer != "none" else base)
    check_vocabulary(reader.config, own_tokenizer)
    if compiled:
        compile_layers(parts_to_compile(reader.t5.encoder))
    n_parameters = sum(p.numel() for p in reader.parameters()) / 1e6
    say(log, "model", "%.1fM parameters, from %s", n_parameters, source)
    return reader, own_tokenizer


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = test_reader_parser()
    options = parser.parse_args(arguments)
    is_conversation = options.interactive or options.question is not None

    # Environment
    quiet_transformers()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    precision = resolve_precision(options.precision, device)

    # A conversation, and nothing else
    if is_conversation:
        search_options = conversation_search(options)
        if launch.world_size > 1:
            raise InputError("a conversation has one process: start it without torchrun or srun")
        log = start_log(None)
        say(log, "ask", "a Fusion-in-Decoder reader, with passages found as you ask")
        say(log, "device", "%s; %s", describe(device), precision)
        passages = Passages(options.passages, passing_bar)
        n, each = count(len(passages), "passage"), count(options.n_context, "passage")
        say(log, "passages", "%s of %s, %s for each question", n, options.passages, each)
        find = open_find(search_options, passages, device, log)
        model = options.model_path, options.model_size, options.tokenizer
        reader, tokenizer = open_reader(*model, device, options.compile, log)
        tokenizer.clean_up_tokenization_spaces = not options.no_clean_up
        replies = converse(
            questions(options.question, log),
            find,
            reader,
            tokenizer,
            device,
            precision,
            options.n_context,
            options.text_maxlength,
            not options.no_title,
            options.generation_max_length,
            options.num_beams,
            options.decoder,
        )
        n = print_replies(replies)
        took = duration(time.perf_counter() - started)
        say(log, "done", "%s in %s", count(n, "question"), took)
        return

    stop_request = StopRequest()
    distributed.start(launch, options.dist_timeout)
    rank, world_size = distributed.rank(), distributed.world_size()
    run = Path(options.checkpoint_dir) / options.name
    check_results(run)
    log = start_log(run / "run.log")
    write_options(run, vars(options))
    say(log, "test", "a Fusion-in-Decoder reader")
    processes = count(world_size, "process", "processes")
    say(log, "device", "%s; %s; %s", describe(device), precision, processes)
    say(log, "results", "%s", run)

    # Data and model
    data = distributed.raise_on_all(
        lambda: load_data(options.eval_data, rank, world_size, bar=passing_bar)
    )
    needed_to = "score them" if options.write_crossattention_scores else ""
    passages = describe_passages(data, options.n_context, needed_to)
    n, file = f"{len(data):,}", options.eval_data
    say(log, "data", "using %s of %s examples of %s, %s", n, n, file, passages)
    model = options.model_path, options.model_size, options.tokenizer
    reader, tokenizer = open_reader(*model, device, options.compile, log)
    tokenizer.clean_up_tokenization_spaces = not options.no_clean_up

    # Loop, from where the same command left off
    places = evaluation_batches(len(data), options.per_gpu_batch_size, rank, world_size)
    file = data.source.stat
    made_by = {"model": digest(reader), "data": [file.st_size, file.st_mtime_ns]}
    made_by |= {"processes": world_size, "precision": precision, "options": vars(options)}
    answer_file = AnswerFile(run, rank, made_by)
    n_finished = len(answer_file.finished)
    if n_finished:
        log.info("going on after %d of %d batches", n_finished, len(places))
    loader = make_loader(
        ReaderDataset(data, options.n_context, not options.no_title),
        places[n_finished:],
        ReaderCollator(tokenizer, options.text_maxlength),
        options.num_workers,
        device.type == "cuda",
    )
    matches, overlaps = Average(), Average()

    def count_in(answers: list[Answer]) -> None:
        for answer in answers:
            right = read_example(data, answer.index).answers
            if right:
                match, overlap = judge(answer.text, right)
                matches.add(100.0 * match)
                overlaps.add(100.0 * overlap)

    for answers in answer_file.finished:
        count_in(answers)
    number = n_finished
    on_interrupt(lambda: "resumes after the last finished batch")
    bar = progress_bar(len(places), "batch", initial=n_finished)
    with answer_file:
        for number, answers in enumerate(
            answer_questions(
                reader,
                tokenizer,
                loader,
                device,
                precision,
                options.generation_max_length,
                options.num_beams,
                options.write_crossattention_scores,
                options.decoder,
                options.eval_data,
            ),
            start=n_finished + 1,
        ):
            count_in(answers)
            answer_file.write(answers)
            bar.update()
            if number % options.eval_print_freq == 0 and matches.weight:
                log.info(
                    "%d of %d batches | exact match so far %.2f, F1 %.2f",
                    number,
                    len(places),
                    matches.value(),
                    overlaps.value(),
                )
            if stop_request.requested:
                break
    bar.close()
    if distributed.any_process(stop_request.requested):
        where = f"after {number} of {len(places)} batches"
        stop_request.leave(log, where, rank == 0, distributed.stop_together)

    # Files
    distributed.barrier()
    if distributed.is_main():
        if options.write_results:
            say(log, "answers", "%s", write_answers(run, data, world_size))
        if options.write_crossattention_scores:
            with passing_bar(len(data), "question", "writing scores") as bar:
                scored = write_scores(run, data, world_size, options.n_context, made_by, bar.update)
            say(log, "scores", "%s", scored)
    distributed.barrier()
    stop_request.finish()
    if distributed.is_main():
        remove_parts(run)
    matches, overlaps = matches.over_all(), overlaps.over_all()
    if matches.weight:
        judged = "exact match %.2f, F1 %.2f on %d examples"
        say(log, "judged", judged, matches.value(), overlaps.value(), matches.weight)
    else:
        say(log, "judged", "%d answers; the data has none to judge them by", len(data))
    distributed.stop()
    took = duration(time.perf_counter() - started)
    say(log, "done", "%s in %s: %s", count(len(data), "question"), took, run)
    if options.write_crossattention_scores:
        command = ["train_retriever.py", "--train_data", run / SCORES]
        command += ["--eval_data", "DEV_WSCORES.json", "--name", f"{options.name}_retriever"]
        command += changed(parser, vars(options), ["n_context", "no_title", "checkpoint_dir"])
        say_next(log, "train a retriever on the scores", command)
    elif options.write_results:
        say_next(log, "look at the answers in a browser", ["-m", "src.tools.report", run])
    else:
        values = {**vars(options), "write_results": True, "write_crossattention_scores": True}
        command = ["test_reader.py", *changed(parser, values)]
        say_next(log, "keep the answers, and the passages' scores", command)


if __name__ == "__main__":
    main()
