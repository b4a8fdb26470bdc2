"""Train a Fusion-in-Decoder reader.

    python train_reader.py --train_data train.json --eval_data dev.json --n_context 10

Reads questions with passages and answers; writes checkpoints, log and metrics into
`--checkpoint_dir/--name`. Run the same command again to resume.
"""

from src.options import GenerationOptions, changed, select, train_reader_parser
from src.runtime.errors import InputError, reports_input_errors
from src.tools.footprint import parse_args

if __name__ == "__main__":
    reports_input_errors(parse_args)(train_reader_parser())  # --help and --plan

from collections.abc import Iterator

from src.data.batches import ReaderCollator, ReaderDataset
from src.data.examples import read_example
from src.evaluation.results import Tally
from src.models.answering import Answer, answer_questions
from src.models.losses import count_labels, reader_loss
from src.models.reader import open_reader
from src.runtime.terminal import say_next
from src.training.loop import Evaluation
from src.training.run import fit, start_run


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    parser = train_reader_parser()
    options = parse_args(parser, arguments)
    run = start_run(options, "a Fusion-in-Decoder reader")

    # Data
    train_data, dev_data = run.load_data()
    if dev_data and not any(read_example(dev_data, i).answers for i in range(len(dev_data))):
        raise InputError(
            f"{options.eval_data}: no example has answers to evaluate on; give another file, "
            "or --eval_data none"
        )

    # Model: this run's newest checkpoint, else what the options name
    reader, tokenizer = open_reader(options, run.device, run.log, run.resumed_from)

    # Evaluation: exact match of generated answers
    generation = select(GenerationOptions, options)
    collate = ReaderCollator(tokenizer, options.text_maxlength, options.answer_maxlength)

    def answer(batches: Iterator[dict]) -> Iterator[list[Answer]]:
        how = run.device, run.precision, generation
        return answer_questions(reader, tokenizer, batches, *how, source=options.eval_data)

    def evaluate() -> dict[str, float]:
        dataset = ReaderDataset(dev_data, options.n_context, not options.no_title)
        tally = Tally(dev_data)
        for answers in run.dev_results(dataset, collate, answer):
            tally.add(answers)
        return tally.over_all().means()

    # Training
    dataset = ReaderDataset(
        train_data, options.n_context, not options.no_title, with_target=True, seed=options.seed
    )
    evaluation = Evaluation(evaluate, "exact_match", higher_is_better=True) if dev_data else None
    loss = reader_loss, count_labels
    weights = fit(run, reader, tokenizer, *loss, dataset, collate, evaluation)

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
