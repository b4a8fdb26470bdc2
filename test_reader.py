"""Answer questions with a reader, judge the answers, and score the passages.

    python test_reader.py --model_path checkpoint/my_experiment/checkpoint/best_dev \\
        --eval_data test.json --n_context 10 --write_results --write_crossattention_scores

Prints exact match and F1; writes the answers (final_output.txt) and the data with the reader's
passage scores (dataset_wscores.json) into `--checkpoint_dir/--name`, in the input's order.
"""

import os
from pathlib import Path

from src import distributed
from src.data import (
    ReaderCollator,
    ReaderDataset,
    evaluation_places,
    make_loader,
)
from src.device import describe, pick_device, resolve_precision
from src.errors import reports_input_errors
from src.evaluation import exact_match, f1
from src.examples import load_data, read_example
from src.metrics import Average, progress_bar, start_log, write_options
from src.options import test_reader_parser
from src.pretrained import check_vocabulary, digest, load_tokenizer, quiet_transformers
from src.reader import Answer, answer_questions, load_reader
from src.results import AnswerFile, check_results, remove_parts, write_answers, write_scores
from src.slurm import StopRequest, detect_launch


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = test_reader_parser().parse_args(arguments)

    # Environment
    quiet_transformers()
    stop_request = StopRequest()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    distributed.start(launch, options.dist_timeout)
    rank, world_size = distributed.rank(), distributed.world_size()
    precision = resolve_precision(options.precision, device)
    run = Path(options.checkpoint_dir) / options.name
    check_results(run)
    log = start_log(run / "run.log")
    write_options(run, vars(options))
    log.info("%s, %s, %d process(es)", describe(device), precision, world_size)

    # Data and model
    data = distributed.together(lambda: load_data(options.eval_data, rank, world_size))
    log.info("using %d of %d examples of %s", len(data), len(data), options.eval_data)
    base = options.tokenizer if options.tokenizer != "none" else f"t5-{options.model_size}"
    source = options.model_path if options.model_path != "none" else f"t5-{options.model_size}"
    reader = load_reader(source).to(device)
    tokenizer = load_tokenizer(source, base)
    check_vocabulary(reader.config, tokenizer)
    log.info("reader of %.1fM parameters", sum(p.numel() for p in reader.parameters()) / 1e6)

    # Loop, from where the same command left off
    places = evaluation_places(len(data), options.per_gpu_batch_size, rank, world_size)
    file = os.stat(options.eval_data)
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

    def judge(answers: list[Answer]) -> None:
        for answer in answers:
            right = read_example(data, answer.index).answers
            if right:
                matches.add(100.0 * exact_match(answer.text, right))
                overlaps.add(100.0 * f1(answer.text, right))

    for answers in answer_file.finished:
        judge(answers)
    bar = progress_bar(len(places), n_finished, unit="batch")
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
            ),
            start=n_finished + 1,
        ):
            judge(answers)
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
            log.info("answers: %s", write_answers(run, data, world_size))
        if options.write_crossattention_scores:
            path = write_scores(run, data, world_size, options.n_context, made_by)
            log.info("passage scores: %s", path)
    distributed.barrier()
    stop_request.finish()
    if distributed.is_main():
        remove_parts(run)
    matches, overlaps = matches.over_all(), overlaps.over_all()
    if matches.weight:
        log.info(
            "exact match %.2f, F1 %.2f on %d examples",
            matches.value(),
            overlaps.value(),
            matches.weight,
        )
    else:
        log.info("%d answers; the data has none to judge them by", len(data))
    distributed.stop()


if __name__ == "__main__":
    main()
