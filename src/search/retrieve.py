"""Passages for questions: where the kind of search is chosen.

`open_search(options, ...)` opens a collection's index, with the retriever if one is needed, and
`search(questions, k)` finds passages with it. Each kind of index is a file in this folder with
`search(queries, k) -> Found`, and is named in `_open_index` or `open_search`.
"""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.data.passages import Passages
from src.data.trec import read_run
from src.options import SearchOptions, encoding
from src.runtime import distributed
from src.runtime.errors import InputError, shorten
from src.runtime.terminal import count, say, size
from src.search import faiss_index
from src.search.bm25 import BM25
from src.search.embeddings import check_count, open_shards, require_same
from src.search.exact import Found, Indexer, merge
from src.search.gpu import GpuIndexer
from src.training.metrics import passing_bar

_QUESTIONS_AT_ONCE = 1024  # embedded between two updates of the progress bar
_RECALL_SAMPLE = 100  # questions on which an approximate index is compared with exact search


def open_search(
    options: SearchOptions, passages: Passages, device: torch.device, log: logging.Logger
) -> "BM25Search | EmbeddingSearch | FoundElsewhere":
    """The search that the options ask for. Every process must call its methods."""
    if options.from_trec != "none":
        return FoundElsewhere(options.from_trec, passages)
    if options.bm25:
        return BM25Search(options, passages, log)
    return EmbeddingSearch(options, passages, device, log)


def _open_index(
    options: SearchOptions, exact: Indexer, device: torch.device, log: logging.Logger
) -> Any:
    """The index over embeddings: FAISS's, or exact search on a GPU or CPU."""
    if options.factory:
        return _open_faiss_index(options, exact, log)
    if device.type == "cuda":
        return GpuIndexer(exact.shards, options.indexing_batch_size, device)
    return exact


def _open_faiss_index(options: SearchOptions, exact: Indexer, log: logging.Logger) -> Any:
    """The main process builds it. If it is saved, the others load it and share the search;
    otherwise theirs is None."""
    factory, keep, allow = options.factory, options.save_or_load_index, options.allow_mismatch

    def load_or_build() -> faiss_index.CompressedIndexer:
        with passing_bar(len(exact), "passage", "building the index") as bar:
            return faiss_index.load_or_build(exact, factory, keep, allow, log, bar.update)

    index = distributed.run_on_main(load_or_build)
    if keep and index is None:
        folder = faiss_index.index_folder(exact, factory)
        index = faiss_index.CompressedIndexer.load(folder, exact, factory, allow, verify=False)
    return index


class BM25Search:
    """BM25, in the main process.

    Attributes: made_by: everything the results depend on, as JSON values.
    """

    def __init__(self, options: SearchOptions, passages: Passages, log: logging.Logger):
        folder = Path(f"{passages.path}.bm25") if options.save_or_load_index else None
        self._index = distributed.run_on_main(
            lambda: BM25.load_or_build(passages, folder, log, options, passing_bar)
        )
        self.made_by = {"model": "bm25", "passages": passages.fingerprint()}

    def search(self, questions: list[str], k: int) -> Found:
        """The k best passages for each question, the same in every process. Positions are rows of
        the collection."""

        def find() -> Found:
            with passing_bar(len(questions), "question", "searching") as bar:
                return self._index.search(questions, k, bar.update)

        return distributed.from_main(find)


class FoundElsewhere:
    """The passages that a TREC run names: `search` takes the questions' ids.

    Attributes: made_by: everything the results depend on, as JSON values.
    """

    def __init__(self, path: str, passages: Passages):
        self._path, self._passages, self._run = path, passages, read_run(path)
        self.made_by = {"model": "from_trec", "passages": passages.fingerprint()}

    def search(self, questions: list[str], k: int) -> Found:
        """The first k passages of each question by score; equal scores keep the run's order.

        Errors: `InputError` for passages of another collection, or when no question is in the run.
        """
        if not any(question in self._run for question in questions):
            raise InputError(
                f"{self._path}: none of the questions has passages in this run (the first is "
                f"{shorten(questions[0])}); give the --data that was searched for"
            )
        found = Found.empty(len(questions), k)
        for row, question in enumerate(questions):
            scores = self._run.get(question, {})
            best = sorted(scores, key=scores.get, reverse=True)[:k]
            found.positions[row, : len(best)] = self._passages.find(best)
            found.scores[row, : len(best)] = [scores[name] for name in best]
        return found


