"""Passages for questions, from opened files to places in the collection: what retrieval and a
conversation share.

With a retriever: `open_embeddings`, `load_checked_retriever`, `question_embedder`, and a
`VectorSearch` over what these give. By words: a `WordSearch`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from src.data.batches import question_text
from src.data.passages import Passages
from src.models.embedder import TextEmbedder
from src.models.pretrained import check_vocabulary, load_tokenizer
from src.models.retriever import Retriever, fingerprint, load_retriever
from src.runtime import distributed
from src.runtime.errors import InputError
from src.runtime.terminal import count, size
from src.search.bm25 import BM25
from src.search.exact import Found, Indexer, merge
from src.search.faiss_index import CompressedIndexer, expected_memory, recall
from src.search.gpu import GpuIndexer
from src.search.shards import check_count, open_shards, require_same

_QUESTIONS_AT_ONCE = 1024  # that are embedded, and searched in a compressed index


class FoundPlaces(NamedTuple):
    """The passages found for each question, best first: `passages[place]` for each of its places,
    and their scores [q, k]. An approximate index can find fewer than k: fewer places then."""

    places: list[list[int]]
    scores: np.ndarray


def check_way(
    bm25: bool, model: str, embeddings: str, factory: str, model_option: str = "--model_path"
) -> None:
    """Errors: `InputError` unless these values of options ("none": not given; `factory`: "") name
    one way to search, and all that it needs."""
    if bm25 == (model != "none"):
        raise InputError(f"give either {model_option} and --passages_embeddings, or --bm25")
    if not bm25 and embeddings == "none":
        raise InputError('--passages_embeddings is missing, for example "wikipedia_embeddings/*"')
    if bm25 and (embeddings != "none" or factory):
        raise InputError(
            "--bm25 searches by words alone: leave out --passages_embeddings, --index_factory and "
            "--n-subquantizers"
        )


# ----------------------------------------------------------------------------------------------
# By words


class WordSearch:
    """Search for the passages that share the most telling words with a question (BM25). Of several
    processes, the main one has the index and searches.

    Args:
        keep: the index is kept beside the collection, and loaded when it is there.
        show_progress: in building and in search.
    """

    def __init__(
        self, passages: Passages, keep: bool, log: logging.Logger, show_progress: bool = False
    ):
        folder = Path(f"{passages.path}.bm25") if keep else None
        self._index = distributed.in_main(
            lambda: BM25.load_or_build(passages, folder, log, show_progress)
        )

    def search(self, questions: list[str], k: int) -> FoundPlaces:
        """The k best passages of each question, the same in every process."""
        found = distributed.in_main(lambda: self._index.search(questions, k))
        found = distributed.share(found)[0]
        return FoundPlaces(found.positions.tolist(), found.scores)


# ----------------------------------------------------------------------------------------------
# By a retriever


def open_embeddings(
    patterns: str, passages: Passages, block_rows: int, allow_mismatch: bool, device: torch.device
) -> Indexer:
    """The embeddings of a collection, to be searched exactly, on a GPU if the device is one.

    Args: block_rows: how many of them are in memory at one time.
    Errors: `InputError` when there are none, or, without `allow_mismatch`, when shards do not
        belong together or are not as many embeddings as there are passages.
    """
    shards = open_shards(patterns, allow_mismatch)
    if not allow_mismatch:
        check_count(shards, passages.path, len(passages))
    if device.type == "cuda":
        return GpuIndexer(shards, block_rows, device)
    return Indexer(shards, block_rows)


def describe_search(exact: Indexer, block_rows: int, factory: str) -> str:
    """What is searched and what that takes, for the log, before anything is loaded."""
    memory = expected_memory(len(exact), exact.dimension, block_rows, factory)
    shards = count(len(exact.shards), "shard")
    return (
        f"{len(exact):,} embeddings of size {exact.dimension} in {shards}; "
        f"{factory or 'exact'} search takes about {size(memory.building)} of memory"
    )


def load_checked_retriever(
    path: str,
    tokenizer: str,
    passages: Passages,
    exact: Indexer,
    plain_text: bool,
    allow_mismatch: bool,
    tokenizer_option: str = "--tokenizer",
) -> tuple[Retriever, PreTrainedTokenizerBase, str]:
    """The retriever at a folder or hub name, its tokenizer, and its fingerprint.

    Args: tokenizer: whose, if the retriever has none of its own; the value of an option.
    Errors: `InputError` when they cannot be loaded, or, without `allow_mismatch`, when the
        embeddings say that another retriever, collection or way of writing texts made them.
    """
    retriever = load_retriever(path)
    loaded = load_tokenizer(path, tokenizer, tokenizer_option)
    check_vocabulary(retriever.config, loaded, tokenizer_option)
    model, shard = fingerprint(retriever), exact.shards[0]
    made_by = shard.metadata
    if made_by and not allow_mismatch:
        plain = json.loads(made_by.get("options", "{}")).get("plain_text", False)
        for what, name, ours, theirs in (
            ("the model", path, model, made_by.get("model")),
            ("the collection", passages.path, passages.fingerprint(), made_by.get("passages")),
            ("--plain_text", "this command", plain_text, plain),
        ):
            require_same(what, name, ours, shard.path, theirs)
    return retriever, loaded, model


def question_embedder(
    retriever: Retriever,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    batch_size: int,
    device: torch.device,
    half: bool,
    plain_text: bool,
    on_questions: Callable[[int], None] | None = None,
) -> Callable[[list[str]], np.ndarray]:
    """From questions to their embeddings [q, d], computed on the device.

    Args:
        max_length: tokens of a question; None: as many as the retriever was made for.
        on_questions: is told how many more are embedded.
    """
    retriever = (retriever.half() if half else retriever).to(device).eval()
    max_length = max_length or retriever.config.question_maxlength
    embed = TextEmbedder(retriever, tokenizer, "questions", max_length, batch_size, device)

    def embed_all(questions: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
            some = questions[start : start + _QUESTIONS_AT_ONCE]
            parts.append(embed([question_text(text, plain_text) for text in some]))
            if on_questions:
                on_questions(len(some))
        return np.concatenate(parts)

    return embed_all


class VectorSearch:
    """Search in the embeddings of a collection: exact, or by the index that `open_index` gives."""

    def __init__(self, exact: Indexer, passages: Passages):
        self._exact, self._passages = exact, passages
        self._index: CompressedIndexer | None = None
        self._compressed = self._in_every_process = False

    def open_index(
        self,
        factory: str,
        keep: bool,
        allow_mismatch: bool,
        log: logging.Logger,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        """Use a compressed index from now on. It is built once: by the main process, whose kept
        index the others open, so that they can share in searching.

        Args:
            factory: FAISS's name for its kind.
            keep: it is kept beside the shards, and loaded when it is there.
            on_rows: is told how many more rows went into an index that is built.
        """
        folder = Path(self._exact.shards[0].path).parent / f"index_{factory.replace(',', '_')}"

        def load() -> CompressedIndexer:
            return CompressedIndexer.load(folder, self._exact, factory, allow_mismatch)

        def load_or_build() -> CompressedIndexer:
            if keep and folder.exists():
                index = load()
                log.info("loaded %s", folder)
                return index
            index = CompressedIndexer.build(self._exact, factory, on_rows=on_rows)
            if keep:
                index.save(folder)
                log.info("saved %s", folder)
            return index

        self._index = distributed.in_main(load_or_build)
        if keep and self._index is None:
            self._index = load()
        self._compressed, self._in_every_process = True, keep

    def search(
        self, queries: np.ndarray, k: int, on_rows: Callable[[int], None] | None = None
    ) -> FoundPlaces:
        """The k passages nearest to each query [q, d], the same in every process.

        Args: on_rows: is told how many more rows this process has searched exactly.
        """
        if self._compressed:
            found = self._search_index(queries, k)
        else:
            found = self._search_exactly(queries, k, on_rows)
        places = [self._passages.find(row) for row in self._exact.ids(found.positions)]
        return FoundPlaces(places, found.scores)

    def recall(
        self, queries: np.ndarray, k: int, on_rows: Callable[[int], None] | None = None
    ) -> float:
        """The share of the exact top k that the index finds, on a sample of the queries.

        Args: on_rows: as in `search`.
        """

        def search_exactly(some: np.ndarray, k: int) -> Found:
            return self._search_exactly(some, k, on_rows)

        return recall(self._search_index, search_exactly, queries, k)

    def _search_exactly(
        self, queries: np.ndarray, k: int, on_rows: Callable[[int], None] | None = None
    ) -> Found:
        part = distributed.rank(), distributed.world_size()
        found = self._exact.search(queries, k, part, on_rows)
        return merge(distributed.share(found), found.scores.shape[1])

    def _search_index(self, queries: np.ndarray, k: int) -> Found:
        # FAISS's rounding depends on how many questions it is asked at once: so these are groups
        # that do not depend on the number of processes.
        groups = range(0, max(1, len(queries)), _QUESTIONS_AT_ONCE)

        def search(starts: range) -> list[Found]:
            return [self._index.search(queries[s : s + _QUESTIONS_AT_ONCE], k) for s in starts]

        if self._in_every_process:
            rank, world_size = distributed.rank(), distributed.world_size()
            shares = distributed.share(search(groups[rank::world_size]))
            parts = [shares[i % world_size][i // world_size] for i in range(len(groups))]
        else:
            parts = distributed.share(distributed.in_main(lambda: search(groups)))[0]
        return Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
