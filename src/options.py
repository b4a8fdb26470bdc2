"""The options of every script and tool, one line each, and the groups their values are passed in.

`add` declares an option of the original code, under its name and (except for paths) with its
default; `new` declares one of ours, which the help marks. Imports nothing heavy, so that `--help`
and wrong options are answered at once.
"""

import argparse
import ast
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Add = Callable[..., None]
Check = Callable[["_Parser", argparse.Namespace], None] | None
Values = TypeVar("Values")

_NEW = """Options marked "new" are not in the original code; the others have its names and,
except for paths, its defaults."""
_CONVERSATION = "search in a conversation"  # a group of test_reader.py
_HIDDEN = argparse.SUPPRESS


class _Parser(argparse.ArgumentParser):
    """Options in titled groups; a wrong one is reported in one line, like all bad input.

    Args:
        check: called with the parsed options, for rules about several of them.
        needs: the required arguments, for the first line of the help.
        program: what follows `python`, for tools; they have no counterpart in the original code.
    """

    def __init__(self, description: str, check: Check, needs: str = "", program: str | None = None):
        super().__init__(
            prog=program,
            usage=f"python %(prog)s {needs}[options]",
            description=description,
            epilog=None if program else _NEW,
            allow_abbrev=False,  # an abbreviation would change its meaning with a new option
        )
        self._check, self.names = check, {}  # of the options, by group

    def group(self, title: str) -> tuple[Add, Add]:
        """Start a group. Options declared from now on, by `add` and `new`, belong to it."""
        self._group, self.names[title] = self.add_argument_group(title), []
        return self.add, self.new

    def add(
        self, names: str, kind: Any, default: Any, help: str, is_new: bool = False, **more
    ) -> None:
        """Declare an option of the original code.

        Args:
            names: followed by the value's name in the help, unless that is N.
            kind: `bool` (a switch), a parser, a list of choices, or (for a text) its name.
            more: for argparse; or `also`, older spellings, which the help leaves out.
        """
        also = more.pop("also", [])
        if kind is bool:
            more["action"] = "store_true"
        elif isinstance(kind, list | str):
            more["choices" if isinstance(kind, list) else "metavar"] = kind
        else:
            names, _, value = names.partition(" ")
            more |= {"metavar": value or "N", "type": kind}
        if names.startswith("-") and help != _HIDDEN:
            shown = "off" if default is False else "none" if default in (None, "", []) else default
            shown = f"default: {shown:g}" if isinstance(shown, float) else f"default: {shown}"
            shown = "needed" if more.get("required") else shown
            help = f"{help} ({'new, ' if is_new else ''}{shown})".replace("%", "%%")
        action = self._group.add_argument(*names.split(), default=default, help=help, **more)
        self.names[self._group.title].append(action.dest)
        if also:
            more |= {"dest": action.dest, "default": _HIDDEN, "help": _HIDDEN}
            self._group.add_argument(*also, **more)

    def new(self, *arguments, **more) -> None:
        """Declare an option of ours."""
        self.add(*arguments, **more, is_new=True)

    def parse_args(self, *arguments: Any) -> argparse.Namespace:
        options = super().parse_args(*arguments)
        for name, value in vars(options).items():
            if name == "question":  # typed by a person, not a file's name
                continue
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
                    self.error(f"{text!a} is no text in UTF-8; rename the file")
        if self._check:
            self._check(self, options)
        return options

    def error(self, message: str) -> NoReturn:
        kind, _, words = message.partition("unrecognized arguments: ")
        if not kind and any(map(os.path.exists, words.split())):
            message += "; a pattern with * must be in quotes"
        print(f"error: {message} (python {self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(2)


def number(
    kind: type, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> Callable[[str], float]:
    """A parser of finite numbers in a range."""
    named = {"at least": at_least, "more than": above, "at most": at_most}
    bounds = " and ".join(f"{name} {end}" for name, end in named.items() if abs(end) < math.inf)

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number") from None
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if not at_least <= value <= at_most or value <= above:
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def _folder_name(text: str) -> str:
    is_plain = text not in ("", ".", "..") and not set(text) & {"/", "\0"}
    if not is_plain or len(text.encode(errors="replace")) > 255:
        shown = text if len(text) < 60 else f"{text[:60]}..."
        raise argparse.ArgumentTypeError(f"{shown!r} cannot be a folder's name; leave out slashes")
    return text


def _factory(text: str) -> str:
    most = {"HNSW": 512, "NSG": 512, "x": 16}  # with more, FAISS runs out of memory or aborts
    numbers = re.findall(r"([A-Za-z]+)([0-9]+)", text)
    is_absurd = any(not 0 < int(n) <= most.get(name, 1 << 20) for name, n in numbers)
    if is_absurd or "/" in text or len(text.encode()) > 200:  # it becomes a folder's name
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a factory string of FAISS")
    return text


def _count_list(text: str) -> list[int]:
    return sorted({COUNT(part) for part in text.split(",")})


def _target(text: str) -> str:
    if text not in TARGETS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(TARGETS)}")
    return text


def _dev_metric(text: str) -> str:
    if text in ("loss", "inversions", "avg_top1") or re.fullmatch("recall@[1-9][0-9]*", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not loss, inversions, avg_top1 or recall@k")


def _targets(text: str) -> str:
    return ",".join(dict.fromkeys(map(_target, text.split(","))))


def _counts(text: str) -> str:
    counts = {COUNT(part) for part in text.split(",")} if text else ()
    return ",".join(map(str, sorted(counts)))


COUNT, COUNT_OR_ZERO = number(int, at_least=1), number(int, at_least=0)
SECONDS = number(float, above=0, at_most=1e9)


def changed(
    parser: argparse.ArgumentParser, values: Mapping[str, Any], names: Sequence[str] = ()
) -> list[str]:
    """The options (only those in `names`, if given) that differ from their defaults, as written in
    a command."""
    arguments = []
    for action in parser._actions:
        is_wanted = action.help != _HIDDEN and (action.dest in names or not names)
        value = values.get(action.dest, action.default)
        if is_wanted and value != action.default:
            option = max(action.option_strings, key=len)
            arguments += [option] if value is True else [option, str(value)]
    return arguments


# ----------------------------------------------------------------------------------------------
# Groups of values, which functions take instead of many parameters. Fields are named like options.


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """How a reader sees an example."""

    n_context: int
    text_maxlength: int
    no_title: bool


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated. `n_context_curve`: numbers of passages to answer with as well."""

    generation_max_length: int = 50
    num_beams: int = 1
    decoder: str = "fast"
    n_best: int = 1
    n_context_curve: str = ""

    @property
    def contexts(self) -> list[int]:
        """The numbers in `n_context_curve`."""
        return [int(part) for part in filter(None, self.n_context_curve.split(","))]


def _keys(file: str, table: str) -> tuple[str, ...]:
    """A table's names, from the source of a file in src/models: importing it would import torch."""
    tree = ast.parse((Path(__file__).parent / "models" / file).read_text(encoding="utf-8"))
    tables = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    (found,) = (node.value for node in tables if ast.unparse(node.target) == table)
    return tuple(ast.literal_eval(key) for key in found.keys)


LOSSES = _keys("losses.py", "DISTILLATION_LOSSES")
TARGETS = (
    *_keys("scores.py", "SCORES"),
    *_keys("targets.py", "AGGREGATES"),
    *("perplexity", "leave_one_out", "has_answer"),  # src/models/answering.py
)


@dataclasses.dataclass(frozen=True)
class TargetOptions:
    """What passages are scored by, and the answer that the reader is given for it."""

    targets: str = "attention"
    target_sum: bool = False
    score_own_answer: bool = False
    token_log_probs: bool = False
    attribution: bool = False

    @property
    def names(self) -> list[str]:
        return self.targets.split(",")

    @property
    def needs_answer(self) -> bool:
        return bool(set(self.names) - {"attention", "has_answer"})


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The loss of a retriever."""

    loss: str = "kl"
    temperature: float = 1.0
    target_temperature: float = 1.0
    margin: float = 0.1


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """The optimizer and its schedule; lengths are in updates."""

    optim: str
    lr: float
    weight_decay: float
    scheduler: str
    warmup_steps: int
    total_steps: int
    scheduler_steps: int | None
    fixed_lr: bool


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How long to train, and how often to evaluate and save; lengths are in updates."""

    total_steps: int
    accumulation_steps: int
    clip: float
    eval_freq: int
    save_freq: int
    keep_checkpoints: int
    precision: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BM25Options:
    """How BM25 splits texts into words and weighs these. By default as is usual for Wikipedia's
    passages of 100 words (Anserini, DPR)."""

    bm25_k1: float = 0.9
    bm25_b: float = 0.4
    bm25_stemmer: str = "none"
    bm25_stop_words: str = "none"


@dataclasses.dataclass(frozen=True)
class SearchOptions(BM25Options):
    """How passages are found."""

    bm25: bool
    passages_embeddings: str
    allow_mismatch: bool
    save_or_load_index: bool
    indexing_batch_size: int
    index_factory: str
    no_fp16: bool
    plain_text: bool
    model_path: str  # the retriever, and the tokenizer of one that has none
    tokenizer: str
    pooling: str | None = None
    normalize: bool = False
    question_prefix: str | None = None
    passage_prefix: str | None = None
    question_maxlength: int | None = None  # tokens; None: as the retriever was trained
    per_gpu_batch_size: int = 1
    n_subquantizers: int = 0  # passage_retrieval.py alone has these two
    n_bits: int = 8
    tokenizer_option: str = "--tokenizer"  # for messages
    from_trec: str = "none"

    @property
    def factory(self) -> str:
        """FAISS factory string of the index; empty for exact search."""
        codes = self.n_subquantizers
        return f"PQ{codes}x{self.n_bits}" if codes else self.index_factory


def select(kind: type[Values], options: argparse.Namespace) -> Values:
    """The values of one of the groups above; an option that the script lacks keeps its default."""
    values = vars(options)
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    return kind(**{name: values[name] for name in names})


ENCODING = ("plain_text", "pooling", "normalize", "question_prefix", "passage_prefix")


def encoding(options: argparse.Namespace | SearchOptions) -> dict[str, Any]:
    """How to embed, where the options say so; a retriever's folder may have settings of its own."""
    given = {name: getattr(options, name, None) for name in ENCODING}
    if given.pop("plain_text"):
        given |= {"question_prefix": "", "passage_prefix": ""}
    return {name: value for name, value in given.items() if value not in (None, False)}


def conversation_search(options: argparse.Namespace) -> SearchOptions:
    """How a conversation finds passages, where --model_path is the reader."""
    search = select(SearchOptions, options)
    values = {"model_path": options.retriever_path, "tokenizer": options.retriever_tokenizer}
    values |= {"per_gpu_batch_size": 1, "tokenizer_option": "--retriever_tokenizer"}
    return dataclasses.replace(search, **values)


# ----------------------------------------------------------------------------------------------
# Options that several scripts share

# fmt: off
_DATA = ".json or .jsonl file"
_COLLECTION = "the collection: .tsv (id, text, title) or .jsonl"
_TOKENIZER = "folder or hub name of the tokenizer for a model without one; none: "
_BERT = f"{_TOKENIZER}bert-base-uncased"
_INDEXED = "the retriever that made the embeddings"
_COMPILE = "compile the layers with PyTorch: takes a minute or so, then runs faster"
_SHARD = "divide weights, gradients and optimizer among the processes (FSDP)"
_PLAIN = "embed without the words question:, title: and context:, as DPR and Contriever do"
_REGEX = "take answers as regular expressions (CuratedTREC's are)"
_PREFIX = 'text before a {}, such as "{}: "; none: {}'
_FRESH = "config file (JSON): start from fresh weights of this shape, with --tokenizer"
_RESUMES = " (A stopped run resumes from its own checkpoint instead.)"


def _processes(parser: _Parser, batch_size: int) -> None:
    add, new = parser.group("processes")
    new("--plan", "GPU[:N]", None, nargs="?", const="this",
        help="print what this command needs (memory, time, disk) on N such GPUs, and end")
    add("--per_gpu_batch_size", COUNT, batch_size, "batch size of each process")
    new("--dist_timeout", SECONDS, 600.0, "seconds until a process stops waiting for another")
    # Launchers before torchrun passed it; torchrun sets an environment variable.
    add("--local_rank", number(int), None, _HIDDEN, also=["--local-rank"])


def _run(parser: _Parser) -> None:
    add, new = parser.group("run")
    add("--name NAME", _folder_name, "experiment_name", "the run's folder in --checkpoint_dir")
    add("--checkpoint_dir", "FOLDER", "./checkpoint/", "folder of all runs")
    new("--precision", ["auto", "fp32", "bf16", "fp16"], "auto",
        "number format of matrix products; auto: bf16 where the GPU supports it, else fp32")
    new("--compile", bool, False, _COMPILE)
    new("--shard", bool, False, _SHARD)
    new("--num_workers", COUNT_OR_ZERO, 2, "data-loading processes per process (0: none)")
    _processes(parser, batch_size=1)


def _search(add: Add, new: Add) -> None:
    new("--bm25", bool, False, "search with BM25; needs no model")
    new("--bm25_k1", number(float, at_least=0), 0.9, "BM25: how much repeated words count")
    new("--bm25_b", number(float, at_least=0, at_most=1), 0.4, "BM25: how much length counts")
    new("--bm25_stemmer", "LANGUAGE", "none", "BM25: compare stems (english: finds, finding)")
    new("--bm25_stop_words", "LANGUAGE", "none", "BM25: leave out frequent words (english: the)")
    add("--passages_embeddings", "GLOB", "none", 'the embeddings, such as "folder/wiki_*"')
    new("--allow_mismatch", bool, False, "accept embeddings of another model, collection or run")
    add("--save_or_load_index", bool, False, "keep a compressed or BM25 index next to its source")
    add("--indexing_batch_size", COUNT, 50000, "embeddings that a process or a GPU takes at a time")
    new("--index_factory TEXT", _factory, "", "FAISS factory string of a compressed index")
    add("--no_fp16", bool, False, "embed questions in fp32 on a GPU too")


def _encoder(new: Add) -> None:
    new("--pooling", ["cls", "mean"], None, "embed by the first token or the mean; none: mean")
    new("--normalize", bool, False, "scale embeddings to length 1, for cosine similarity")
    new("--question_prefix", "TEXT", None, _PREFIX.format("question", "query", "question:"))
    new("--passage_prefix", "TEXT", None, _PREFIX.format("passage", "passage", "title: ..."))


def _reader(parser: _Parser, model_help: str) -> None:
    add, new = parser.group("reader")
    add("--model_path", "MODEL", "none", model_help)
    add("--model_size", ["small", "base", "large", "3b", "11b"], "base",
        "the T5 to start from, t5-SIZE, and the tokenizer of a model that has none")
    new("--tokenizer", "NAME", "none", f"{_TOKENIZER}t5-SIZE")
    add("--n_context", COUNT, 1, "passages read for each question")
    add("--text_maxlength", COUNT, 200, "maximum tokens of a question with a passage")
    add("--no_title", bool, False, "read passages without their titles")
    new("--num_beams", COUNT, 1, "beams in generation (1: greedy)")
    new("--decoder", ["fast", "transformers"], "fast", "fast falls back for changed decoders")
    new("--generation_max_length", number(int, at_least=2), 50,
        "maximum tokens of a generated answer, including the start token")
    new("--no_clean_up", bool, False, 'keep spaces before punctuation in answers ("Bob \'s")')


def _training(parser: _Parser) -> None:
    add, new = parser.group("optimisation")
    add("--seed", number(int, at_least=0, at_most=2**62), 0, "random seed")
    add("--total_steps", COUNT, 1000, "optimizer updates", also=["--total_step"])
    add("--accumulation_steps", COUNT, 1, "batches averaged into one update")
    add("--lr", number(float, above=0), 1e-4, "learning rate")
    add("--optim", ["adam", "adamw"], "adam", "optimizer")
    add("--weight_decay", number(float, at_least=0), 0.1, "weight decay (adamw only)")
    add("--scheduler", ["fixed", "linear"], "fixed", "linear: up over --warmup_steps, down to 0")
    add("--warmup_steps", COUNT_OR_ZERO, 1000, "warm-up updates (linear)", also=["--warmup_step"])
    add("--scheduler_steps", COUNT, None, "update at which linear reaches 0; none: --total_steps")
    add("--fixed_lr", bool, False, "with the linear schedule, stay at --lr after the warm-up")
    add("--clip", number(float, at_least=0), 1.0, "maximum gradient norm (0: no clipping)")
    add("--dropout", number(float, at_least=0, at_most=0.99), 0.1, "dropout rate")
    parser.group("evaluation and checkpoints")
    add("--eval_freq", COUNT, 500, "updates between evaluations")
    add("--save_freq", COUNT, 5000, "updates between checkpoints")
    new("--keep_checkpoints", COUNT_OR_ZERO, 0, "step-N checkpoints kept besides best_dev (0: all)")
    _run(parser)


# ----------------------------------------------------------------------------------------------
# Scripts


def train_reader_parser() -> _Parser:
    description = "Train a Fusion-in-Decoder reader on questions with passages and answers."
    parser = _Parser(description, _check_fresh_weights)
    add, new = parser.group("data")
    add("--train_data", "FILE", "train_data.json", f"{_DATA} to train on")
    add("--eval_data", "FILE", "eval_data.json", f"{_DATA} to evaluate on, or none")
    _reader(parser, f"T5 or reader to start from, a folder or hub name; none: t5-SIZE.{_RESUMES}")
    parser.group("reader training")
    new("--model_config", "FILE", "none", f"T5 {_FRESH}")
    add("--answer_maxlength", number(int, at_least=-1), -1, "tokens to cut or pad to (-1: no)")
    add("--use_checkpoint", bool, False, "save memory: compute the encoder's activations twice")
    new("--legacy_position_table", bool, False,
        "use the cross-attention position table in T5's weights, as the original code did")
    _training(parser)
    return parser


def test_reader_parser() -> _Parser:
    description = "Answer questions with a reader, judge the answers, score the passages."
    parser = _Parser(description, _check_test_reader)
    add, new = parser.group("data")
    add("--eval_data", "FILE", "eval_data.json", f"{_DATA} with the questions")
    new("--regex_answers", bool, False, _REGEX)
    add("--write_results", bool, False, "write the answers to final_output.txt (id, tab, answer)")
    add("--write_crossattention_scores", bool, False,
        "write the data with passage scores to dataset_wscores.json")
    add("--eval_print_freq", COUNT, 1000, "batches between intermediate results")
    new("--targets NAME,NAME,...", _targets, "attention", "what passages are scored by")
    new("--target_sum", bool, False, "perplexity: the sum of the tokens' log-likelihoods")
    new("--score_own_answer", bool, False, "score by the reader's answer where the data has none")
    new("--token_log_probs", bool, False, "perplexity: write them token by token, too")
    new("--attribution", bool, False, "score passages by what the answer loses without each")
    new("--n_best", COUNT, 1, "answers per question in answers.jsonl (at most --num_beams)")
    new("--n_context_curve N,N,...", _counts, "", "judge answers from the first N passages as well")
    new("--abstain_below P", number(float, at_least=0, at_most=1), 0.0,
        "write an empty answer if its probability is lower")
    _reader(parser, "the reader: a checkpoint folder or hub name; none: t5-SIZE")
    parser.group("conversation")
    new("--interactive", bool, False, "answer questions typed at a prompt or piped in")
    new("--question TEXT", str, None, "answer this one question in the same way")
    new("--serve", bool, False, "answer questions on a web page of this machine")
    new("--host", "ADDRESS", "127.0.0.1", "with --serve: another address lets others ask too")
    new("--port", number(int, at_least=0, at_most=65535), 8000, "with --serve (0: a free one)")
    parser.group(_CONVERSATION)
    new("--passages", "FILE", "none", _COLLECTION)
    new("--retriever_path", "MODEL", "none", _INDEXED)
    new("--retriever_tokenizer", "NAME", "none", _BERT)
    new("--plain_text", bool, False, _PLAIN)
    _encoder(new)
    _search(new, new)
    _run(parser)
    return parser


def train_retriever_parser() -> _Parser:
    description = "Train a retriever on the passage scores of a reader."
    parser = _Parser(description, _check_train_retriever)
    add, new = parser.group("data")
    add("--train_data", "FILE", "train_data.json", "scored passages, such as dataset_wscores.json")
    add("--eval_data", "FILE", "eval_data.json", "file of the same kind to evaluate on, or none")
    add("--n_context", COUNT, 1, "passages of each question, by score")
    parser.group("retriever")
    add("--model_path", "MODEL", "none",
        f"retriever to start from, a folder or hub name; none: --retriever_model.{_RESUMES}")
    new("--tokenizer", "NAME", "none", _BERT)
    add("--no_title", bool, False, "embed passages without their titles")
    new("--in_batch_negatives", bool, False, "use other questions' passages as negatives")
    new("--target NAME", _target, None, "score to learn from; none: the first of the data's")
    new("--loss", list(LOSSES), "kl", "contrastive: data with hasanswer, or DPR's")
    new("--negatives", COUNT_OR_ZERO, None,
        "contrastive: passages without an answer drawn per question; none: --n_context - 1")
    new("--temperature", number(float, above=0), 1.0, "divides the similarities")
    new("--target_temperature", number(float, above=0), 1.0, "divides the target (kl)")
    new("--margin", number(float, at_least=0), 0.1, "margin between two passages (margin)")
    new("--best_by METRIC", _dev_metric, "loss",
        "dev metric that picks best_dev: loss, inversions, avg_top1, or recall@5 (or another k)")
    parser.group("a new retriever (an existing one keeps its own settings)")
    new("--retriever_model", "MODEL", "bert-base-uncased", "the encoder to start from")
    new("--model_config", "FILE", "none", f"BERT {_FRESH}")
    add("--indexing_dimension", COUNT, None,
        "size of an embedding; none: 768, or BERT's hidden size with --no_projection")
    add("--no_projection", bool, False, "no linear layer and LayerNorm after BERT")
    add("--question_maxlength", COUNT, None, "maximum tokens of a question; none: 40")
    add("--passage_maxlength", COUNT, None, "maximum tokens of a passage; none: 200")
    add("--no_question_mask", bool, False, "do not mask padding in questions")
    add("--no_passage_mask", bool, False, "do not mask padding in passages")
    add("--extract_cls", bool, False, "the same as --pooling cls")
    _encoder(new)
    new("--two_towers", bool, False, "one encoder for questions, another for passages")
    _training(parser)
    return parser


def passage_embeddings_parser() -> _Parser:
    description = "Embed a passage collection with a retriever, shard by shard."
    parser = _Parser(description, _check_passage_embeddings, "--passages FILE ")
    add, new = parser.group("data")
    add("--passages", "FILE", None, _COLLECTION, required=True)
    add("--output_path", "PATH", "wikipedia_embeddings",
        "folder: shards FOLDER/wiki_00, ...; with a slash a prefix: DIR/x gives DIR/x_00, ...")
    add("--shard_id", COUNT_OR_ZERO, 0, "index of the shard, from 0")
    add("--num_shards", COUNT, 1, "number of shards")
    parser.group("retriever")
    add("--model_path", "MODEL", "none", "the retriever, or an encoder to use as it is")
    new("--tokenizer", "NAME", "none", _BERT)
    add("--no_title", bool, False, "embed passages without their titles")
    new("--plain_text", bool, False, _PLAIN)
    _encoder(new)
    parser.group("embedding")
    add("--passage_maxlength", COUNT, None, "maximum tokens of a passage; none: the model's")
    add("--no_fp16", bool, False, "compute and store fp32 on a GPU too")
    new("--compile", bool, False, _COMPILE)
    _processes(parser, batch_size=32)
    return parser


def passage_retrieval_parser() -> _Parser:
    description = "Find passages for questions, with a retriever or with BM25."
    needs = "--passages FILE --output_path PATH "
    parser = _Parser(description, _check_passage_retrieval, needs)
    add, new = parser.group("data")
    add("--data", "FILE", "data.json", "questions: .json, .jsonl, DPR's .csv", also=["--data_path"])
    add("--passages", "FILE", None, _COLLECTION, required=True)
    add("--output_path", "PATH", None, f"{_DATA} for the results", required=True)
    new("--regex_answers", bool, False, _REGEX)
    new("--output_format", ["json", "trec"], "json", "trec: a run for trec_eval, without the texts")
    add("--n-docs", COUNT, 100, "passages for each question", also=["--n_docs"])
    add("--validation_workers", COUNT, 32, "maximum number of processes that look for answers")
    new("--from_trec", "RUN", "none", "no search: the passages that this TREC run names")
    parser.group("retriever")
    add("--model_path", "MODEL", "none", _INDEXED)
    new("--tokenizer", "NAME", "none", _BERT)
    new("--plain_text", bool, False, _PLAIN)
    _encoder(new)
    parser.group("search")
    _search(add, new)
    add("--question_maxlength", COUNT, None, "maximum tokens of a question; none: the model's")
    add("--n-subquantizers", COUNT_OR_ZERO, 0, "codes per embedding (0: exact search)",
        also=["--n_subquantizers"])
    add("--n-bits", number(int, at_least=1, at_most=16), 8, "bits of each code", also=["--n_bits"])
    _processes(parser, batch_size=64)
    return parser


# ----------------------------------------------------------------------------------------------
# Tools


def evaluation_parser() -> _Parser:
    description = "Recall@k of data files with passages; exact match of files with answers."
    parser = _Parser(description, _check_evaluation, "FILE ... ", "-m src.tools.evaluate")
    add, _ = parser.group("data")
    add("files", "FILE", None, "data files with ctxs, TREC runs, or final_output.txt", nargs="+")
    add("--data", "FILE", None, "the questions that were answered, with their gold answers")
    add("--regex_answers", bool, False, _REGEX)
    add("--qrels", "FILE", None, "judge by relevant passages, from TREC's qrels or BEIR's TSV")
    parser.group("measures")
    add("--k LIST", _count_list, "1,5,20,100", "numbers of passages for recall, such as 1,5,20,50")
    add("--compare", bool, False, "of two files: differences, 95 % intervals, p (bootstrap)")
    parser.group("answers")
    add("--also", ["contained", "rouge_l", "calibration"], [],
        "more columns: an answer's words contained; ROUGE-L; calibration error", nargs="+")
    add("--by", ["type", "length", "overlap"], [],
        "a row for each question word, answer length, overlap with --train_data", nargs="+")
    add("--train_data", "FILE", None, "the questions that the reader was trained on")
    return parser


def fusion_parser() -> _Parser:
    description = "Fuse the passages that several systems found into one ranking."
    parser = _Parser(description, _check_fusion, "FILE FILE ... -o FILE ", "-m src.tools.fuse")
    add, _ = parser.group("data")
    add("files", "FILE", None, "data files with ctxs, or TREC runs", nargs="+")
    add("-o --output", "FILE", None, "the result: .json or .jsonl, else a TREC run", required=True)
    parser.group("fusion")
    add("--method", ["rrf", "sum"], "rrf", "reciprocal ranks, or scores scaled to 0 ... 1")
    add("--weights", number(float, at_least=0), None, "one for each file; none: 1", nargs="+")
    add("--rrf_k", COUNT_OR_ZERO, 60, "added to each rank")
    add("--n-docs", COUNT, 100, "passages for each question", also=["--n_docs"])
    return parser


def splitting_parser() -> _Parser:
    description = "Split documents into passages: a collection to search."
    program = "-m src.tools.split_documents"
    parser = _Parser(description, _check_splitting, "FILE ... -o FILE ", program)
    add, _ = parser.group("data")
    add("files", "FILE", None, "documents (.txt, .md, .json, .jsonl, .gz) or folders", nargs="+")
    add("-o --output", "FILE", None, "the collection to write: .tsv or .jsonl", required=True)
    add("--text_field", "NAME", None, "JSON's text; none: text, contents, body, ...")
    add("--title_field", "NAME", None, "JSON's title; none: title, page_title, ...")
    add("--id_field", "NAME", None, "JSON's id; none: id, _id, docid, ...")
    parser.group("passages")
    add("--words", COUNT, 100, "most words of a passage")
    add("--overlap", COUNT_OR_ZERO, 0, "words that a passage shares with the one before")
    add("--sentences", bool, False, "end passages at ends of sentences where possible")
    add("--workers", COUNT, None, "processes; none: one for each CPU, if there is enough to do")
    return parser


def targets_parser() -> _Parser:
    description = "Recall by each target in scored data, and how targets agree."
    parser = _Parser(description, None, "FILE ... ", "-m src.tools.targets")
    add, _ = parser.group("data")
    add("files", "FILE", None, "dataset_wscores.json written with --targets", nargs="+")
    return parser


def report_parser() -> _Parser:
    description = "Show a run as a page for a browser: curves, recall, questions and passages."
    parser = _Parser(description, None, "RUN ", "-m src.tools.report")
    add, _ = parser.group("data")
    add("run", "RUN", None, "folder of a training or test run, or of both; or a retrieved file")
    add("--data", "FILE", None, "the questions; none: dataset_wscores.json, or else --eval_data")
    add("--retrieved", "FILE", [], "files with retrieved passages to compare", nargs="+")
    add("--against", "FOLDER", None, "another run on the same questions: which answers flipped")
    parser.group("page")
    add("-o --output", "FILE", None, "the page to write; none: report.html in the run's folder")
    add("--max_questions", COUNT, 500, "most questions on the page; figures cover all questions")
    add("--passages_shown", COUNT, 10, "passages shown per question, besides its first hit")
    return parser


def preprocess_parser() -> _Parser:
    description = "Make data files from what get-data.sh has downloaded."
    parser = _Parser(description, None, "FOLDER ", "-m src.tools.preprocess")
    add, _ = parser.group("data")
    add("folder", "FOLDER", None, "get-data.sh's folder with download/ and psgs_w100.tsv")
    add("--only", ["nq", "tqa"], None, "one dataset; none: both")
    return parser


def ask_parser() -> _Parser:
    parser = test_reader_parser()
    parser.prog = "-m src.tools.ask"
    return parser


def plan_parser() -> _Parser:
    description = "What NaturalQuestions takes on some GPUs, as a table. (For one command: --plan.)"
    parser = _Parser(description, None, "", "-m src.tools.plan")
    add, _ = parser.group("devices")
    add("device", "GPU[:N]", "H100-80GB:8", "N of a kind, or GB,TFLOPs[:N]", nargs="?")
    return parser
# fmt: on


# ----------------------------------------------------------------------------------------------
# Rules about several options


def _error_if_given(parser: _Parser, options: argparse.Namespace, names: str, message: str) -> None:
    given = [word for word in changed(parser, vars(options), names.split()) if word[:2] == "--"]
    if given:
        parser.error(message.format(", ".join(given)))


def _check_fresh_weights(parser: _Parser, options: argparse.Namespace) -> None:
    if options.model_config != "none":
        start = f"--model_config {options.model_config} starts from fresh weights: leave out {{}}"
        _error_if_given(parser, options, "model_path legacy_position_table", start)


def _check_train_retriever(parser: _Parser, options: argparse.Namespace) -> None:
    _check_fresh_weights(parser, options)
    loss = options.loss
    if options.negatives is not None:
        n = options.negatives + 1  # with the positive
        message = f"--negatives {options.negatives} makes {n} passages a question: leave out {{}}"
        if options.n_context != n:
            _error_if_given(parser, options, "n_context", message)
        options.n_context = n
    if options.in_batch_negatives and loss not in ("kl", "contrastive"):
        parser.error(f"--loss {loss} has no in-batch negatives: leave out --in_batch_negatives")
    if loss == "contrastive" and options.target not in (None, "has_answer"):
        parser.error("--loss contrastive learns from has_answer: leave out --target")
    unused = {"temperature": ("mse", "margin"), "margin": [n for n in LOSSES if n != "margin"]}
    unused["target_temperature"] = [name for name in LOSSES if name != "kl"]
    unused["negatives"] = [name for name in LOSSES if name != "contrastive"]
    for name, losses in unused.items():
        if loss in losses:
            _error_if_given(parser, options, name, f"--loss {loss} does not use {{}}: leave it out")
    kind, _, k = options.best_by.partition("@")
    if kind == "recall" and int(k) >= options.n_context:
        parser.error(
            f"--best_by {options.best_by} needs more than {k} passages to choose from, not "
            f"--n_context {options.n_context}"
        )
    if options.extract_cls and options.pooling not in (None, "cls"):
        parser.error(f"--extract_cls and --pooling {options.pooling}: give one of them")


def _check_prefixes(parser: _Parser, options: argparse.Namespace) -> None:
    if options.plain_text:
        both = "--plain_text embeds without prefixes: leave out it or {}"
        _error_if_given(parser, options, "question_prefix passage_prefix", both)


def _check_passage_embeddings(parser: _Parser, options: argparse.Namespace) -> None:
    shard, n = options.shard_id, options.num_shards
    if shard >= n:
        parser.error(f"--shard_id {shard} of --num_shards {n}: shards count from 0 to {n - 1}")
    if options.model_path == "none":
        parser.error("--model_path is missing: give the folder of a retriever")
    _check_prefixes(parser, options)


def _check_passage_retrieval(parser: _Parser, options: argparse.Namespace) -> None:
    n, factory = options.n_subquantizers, options.index_factory
    if factory and n:
        both = f"--index_factory {factory} and --n-subquantizers {n}: give one"
        parser.error(f"{both}; the second is the same as --index_factory PQ{n}x{options.n_bits}")
    _check_search(parser, options, "--model_path")


def _check_search(parser: _Parser, options: argparse.Namespace, model: str) -> None:
    """Refuse options that do not name exactly one way to search, and all it needs."""
    if getattr(options, "from_trec", "none") != "none":
        names = "bm25 model_path passages_embeddings index_factory n_subquantizers"
        _error_if_given(parser, options, names, "--from_trec searches nothing: leave out {}")
        return
    if options.bm25 == (getattr(options, model.removeprefix("--")) != "none"):
        parser.error(f"give either {model} and --passages_embeddings, or --bm25")
    if not options.bm25 and options.passages_embeddings == "none":
        parser.error('--passages_embeddings is missing, for example "wikipedia_embeddings/*"')
    if options.bm25:
        names = " ".join(("passages_embeddings index_factory n_subquantizers", *ENCODING[1:]))
        unused = "--bm25 uses neither embeddings nor an index of them: leave out {}"
        _error_if_given(parser, options, names, unused)
        return
    _check_prefixes(parser, options)
    names = " ".join(field.name for field in dataclasses.fields(BM25Options))
    _error_if_given(parser, options, names, "{}: for BM25; add --bm25, or leave this out")


def _check_evaluation(parser: _Parser, options: argparse.Namespace) -> None:
    if options.compare and len(set(options.files)) != 2:
        parser.error(f"--compare needs two files, not {len(set(options.files))}")


def _check_fusion(parser: _Parser, options: argparse.Namespace) -> None:
    n, weights = len(options.files), options.weights
    if n < 2:
        parser.error("give at least two files to fuse")
    if weights and (len(weights) != n or not any(weights)):
        parser.error(f"--weights must be {n} numbers, one for each file, and not all 0")


def _check_splitting(parser: _Parser, options: argparse.Namespace) -> None:
    if options.overlap >= options.words:
        parser.error(f"--overlap {options.overlap} must be less than --words {options.words}")
    if not options.output.endswith((".tsv", ".jsonl")):
        parser.error(f"-o {options.output}: its name must end in .tsv or .jsonl")


def _check_test_reader(parser: _Parser, options: argparse.Namespace) -> None:
    """Refuse options of a conversation in a test, and the other way round."""
    if options.token_log_probs and "perplexity" not in options.targets.split(","):
        parser.error("--token_log_probs: add perplexity to --targets")
    if not options.write_crossattention_scores:
        names = "targets target_sum score_own_answer token_log_probs attribution"
        _error_if_given(parser, options, names, "{}: add --write_crossattention_scores")
    if options.n_best > options.num_beams:
        beams = f"--num_beams {options.num_beams}"
        parser.error(f"--n_best {options.n_best} needs as many beams, not {beams}")
    if max(select(GenerationOptions, options).contexts, default=0) > options.n_context:
        curve = f"--n_context_curve {options.n_context_curve}"
        parser.error(f"{curve} goes beyond --n_context {options.n_context}; raise that")
    ways = {"--interactive": options.interactive, "--question": options.question is not None}
    ways["--serve"] = options.serve
    asked = [name for name, is_given in ways.items() if is_given]
    if not options.serve:
        _error_if_given(parser, options, "host port", "{}: for a web page; add --serve")
    if not asked:
        needed = "{}: for a conversation; add --interactive, or --question TEXT"
        _error_if_given(parser, options, " ".join(parser.names[_CONVERSATION]), needed)
        return
    if len(asked) > 1:
        parser.error(f"{' and '.join(asked)}: give one of them")
    if options.question is not None and not options.question.strip():
        parser.error("--question is empty: give its text")
    if options.passages == "none":
        parser.error("--passages is missing: the collection to find passages in")
    unused = "{}: for a file of questions; leave this out of a conversation"
    names = "eval_data write_results write_crossattention_scores n_best n_context_curve"
    names += " abstain_below shard"
    _error_if_given(parser, options, names, unused)
    _check_search(parser, options, "--retriever_path")