class EmbeddingSearch:
    """Search by embeddings of questions in those of a collection.

    Errors: `InputError` when there are none, or, without `allow_mismatch`, when shards, collection
        and retriever do not belong together.
    Attributes: made_by: everything the results depend on, as JSON values.
    """

    def __init__(
        self, options: SearchOptions, passages: Passages, device: torch.device, log: logging.Logger
    ):
        self._options, self._passages = options, passages
        shards = open_shards(options.passages_embeddings, options.allow_mismatch)
        if not options.allow_mismatch:
            check_count(shards, passages.path, len(passages))
        self._exact = exact = Indexer(shards, options.indexing_batch_size)
        memory = faiss_index.expected_memory(
            len(exact), exact.dimension, options.indexing_batch_size, options.factory
        )
        of = f"{len(exact):,} embeddings of size {exact.dimension} in {count(len(shards), 'shard')}"
        kind = options.factory or "exact"
        if device.type == "cuda" and not options.factory:  # two blocks, on their way to the GPU
            memory = 8 * min(len(exact), options.indexing_batch_size) * exact.dimension
        say(log, "search", "%s; %s search takes about %s of memory", of, kind, size(memory))
        if len(exact) < len(passages):
            n_lost = f"{len(passages) - len(exact):,} of {count(len(passages), 'passage')}"
            say(log, "missing", "%s have no embedding and cannot be found", n_lost)
        self._embedder = self._load_retriever(device, log)
        self._index = _open_index(options, exact, device, log)

    def _load_retriever(
        self, device: torch.device, log: logging.Logger
    ) -> Callable[[list[str]], np.ndarray]:
        from src.models.embedder import TextEmbedder  # slow, and BM25 needs no model
        from src.models.retriever import fingerprint, open_retriever, text_settings

        options = self._options
        path, tokenizer, option = options.model_path, options.tokenizer, options.tokenizer_option
        settings = encoding(options)
        retriever, tokenizer = open_retriever(path, tokenizer, option, **settings)
        shard, model = self._exact.shards[0], fingerprint(retriever)
        collection, theirs = self._passages.fingerprint(), shard.metadata
        questions = fingerprint(retriever, "questions")
        self.made_by = {"model": questions, "passages": collection, "embeddings": theirs}
        if theirs and not options.allow_mismatch:
            config, made = retriever.config, json.loads(theirs.get("options", "{}"))
            if config.side == "questions" and made.get("side") == "passages":
                model = theirs.get("model")  # DPR's encoders do not know each other
            plain, texts = made.get("plain_text", False), text_settings(config, settings)
            require = functools.partial(require_same, other_path=shard.path)
            for name in sorted(settings.keys() & made.keys()):
                require(f"--{name}", "this command", getattr(config, name), other=made[name])
            require("the model", options.model_path, model, other=theirs.get("model"))
            require("the collection", self._passages.path, collection, other=theirs.get("passages"))
            require("--plain_text", "this command", texts["plain_text"], other=plain)
        n_parameters = sum(p.numel() for p in retriever.parameters()) / 1e6
        say(log, "retriever", "%.1fM parameters, from %s", n_parameters, options.model_path)
        if not options.no_fp16 and device.type == "cuda":
            retriever = retriever.half()
        length = options.question_maxlength or retriever.config.question_maxlength
        retriever.passage_tower, self._text = None, retriever.texts[0]
        retriever, batch_size = retriever.to(device).eval(), options.per_gpu_batch_size
        return TextEmbedder(retriever, tokenizer, "questions", length, batch_size, device)

    def search(self, questions: list[str], k: int) -> Found:
        """The k best passages for each question, the same in every process. Positions are rows of
        the collection; an approximate index can find fewer than k."""
        found = self._find(self._index, self._embed(questions), k)
        positions = np.full(found.positions.shape, -1)
        for row, some in zip(positions, found.positions, strict=True):
            (ids,) = self._exact.ids(some[None])  # those of all questions would fill the memory
            row[: len(ids)] = self._passages.find(ids)
        return Found(found.scores, positions)

    def recall(self, questions: list[str], k: int, seed: int = 0) -> float:
        """The share of the exact top k that the index finds, on a sample of the questions."""
        draw = np.random.default_rng(seed).permutation(len(questions))[:_RECALL_SAMPLE]
        queries = self._embed([questions[number] for number in sorted(draw)])
        found, exact = (self._find(index, queries, k) for index in (self._index, self._exact))
        return faiss_index.recall(found, exact)

    def _embed(self, questions: list[str]) -> np.ndarray:
        """Embeddings [q, d]."""
        parts = [np.empty((0, self._exact.dimension), np.float32)] * (not questions)
        with passing_bar(len(questions), "question", "embedding questions") as bar:
            for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
                some = questions[start : start + _QUESTIONS_AT_ONCE]
                parts.append(self._embedder([self._text(question) for question in some]))
                bar.update(len(some))
        return np.concatenate(parts)

    def _find(self, index: Any, queries: np.ndarray, k: int) -> Found:
        """Search with all processes: exact search divides the embeddings' blocks among them, FAISS
        the questions, unless only the main process has the index."""
        rank, world_size = distributed.rank(), distributed.world_size()
        if isinstance(index, Indexer):
            with passing_bar(len(self._exact), "passage", "searching") as bar:
                found = index.search(queries, k, (rank, world_size), bar.update)
            return merge(distributed.all_gather(found), found.scores.shape[1])
        if not self._options.save_or_load_index:
            return distributed.from_main(lambda: index.search(queries, k))
        parts = distributed.all_gather(index.search(queries[rank::world_size], k))
        found = Found.empty(len(queries), parts[0].scores.shape[1])
        for number, part in enumerate(parts):
            found.scores[number::world_size], found.positions[number::world_size] = part
        return found
