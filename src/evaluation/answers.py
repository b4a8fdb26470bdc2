"""How answers are judged: exact match, F1, and whether a passage contains an answer.

Nothing here imports torch, so that data can be evaluated quickly anywhere.
"""

import functools
import itertools
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import regex

from src.data.examples import Examples, read_example
from src.data.formats import Pattern
from src.runtime.errors import InputError, shorten

_ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.UNICODE)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# DPR's tokenizer: a run of letters, digits and combining marks, or one other visible character.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]")
# What test_reader.py writes into a run's folder.
ANSWERS, SCORES = "final_output.txt", "dataset_wscores.json"


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


def _token_f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:  # SQuAD 2.0: no tokens agree only with no tokens
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 between the prediction and one of the answers, in [0, 1].

    Tokens are the words of `normalize_answer`, counted with repetition (Rajpurkar et al., 2016).
    """
    predicted = normalize_answer(prediction).split()
    scores = (_token_f1(predicted, normalize_answer(answer).split()) for answer in answers)
    return max(scores, default=0.0)


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
def _tokenize_all(answers: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Each answer's longest token, which few texts contain, and all of its tokens."""
    return [(max(tokens, key=len, default=""), tokens) for tokens in map(tokenize, answers)]


def has_answer(answers: Sequence[str], text: str) -> bool:
    """Whether one of the answers is in the text as a run of whole tokens (see `tokenize`).

    An answer without any token (empty, or only spaces) is in every text, as in the reference. A
    `Pattern` is searched for in the text as it is.
    Source: answer recall in DPR (Karpukhin et al., 2020, section 4).
    """
    if any(isinstance(answer, Pattern) for answer in answers):
        return any(answer.finds(text) for answer in answers)
    if not text.isascii():
        text = unicodedata.normalize("NFD", text)
        if "Σ" in text:  # whose lower case depends on what is before and after it
            text = _TOKEN.sub(lambda token: token[0].lower(), text)
    text = text.lower()
    for longest, tokens in _tokenize_all(tuple(answers)):
        may_match = longest in text and all(token in text for token in tokens)
        if may_match and (not tokens or _has_run(tokens, text)):
            return True
    return False


def _is_word(text: str) -> bool:
    return text.isalnum() or _WORD.match(text) is not None  # the first is faster


def _has_run(tokens: list[str], text: str) -> bool:
    """Whether these are consecutive tokens of a text in lower case. To tokenize all of it would
    take ten times as long as to tokenize what follows each occurrence of the first one."""
    is_word, start = _is_word(tokens[0]), text.find(tokens[0])
    while start >= 0:
        if not (is_word and start and _is_word(text[start - 1])):
            found = itertools.islice(_TOKEN.finditer(text, start), len(tokens))
            if [token[0] for token in found] == tokens:
                return True
        start = text.find(tokens[0], start + 1)
    return False


def find_answers(answers: Sequence[str], texts: Iterable[str]) -> Iterator[bool]:
    """Which texts contain an answer; none does when there are no answers."""
    return (bool(answers) and has_answer(answers, text) for text in texts)


Task = tuple[list[str], list[str]]  # answers, and the texts that may contain them


def match(task: Task) -> tuple[bool, list[bool]]:
    """Whether there are answers, and which texts contain one. (For worker processes, which then
    need not import torch.)"""
    answers, texts = task
    return bool(answers), list(find_answers(answers, texts))


def answer_spans(answers: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where `has_answer` finds answers: [start, end) in characters of the text, in order, merged
    where they touch or overlap. Answers without any token are not marked.

    A character that is only partly in a match (the "=" in the NFD form of "≠") is included.
    """
    normal, sources = _normalize_with_sources(text)
    found = list(_TOKEN.finditer(normal))
    tokens = [token.group().lower() for token in found]
    spans = []
    for answer in filter(None, map(tokenize, answers)):
        for first in range(len(tokens) - len(answer) + 1):
            last = first + len(answer) - 1
            if tokens[first : last + 1] == answer:
                spans.append((sources[found[first].start()][0], sources[found[last].end() - 1][1]))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            start, before = joined.pop()
            end = max(end, before)
        joined.append((start, end))
    return joined


def _normalize_with_sources(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text in NFD, and for each of its characters the span of the text that it came from: a
    character with the combining marks after it, because NFD reorders only these."""
    starts = [
        index
        for index, character in enumerate(text)
        if index == 0 or not unicodedata.combining(unicodedata.normalize("NFD", character)[0])
    ]
    normal, sources = "", []
    for start, end in itertools.pairwise([*starts, len(text)]):
        piece = unicodedata.normalize("NFD", text[start:end])
        normal += piece
        sources += [(start, end)] * len(piece)
    return normal, sources


def read_answers(path: str, data: Examples) -> list[str]:
    """The answers in a file of lines `id<TAB>answer`, one for each example of the data, in its
    order. Errors: `InputError` when the two do not belong together."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8 text; re-encode the file"
        raise InputError(f"{path}: {problem}") from None
    if len(lines) != len(data):
        raise InputError(
            f"{path}: {len(lines)} lines of answers to the {len(data)} questions of {data.path}; "
            "give the --data that was answered, and the whole file"
        )
    answers = []
    for index, line in enumerate(lines):
        identity, tab, answer = line.partition("\t")
        expected = " ".join(read_example(data, index).id.split())
        if not tab or identity != expected:
            raise InputError(
                f"{path}, line {index + 1}: must be the answer to question {expected} of "
                f"{data.path}, as id, tab, answer, not {shorten(line, 40)}; give the --data that "
                "was answered"
            )
        answers.append(answer)
    return answers


def judge_answers(path: str, data: Examples) -> dict[str, list[float]]:
    """Exact match and F1, in [0, 1], of a file of answers (see `read_answers`) to each question
    that has gold answers. Errors: `InputError` also when there are none."""
    examples = [read_example(data, index) for index in range(len(data))]
    pairs = zip(read_answers(path, data), examples, strict=True)
    judged = [judge(answer, example.answers) for answer, example in pairs if example.answers]
    if not judged:
        raise InputError(
            f"{data.path}: no question in this file has answers; give --data that has some"
        )
    return dict(zip(("exact match", "F1"), map(list, zip(*judged, strict=True)), strict=True))


def measure_answers(path: str, data: Examples) -> dict[str, float]:
    """The means of `judge_answers` in percent, and the number of questions."""
    judged = judge_answers(path, data)
    means = {name: 100 * sum(values) / len(values) for name, values in judged.items()}
    return {"questions": len(judged["F1"]), **means}
