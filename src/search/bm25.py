"""BM25 search with the library bm25s: needs no model, and finds a reader's first passages."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import bm25s
import numpy as np

from src.data.passages import Passages
from src.runtime.errors import InputError
from src.search import saved_index
from src.search.exact import Found

_K1, _B = 0.9, 0.4  # as is usual for Wikipedia's passages of 100 words (Anserini, DPR)
_FILES = {"vocab.index.json", "params.index.json"} | {
    f"{name}.csc.index.npy" for name in ("data", "indices", "indptr")
}


class BM25:
    """Passages scored by the words they share with a question; titles count as text."""

    def __init__(self, index: bm25s.BM25, passages: Passages):
        self._index, self._passages = index, passages

    @classmethod
    def load_or_build(
        cls,
        passages: Passages,
        folder: Path | None,
        log: logging.Logger,
        show_progress: bool = False,
    ) -> "BM25":
        """Open the index in a folder, or build it and save it there.

        Args: see `saved_index.load_or_build`; show_progress: bars while building.
        Errors: `InputError` when no passage has a word, or the folder cannot be written.
        """

        def load() -> BM25 | None:
            description = saved_index.read_description(folder)
            if description and description.get("passages") == passages.fingerprint():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    return cls(bm25s.BM25.load(folder, mmap=True), passages)
            return None

        def build() -> BM25:
            log.info("building the BM25 index of %d passages", len(passages))
            words = _words(_Texts(passages), show_progress=show_progress)
            if not words.vocab:
                raise InputError(
                    f"{passages.path}: no passage has a word of two letters, so BM25 can find "
                    "none; check that the file is a collection"
                )
            index = bm25s.BM25(k1=_K1, b=_B)
            index.index(words, show_progress=show_progress)
            return cls(index, passages)

        return saved_index.load_or_build(folder, _FILES, load, build, log)

    def save(self, folder: Path) -> None:
        made_from = {"passages": self._passages.fingerprint()}
        write = lambda partial: self._index.save(partial, show_progress=False)  # noqa: E731
        saved_index.save_index(folder, made_from, write)

    def search(
        self, questions: list[str], k: int, on_questions: Callable[[int], object] = lambda n: None
    ) -> Found:
        """The k best passages for each question, among those that share a word with it.

        Args: on_questions: called with the number of questions just answered.
        """
        found = Found.empty(len(questions), min(k, len(self._passages)))
        for row, words in enumerate(_words(questions, return_ids=False, show_progress=False)):
            scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
            positions = np.flatnonzero(scores)  # a shared word always adds something (Lucene's idf)
            scores = scores[positions]
            if len(positions) > k:  # sorting all would take longer than finding the best
                last = np.partition(scores, len(scores) - k)[len(scores) - k]
                better, tied = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
                best = np.concatenate([better, tied[: k - len(better)]])
                scores, positions = scores[best], positions[best]
            order = np.lexsort((positions, -scores))
            found.scores[row, : len(order)] = scores[order]
            found.positions[row, : len(order)] = positions[order]
            on_questions(1)
        return found


class _Texts(Sequence[str]):
    """The texts of passages, each read when it is needed."""

    def __init__(self, passages: Passages):
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, index: int) -> str:
        passage = self._passages[index]
        return f"{passage.title} {passage.text}"


def _words(texts: Sequence[str], **options: bool) -> "bm25s.tokenization.Tokenized | list":
    return bm25s.tokenize(texts, stopwords=None, **options)
