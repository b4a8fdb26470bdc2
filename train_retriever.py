"""Train a retriever on the passage scores of a reader.

    python train_retriever.py --train_data train_wscores.json --eval_data dev_wscores.json

Reads what `test_reader.py --write_crossattention_scores` wrote; writes checkpoints, log and metrics
into `--checkpoint_dir/--name`. Run the same command again to resume.
"""

from src.options import LossOptions, changed, encoding, select, train_retriever_parser
from src.runtime.errors import reports_input_errors
from src.tools.footprint import parse_args

if __name__ == "__main__":
    reports_input_errors(parse_args)(train_retriever_parser())  # --help and --plan

import functools
from collections.abc import Iterator

import torch

from src.data.batches import RetrieverCollator, RetrieverDataset, TextCollator, check_marks
from src.evaluation.rankings import judge_ranks
from src.models.losses import check_dev_loss, count_elements, retriever_loss
from src.models.pretrained import load_tokenizer, set_up
from src.models.retriever import check_settings, gold_ranks, load_retriever, start_retriever
from src.runtime.device import autocast
from src.runtime.terminal import say_next
from src.training.loop import Evaluation, move_to
from src.training.metrics import Average
from src.training.run import fit, start_run


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    parser = train_retriever_parser()
    options = parse_args(parser, arguments)
    run = start_run(options, f"a retriever, by --loss {options.loss}")
    train_data, dev_data = run.load_data(needs_scores=True)

    # Model: this run's newest checkpoint, else what the options name
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
    own = encoding(options)
    base = options.tokenizer if options.tokenizer != "none" else "bert-base-uncased"
    if run.resumed_from or options.model_path != "none":
        source = str(run.resumed_from or options.model_path)
        retriever = load_retriever(source, options.dropout, run.by_shares, **own)
        check_settings(retriever.config, settings, source)
    else:
        source = options.model_config if run.is_fresh else options.retriever_model
        own |= settings
        retriever = start_retriever(source, options.dropout, run.by_shares, **own)
    tokenizer = load_tokenizer(base if run.is_fresh else source, base)
    retriever.begin_training(tokenizer, options.two_towers)
    config, learning = retriever.config, (options.loss, options.seed)
    form = options.n_context, not options.no_title, *learning, *retriever.texts
    detail = f"embeddings of size {config.indexing_dimension}, "
    set_up(retriever, tokenizer, options, run.device, run.log, source, retriever.layers, detail)

    # Evaluation: the loss, and how the retriever ranks the passages that the reader prefers, and
    # those with an answer
    collate = RetrieverCollator(
        TextCollator(tokenizer, config.question_maxlength, not config.apply_question_mask),
        TextCollator(tokenizer, config.passage_maxlength, not config.apply_passage_mask),
    )

    how, best_by = (select(LossOptions, options), options.in_batch_negatives), options.best_by
    top = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= options.n_context]
    recall_at = {k for k in (1, 5, 20) if k < options.n_context}
    if best_by.startswith("recall@"):
        recall_at.add(int(best_by.removeprefix("recall@")))
        if dev_data:
            check_marks(RetrieverDataset(dev_data, *form))
    names = ["loss", "inversions", *[f"{kind}_top{k}" for kind in ("avg", "idx") for k in top]]
    names += [f"recall@{k}" for k in sorted(recall_at)]

    def compare(batches: Iterator[dict]) -> Iterator[tuple]:
        for batch in batches:
            batch = move_to(batch, run.device)
            with torch.no_grad(), autocast(run.device, run.precision):
                loss, n_passages, scores = retriever_loss(retriever, batch, *how)
            check_dev_loss([] if loss.isfinite() else batch["index"], options.eval_data)
            ranked = gold_ranks(scores, batch["present"])
            yield loss.item(), int(n_passages), zip(ranked, batch["marks"], strict=True)

    def evaluate() -> dict[str, float]:
        dataset = RetrieverDataset(dev_data, *form)
        averages = {name: Average() for name in names}
        for loss, n_passages, ranked in run.dev_results(dataset, collate, compare):
            averages["loss"].add(loss, n_passages)
            for ranks, marks in ranked:
                for name, value in judge_ranks(ranks, marks, top, recall_at).items():
                    averages[name].add(value)
        joint = {name: average.over_all() for name, average in averages.items()}
        return {name: average.value() for name, average in joint.items() if average.weight}

    # Training
    dataset = RetrieverDataset(train_data, *form)
    loss = functools.partial(retriever_loss, options=how[0], use_negatives=how[1])
    higher_is_better = best_by not in ("loss", "inversions")
    evaluation = Evaluation(evaluate, best_by, higher_is_better) if dev_data else None
    count = functools.partial(count_elements, options=how[0])
    weights = fit(run, retriever, tokenizer, loss, count, dataset, collate, evaluation)

    command = ["generate_passage_embeddings.py", "--model_path", weights]
    command += ["--passages", "PASSAGES.tsv", "--output_path", f"{run.folder / 'embeddings'}/"]
    command += changed(parser, vars(options), ["no_title"])
    say_next(run.log, "embed a collection of passages", command)


if __name__ == "__main__":
    main()
