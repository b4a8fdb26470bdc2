"""BM25 search with the library bm25s: needs no model, and finds a reader's first passages."""

import contextlib
import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np

from src.data.passages import Passages
from src.options import BM25Options, select
from src.runtime.errors import InputError
from src.runtime.terminal import Bar, no_bar
from src.search import saved_index
from src.search.exact import Found
from src.search.words import Words

_PART = 1 << 13  # passages whose words are counted at a time
# How often terms occur in a part of the passages, by term, then by row: their numbers, rows in the
# part, and counts, [n] each.
_Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
_FILES = {"vocab.index.json", "params.index.json"} | {
    f"{name}.csc.index.npy" for name in ("data", "indices", "indptr")
}


class BM25:
    """Passages scored by the words they share with a question; titles count as text."""

    def __init__(self, index: bm25s.BM25, passages: Passages, options: BM25Options):
        self._index, self._passages, self._options = index, passages, options
        self._words = Words(options)

    @classmethod
    def load_or_build(
        cls,
        passages: Passages,
        folder: Path | None,
        log: logging.Logger,
        options: BM25Options = BM25Options(),  # noqa: B008 (it is frozen)
        bar: Bar = no_bar,
    ) -> "BM25":
        """Open the index in a folder, or build it and save it there.

        Args: see `saved_index.load_or_build`; an index with other options is built again.
        Errors: `InputError` when no passage has a word, the folder cannot be written, or a language
        is unknown.
        """
        made_from = _made_from(passages, options)

        def load() -> BM25 | None:
            description = saved_index.read_description(folder)
            if description and {name: description.get(name) for name in made_from} == made_from:
                with contextlib.suppress(OSError, ValueError, KeyError):
                    return cls(bm25s.BM25.load(folder, mmap=True), passages, options)
            return None

        def build() -> BM25:
            log.info("building the BM25 index of %d passages", len(passages))
            return cls(_build(passages, options, bar), passages, options)

        return saved_index.load_or_build(folder, _FILES, load, build, log)

    def save(self, folder: Path) -> None:
        write = lambda partial: self._index.save(partial, show_progress=False)  # noqa: E731
        saved_index.save_index(folder, _made_from(self._passages, self._options), write)

    def search(
        self, questions: list[str], k: int, on_questions: Callable[[int], object] = lambda n: None
    ) -> Found:
        """The k best passages for each question, among those that share a word with it.

        Args: on_questions: called with the number of questions just answered.
        """
        found = Found.empty(len(questions), min(k, len(self._passages)))
        for row, terms in enumerate(map(self._words, questions)):
            scores = self._index.get_scores_from_ids(self._index.get_tokens_ids(terms))
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


def _made_from(passages: Passages, options: BM25Options) -> dict[str, object]:
    words = 2  # changes with what `split_words` does
    given = vars(select(BM25Options, options))
    return {"passages": passages.fingerprint(), "words": words, **given}


# ----------------------------------------------------------------------------------------------
# Building the index. bm25s keeps every word of the collection as a Python object until the end;
# this takes a part of the passages at a time, and 16 bytes for each word of a passage.


def _build(passages: Passages, options: BM25Options, bar: Bar) -> bm25s.BM25:
    words, terms = Words(options), defaultdict(itertools.count().__next__)
    with bar(len(passages), "passage", "building the index") as shown:
        parts, lengths = deque(), []
        texts = (f"{passage.title} {passage.text}" for passage in passages)
        while part := list(itertools.islice(texts, _PART)):
            counted, length = _count(list(map(words, part)), terms)
            parts.append(counted)
            lengths.append(length)
            shown.update(len(part))
    if not terms:
        raise InputError(
            f"{passages.path}: no passage has a word, so BM25 can find none; check that the file "
            "is a collection"
        )
    index = bm25s.BM25(k1=options.bm25_k1, b=options.bm25_b)
    index.vocab_dict = dict(terms)
    index.unique_token_ids_set = set(terms.values())
    words.clear()
    index.nonoccurrence_array = None
    index.scores = _scores(parts, lengths, len(index.vocab_dict), options)
    return index


def _count(texts: list[list[str]], terms: dict[str, int]) -> tuple[_Counts, np.ndarray]:
    """How often terms occur in some passages, and how many each passage has."""
    words = itertools.chain.from_iterable(texts)
    numbers = np.fromiter(map(terms.__getitem__, words), np.int64)
    rows = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    pairs, counts = np.unique(numbers * _PART + rows, return_counts=True)
    numbers, rows_of = (pairs // _PART).astype(np.int32), (pairs % _PART).astype(np.uint16)
    counts = np.minimum(counts, np.iinfo(np.uint16).max).astype(np.uint16)
    return (numbers, rows_of, counts), np.bincount(rows, minlength=len(texts))


def _scores(
    parts: "deque[_Counts]", lengths: list[np.ndarray], n_terms: int, options: BM25Options
) -> dict[str, object]:
    """The scores as bm25s holds them, in compressed sparse columns: a column for each term, with
    Lucene's variant of BM25 (Kamphuis et al., 2020) in the rows of the passages that have it.

    Empties `parts`, so that they make room for the result.
    """
    n_passages = sum(map(len, lengths))
    mean = sum(int(length.sum()) for length in lengths) / n_passages
    holding = sum(np.bincount(numbers, minlength=n_terms) for numbers, *_ in parts)
    weights = np.log(1 + (n_passages - holding + 0.5) / (holding + 0.5)).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(holding)])
    data, indices = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int32)
    free = starts[:-1].copy()  # where the next part continues each column
    k1, b, first = options.bm25_k1, options.bm25_b, 0
    for length in lengths:
        terms, rows, counts = parts.popleft()
        present, begins, sizes = np.unique(terms, return_index=True, return_counts=True)
        positions = np.repeat(free[present] - begins, sizes) + np.arange(len(terms))
        penalties = k1 * ((1 - b) + b * length / mean)
        data[positions] = weights[terms] * (counts / (penalties[rows] + counts))
        indices[positions] = rows + np.int32(first)
        free[present] += sizes
        first += len(length)
    return {"data": data, "indices": indices, "indptr": starts, "num_docs": n_passages}
