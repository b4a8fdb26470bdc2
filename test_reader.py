"""Answer questions with a reader, judge the answers, and score the passages.

    python test_reader.py --model_path checkpoint/my_experiment/checkpoint/best_dev \\
        --eval_data test.json --n_context 10 --write_results --write_crossattention_scores

Writes the answers (final_output.txt) and the data with passage scores (dataset_wscores.json) into
`--checkpoint_dir/--name`. `--interactive` or `--question`: a conversation (src/tools/ask.py).
"""

from src.options import changed, test_reader_parser
from src.runtime.errors import on_interrupt, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(test_reader_parser().parse_args)()  # answers --help at once

import itertools
import time
from pathlib import Path

from src.data.batches import ReaderCollator, ReaderDataset, evaluation_batches, make_loader
from src.data.examples import describe_passages, load_data
from src.evaluation import results
from src.evaluation.results import AnswerFile, Tally, write_scores
from src.models.pretrained import digest
from src.models.reader import answer_questions, open_reader
from src.runtime import distributed
from src.runtime.device import resolve_precision
from src.runtime.launch import StopRequest
from src.runtime.terminal import count, duration, say, say_next
from src.tools import ask
from src.training import metrics
from src.training.metrics import passing_bar


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = test_reader_parser()
    options = parser.parse_args(arguments)
    if options.interactive or options.question is not None:
        ask.main(options)
        return

    # Environment
    stop_request, device = StopRequest(), distributed.join(options)
    precision = resolve_precision(options.precision, device)
    part = rank, world_size = distributed.rank(), distributed.world_size()
    run = Path(options.checkpoint_dir) / options.name
    results.check_results(run, options.eval_data)
    log = metrics.start_log(run / "run.log")
    metrics.write_options(run, vars(options))
    metrics.announce(log, "test", "a Fusion-in-Decoder reader", device, precision, run)

    # Data and model
    file, with_scores = options.eval_data, options.write_crossattention_scores
    kind = {"bar": passing_bar, "regex_answers": options.regex_answers}
    data = distributed.raise_on_all(lambda: load_data(file, *part, **kind))
    passages = describe_passages(data, options.n_context, "score them" if with_scores else "")
    say(log, "data", "using %s of %s examples of %s, %s", *[f"{len(data):,}"] * 2, file, passages)
    reader, tokenizer = open_reader(options, device, log)

    # Loop, from the last finished batch of the same command on
    batches = evaluation_batches(len(data), options.per_gpu_batch_size, rank, world_size)
    made_by = {"model": digest(reader), "data": [data.source.size, data.source.stat.st_mtime_ns]}
    made_by |= {"processes": world_size, "precision": precision, "options": vars(options)}
    answer_file = AnswerFile(run, rank, made_by)
    if n_finished := len(answer_file.finished):
        log.info("resuming after %d of %d batches", n_finished, len(batches))
    dataset = ReaderDataset(data, options.n_context, not options.no_title)
    loading = ReaderCollator(tokenizer, options.text_maxlength), options.num_workers
    loader = make_loader(dataset, batches[n_finished:], *loading, device.type == "cuda")
    on_interrupt(lambda: "resumes after the last finished batch")
    generation = options.generation_max_length, options.num_beams, with_scores, options.decoder
    new = answer_questions(reader, tokenizer, loader, device, precision, *generation, file)
    tally, done = Tally(data), 0
    with answer_file, metrics.progress_bar(len(batches), "batch", initial=n_finished) as bar:
        for done, answers in enumerate(itertools.chain(answer_file.finished, new), start=1):
            tally.add(answers)
            if done <= n_finished:
                continue
            answer_file.write(answers)
            bar.update()
            if done % options.eval_print_freq == 0:
                log.info("%d of %d batches | so far %s", done, len(batches), tally)
            if stop_request.requested:
                break
    if distributed.any_process(stop_request.requested):
        where = f"after {done} of {len(batches)} batches"
        stop_request.leave(log, where, rank == 0, distributed.stop_together)

    # Files, results, next step
    distributed.barrier()
    if rank == 0 and options.write_results:
        say(log, "answers", "%s", results.write_answers(run, data, world_size))
    if rank == 0 and with_scores:
        with passing_bar(len(data), "question", "writing scores") as bar:
            path = write_scores(run, data, world_size, options.n_context, made_by, bar.update)
        say(log, "scores", "%s", path)
    distributed.barrier()
    stop_request.finish()
    distributed.run_on_main(lambda: results.remove_parts(run))
    say(log, "judged", "%s", tally.over_all())
    distributed.stop()
    took = duration(time.perf_counter() - started)
    say(log, "done", "%s in %s: %s", count(len(data), "question"), took, run)
    if with_scores:
        command = ["train_retriever.py", "--train_data", run / results.SCORES, "--eval_data"]
        command += ["DEV_WSCORES.json", "--name", f"{options.name}_retriever"]
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
