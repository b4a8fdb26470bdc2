"""How answers are judged: exact match, F1, and whether a passage contains an answer.

Nothing here imports torch, so that data can be evaluated quickly anywhere.
"""

import functools
import itertools
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import regex

from src.data.examples import Examples, read_example
from src.data.files import read_text
from src.data.formats import Pattern
from src.runtime.errors import InputError, shorten

_ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.UNICODE)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# DPR's tokenizer: a run of letters, digits and combining marks, or one other visible character.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
# What test_reader.py writes into a run's folder.
ANSWERS, SCORES = "final_output.txt", "dataset_wscores.json"
Value = TypeVar("Value")


def normalize_answer(text: str) -> str:
    """Lower-case, without ASCII punctuation, articles (a, an, the) and extra whitespace.

    Source: the SQuAD evaluation (Rajpurkar et al., 2016), as the reference uses it.
    """
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised answers. (A `Pattern` must
    match the prediction as it is, from its start.)"""
    predicted = normalize_answer(prediction)
    return any(
        answer.finds(prediction, from_start=True)
        if isinstance(answer, Pattern)
        else normalize_answer(answer) == predicted
        for answer in answers
    )


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 between the prediction and one of the answers, in [0, 1].

    Tokens are the words of `normalize_answer`, counted with repetition (Rajpurkar et al., 2016).
    """
    predicted, best = normalize_answer(prediction).split(), 0.0
    for answer in answers:
        right = normalize_answer(answer).split()
        common = sum((Counter(predicted) & Counter(right)).values())
        total = len(predicted) + len(right)
        best = max(best, 2 * common / total if total else 1.0)  # SQuAD 2.0: nothing is nothing
    return best


def judge(prediction: str, answers: Sequence[str]) -> tuple[bool, float]:
    """Exact match and F1 of an answer; for patterns, F1 is exact match."""
    is_right = exact_match(prediction, answers)
    if any(isinstance(answer, Pattern) for answer in answers):
        return is_right, float(is_right)
    return is_right, f1(prediction, answers)


