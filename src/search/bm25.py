"""BM25, which needs no model and finds the first passages for a reader; by the library bm25s."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import bm25s
import numpy as np

from src.data.outputs import atomic_folder, load_or_claim, writing
from src.data.passages import Passages
from src.runtime.errors import InputError
from src.search.exact import Found
from src.search.shards import checksum

_K1, _B = 0.9, 0.4  # as is usual for Wikipedia's passages of 100 words (Anserini, DPR)
_FINGERPRINT = "collection.txt"  # of the collection, then a checksum of each other file
_FILES = {_FINGERPRINT, "vocab.index.json", "params.index.json"} | {
    f"{name}.csc.index.npy" for name in ("data", "indices", "indptr")
}


class BM25:
    """Passages scored by the words that they share with a question; titles count as text."""

    def __init__(self, index: bm25s.BM25, n_passages: int):
        self._index, self._n_passages = index, n_passages

    @classmethod
    def load_or_build(
        cls,
        passages: Passages,
        folder: Path | None,
        log: logging.Logger,
        show_progress: bool = False,
    ) -> "BM25":
        """Open the index in a folder, or build it and save it there.

        An index of another collection, or one that is incomplete or altered, is built again. To
        notice that, all of it is read (about 1 GB a second).

        Args:
            folder: None builds an index that is not saved.
            show_progress: while building, by the library's own bars.
        Errors: `InputError` when no passage has a word, or the folder cannot be written.
        """
        if folder is not None:
            remedy = "leave out --save_or_load_index"
            index = load_or_claim(folder, lambda: _load(passages, folder), remedy)
            if index is not None:
                log.info("loaded %s", folder)
                return cls(index, len(passages))
            if folder.exists():
                what = "incomplete, altered or of another collection"
                log.info("%s is %s: building it again", folder, what)
        log.info("building the BM25 index of %d passages", len(passages))
        words = _words(_Texts(passages), show_progress)
        if not words.vocab:
            raise InputError(
                f"{passages.path}: no passage has a word of two letters, so BM25 can find none; "
                "check that the file is a collection"
            )
        index = bm25s.BM25(k1=_K1, b=_B)
        index.index(words, show_progress=show_progress)
        if folder is not None:
            _save(index, passages, folder)
            log.info("saved %s", folder)
        return cls(index, len(passages))

    def search(
        self, questions: list[str], k: int, on_questions: Callable[[int], object] = lambda n: None
    ) -> Found:
        """The k best passages of each question; only those that share a word with it.

        Args: on_questions: is told how many more questions have been answered.
        """
        found = Found.empty(len(questions), min(k, self._n_passages))
        for row, words in enumerate(_words(questions, return_ids=False)):
            scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
            positions = np.flatnonzero(scores)  # a shared word always adds something (Lucene's idf)
            scores = scores[positions]
            if len(positions) > k:  # sorting all would take longer than finding them
                last = np.partition(scores, len(scores) - k)[len(scores) - k]
                tied = np.flatnonzero(scores == last)[: k - int((scores > last).sum())]
                best = np.concatenate([np.flatnonzero(scores > last), tied])
                scores, positions = scores[best], positions[best]
            order = np.lexsort((positions, -scores))
            found.scores[row, : len(order)] = scores[order]
            found.positions[row, : len(order)] = positions[order]
            on_questions(1)
        return found


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
    texts: Sequence[str], show_progress: bool = False, return_ids: bool = True
) -> "bm25s.tokenization.Tokenized | list":
    return bm25s.tokenize(texts, stopwords=None, return_ids=return_ids, show_progress=show_progress)


def _fingerprint(passages: Passages, folder: Path) -> str:
    """A line for the collection, and one for each file of the index: checksum, size and name."""
    lines = [passages.fingerprint()]
    for name in sorted(_FILES - {_FINGERPRINT}):
        lines.append(f"{checksum(folder / name):08x} {(folder / name).stat().st_size} {name}")
    return "\n".join(lines) + "\n"


def _load(passages: Passages, folder: Path) -> bm25s.BM25 | None:
    """A saved index, or None if it is not a whole one of this collection. Errors: `InputError` when
    the folder holds anything else, which must not be replaced."""
    try:
        others = sorted({path.name for path in folder.iterdir()} - _FILES)
        if others:
            raise InputError(f"{folder}: not a BM25 index, it holds {others[0]}; remove it")
    except OSError as error:
        raise InputError(f"{folder}: not a BM25 index ({error.strerror}); remove it") from None
    with contextlib.suppress(OSError, ValueError, KeyError):
        if (folder / _FINGERPRINT).read_text() == _fingerprint(passages, folder):
            return bm25s.BM25.load(folder, mmap=True)
    return None


def _save(index: bm25s.BM25, passages: Passages, folder: Path) -> None:
    """Write the index into a folder, atomically."""
    remedy = "make room, or leave out --save_or_load_index"
    with writing(folder, remedy), atomic_folder(folder) as partial:
        index.save(partial, show_progress=False)
        (partial / _FINGERPRINT).write_text(_fingerprint(passages, partial))
