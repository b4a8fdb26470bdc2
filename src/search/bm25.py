"""BM25, the search by words that finds the first passages for a reader; by the library bm25s."""

import logging
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np

from src.data.files import atomic_folder, claim_unless_made, writing
from src.data.passages import Passages
from src.runtime.errors import InputError, first_line
from src.search.exact import Found

_K1, _B = 0.9, 0.4  # as is usual for Wikipedia's passages of 100 words (Anserini, DPR)
_FINGERPRINT = "collection.txt"


class BM25:
    """Passages scored by the words that they share with a question; titles count as text."""

    def __init__(self, index: bm25s.BM25, n_passages: int, show_progress: bool = False):
        self._index = index
        self._n_passages = n_passages
        self._show_progress = show_progress

    @classmethod
    def load_or_build(
        cls,
        passages: Passages,
        folder: Path | None,
        log: logging.Logger,
        show_progress: bool = False,
    ) -> "BM25":
        """Open the index in a folder, or build it and save it there.

        Args:
            folder: None builds an index that is not saved.
            show_progress: by the library's own bars, in building and in search for many questions.
        Errors: `InputError` when the folder holds another collection's index, or cannot be written.
        """
        if folder is not None and claim_unless_made(folder, "leave out --save_or_load_index"):
            return cls(cls._load(passages, folder, log), len(passages), show_progress)
        log.info("building the BM25 index of %d passages", len(passages))
        words = _words(_Texts(passages), show_progress)
        index = bm25s.BM25(k1=_K1, b=_B)
        index.index(words, show_progress=show_progress)
        if folder is not None:
            _save(index, passages, folder)
            log.info("saved %s", folder)
        return cls(index, len(passages), show_progress)

    @staticmethod
    def _load(passages: Passages, folder: Path, log: logging.Logger) -> bm25s.BM25:
        try:
            made_from = (folder / _FINGERPRINT).read_text()
            index = bm25s.BM25.load(folder, mmap=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder}: not a complete BM25 index ({first_line(error)}); remove it to build it "
                "again"
            ) from None
        if made_from != passages.fingerprint():
            raise InputError(
                f"{folder}: a BM25 index of other passages than {passages.path}; remove it to "
                "build it again"
            )
        log.info("loaded %s", folder)
        return index

    def search(self, questions: list[str], k: int) -> Found:
        """The k best passages of each question: scores and positions [q, k], best first."""
        k = min(k, self._n_passages)
        words = _words(questions, False, return_ids=False)
        shown = self._show_progress and len(questions) > 1
        positions, scores = self._index.retrieve(words, k=k, show_progress=shown)
        # Equal scores in the collection's order, whatever the library's own is.
        order = np.lexsort((positions, -scores), axis=-1)
        return Found(
            np.take_along_axis(scores, order, axis=1),
            np.take_along_axis(positions, order, axis=1).astype(np.int64),
        )


class _Texts(Sequence[str]):
    """The texts of passages, each made when it is asked for."""

    def __init__(self, passages: Passages):
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, index: int) -> str:
        passage = self._passages[index]
        return f"{passage.title} {passage.text}"


def _words(
    texts: Sequence[str], show_progress: bool, return_ids: bool = True
) -> "bm25s.tokenization.Tokenized | list":
    return bm25s.tokenize(texts, stopwords=None, return_ids=return_ids, show_progress=show_progress)


def _save(index: bm25s.BM25, passages: Passages, folder: Path) -> None:
    """Write the index into a folder, atomically."""
    remedy = "make room, or leave out --save_or_load_index"
    with writing(folder, remedy), atomic_folder(folder) as partial:
        index.save(partial, show_progress=False)
        (partial / _FINGERPRINT).write_text(passages.fingerprint())
