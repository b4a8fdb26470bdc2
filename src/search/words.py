"""How BM25 splits text into words, the same way for passages and questions.

Texts are compared in Unicode's NFKC form, in lower case (case folding). A word is a run of letters,
digits, combining marks and underscores. Scripts without spaces between words (Chinese, Japanese,
Thai) and Korean are split into overlapping pairs of characters, as Lucene's CJKAnalyzer does.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator

import bm25s.stopwords
import regex

from src.options import BM25Options
from src.runtime.errors import InputError

_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}_]+")
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_HAS_SPACELESS = regex.compile(rf"[{_SPACELESS}]")
_PIECE = regex.compile(rf"(?:[{_SPACELESS}]\p{{M}}*)+|(?:[^{_SPACELESS}])+")
_CHARACTER = regex.compile(r"\P{M}\p{M}*|\p{M}+")  # with the marks that belong to it
# Invisible characters inside words: soft hyphen, joiners (Persian, Hindi), byte order mark.
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])


def split_words(text: str) -> list[str]:
    """The words of a text, normalised, in order."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    folded = unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold()
    words = _WORD.findall(unicodedata.normalize("NFKC", folded))
    if _HAS_SPACELESS.search(folded):
        return list(itertools.chain.from_iterable(map(_bigrams, words)))
    return words


def _bigrams(word: str) -> Iterator[str]:
    for piece in _PIECE.findall(word):
        characters = _CHARACTER.findall(piece) if _HAS_SPACELESS.match(piece) else [piece]
        if len(characters) == 1:
            yield characters[0]
        yield from map("".join, itertools.pairwise(characters))


def open_stemmer(language: str) -> Callable[[str], str]:
    """A function that reduces a word to its stem (Snowball's stemmers), or leaves it ("none").

    Errors: `InputError` for another language, or without the package PyStemmer.
    """
    if language == "none":
        return str
    try:
        import Stemmer
    except ImportError:
        raise InputError(
            f"--bm25_stemmer {language} needs the package PyStemmer; pip install PyStemmer"
        ) from None
    _check_language("--bm25_stemmer", language, Stemmer.algorithms())
    return Stemmer.Stemmer(language).stemWord


def stop_words(language: str) -> frozenset[str]:
    """The words of a language that are left out: for English Lucene's 33, otherwise Snowball's."""
    prefix = "STOPWORDS_"
    lists = {
        name.removeprefix(prefix).lower(): words
        for name, words in vars(bm25s.stopwords).items()
        if name.startswith(prefix) and name != f"{prefix}EN_PLUS"
    }
    lists |= {"none": (), "english": lists.pop("en")}
    _check_language("--bm25_stop_words", language, lists)
    return frozenset(itertools.chain.from_iterable(map(split_words, lists[language])))


def _check_language(option: str, language: str, known: object) -> None:
    if language not in known:
        shown = ", ".join(sorted({*known} - {"none"}))
        raise InputError(f"{option} {language}: must be none or one of {shown}")


class Words(dict):
    """What texts are compared by: their words without stop words, reduced to stems if so wanted.
    As a dict: what each word met so far counts as, None for a stop word."""

    def __init__(self, options: BM25Options):
        self._stem = open_stemmer(options.bm25_stemmer)
        self._stop_words = stop_words(options.bm25_stop_words)

    def __missing__(self, word: str) -> str | None:
        self[word] = None if word in self._stop_words else self._stem(word)
        return self[word]

    def __call__(self, text: str) -> list[str]:
        return list(filter(None, map(self.__getitem__, split_words(text))))
