"""Train a Fusion-in-Decoder reader.

    python train_reader.py --train_data train.json --eval_data dev.json --n_context 10

Reads questions with passages and answers; writes checkpoints, log and metrics into
`--checkpoint_dir/--name`. Run the same command again to resume.
"""

from src.options import changed, train_reader_parser
from src.runtime.errors import InputError, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(train_reader_parser().parse_args)()  # answers --help at once

from collections.abc import Iterator

from src.data.batches import ReaderCollator, ReaderDataset
from src.data.examples import read_example
from src.evaluation.answers import judge
from src.models.encoder import parts_to_compile
from src.models.losses import reader_loss
from src.models.pretrained import load_tokenizer
from src.models.reader import Answer, answer_questions, load_reader, new_reader
from src.runtime.terminal import say_next
from src.training.loop import Evaluation
from src.training.metrics import Average
from src.training.run import fit, start_run


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    parser = train_reader_parser()
    options = parser.parse_args(arguments)
    run = start_run(options, "a Fusion-in-Decoder reader")

    # Data
    train_data, dev_data = run.load_data()
    if dev_data and not any(read_example(dev_data, i).answers for i in range(len(dev_data))):
        raise InputError(
            f"{options.eval_data}: no example has answers to evaluate on; give another file, "
            "or --eval_data none"
        )

    # Model: this run's newest checkpoint, else what the options name
    size = f"t5-{options.model_size}"
    base = options.tokenizer if options.tokenizer != "none" else size
    named = options.model_path if options.model_path != "none" else size
    source = str(run.resumed_from or named)
    if run.is_fresh:
        reader = new_reader(options.model_config, options.dropout)
    else:
        reader = load_reader(source, options.dropout, options.legacy_position_table)
    tokenizer = load_tokenizer(base if run.is_fresh else source, base)
    tokenizer.clean_up_tokenization_spaces = not options.no_clean_up
    if options.use_checkpoint:
        reader.checkpoint_encoder()
    run.prepare(reader, tokenizer, source, parts_to_compile(reader.t5.encoder))

    # Evaluation: exact match of generated answers
    collate = ReaderCollator(tokenizer, options.text_maxlength, options.answer_maxlength)

    def answer(batches: Iterator[dict]) -> Iterator[list[Answer]]:
        return answer_questions(
            reader,
            tokenizer,
            batches,
            run.device,
            run.precision,
            options.generation_max_length,
            options.num_beams,
            decoder=options.decoder,
            source=options.eval_data,
        )

    def evaluate() -> dict[str, float]:
        dataset = ReaderDataset(dev_data, options.n_context, not options.no_title)
        matches, overlaps = Average(), Average()
        for answers in run.dev_results(dataset, collate, answer):
            for given in answers:
                right = read_example(dev_data, given.index).answers
                if right:
                    match, overlap = judge(given.text, right)
                    matches.add(100.0 * match)
                    overlaps.add(100.0 * overlap)
        return {"exact_match": matches.over_all().value(), "f1": overlaps.over_all().value()}

    # Training
    dataset = ReaderDataset(
        train_data, options.n_context, not options.no_title, with_target=True, seed=options.seed
    )
    evaluation = Evaluation(evaluate, "exact_match", higher_is_better=True) if dev_data else None
    weights = fit(run, reader, tokenizer, reader_loss, dataset, collate, evaluation)

    same = "n_context text_maxlength no_title num_beams generation_max_length checkpoint_dir"
    same += " no_clean_up per_gpu_batch_size num_workers precision decoder"
    commands = [
        ["test_reader.py", "--model_path", weights, "--eval_data", file]
        + ["--name", f"{options.name}_{part}", *changed(parser, vars(options), same.split())]
        + ["--write_results", "--write_crossattention_scores"]
        for part, file in (("train", options.train_data), ("dev", options.eval_data))
        if file != "none"
    ]
    say_next(run.log, "answer the questions, and score their passages for a retriever", *commands)


if __name__ == "__main__":
    main()
