"""Train a retriever on the passage scores of a reader.

    python train_retriever.py --train_data train_wscores.json --eval_data dev_wscores.json \\
        --n_context 100 --lr 1e-4 --optim adamw --scheduler linear --total_steps 20000

Reads what `test_reader.py --write_crossattention_scores` wrote; writes checkpoints, log and metrics
into `--checkpoint_dir/--name`. Started again with the same command, it resumes where it stopped.
"""

from src.options import changed, train_retriever_parser
from src.runtime.errors import on_interrupt, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(train_retriever_parser().parse_args)()  # answers --help at once

import functools
import math
import os
import time
from pathlib import Path

import torch

from src.data.batches import (
    RetrieverCollator,
    RetrieverDataset,
    TextCollator,
    evaluation_batches,
    make_loader,
    training_batches,
)
from src.data.examples import Examples, describe_passages, load_data, skip_unscored
from src.evaluation.rankings import count_inversions, last_gold_index, top_k_overlap
from src.models.losses import check_dev_loss, compare_to_reader, retriever_loss
from src.models.pretrained import check_vocabulary, hide_bars, load_tokenizer, quiet_transformers
from src.models.retriever import check_settings, gold_ranks, load_retriever, start_retriever
from src.runtime import distributed
from src.runtime.device import autocast, compile_layers, describe, pick_device, resolve_precision
from src.runtime.launch import StopRequest, detect_launch
from src.runtime.terminal import count, duration, say, say_next
from src.training.checkpoint import Checkpoints, describe_resume, resume_point
from src.training.loop import Evaluation, Settings, State, move_to, train
from src.training.metrics import Average, Metrics, passing_bar, start_log, write_options
from src.training.optim import build_optimizer, build_schedule


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = train_retriever_parser()
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
    say(log, "train", "a retriever, by distillation")
    processes = count(world_size, "process", "processes")
    say(log, "device", "%s; %s; %s", describe(device), precision, processes)
    say(log, "results", "%s", run)

    # Data
    def load(path: str, name: str, doing: str) -> Examples:
        data = distributed.raise_on_all(
            lambda: load_data(path, rank, world_size, False, options.n_context, passing_bar)
        )
        total, data = len(data), skip_unscored(data, distributed.all_gather(data.unscored), log)
        passages = describe_passages(data, options.n_context)
        numbers = f"{len(data):,}", f"{total:,}", path
        say(log, name, f"{doing} on %s of %s examples of %s, %s", *numbers, passages)
        return data

    train_data = load(options.train_data, "data", "training")
    eval_data = None
    if options.eval_data != "none":
        eval_data = load(options.eval_data, "dev data", "evaluating")

    # Model: from this run's own newest checkpoint, else from what the options name
    torch.manual_seed(options.seed)
    settings = {
        "indexing_dimension": options.indexing_dimension,
        "question_maxlength": options.question_maxlength,
        "passage_maxlength": options.passage_maxlength,
        "projection": False if options.no_projection else None,
        "apply_question_mask": False if options.no_question_mask else None,
        "apply_passage_mask": False if options.no_passage_mask else None,
        "extract_cls": True if options.extract_cls else None,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    base = options.tokenizer if options.tokenizer != "none" else "bert-base-uncased"
    newest = resume_point(run / "checkpoint", started_with, log)
    if newest or options.model_path != "none":
        source = str(newest) if newest else options.model_path
        retriever = load_retriever(source, options.dropout)
        check_settings(retriever.config, settings, source)
        tokenizer = load_tokenizer(source, base)
    elif options.model_config != "none":
        source = f"fresh weights of the shape in {options.model_config}"
        retriever = start_retriever(options.model_config, options.dropout, **settings)
        tokenizer = load_tokenizer(base, base)
    else:
        source = options.retriever_model
        retriever = start_retriever(source, options.dropout, **settings)
        tokenizer = load_tokenizer(source, base)
    check_vocabulary(retriever.config, tokenizer)
    if options.compile:
        compile_layers(retriever.model.encoder.layer)
    retriever.to(device)
    config, use_title = retriever.config, not options.no_title
    size = sum(p.numel() for p in retriever.parameters()) / 1e6
    says = "%.1fM parameters, embeddings of size %d, from %s"
    say(log, "model", says, size, config.indexing_dimension, source)

    # Optimisation
    optimizer = build_optimizer(retriever, options.optim, options.lr, options.weight_decay)
    learning_rate = build_schedule(
        options.scheduler,
        options.lr,
        options.warmup_steps,
        options.total_steps,
        options.scheduler_steps,
        options.fixed_lr,
    )
    torch.manual_seed(options.seed + rank)  # dropout differs between processes
    state = State(retriever, optimizer, device, precision)
    if newest:
        state.restore(newest, options.seed)
    position = state.position
    first_step = position.step

    def say_what_is_next() -> None:
        folder = run / "checkpoint"
        best = folder / "best_dev"
        model = best if best.exists() else folder / "latest"
        say(log, "weights", "%s", model)
        command = ["generate_passage_embeddings.py", "--model_path", model]
        command += ["--passages", "PASSAGES.tsv", "--output_path", f"{run / 'embeddings'}/"]
        command += changed(parser, vars(options), ["no_title"])
        say_next(log, "embed a collection of passages", command)

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
    collate = RetrieverCollator(
        TextCollator(tokenizer, config.question_maxlength, not config.apply_question_mask),
        TextCollator(tokenizer, config.passage_maxlength, not config.apply_passage_mask),
    )
    places = training_batches(
        len(train_data),
        options.per_gpu_batch_size,
        rank,
        world_size,
        options.seed,
        position.examples_seen,
    )
    pin = device.type == "cuda"
    dataset = RetrieverDataset(train_data, options.n_context, use_title)
    batches = make_loader(dataset, places, collate, options.num_workers, pin)

    def evaluate() -> dict[str, float] | None:
        dataset = RetrieverDataset(eval_data, options.n_context, use_title)
        places = evaluation_batches(len(eval_data), options.per_gpu_batch_size, rank, world_size)
        # Passages of all processes are each other's negatives, as in training: so all read the
        # same number of batches. One that has run out reads a question that counts for nothing.
        n_own = len(places)
        n_rounds = math.ceil(len(eval_data) / (options.per_gpu_batch_size * world_size))
        places += [[(0, 0)]] * (n_rounds - n_own)
        top = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= options.n_context]
        names = ["loss", "inversions", *[f"{kind}_top{k}" for kind in ("avg", "idx") for k in top]]
        averages = {name: Average() for name in names}
        not_finite: list[int] = []  # examples of batches with such a loss
        loader = make_loader(dataset, places, collate, options.num_workers, pin)
        with passing_bar(len(places), "batch", "evaluating") as bar:
            for number, batch in enumerate(loader):
                batch = move_to(batch, device)
                if number >= n_own:
                    batch["present"] = torch.zeros_like(batch["present"])
                with torch.no_grad(), autocast(device, precision):
                    loss, n_passages, scores = compare_to_reader(
                        retriever, batch, options.in_batch_negatives
                    )
                if not loss.isfinite():
                    not_finite.extend(batch["index"])
                averages["loss"].add(loss.item(), int(n_passages))
                for ranks in filter(None, gold_ranks(scores, batch["present"])):
                    averages["inversions"].add(count_inversions(ranks))
                    for k in [k for k in top if k <= len(ranks)]:
                        averages[f"avg_top{k}"].add(top_k_overlap(ranks, k))
                        averages[f"idx_top{k}"].add(last_gold_index(ranks, k))
                bar.update()
                if distributed.any_process(stop_request.requested):
                    return None
        distributed.together(lambda: check_dev_loss(not_finite, options.eval_data))
        joint = {name: average.over_all() for name, average in averages.items()}
        return {name: average.value() for name, average in joint.items() if average.weight}

    # Loop
    def save_model(folder: Path) -> None:
        retriever.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

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
        functools.partial(retriever_loss, use_negatives=options.in_batch_negatives),
        iter(batches),
        learning_rate,
        checkpoints,
        metrics,
        log,
        settings,
        Evaluation(evaluate, "loss", higher_is_better=False) if evaluates else None,
        should_stop=lambda: stop_request.requested,
    )
    metrics.close()
    if position.step < options.total_steps or position.evaluation_due:
        where = f"after update {position.step}"
        stop_request.leave(log, where, rank == 0, distributed.stop_together)
    stop_request.finish()
    distributed.stop()
    best = "" if position.best is None else f"; the lowest loss on dev is {position.best:.4g}"
    n_updates, took = count(position.step - first_step, "update"), time.perf_counter() - started
    say(log, "done", "%s in %s%s", n_updates, duration(took), best)
    say_what_is_next()


if __name__ == "__main__":
    main()
