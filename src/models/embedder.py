"""Embedding texts with a retriever, many at a time, and a whole collection block by block.

Shapes: D size of an embedding.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from src.data.passages import Passages
from src.models.encoders import longest
from src.models.lengths import prefetch_one
from src.models.retriever import Retriever
from src.runtime import distributed
from src.runtime.errors import InputError

# A killed job loses at most one block a process. Blocks are those of the whole collection, and each
# is sorted into batches as a whole, also if a shard begins or ends inside it: so a passage's
# embedding is the same to the bit in any shard, and by any number of processes.
BLOCK_ROWS = 2048
# Tokens of a batch on a CPU: its activations fit in the cache, which makes it a quarter faster.
_CPU_TOKENS = 1024


def token_batches(lengths: list[int], most_tokens: int) -> list[tuple[int, int]]:
    """Cut a list of lengths, longest first, into batches [start, end) of at least one text, and of
    at most `most_tokens` tokens when padded to the first text."""
    batches, start = [], 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, most_tokens // max(1, lengths[start])))
        batches.append((start, end))
        start = end
    return batches


class TextEmbedder:
    """Embeds texts in batches of similar length, and returns the embeddings in the texts' order.

    A batch has at most as many tokens, padding included, as `batch_size` texts of `max_length`, and
    on a CPU not many.

    Args:
        side: "questions" or "passages".
        max_length: tokens of a text; the rest is cut off.
    """

    def __init__(
        self,
        retriever: Retriever,
        tokenizer: PreTrainedTokenizerBase,
        side: str,
        max_length: int,
        batch_size: int,
        device: torch.device,
    ):
        is_question = side == "questions"
        config = retriever.config
        apply_mask = config.apply_question_mask if is_question else config.apply_passage_mask
        if max_length > longest(config):
            raise InputError(
                f"this retriever reads at most {longest(config)} tokens, not "
                f"{max_length}: lower --{side[:-1]}_maxlength"
            )
        if config.side not in (None, side):
            raise InputError(
                f"{tokenizer.name_or_path}: this encoder is one of {config.side}, and cannot embed "
                f"{side}; give the other one of the pair"
            )
        self._embed = retriever.embed_questions if is_question else retriever.embed_passages
        self._tokenizer, self._max_length = tokenizer, max_length
        self._shortest = 1 if apply_mask else max_length  # a mean over padding needs all of it
        self._most_tokens = batch_size * max_length
        if device.type == "cpu":
            self._most_tokens = min(self._most_tokens, _CPU_TOKENS)
        self._dimension, self.device = config.indexing_dimension, device
        self._dtype = next(retriever.parameters()).dtype

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embeddings [len(texts), D] in the model's number format."""
        return self.begin(self.tokenize(texts))()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The texts' token ids. (May run in another thread, but in one at a time.)"""
        if not texts:
            return []
        tokens = self._tokenizer(texts, truncation=True, max_length=self._max_length)
        return tokens["input_ids"]

    @torch.no_grad()
    def begin(self, tokens: list[list[int]]) -> Callable[[], np.ndarray]:
        """Start to embed tokenized texts. The returned function waits for the embeddings
        [len(tokens), D]; until it is called, a GPU computes while the caller does something else.
        """
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]), reverse=True)
        lengths = [max(self._shortest, len(tokens[row])) for row in order]
        parts = [torch.empty(0, self._dimension, dtype=self._dtype, device=self.device)]
        for start, end in token_batches(lengths, self._most_tokens):
            ids, mask = self._pad([tokens[row] for row in order[start:end]], lengths[start])
            parts.append(self._embed(ids, mask))
        found = torch.cat(parts).to("cpu", non_blocking=True)  # from a GPU, to pinned memory
        complete = torch.get_device_module(self.device).Event()
        complete.record()

        def finish() -> np.ndarray:
            complete.synchronize()
            rows = np.empty(found.shape, found.numpy().dtype)
            rows[order] = found.numpy()
            return rows

        return finish

    def _pad(self, tokens: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([len(text) for text in tokens])
        mask = torch.arange(length) < lengths[:, None]
        ids = torch.full((len(tokens), length), self._tokenizer.pad_token_id)
        ids[mask] = torch.tensor(list(itertools.chain.from_iterable(tokens)))
        if self.device.type == "cuda":  # from pinned memory, the copies do not wait for the GPU
            ids, mask = ids.pin_memory(), mask.pin_memory()
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)


def embed_blocks(
    embed: TextEmbedder,
    passages: Passages,
    rows: range,
    use_title: bool,
    write: Callable[[str, str, bool], str],
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Embed these rows of a collection, which the retriever's `texts` write, in rounds of a block
    for each process. Yields the ids and embeddings [n, D] of a round in the main process, and
    nothing in the others."""

    def read(start: int) -> tuple[slice, list[str], list[list[int]]]:
        """Of a block: the rows to embed, their ids, and the tokens of all."""
        block = [passages[row] for row in range(start, min(start + BLOCK_ROWS, len(passages)))]
        texts = [write(passage.title, passage.text, use_title) for passage in block]
        wanted = slice(max(0, rows.start - start), max(0, min(len(block), rows.stop - start)))
        return wanted, [passage.id for passage in block[wanted]], embed.tokenize(texts)

    first = rows.start // BLOCK_ROWS * BLOCK_ROWS
    own, step = distributed.rank() * BLOCK_ROWS, distributed.world_size() * BLOCK_ROWS
    starts = [start + own for start in range(first, rows.stop, step)]
    with ThreadPoolExecutor(1) as thread:  # it reads and tokenizes the next block
        read_blocks = (
            ready.result() for ready in prefetch_one(thread.submit(read, s) for s in starts)
        )
        begun = ((wanted, ids, embed.begin(tokens)) for wanted, ids, tokens in read_blocks)
        # A GPU embeds the next block while the caller writes this one.
        for wanted, ids, finish in prefetch_one(begun) if embed.device.type == "cuda" else begun:
            blocks = distributed.gather((ids, finish()[wanted])) or [([], np.empty(0))]
            all_ids, vectors = zip(*blocks, strict=True)
            yield list(itertools.chain(*all_ids)), np.concatenate(vectors)