def contains_answer(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction holds the words of an answer in a row, both normalised: how answers
    of sentences are judged. An answer without words is held only by a prediction without any."""
    words = normalize_answer(prediction)
    normal = map(normalize_answer, answers)
    return any(f" {answer} " in f" {words} " if answer else not words for answer in normal)


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE-L needs the library rouge-score: pip install rouge-score") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """The best ROUGE-L F-measure between the prediction and one of the answers, in [0, 1], of
    stemmed words (Lin, 2004; Google's implementation). Needs the library rouge-score."""
    scored = (_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure for answer in answers)
    return max(scored, default=0.0)


def tokenize(text: str) -> list[str]:
    """The lower-cased tokens that `has_answer` compares, after NFD normalisation."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


@functools.lru_cache(maxsize=1 << 12)  # the same answers are looked for in many passages
def _tokenize_all(answers: tuple[str, ...]) -> list[list[str]]:
    return list(map(tokenize, answers))


def has_answer(answers: Sequence[str], text: str) -> bool:
    """Whether one of the answers is in the text as a run of whole tokens (see `tokenize`).

    An answer without any token (empty, or only spaces) is in every text, as in the reference. A
    `Pattern` is searched for in the text as it is.
    Source: answer recall in DPR (Karpukhin et al., 2020, section 4).
    """
    if any(isinstance(answer, Pattern) for answer in answers):
        return any(answer.finds(text) for answer in answers)
    lowered, words = unicodedata.normalize("NFD", text).lower(), ""
    for tokens in _tokenize_all(tuple(answers)):
        # Tokenizing is slow, and few texts have all tokens of an answer. (The lower case of Σ
        # depends on what is beside it.)
        if all(map(lowered.__contains__, tokens)) or "Σ" in text:
            words = words or f" {' '.join(tokenize(text))} "
            if not tokens or f" {' '.join(tokens)} " in words:
                return True
    return False


def find_answers(answers: Sequence[str], texts: Iterable[str]) -> Iterator[bool]:
    """Which texts contain an answer; none does when there are no answers."""
    return (bool(answers) and has_answer(answers, text) for text in texts)


def answer_spans(answers: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where `has_answer` finds answers: [start, end) in characters of the text, in order, merged
    where they touch or overlap. Answers without any token are not marked.

    A character that is only partly in a match (the "=" in the NFD form of "≠") is included.
    """
    nfd = functools.partial(unicodedata.normalize, "NFD")
    # NFD reorders only combining marks: each piece is a character with those after it.
    starts = {0, *(i for i, c in enumerate(text) if not unicodedata.combining(nfd(c)[0]))}
    pieces = [(nfd(text[a:b]), (a, b)) for a, b in itertools.pairwise([*sorted(starts), len(text)])]
    sources = [span for piece, span in pieces for _ in piece]
    found = list(_TOKEN.finditer("".join(piece for piece, _ in pieces)))
    tokens = [token.group().lower() for token in found]
    marked = np.zeros(len(text), bool)
    for answer in filter(None, map(tokenize, answers)):
        for first in range(len(tokens) - len(answer) + 1):
            if tokens[first : first + len(answer)] == answer:
                last = found[first + len(answer) - 1]
                marked[sources[found[first].start()][0] : sources[last.end() - 1][1]] = True
    edges = np.flatnonzero(np.diff(marked, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def read_aligned(
    path: str | Path, data: Examples, parse: Callable[[str], tuple[object, Value]], shape: str
) -> list[Value]:
    """The values in a file with a line for each example of the data, in its order.

    Args: parse: a line's id and value; shape: what a line has, for errors.
    Errors: `InputError` when the two do not belong together.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    remedy = "give the --data that was answered"
    if len(lines) != len(data):
        lengths = f"{len(lines)} lines of answers to the {len(data)} questions"
        raise InputError(f"{path}: {lengths} of {data.path}; {remedy}, and the complete file")
    values = []
    for index, line in enumerate(lines):
        expected = " ".join(read_example(data, index).id.split())
        try:
            identity, value = parse(line)
            if " ".join(str(identity).split()) != expected:
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            wanted = f"must be the answer to question {expected} of {data.path}, {shape}"
            problem = f"{wanted}, not {shorten(line, 60)}; {remedy}"
            raise InputError(f"{path}, line {index + 1}: {problem}") from None
        values.append(value)
    return values


def read_answers(path: str | Path, data: Examples) -> list[str]:
    """The answers in a file of lines `id<TAB>answer`. Errors: those of `read_aligned`."""
    return read_aligned(path, data, lambda line: line.split("\t", 1), "as id, tab, answer")


METRICS = {"contained": contains_answer, "rouge_l": rouge_l}  # besides exact match and F1


def judge_answers(
    path: str, data: Examples, more: Iterable[str] = ()
) -> tuple[list[int], dict[str, list[float]]]:
    """The indices of the examples that have gold answers, and the exact match, F1 and further
    `METRICS` of a file's answers to them, in [0, 1]. Errors: those of `read_answers`, and
    `InputError` when there are none."""
    indices, rows = [], []
    for index, answer in enumerate(read_answers(path, data)):
        if gold := read_example(data, index).answers:
            indices.append(index)
            rows.append([*judge(answer, gold), *(METRICS[name](answer, gold) for name in more)])
    if not indices:
        problem = "no question in this file has answers; give --data that has some"
        raise InputError(f"{data.path}: {problem}")
    columns = map(list, zip(*rows, strict=True))
    return indices, dict(zip(("exact match", "F1", *more), columns, strict=True))


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The number of questions, and the means of their values in percent."""
    n = len(next(iter(values.values()), ()))
    return {"questions": n} | {name: 100 * float(np.mean(v)) for name, v in values.items()}


def measure_answers(path: str, data: Examples) -> dict[str, float]:
    """The means of `judge_answers`."""
    return means(judge_answers(path, data)[1])
