"""How answers are judged: exact match, F1, and whether a passage contains an answer.

No torch here, so that data can be evaluated anywhere in a moment.
"""

import functools
import itertools
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import regex

from src.data.examples import Examples, read_example
from src.runtime.errors import InputError, shorten

_ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.UNICODE)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# DPR's tokenizer: a run of letters, digits and combining marks, or one other visible character.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_TOKEN_BEFORE = regex.compile(_TOKEN.pattern, regex.REVERSE)  # finds the last one first
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]")
# What test_reader.py writes into a run's folder.
ANSWERS, SCORES = "final_output.txt", "dataset_wscores.json"


def normalize_answer(text: str) -> str:
    """Lower-case, without ASCII punctuation, articles (a, an, the) and extra white space.

    Source: the SQuAD evaluation (Rajpurkar et al., 2016), as the reference uses it.
    """
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised answers."""
    predicted = normalize_answer(prediction)
    return any(normalize_answer(answer) == predicted for answer in answers)


def _token_f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:  # SQuAD 2.0: nothing agrees with nothing only
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 between the prediction and one of the answers, in [0, 1].

    Tokens are the words of `normalize_answer`, counted with repetition (Rajpurkar et al., 2016).
    """
    predicted = normalize_answer(prediction).split()
    scores = (_token_f1(predicted, normalize_answer(answer).split()) for answer in answers)
    return max(scores, default=0.0)


def judge(prediction: str, answers: Sequence[str]) -> tuple[bool, float]:
    """Exact match and F1 of an answer."""
    return exact_match(prediction, answers), f1(prediction, answers)


def tokenize(text: str) -> list[str]:
    """The lower-cased tokens that `has_answer` compares, after NFD normalisation."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


class _Answer(NamedTuple):
    """An answer as it is looked for: its tokens; the same with the longest first, which are in the
    fewest texts; those of them that are ASCII words; and where the longest stands in `tokens`."""

    tokens: list[str]
    longest_first: list[str]
    plain: list[str]
    place: int


@functools.lru_cache(maxsize=1 << 12)  # the same answers are looked for in many passages
def _prepared(answers: tuple[str, ...]) -> list[_Answer]:
    prepared = []
    for tokens in map(tokenize, answers):
        longest_first = sorted(tokens, key=len, reverse=True)
        plain = [token for token in longest_first if token.isascii() and _is_word(token)]
        place = tokens.index(longest_first[0]) if tokens else 0
        prepared.append(_Answer(tokens, longest_first, plain, place))
    return prepared


def _is_word(text: str) -> bool:
    return text.isalnum() or _WORD.match(text) is not None  # the first is faster


def has_answer(answers: Sequence[str], text: str) -> bool:
    """Whether one of the answers stands in the text as a run of whole tokens (see `tokenize`).

    An answer without any token (empty, or only spaces) is in every text, as the reference has it.
    Source: answer recall in DPR (Karpukhin et al., 2020, section 4).

    Most answers are not in most texts, and a search for their words as plain strings tells; the
    text is never cut into tokens as a whole. It need not even be normalised (NFD) for ASCII words:
    what is a whole word of ASCII letters and digits afterwards was so before. But what a capital
    sigma is in lower case depends on where in a word it stands, and so on how the text is cut.
    """
    lowered, is_normal = text.lower(), text.isascii()
    for answer in _prepared(tuple(answers)):
        _, longest_first, plain, _ = answer
        for token in longest_first if is_normal else plain:
            if token not in lowered:
                break
        else:
            if not is_normal:
                normal, is_normal = unicodedata.normalize("NFD", text), True
                if "\N{GREEK CAPITAL LETTER SIGMA}" in normal:
                    return _has_answer_by_tokens(answers, normal)
                lowered = normal.lower()
            if not answer.tokens or _stands_in(answer, lowered):
                return True
    return False


def _stands_in(answer: _Answer, lowered: str) -> bool:
    """Whether the answer's tokens are a run of those of a text in lower case. Only where its
    longest one stands, with no letter, digit or mark beside a word, is the text cut into tokens:
    into as many before and after it as the answer has."""
    tokens, place = answer.tokens, answer.place
    longest = tokens[place]
    start = lowered.find(longest)
    while start >= 0:
        end = start + len(longest)
        inside = (start > 0 and _is_word(lowered[start - 1])) or _is_word(lowered[end : end + 1])
        if not (inside and _is_word(longest)):
            before = itertools.islice(_TOKEN_BEFORE.finditer(lowered, 0, start), place)
            after = itertools.islice(_TOKEN.finditer(lowered, end), len(tokens) - place - 1)
            run = [*[match[0] for match in before][::-1], longest, *[match[0] for match in after]]
            if run == tokens:
                return True
        start = lowered.find(longest, start + 1)
    return False


def _has_answer_by_tokens(answers: Sequence[str], text: str) -> bool:
    """`has_answer` as the rule says it."""
    tokens = tokenize(text)
    for answer in map(tokenize, answers):
        width = len(answer)
        for start in range(len(tokens) - width + 1):
            if tokens[start : start + width] == answer:
                return True
    return False


def find_answers(answers: Sequence[str], texts: Iterable[str]) -> Iterator[bool]:
    """Which texts contain an answer; none does when there are no answers."""
    return (bool(answers) and has_answer(answers, text) for text in texts)


def answer_spans(answers: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where in the text `has_answer` finds answers: [start, end) in characters of the text as it
    stands, in order, those that touch or overlap as one.

    There are some exactly when `has_answer` says yes, but for answers without any token: these are
    in every text, and nowhere. A character that is only partly in a match (the "=" that NFD finds
    in "≠") is taken in whole.
    """
    normal, places = _normalize_with_places(text)
    found = list(_TOKEN.finditer(normal))
    tokens = [token.group().lower() for token in found]
    spans = []
    for answer in filter(None, map(tokenize, answers)):
        for first in range(len(tokens) - len(answer) + 1):
            last = first + len(answer) - 1
            if tokens[first : last + 1] == answer:
                spans.append((places[found[first].start()][0], places[found[last].end() - 1][1]))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _normalize_with_places(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text in NFD, and for each of its characters the piece of the text that it came from.

    A piece is a character with the combining marks after it: NFD reorders these, and nothing else.
    """
    starts = [
        place
        for place, character in enumerate(text)
        if place == 0 or not unicodedata.combining(unicodedata.normalize("NFD", character)[0])
    ]
    normal, places = [], []
    for start, end in itertools.pairwise([*starts, len(text)]):
        piece = unicodedata.normalize("NFD", text[start:end])
        normal.append(piece)
        places += [(start, end)] * len(piece)
    return "".join(normal), places


def read_answers(path: str, data: Examples) -> list[str]:
    """The answers in a file with a line `id<TAB>answer` for each example of the data, in its order.
    Errors: `InputError` when the two do not belong together."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")[:-1]
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


def measure_answers(path: str, data: Examples) -> dict[str, float]:
    """Exact match and F1, in percent, of a file of answers (see `read_answers`) over the questions
    with right answers. Errors: `InputError` also when there are none."""
    judged = []
    for index, answer in enumerate(read_answers(path, data)):
        example = read_example(data, index)
        if example.answers:
            judged.append(judge(answer, example.answers))
    if not judged:
        raise InputError(
            f"{data.path}: no question in this file has answers; give --data that has some"
        )
    match, overlap = (100 * sum(values) / len(judged) for values in zip(*judged, strict=True))
    return {"questions": len(judged), "exact match": match, "F1": overlap}
