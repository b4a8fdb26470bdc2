"""Answer questions with a reader, judge the answers, and score the passages.

    python test_reader.py --model_path checkpoint/my_experiment/checkpoint/best_dev \\
        --eval_data test.json --n_context 10 --write_results --write_crossattention_scores

Writes the answers (final_output.txt) and the data with passage scores (dataset_wscores.json) into
`--checkpoint_dir/--name`. `--interactive`, `--question`, `--serve`: a conversation (tools/ask.py).
"""

from src.options import GenerationOptions, TargetOptions, changed, select, test_reader_parser
from src.runtime.errors import on_interrupt, reports_input_errors
from src.tools.footprint import parse_args

if __name__ == "__main__":
    reports_input_errors(parse_args)(test_reader_parser())  # --help and --plan

import itertools
import time
from pathlib import Path

from src.data.batches import ReaderCollator, ReaderDataset, evaluation_batches, make_loader
from src.data.examples import describe_passages, load_data
from src.evaluation import results
from src.evaluation.results import AnswerFile, Tally
from src.models.answering import answer_questions
from src.models.pretrained import digest
from src.models.reader import open_reader
from src.runtime import distributed
from src.runtime.device import resolve_precision
from src.runtime.launch import StopRequest
from src.runtime.terminal import count, duration, say, say_next
from src.tools import ask
from src.training import metrics, sharding


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = test_reader_parser()
    options = parse_args(parser, arguments)
    if options.interactive or options.serve or options.question is not None:
        ask.main(options)
        return

    # Environment
    stop_request, device = StopRequest(), distributed.join(options)
    precision = resolve_precision(options.precision, device)
    rank, world_size = part = distributed.rank(), distributed.world_size()
    run, pin = Path(options.checkpoint_dir) / options.name, device.type == "cuda"
    results.check_results(run, options.eval_data)
    log = metrics.start_log(run / "run.log")
    metrics.write_options(run, vars(options))
    metrics.announce(log, "test", "a Fusion-in-Decoder reader", device, precision, run)

    # Data and model
    file, with_scores = options.eval_data, options.write_crossattention_scores
    how = {"bar": metrics.passing_bar, "regex_answers": options.regex_answers}
    data = distributed.raise_on_all(lambda: load_data(file, *part, **how))
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
    collate = ReaderCollator(tokenizer, options.text_maxlength)
    loader = make_loader(dataset, batches[n_finished:], collate, options.num_workers, pin)
    loader = itertools.takewhile(lambda _: not stop_request.requested, loader)
    on_interrupt(lambda: "resumes after the last finished batch")
    sharding.shard(reader, device, precision, options.shard)
    generation, targets = select(GenerationOptions, options), select(TargetOptions, options)
    rest = generation, with_scores, file, targets, lambda n: results.right_answer(data, n)
    new = answer_questions(reader, tokenizer, loader, device, precision, *rest)
    tally, done = Tally(data, generation.contexts), 0
    with answer_file, metrics.progress_bar(len(batches), "batch", initial=n_finished) as bar:
        for done, answers in enumerate(itertools.chain(answer_file.finished, new), start=1):
            tally.add(answers)
            if done <= n_finished:
                continue
            answer_file.write(answers)
            bar.update()
            if done % options.eval_print_freq == 0:
                log.info("%d of %d batches | so far %s", done, len(batches), tally)
    if distributed.any_process(stop_request.requested):
        distributed.leave(stop_request, log, f"after {done} of {len(batches)} batches")

    # Files, results, next step
    distributed.barrier()
    files = run, data, world_size, options, made_by, log
    distributed.run_on_main(lambda: results.write_files(*files))
    stop_request.finish()
    distributed.run_on_main(lambda: results.remove_parts(run))
    joint = tally.over_all()
    say(log, "judged", "%s", joint)
    if generation.contexts and rank == 0:
        say(log, "curve", "exact match by passages read: %s", results.write_curve(run, joint))
    del reader, new
    distributed.stop()
    took = duration(time.perf_counter() - started)
    say(log, "done", "%s in %s: %s", count(len(data), "question"), took, run)
    if with_scores:
        command = ["train_retriever.py", "--train_data", run / results.SCORES]
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
