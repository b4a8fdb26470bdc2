"""The passages of a collection for questions: where the kind of search is chosen.

`open_search(options, ...)` opens a collection's index, with the retriever if one is needed, and
`search(questions, k)` finds passages with it. Each index is a file of its own beside this one, with
`search(queries, k) -> Found` and `ids(positions)`, and is named in `_open_index`.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.data.batches import question_text
from src.data.passages import Passages
from src.models.embedder import TextEmbedder
from src.models.pretrained import check_vocabulary, load_tokenizer
from src.models.retriever import fingerprint, load_retriever
from src.options import SearchOptions
from src.runtime import distributed
from src.runtime.terminal import count, has_bars, say, size
from src.search import faiss_index
from src.search.bm25 import BM25
from src.search.embeddings import check_count, open_shards, require_same
from src.search.exact import Found, Indexer, merge
from src.search.gpu import GpuIndexer
from src.training.metrics import passing_bar

_QUESTIONS_AT_ONCE = 1024  # embedded at once
_RECALL_SAMPLE = 100  # questions on which an approximate index is compared with exact search


def open_search(
    options: SearchOptions, passages: Passages, device: torch.device, log: logging.Logger
) -> "BM25Search | EmbeddingSearch":
    """The search that the options ask for. Of several processes, each must call its methods."""
    if options.bm25:
        return BM25Search(options, passages, log)
    return EmbeddingSearch(options, passages, device, log)


def _open_index(
    options: SearchOptions, exact: Indexer, device: torch.device, log: logging.Logger
) -> Any:
    """The index over embeddings: the exact one itself, on a GPU, or one that FAISS makes of it."""
    if options.factory:
        return _open_faiss_index(options, exact, log)
    return (
        GpuIndexer(exact.shards, options.indexing_batch_size, device)
        if device.type == "cuda"
        else exact
    )


def _open_faiss_index(options: SearchOptions, exact: Indexer, log: logging.Logger) -> Any:
    """The main process builds it. The others open it where it is saved, and share in searching;
    otherwise theirs is None."""
    factory, keep, allow_mismatch = (
        options.factory,
        options.save_or_load_index,
        options.allow_mismatch,
    )

    def load_or_build() -> faiss_index.CompressedIndexer:
        with passing_bar(len(exact), "passage", "building the index") as bar:
            return faiss_index.load_or_build(exact, factory, keep, allow_mismatch, log, bar.update)

    index = distributed.run_on_main(load_or_build)
    if keep and index is None:
        folder = faiss_index.index_folder(exact, factory)
        index = faiss_index.CompressedIndexer.load(folder, exact, factory, allow_mismatch, False)
    return index


class BM25Search:
    """BM25. Of several processes, the main one has the index and searches.

    Attributes: made_by: what the results depend on, as JSON values.
    """

    def __init__(self, options: SearchOptions, passages: Passages, log: logging.Logger):
        folder = Path(f"{passages.path}.bm25") if options.save_or_load_index else None
        shown = distributed.is_main() and has_bars()
        self._index = distributed.run_on_main(
            lambda: BM25.load_or_build(passages, folder, log, show_progress=shown)
        )
        self.made_by = {"model": "bm25", "passages": passages.fingerprint()}

    def search(self, questions: list[str], k: int) -> Found:
        """The k best passages of each question, the same in every process. Positions are those in
        the collection."""

        def find() -> Found:
            with passing_bar(len(questions), "question", "searching") as bar:
                return self._index.search(questions, k, bar.update)

        return distributed.all_gather(distributed.run_on_main(find))[0]


class EmbeddingSearch:
    """Search in the embeddings of a collection by those of questions.

    Errors: `InputError` when there are none, or, without `allow_mismatch`, when shards, collection
        and retriever do not belong together.
    Attributes: made_by: what the results depend on, as JSON values.
    """

    def __init__(
        self,
        options: SearchOptions,
        passages: Passages,
        device: torch.device,
        log: logging.Logger,
    ):
        self._options, self._passages, self._device = options, passages, device
        shards = open_shards(options.passages_embeddings, options.allow_mismatch)
        if not options.allow_mismatch:
            check_count(shards, passages.path, len(passages))
        self._exact = Indexer(shards, options.indexing_batch_size)
        self._describe(log)
        self._load_retriever(log)
        self._index = _open_index(options, self._exact, device, log)

    def _describe(self, log: logging.Logger) -> None:
        exact, factory = self._exact, self._options.factory
        memory = faiss_index.expected_memory(
            len(exact), exact.dimension, self._options.indexing_batch_size, factory
        )
        shards = count(len(exact.shards), "shard")
        embeddings = f"{len(exact):,} embeddings of size {exact.dimension} in {shards}"
        needs = f"{factory or 'exact'} search takes about {size(memory.building)} of memory"
        say(log, "search", "%s; %s", embeddings, needs)

    def _load_retriever(self, log: logging.Logger) -> None:
        options, device = self._options, self._device
        retriever = load_retriever(options.model_path)
        base = "bert-base-uncased" if options.tokenizer == "none" else options.tokenizer
        tokenizer = load_tokenizer(options.model_path, base, options.tokenizer_option)
        check_vocabulary(retriever.config, tokenizer, options.tokenizer_option)
        shard, model = self._exact.shards[0], fingerprint(retriever)
        collection = self._passages.fingerprint()
        self.made_by = {"model": model, "passages": collection, "embeddings": shard.metadata}
        if shard.metadata and not options.allow_mismatch:
            theirs = shard.metadata
            plain = json.loads(theirs.get("options", "{}")).get("plain_text", False)
            for what, name, ours, other in (
                ("the model", options.model_path, model, theirs.get("model")),
                ("the collection", self._passages.path, collection, theirs.get("passages")),
                ("--plain_text", "this command", options.plain_text, plain),
            ):
                require_same(what, name, ours, shard.path, other)
        n_parameters = sum(p.numel() for p in retriever.parameters()) / 1e6
        say(log, "retriever", "%.1fM parameters, from %s", n_parameters, options.model_path)
        if not options.no_fp16 and device.type == "cuda":
            retriever = retriever.half()
        length = options.question_maxlength or retriever.config.question_maxlength
        self._embedder = TextEmbedder(
            retriever.to(device).eval(),
            tokenizer,
            "questions",
            length,
            options.per_gpu_batch_size,
            device,
        )

    def search(self, questions: list[str], k: int) -> Found:
        """The k best passages of each question, the same in every process. Positions are those in
        the collection; an approximate index can find fewer than k."""
        queries = self._embed(questions)
        found = self._find(self._index, queries, k)
        positions = np.full(found.positions.shape, -1)
        for row, ids in zip(positions, self._exact.ids(found.positions), strict=True):
            row[: len(ids)] = self._passages.find(ids)
        return Found(found.scores, positions)

    def recall(self, questions: list[str], k: int, seed: int = 0) -> float:
        """The share of the exact top k that the index finds, on a sample of the questions."""
        draw = np.random.default_rng(seed).permutation(len(questions))[:_RECALL_SAMPLE]
        queries = self._embed([questions[number] for number in sorted(draw)])
        return faiss_index.recall(
            self._find(self._index, queries, k), self._find(self._exact, queries, k)
        )

    def _embed(self, questions: list[str]) -> np.ndarray:
        """Embeddings [q, d]."""
        parts = [np.empty((0, self._exact.dimension), np.float32)]
        with passing_bar(len(questions), "question", "embedding questions") as bar:
            for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
                some = questions[start : start + _QUESTIONS_AT_ONCE]
                texts = [question_text(text, self._options.plain_text) for text in some]
                parts.append(self._embedder(texts))
                bar.update(len(some))
        return np.concatenate(parts[1:] or parts)

    def _find(self, index: Any, queries: np.ndarray, k: int) -> Found:
        """Search with all processes: exact search shares out the embeddings' blocks, the others
        share out the questions, unless only the main process has the index."""
        rank, world_size = distributed.rank(), distributed.world_size()
        if isinstance(index, Indexer):
            with passing_bar(len(self._exact), "passage", "searching") as bar:
                found = index.search(queries, k, (rank, world_size), bar.update)
            return merge(distributed.all_gather(found), found.scores.shape[1])
        if not self._options.save_or_load_index:
            return distributed.all_gather(
                distributed.run_on_main(lambda: index.search(queries, k))
            )[0]
        shares = distributed.all_gather(index.search(queries[rank::world_size], k))
        found = Found.empty(len(queries), shares[0].scores.shape[1])
        for number, share in enumerate(shares):
            found.scores[number::world_size], found.positions[number::world_size] = share
        return found
