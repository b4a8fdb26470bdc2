"""Train a Fusion-in-Decoder reader.

    python train_reader.py --train_data train.json --eval_data dev.json --n_context 10

Reads questions with passages and answers; writes checkpoints, log and metrics into
`--checkpoint_dir/--name`. Started again with the same command, it goes on where it stopped.
"""

from src.runtime.interrupt import die_quietly

if __name__ == "__main__":
    die_quietly()  # while the packages load

import os
import time
from pathlib import Path

import torch

from src.data.batches import (
    ReaderCollator,
    ReaderDataset,
    evaluation_places,
    make_loader,
    training_places,
)
from src.data.examples import load_data, read_example
from src.evaluation.answers import exact_match, f1
from src.models.encoder import parts_to_compile
from src.models.losses import reader_loss
from src.models.pretrained import check_vocabulary, hide_bars, load_tokenizer, quiet_transformers
from src.models.reader import answer_questions, load_reader, new_reader
from src.options import changed, train_reader_parser
from src.runtime import distributed
from src.runtime.device import compile_layers, describe, pick_device, resolve_precision
from src.runtime.errors import InputError, reports_input_errors
from src.runtime.launch import StopRequest, detect_launch
from src.runtime.terminal import count, duration, say, say_next
from src.training.checkpoint import Checkpoints, goes_on_from, load_state, resume_point
from src.training.loop import Position, restore, train
from src.training.metrics import Average, Metrics, passing_bar, start_log, write_options
from src.training.optim import build_optimizer, build_scheduler


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = train_reader_parser()
    options = parser.parse_args(arguments)
    if options.model_config != "none" and (
        options.model_path != "none" or options.legacy_position_table
    ):
        raise InputError(
            f"--model_config {options.model_config} starts from fresh weights: leave out "
            "--model_path and --legacy_position_table"
        )

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
    train_data = distributed.together(
        lambda: load_data(options.train_data, rank, world_size, needs_target=True, bar=passing_bar)
    )
    passages = f"at most {count(options.n_context, 'passage')} each"
    n, file = f"{len(train_data):,}", options.train_data
    say(log, "data", "training on %s of %s examples of %s, %s", n, n, file, passages)
    eval_data = None
    if options.eval_data != "none":
        eval_data = distributed.together(
            lambda: load_data(options.eval_data, rank, world_size, bar=passing_bar)
        )
        if not any(read_example(eval_data, index).answers for index in range(len(eval_data))):
            raise InputError(
                f"{options.eval_data}: no example has answers to evaluate on; give another file, "
                "or --eval_data none"
            )
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
    if options.compile:
        compile_layers(parts_to_compile(reader.t5.encoder))
    if options.use_checkpoint:
        reader.checkpoint_encoder()
    reader.to(device)
    size = sum(p.numel() for p in reader.parameters()) / 1e6
    say(log, "model", "%.1fM parameters, from %s", size, source)

    # Optimisation
    optimizer = build_optimizer(reader, options.optim, options.lr, options.weight_decay)
    scheduler = build_scheduler(
        optimizer,
        options.scheduler,
        options.warmup_steps,
        options.total_steps,
        options.scheduler_steps,
        options.fixed_lr,
    )
    torch.manual_seed(options.seed + rank)  # dropout differs between processes
    state = load_state(newest) if newest else None
    position = restore(state, optimizer, scheduler) if state else Position()

    def say_what_is_next() -> None:
        folder = run / "checkpoint"
        best = folder / "best_dev"
        model = best if best.exists() else folder / "latest"
        say(log, "weights", "%s", model)
        shared = "n_context text_maxlength no_title num_beams generation_max_length checkpoint_dir"
        shared += " per_gpu_batch_size num_workers precision decoder"
        commands = [
            ["test_reader.py", "--model_path", model, "--eval_data", file]
            + ["--name", f"{options.name}_{part}", *changed(parser, vars(options), shared.split())]
            + ["--write_results", "--write_crossattention_scores"]
            for part, file in (("train", options.train_data), ("dev", options.eval_data))
            if file != "none"
        ]
        say_next(log, "answer the questions, and score their passages for a retriever", *commands)

    if position.step >= options.total_steps and not position.evaluation_due:
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
    places = training_places(
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
        places = evaluation_places(len(eval_data), options.per_gpu_batch_size, rank, world_size)
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
                        matches.add(100.0 * exact_match(answer.text, right))
                        overlaps.add(100.0 * f1(answer.text, right))
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
        tokenizer.save_pretrained(folder)

    hide_bars()
    checkpoints = Checkpoints(
        run / "checkpoint", save_model, options.keep_checkpoints, started_with
    )
    metrics = Metrics(run, position.step, position.evaluation_due)
    first_step = position.step
    stop_request.include_interrupt(lambda: goes_on_from(run / "checkpoint"))
    position = train(
        reader,
        reader_loss,
        iter(batches),
        optimizer,
        scheduler,
        checkpoints,
        metrics,
        log,
        device,
        total_steps=options.total_steps,
        metric="exact_match",
        higher_is_better=True,
        evaluate=evaluate if eval_data is not None else None,
        position=position,
        scaler_state=state["scaler"] if state else None,
        precision=precision,
        accumulation_steps=options.accumulation_steps,
        clip=options.clip,
        eval_freq=options.eval_freq,
        save_freq=options.save_freq,
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
