"""The options of each script: one definition, one default, one help text.

Names and defaults are the reference's where it has them; older spellings stay accepted and are left
out of the help.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

# Options that the original code has too: by the same names and, but for paths, with the same
# defaults. All others are ours, and the help calls them new.
_ORIGINAL = """
accumulation_steps answer_maxlength checkpoint_dir clip data dropout eval_data eval_freq
eval_print_freq extract_cls fixed_lr indexing_batch_size indexing_dimension local_rank lr model_path
model_size n_bits n_context n_docs n_subquantizers name no_fp16 no_passage_mask no_projection
no_question_mask no_title num_shards optim output_path passage_maxlength passages
passages_embeddings per_gpu_batch_size question_maxlength save_freq save_or_load_index scheduler
scheduler_steps seed shard_id text_maxlength total_steps train_data use_checkpoint
validation_workers warmup_steps weight_decay write_crossattention_scores write_results
"""
_NEW = (
    'Options that are "new" are not in the original code; the others have its names, and but for '
    "paths its defaults."
)
_VALUES = {  # what stands for a value in the help, if it is not a number
    **dict.fromkeys(["train_data", "eval_data", "data", "passages", "model_config"], "FILE"),
    **dict.fromkeys(["files", "retrieved", "output"], "FILE"),
    **dict.fromkeys(["checkpoint_dir", "run", "folder"], "FOLDER"),
    **dict.fromkeys(["model_path", "retriever_model", "retriever_path"], "MODEL"),
    **dict.fromkeys(["name", "tokenizer", "retriever_tokenizer"], "NAME"),
    **{"output_path": "PATH", "passages_embeddings": "GLOB"},
}
_CONVERSATION = "search in a conversation"  # a group of test_reader.py's, all new there


class _Formatter(argparse.HelpFormatter):
    """Shows every default, and short names for values: 80 columns are enough."""

    _tells_what_is_new = False

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _VALUES.get(action.dest, "N" if action.type else "TEXT")

    def _get_default_metavar_for_positional(self, action: argparse.Action) -> str:
        return _VALUES[action.dest]

    def _get_help_string(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return action.help
        default = "off" if action.default is False else action.default
        default = f"{default:g}" if isinstance(default, float) else default
        default = "none" if default in (None, "", []) else default
        default = "needed" if action.required else f"default: {default}"
        is_new = action.dest not in _ORIGINAL.split() or hasattr(action, "is_new_here")
        new = "new, " if self._tells_what_is_new and is_new else ""
        return f"{action.help} ({new}{default})".replace("%", "%%")


class _ScriptFormatter(_Formatter):
    _tells_what_is_new = True


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, as all bad input is reported.

    Args:
        program: what follows `python`, for what is no script of the original code.
        needs: what must be given, for the first line of the help.
    """

    def __init__(self, description: str, needs: str = "", program: str | None = None):
        super().__init__(
            prog=program,
            usage=f"python %(prog)s {needs}[options]",
            description=description,
            epilog=None if program else _NEW,
            formatter_class=_Formatter if program else _ScriptFormatter,
            allow_abbrev=False,  # an abbreviation would change its meaning with a new option
        )

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (python {self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(2)


def _number(kind: type, lowest: float, exclusive: bool = False, highest: float | None = None):
    """A parser of numbers that are in range."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number") from None
        if not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        too_low = value <= lowest if exclusive else value < lowest
        if too_low or (highest is not None and value > highest):
            bounds = f"{'more than' if exclusive else 'at least'} {lowest}"
            bounds += "" if highest is None else f" and at most {highest}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


_COUNT = _number(int, 1)
_COUNT_OR_ZERO = _number(int, 0)
_POSITIVE = _number(float, 0, exclusive=True)
_AT_LEAST_ZERO = _number(float, 0)


def _older_names(group: argparse._ArgumentGroup, option: str, *names: str) -> None:
    """Accept other spellings of an option that has been added to the group."""
    action = next(a for a in group._group_actions if option in a.option_strings)
    group.add_argument(
        *names,
        dest=action.dest,
        type=action.type,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def changed(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], names: Sequence[str] = ()
) -> list[str]:
    """The options whose values are not the defaults, as a command gives them.

    Args:
        names: only these; all, if there are none.
    """
    arguments = []
    for action in parser._actions:
        is_wanted = action.help != argparse.SUPPRESS and (action.dest in names or not names)
        value = values.get(action.dest, action.default)
        if is_wanted and value != action.default:
            option = max(action.option_strings, key=len)
            arguments += [option] if value is True else [option, str(value)]
    return arguments


def _add_process_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--per_gpu_batch_size",
        type=_COUNT,
        default=batch_size,
        help="questions in a batch of each process",
    )
    group.add_argument(
        "--dist_timeout",
        type=_number(float, 0, exclusive=True, highest=1e9),
        default=600.0,
        help="seconds after which a process stops waiting for another",
    )
    # Launchers before torchrun passed it; torchrun says it in the environment.
    group.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    _older_names(group, "--local_rank", "--local-rank")


def _add_compile(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compile",
        action="store_true",
        help="let PyTorch compile the encoder's layers: a minute or so at the start, faster after",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--name", default="experiment_name", help="the run's name: a folder in --checkpoint_dir"
    )
    group.add_argument("--checkpoint_dir", default="./checkpoint/", help="where runs are kept")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="number format of matrix products; auto: bf16 where the GPU has it, else fp32",
    )
    _add_compile(group)
    group.add_argument(
        "--num_workers",
        type=_COUNT_OR_ZERO,
        default=2,
        help="processes that prepare batches, for each training process; 0: none of their own",
    )
    _add_process_options(parser, batch_size=1)


def _add_retriever_options(
    parser: argparse.ArgumentParser, model_help: str, with_title: bool = True
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("retriever")
    group.add_argument("--model_path", default="none", help=model_help)
    group.add_argument(
        "--tokenizer",
        default="none",
        help="folder or hub name of the tokenizer for a model without one; none: bert-base-uncased",
    )
    if with_title:
        group.add_argument(
            "--no_title", action="store_true", help="embed passages without their titles"
        )
    return group


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--bm25", action="store_true", help="search by words; needs no model")
    group.add_argument(
        "--passages_embeddings", default="none", help='the embeddings, such as "folder/wiki_*"'
    )
    group.add_argument(
        "--allow_mismatch",
        action="store_true",
        help="use embeddings of another model, collection or run all the same",
    )
    group.add_argument(
        "--save_or_load_index",
        action="store_true",
        help="keep a compressed or BM25 index beside its source, and use it the next time",
    )
    group.add_argument(
        "--indexing_batch_size",
        type=_COUNT,
        default=50000,
        help="embeddings that are in memory at one time",
    )
    group.add_argument(
        "--index_factory",
        default="",
        help="FAISS factory string of a compressed index; none: exact",
    )
    group.add_argument(
        "--no_fp16", action="store_true", help="embed questions in fp32 on a GPU too"
    )


def _add_plain_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plain_text",
        action="store_true",
        help="embed texts without the words question:, title: and context:, as DPR and Contriever",
    )


def _add_reader_options(parser: argparse.ArgumentParser, model_help: str) -> None:
    group = parser.add_argument_group("reader")
    group.add_argument("--model_path", default="none", help=model_help)
    group.add_argument(
        "--model_size",
        choices=["small", "base", "large", "3b", "11b"],
        default="base",
        help="the T5 to start from, t5-SIZE, and whose tokenizer is used when a model has none",
    )
    group.add_argument(
        "--tokenizer",
        default="none",
        help="folder or hub name of the tokenizer for a model without one; none: t5-SIZE",
    )
    group.add_argument(
        "--n_context", type=_COUNT, default=1, help="passages that are read for each question"
    )
    group.add_argument(
        "--text_maxlength",
        type=_COUNT,
        default=200,
        help="tokens of a question with a passage; the rest is cut off",
    )
    group.add_argument("--no_title", action="store_true", help="read passages without their titles")
    group.add_argument("--num_beams", type=_COUNT, default=1, help="beams in generation; 1: greedy")
    group.add_argument(
        "--decoder",
        choices=["fast", "transformers"],
        default="fast",
        help="fast: our own, which leaves a decoder changed in code to Transformers",
    )
    group.add_argument(
        "--generation_max_length",
        type=_number(int, 2),
        default=50,
        help="tokens of a generated answer, the start token included",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--seed", type=_number(int, 0, highest=2**62), default=0, help="seed of everything random"
    )
    group.add_argument("--total_steps", type=_COUNT, default=1000, help="updates of the weights")
    _older_names(group, "--total_steps", "--total_step")
    group.add_argument(
        "--accumulation_steps",
        type=_COUNT,
        default=1,
        help="batches whose gradients are averaged for one update",
    )
    group.add_argument("--lr", type=_POSITIVE, default=1e-4, help="learning rate")
    group.add_argument("--optim", choices=["adam", "adamw"], default="adam", help="optimizer")
    group.add_argument(
        "--weight_decay", type=_AT_LEAST_ZERO, default=0.1, help="weight decay of adamw"
    )
    group.add_argument(
        "--scheduler",
        choices=["fixed", "linear"],
        default="fixed",
        help="fixed: always --lr; linear: up over --warmup_steps, then down to 0",
    )
    group.add_argument(
        "--warmup_steps",
        type=_COUNT_OR_ZERO,
        default=1000,
        help="updates that the linear schedule takes up",
    )
    _older_names(group, "--warmup_steps", "--warmup_step")
    group.add_argument(
        "--scheduler_steps",
        type=_COUNT,
        default=None,
        help="update at which the linear schedule reaches 0; none: --total_steps",
    )
    group.add_argument(
        "--fixed_lr", action="store_true", help="the linear schedule stays at --lr after warm-up"
    )
    group.add_argument(
        "--clip", type=_AT_LEAST_ZERO, default=1.0, help="the gradient's largest norm; 0: any"
    )
    group.add_argument(
        "--dropout", type=_number(float, 0, highest=0.99), default=0.1, help="dropout rate"
    )

    optimisation = group
    group = parser.add_argument_group("evaluation and checkpoints")
    group.add_argument(
        "--eval_freq", type=_COUNT, default=500, help="updates between two evaluations"
    )
    group.add_argument(
        "--save_freq", type=_COUNT, default=5000, help="updates between two checkpoints"
    )
    group.add_argument(
        "--keep_checkpoints",
        type=_COUNT_OR_ZERO,
        default=0,
        help="how many step-N checkpoints are kept, besides best_dev; 0: all",
    )
    return optimisation


def train_reader_parser() -> argparse.ArgumentParser:
    """Options of train_reader.py."""
    parser = _Parser("Train a Fusion-in-Decoder reader on questions with passages and answers.")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train_data", default="train_data.json", help=".json or .jsonl file to train on"
    )
    group.add_argument(
        "--eval_data",
        default="eval_data.json",
        help=".json or .jsonl file to evaluate on; none: train without evaluation",
    )
    _add_reader_options(
        parser,
        "T5 or reader to take the weights from, a folder or hub name; none: t5-SIZE. "
        "(A run that was stopped goes on from its own checkpoint instead.)",
    )
    group = parser.add_argument_group("reader training")
    group.add_argument(
        "--model_config",
        default="none",
        help="T5 config file (JSON): start from fresh weights of this shape, with --tokenizer",
    )
    group.add_argument(
        "--answer_maxlength",
        type=_number(int, -1),
        default=-1,
        help="tokens of a target, fixed: longer ones are cut, shorter ones padded; -1: as they are",
    )
    group.add_argument(
        "--use_checkpoint",
        action="store_true",
        help="keep less of the encoder in memory: compute its activations twice",
    )
    group.add_argument(
        "--legacy_position_table",
        action="store_true",
        help="use the cross-attention position table in T5's weights, as the original code did",
    )
    _add_training_options(parser)
    _add_run_options(parser)
    return parser


def test_reader_parser() -> argparse.ArgumentParser:
    """Options of test_reader.py."""
    parser = _Parser("Answer questions with a reader, judge the answers, score the passages.")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--eval_data", default="eval_data.json", help=".json or .jsonl file with the questions"
    )
    group.add_argument(
        "--write_results",
        action="store_true",
        help="write the answers to final_output.txt (id, tab, answer) in the run's folder",
    )
    group.add_argument(
        "--write_crossattention_scores",
        action="store_true",
        help="write the data with passage scores to dataset_wscores.json in the run's folder",
    )
    group.add_argument(
        "--eval_print_freq",
        type=_COUNT,
        default=1000,
        help="batches after which the results so far are printed",
    )
    _add_reader_options(parser, "the reader: a checkpoint folder or hub name; none: t5-SIZE")
    group = parser.add_argument_group("conversation")
    group.add_argument(
        "--interactive",
        action="store_true",
        help="answer questions as they are typed, or come by a pipe, one a line, from the passages "
        "that are found for them; Ctrl-D leaves",
    )
    group.add_argument("--question", help="answer this one in the same way")
    group = parser.add_argument_group(_CONVERSATION)
    group.add_argument(
        "--passages", default="none", help="the collection: .tsv (id, text, title) or .jsonl"
    )
    group.add_argument(
        "--retriever_path",
        default="none",
        help="the retriever that made the embeddings, a folder or hub name",
    )
    group.add_argument(
        "--retriever_tokenizer",
        default="none",
        help="folder or hub name of the tokenizer for a retriever without one; none: "
        "bert-base-uncased",
    )
    _add_plain_text(group)
    _add_search(group)
    for action in group._group_actions:
        action.is_new_here = True  # some have names of the original's other scripts
    _add_run_options(parser)
    return parser


def check_conversation(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], talks: bool
) -> None:
    """Errors: as of a wrong option, when test_reader.py is given some of a test for a conversation
    (`talks`), or the other way round."""
    if values["interactive"] and values["question"] is not None:
        parser.error("--interactive and --question: give one of them")
    if values["question"] is not None and not values["question"].strip():
        parser.error("--question is empty: give its text")
    if talks and values["passages"] == "none":
        parser.error("--passages is missing: the collection to find passages in")
    (group,) = (group for group in parser._action_groups if group.title == _CONVERSATION)
    of_search = [action.dest for action in group._group_actions]
    of_test = ["eval_data", "write_results", "write_crossattention_scores"]
    given = changed(parser, values, of_test if talks else of_search)
    names = ", ".join(word for word in given if word.startswith("--"))
    if names and talks:
        parser.error(f"{names}: for a file of questions; leave this out of a conversation")
    if names:
        parser.error(f"{names}: of a conversation; add --interactive, or --question TEXT")


def train_retriever_parser() -> argparse.ArgumentParser:
    """Options of train_retriever.py."""
    parser = _Parser("Train a retriever on the passage scores of a reader.")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train_data",
        default="train_data.json",
        help=".json or .jsonl file with scored passages (test_reader.py's dataset_wscores.json)",
    )
    group.add_argument(
        "--eval_data",
        default="eval_data.json",
        help=".json or .jsonl file with scored passages; none: train without evaluation",
    )
    group.add_argument(
        "--n_context", type=_COUNT, default=1, help="passages of each question, by score"
    )
    _add_retriever_options(
        parser,
        "retriever to take weights and shape from, a folder or hub name; none: --retriever_model. "
        "(A run that was stopped goes on from its own checkpoint instead.)",
    )
    group = parser.add_argument_group("a new retriever (an existing one keeps its own settings)")
    group.add_argument(
        "--retriever_model", default="bert-base-uncased", help="the BERT to start from"
    )
    group.add_argument(
        "--model_config",
        default="none",
        help="BERT config file (JSON): start from fresh weights of this shape, with --tokenizer",
    )
    group.add_argument(
        "--indexing_dimension",
        type=_COUNT,
        default=None,
        help="size of an embedding; none: 768, or BERT's hidden size with --no_projection",
    )
    group.add_argument(
        "--no_projection", action="store_true", help="no linear layer and LayerNorm after BERT"
    )
    group.add_argument(
        "--question_maxlength", type=_COUNT, default=None, help="tokens of a question; none: 40"
    )
    group.add_argument(
        "--passage_maxlength", type=_COUNT, default=None, help="tokens of a passage; none: 200"
    )
    group.add_argument(
        "--no_question_mask", action="store_true", help="let padding count in questions"
    )
    group.add_argument(
        "--no_passage_mask", action="store_true", help="let padding count in passages"
    )
    group.add_argument(
        "--extract_cls", action="store_true", help="embed by the first token, not by the mean"
    )
    group = _add_training_options(parser)
    group.add_argument(
        "--in_batch_negatives",
        action="store_true",
        help="other questions' passages count as wrong ones (not in the paper)",
    )
    _add_run_options(parser)
    return parser


def passage_embeddings_parser() -> argparse.ArgumentParser:
    """Options of generate_passage_embeddings.py."""
    parser = _Parser(
        "Embed a passage collection with a retriever, shard by shard.",
        needs="--passages FILE ",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--passages", required=True, help="the collection: .tsv (id, text, title) or .jsonl"
    )
    group.add_argument(
        "--output_path",
        default="wikipedia_embeddings",
        help="folder: shards FOLDER/wiki_00, ...; with a slash a prefix: DIR/x gives DIR/x_00, ...",
    )
    group.add_argument("--shard_id", type=_COUNT_OR_ZERO, default=0, help="which shard, from 0")
    group.add_argument("--num_shards", type=_COUNT, default=1, help="how many shards in all")
    group = _add_retriever_options(
        parser, "the retriever: a checkpoint folder, or a BERT to use as it is"
    )
    _add_plain_text(group)
    group = parser.add_argument_group("embedding")
    group.add_argument(
        "--passage_maxlength", type=_COUNT, default=None, help="tokens of a passage; none: its own"
    )
    group.add_argument("--no_fp16", action="store_true", help="compute and keep fp32 on a GPU too")
    _add_compile(group)
    _add_process_options(parser, batch_size=32)
    return parser


def passage_retrieval_parser() -> argparse.ArgumentParser:
    """Options of passage_retrieval.py."""
    parser = _Parser(
        "Find passages for questions, with a retriever or with BM25.",
        needs="--passages FILE --output_path PATH ",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="data.json", help=".json or .jsonl file of questions, or DPR's .csv"
    )
    _older_names(group, "--data", "--data_path")
    group.add_argument(
        "--passages", required=True, help="the collection: .tsv (id, text, title) or .jsonl"
    )
    group.add_argument(
        "--output_path", required=True, help=".json or .jsonl file to write what is found into"
    )
    group.add_argument(
        "--output_format",
        choices=["json", "trec"],
        default="json",
        help="json: what the reader reads; trec: a run for trec_eval, without the passages' texts",
    )
    group.add_argument("--n-docs", type=_COUNT, default=100, help="passages for each question")
    _older_names(group, "--n-docs", "--n_docs")
    group.add_argument(
        "--validation_workers",
        type=_COUNT,
        default=32,
        help="processes at most that look for answers in passages",
    )
    group = _add_retriever_options(
        parser, "the retriever that made the embeddings", with_title=False
    )
    _add_plain_text(group)
    group = parser.add_argument_group("search")
    _add_search(group)
    group.add_argument(
        "--question_maxlength",
        type=_COUNT,
        default=None,
        help="tokens of a question; none: its own",
    )
    group.add_argument(
        "--n-subquantizers",
        type=_COUNT_OR_ZERO,
        default=0,
        help="product quantization into so many codes; 0: exact search",
    )
    _older_names(group, "--n-subquantizers", "--n_subquantizers")
    group.add_argument("--n-bits", type=_COUNT, default=8, help="bits of such a code")
    _older_names(group, "--n-bits", "--n_bits")
    _add_process_options(parser, batch_size=64)
    return parser


def evaluation_parser() -> argparse.ArgumentParser:
    """Options of `python -m src.tools.evaluate`."""
    parser = _Parser(
        "Recall@k of data files with passages; exact match of files with answers.",
        needs="FILE ... ",
        program="-m src.tools.evaluate",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "files", nargs="+", help=".json or .jsonl with ctxs, or a final_output.txt (needs --data)"
    )
    group.add_argument("--data", help="the questions that were answered, with the right answers")
    return parser


def report_parser() -> argparse.ArgumentParser:
    """Options of `python -m src.tools.report`."""
    parser = _Parser(
        "Show a run as a page for a browser: curves, recall, questions and passages.",
        needs="FOLDER ",
        program="-m src.tools.report",
    )
    group = parser.add_argument_group("data")
    group.add_argument("run", help="the run's folder, of training, of testing, or both")
    group.add_argument(
        "--data",
        help="the questions that were answered; none: dataset_wscores.json in the run's folder, or "
        "else the --eval_data that the run was given",
    )
    group.add_argument(
        "--retrieved",
        nargs="+",
        default=[],
        help="files with passages found for the questions, to compare",
    )
    group = parser.add_argument_group("page")
    group.add_argument(
        "-o", "--output", help="the page to write; none: report.html in the run's folder"
    )
    group.add_argument(
        "--max_questions",
        type=_COUNT,
        default=500,
        help="questions that the page holds; the numbers are always of all",
    )
    group.add_argument(
        "--passages_shown",
        type=_COUNT,
        default=10,
        help="passages of a question that the page holds; the first with an answer comes on top",
    )
    return parser


def preprocess_parser() -> argparse.ArgumentParser:
    """Options of `python -m src.tools.preprocess`."""
    parser = _Parser(
        "Make data files of what get-data.sh has fetched.",
        needs="FOLDER ",
        program="-m src.tools.preprocess",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "folder", help="get-data.sh's folder: has download/ and psgs_w100.tsv, gets NQ/ and TQA/"
    )
    group.add_argument("--only", choices=["nq", "tqa"], help="one dataset; none: both")
    return parser
