"""Train a Fusion-in-Decoder reader.

    python train_reader.py --train_data train.json --eval_data dev.json --n_context 10

Reads questions with passages and answers; writes checkpoints, log and metrics into
`--checkpoint_dir/--name`. Started again with the same command, it resumes where it stopped.
"""

from src.options import changed, train_reader_parser
from src.runtime.errors import InputError, on_interrupt, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(train_reader_parser().parse_args)()  # answers --help at once

import os
import time
from pathlib import Path

import torch

from src.data.batches import (
    ReaderCollator,
    ReaderDataset,
    evaluation_batches,
    make_loader,
    training_batches,
)
from src.data.examples import describe_passages, load_data, read_example
from src.evaluation.answers import judge
from src.models.encoder import parts_to_compile
from src.models.losses import reader_loss
from src.models.pretrained import (
    check_vocabulary,
    hide_bars,
    load_tokenizer,
    quiet_transformers,
    save_tokenizer,
)
from src.models.reader import answer_questions, load_reader, new_reader
from src.runtime import distributed
from src.runtime.device import compile_layers, describe, pick_device, resolve_precision
from src.runtime.launch import StopRequest, detect_launch
from src.runtime.terminal import count, duration, say, say_next
from src.training.checkpoint import Checkpoints, describe_resume, resume_point
from src.training.loop import Evaluation, Settings, State, train
from src.training.metrics import Average, Metrics, passing_bar, start_log, write_options
from src.training.optim import build_optimizer, build_schedule


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = train_reader_parser()
    options = parser.parse_args(arguments)

    # Environment
    quiet_transformers()
    stop_request = StopRequest()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    distributed.start(launch, options.dist_timeout)
    rank, world_size = distributed.rank(), distributed.world_size()
    precision = resolve_precision(options.precision, device)
    run = Path(options.checkpoint_dir) / options.name
    log = start_log(run / "run.log")
    started_with = {**vars(options), "processes": world_size}
    write_options(run, started_with)
    say(log, "train", "a Fusion-in-Decoder reader")
    processes = count(world_size, "process", "processes")
    say(log, "device", "%s; %s; %s", describe(device), precision, processes)
    say(log, "results", "%s", run)

    # Data
    train_data = distributed.raise_on_all(
        lambda: load_data(options.train_data, rank, world_size, needs_target=True, bar=passing_bar)
    )
    needed_to = f"train with --n_context {options.n_context}" if options.n_context > 1 else ""
    passages = describe_passages(train_data, options.n_context, needed_to)
    n, file = f"{len(train_data):,}", options.train_data
    say(log, "data", "training on %s of %s examples of %s, %s", n, n, file, passages)
    eval_data = None
    if options.eval_data != "none":
        eval_data = distributed.raise_on_all(
            lambda: load_data(options.eval_data, rank, world_size, bar=passing_bar)
        )
        if not any(read_example(eval_data, index).answers for index in range(len(eval_data))):
            raise InputError(
                f"{options.eval_data}: no example has answers to evaluate on; give another file, "
                "or --eval_data none"
            )
        passages = describe_passages(eval_data, options.n_context)
        n, file = f"{len(eval_data):,}", options.eval_data
        say(log, "dev data", "evaluating on %s of %s examples of %s, %s", n, n, file, passages)

    # Model: from this run's own newest checkpoint, else from what the options name
    torch.manual_seed(options.seed)
    base = options.tokenizer if options.tokenizer != "none" else f"t5-{options.model_size}"
    newest = resume_point(run / "checkpoint", started_with, log)
    if newest:
        source = str(newest)
        reader = load_reader(source, options.dropout)
        tokenizer = load_tokenizer(source, base)
    elif options.model_config != "none":
        source = f"fresh weights of the shape in {options.model_config}"
        reader = new_reader(options.model_config, options.dropout)
        tokenizer = load_tokenizer(base, base)
    else:
        source = options.model_path if options.model_path != "none" else f"t5-{options.model_size}"
        reader = load_reader(source, options.dropout, options.legacy_position_table)
        tokenizer = load_tokenizer(source, base)
    check_vocabulary(reader.config, tokenizer)
    tokenizer.clean_up_tokenization_spaces = not options.no_clean_up
    if options.compile:
        compile_layers(parts_to_compile(reader.t5.encoder))
    if options.use_checkpoint:
        reader.checkpoint_encoder()
    reader.to(device)
    size = sum(p.numel() for p in reader.parameters()) / 1e6
    say(log, "model", "%.1fM parameters, from %s", size, source)

    # Optimisation
    optimizer = build_optimizer(reader, options.optim, options.lr, options.weight_decay)
    learning_rate = build_schedule(
        options.scheduler,
        options.lr,
        options.warmup_steps,
        options.total_steps,
        options.scheduler_steps,
        options.fixed_lr,
    )
    torch.manual_seed(options.seed + rank)  # dropout differs between processes
    state = State(reader, optimizer, device, precision)
    if newest:
        state.restore(newest, options.seed)
    position = state.position
    first_step = position.step

    def say_what_is_next() -> None:
        folder = run / "checkpoint"
        best = folder / "best_dev"
        model = best if best.exists() else folder / "latest"
        say(log, "weights", "%s", model)
        shared = "n_context text_maxlength no_title num_beams generation_max_length checkpoint_dir"
        shared += " no_clean_up per_gpu_batch_size num_workers precision decoder"
        commands = [
            ["test_reader.py", "--model_path", model, "--eval_data", file]
            + ["--name", f"{options.name}_{part}", *changed(parser, vars(options), shared.split())]
            + ["--write_results", "--write_crossattention_scores"]
            for part, file in (("train", options.train_data), ("dev", options.eval_data))
            if file != "none"
        ]
        say_next(log, "answer the questions, and score their passages for a retriever", *commands)

    evaluates = eval_data is not None
    if position.step >= options.total_steps and not (position.evaluation_due and evaluates):
        say(log, "done", "all %d updates are done; more needs --total_steps", position.step)
        say_what_is_next()
        distributed.stop()
        return
    say(
        log,
        "updates",
        "%d to %d, of %d x %d x %d questions (a process x accumulated x processes)",
        position.step + 1,
        options.total_steps,
        options.per_gpu_batch_size,
        options.accumulation_steps,
        world_size,
    )

    # Batches
    collate = ReaderCollator(tokenizer, options.text_maxlength, options.answer_maxlength)
    use_title = not options.no_title
    dataset = ReaderDataset(train_data, options.n_context, use_title, True, options.seed)
    places = training_batches(
        len(train_data),
        options.per_gpu_batch_size,
        rank,
        world_size,
        options.seed,
        position.examples_seen,
    )
    pin = device.type == "cuda"
    batches = make_loader(dataset, places, collate, options.num_workers, pin)

    def evaluate() -> dict[str, float] | None:
        dataset = ReaderDataset(eval_data, options.n_context, use_title)
        places = evaluation_batches(len(eval_data), options.per_gpu_batch_size, rank, world_size)
        loader = make_loader(dataset, places, collate, options.num_workers, pin)
        matches, overlaps = Average(), Average()
        with passing_bar(len(places), "batch", "evaluating") as bar:
            for answers in answer_questions(
                reader,
                tokenizer,
                loader,
                device,
                precision,
                options.generation_max_length,
                options.num_beams,
                decoder=options.decoder,
                source=options.eval_data,
            ):
                for answer in answers:
                    right = read_example(eval_data, answer.index).answers
                    if right:
                        match, overlap = judge(answer.text, right)
                        matches.add(100.0 * match)
                        overlaps.add(100.0 * overlap)
                bar.update()
                if stop_request.requested:
                    break
        if distributed.any_process(stop_request.requested):
            return None
        matches, overlaps = matches.over_all(), overlaps.over_all()
        return {"exact_match": matches.value(), "f1": overlaps.value()}

    # Loop
    def save_model(folder: Path) -> None:
        reader.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)

    hide_bars()
    checkpoints = Checkpoints(
        run / "checkpoint", save_model, options.keep_checkpoints, started_with
    )
    metrics = Metrics(run, position.step, position.evaluation_due)
    on_interrupt(lambda: describe_resume(run / "checkpoint"))
    settings = Settings(
        total_steps=options.total_steps,
        precision=precision,
        accumulation_steps=options.accumulation_steps,
        clip=options.clip,
        eval_freq=options.eval_freq,
        save_freq=options.save_freq,
    )
    train(
        state,
        reader_loss,
        iter(batches),
        learning_rate,
        checkpoints,
        metrics,
        log,
        settings,
        Evaluation(evaluate, "exact_match", higher_is_better=True) if evaluates else None,
        should_stop=lambda: stop_request.requested,
    )
    metrics.close()
    if position.step < options.total_steps or position.evaluation_due:
        where = f"after update {position.step}"
        stop_request.leave(log, where, rank == 0, distributed.stop_together)
    stop_request.finish()
    distributed.stop()
    best = "" if position.best is None else f"; the best exact match on dev is {position.best:.2f}"
    n_updates, took = count(position.step - first_step, "update"), time.perf_counter() - started
    say(log, "done", "%s in %s%s", n_updates, duration(took), best)
    say_what_is_next()


if __name__ == "__main__":
    main()
