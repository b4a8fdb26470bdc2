"""From examples to batches: the reader's texts, datasets, collators, and who reads what when."""

import atexit
import dataclasses
import functools
import hashlib
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from src.data.examples import Example, Examples, ignore_signals, marked, parse_example, read_example
from src.data.passages import Passage
from src.runtime.errors import InputError, end_children

# ----------------------------------------------------------------------------------------------
# Text and tokens of the reader


def reader_texts(example: Example, n_context: int, use_title: bool = True) -> list[str]:
    """The texts that the reader encodes for a question, one a passage (Izacard and Grave, 2020,
    section 3): its first `n_context` passages, or the question alone when it has none."""
    question = question_text(example.question)
    passages = example.passages[:n_context]
    texts = [f"{question} {passage_text(p.title, p.text, use_title)}" for p in passages]
    return texts or [question]


def draw_target(example: Example, seed: int, epoch: int) -> str:
    """The text to train on: `target`, else one of the answers at random.

    The draw depends on the seed, the epoch and the example alone, so a resumed run repeats it.
    """
    if example.target is not None:
        return example.target
    return random.Random(f"{seed} {epoch} {example.index}").choice(example.answers)


class ReaderItem(NamedTuple):
    """What the collator needs of an example. `target` is None when only answers are wanted."""

    index: int
    texts: list[str]
    target: str | None


@dataclasses.dataclass
class ReaderDataset(Dataset):
    """Reader texts of the examples of a file, by (epoch, index)."""

    examples: Examples
    n_context: int
    use_title: bool = True
    with_target: bool = False
    seed: int = 0

    def __getitem__(self, key: tuple[int, int]) -> ReaderItem:
        epoch, index = key
        example = read_example(self.examples, index)
        target = draw_target(example, self.seed, epoch) if self.with_target else None
        return ReaderItem(index, reader_texts(example, self.n_context, self.use_title), target)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int | None
) -> list[list[int]]:
    """Token ids of each text, without an end-of-sequence token, cut on the right at `max_length`.

    By the tokenizer's own `spiece.model` where `load_tokenizer` found one.
    """
    pieces = getattr(tokenizer, "pieces", None)
    if pieces is not None:
        return [pieces.encode(text)[:max_length] for text in texts]
    return tokenizer(
        texts,
        add_special_tokens=False,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
    )["input_ids"]


@dataclasses.dataclass
class ReaderCollator:
    """Makes a batch: `input_ids` and `attention_mask` [B, N, L], `labels` [B, T], `index` (list).

    N is the largest number of passages in the batch (missing ones are all padding) and L is
    `text_maxlength`: a fixed size, which keeps memory even and is the layout that the position
    table of legacy readers counts in. With `answer_maxlength` > 0, T is fixed too.
    """

    tokenizer: PreTrainedTokenizerBase
    text_maxlength: int
    answer_maxlength: int = -1

    def __call__(self, items: list[ReaderItem]) -> dict[str, Any]:
        N = max(len(item.texts) for item in items)
        rows = []
        # No end-of-sequence token: the released readers never saw one in a passage.
        for item in items:
            rows += encode_texts(self.tokenizer, item.texts, self.text_maxlength)
            rows += [[]] * (N - len(item.texts))
        ids = _padded(rows, self.text_maxlength, self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(self.text_maxlength) < lengths[:, None]
        shape = len(items), N, self.text_maxlength
        batch = {
            "index": [item.index for item in items],
            "input_ids": ids.view(shape),
            "attention_mask": mask.view(shape),
        }
        if items[0].target is not None:
            batch["labels"] = self._labels([item.target for item in items])
        return batch

    def _labels(self, targets: list[str]) -> torch.Tensor:
        cut = self.answer_maxlength > 0
        # Without trailing white space, as in transformers 3.0.2.
        texts = [target.rstrip() for target in targets]
        tokens = encode_texts(self.tokenizer, texts, self.answer_maxlength - 1 if cut else None)
        tokens = [row + [self.tokenizer.eos_token_id] for row in tokens]
        width = self.answer_maxlength if cut else max(map(len, tokens))
        return _padded(tokens, width, -100)


def _padded(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    """Rows of numbers as a tensor [len(rows), width], filled up with a value."""
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# ----------------------------------------------------------------------------------------------
# Text and tokens of the retriever


def question_text(question: str, prefix: str | None = None) -> str:
    """The text of a question as a retriever embeds it, after `question: ` or another prefix."""
    return f"question: {question}" if prefix is None else prefix + question


def passage_text(
    title: str, text: str, use_title: bool = True, prefix: str | None = None, separator: str = " "
) -> str:
    """The text of a passage as a retriever embeds it: `title: ... context: ...` or, with a prefix
    (which may be empty), that prefix, the title if there is one, a separator and the text."""
    if prefix is not None:
        return prefix + (f"{title}{separator}{text}" if use_title and title else text)
    return f"title: {title} context: {text}" if use_title else f"context: {text}"


@dataclasses.dataclass
class TextCollator:
    """Tokenizes texts as BERT reads them: ids and mask [B, L], cut on the right at `max_length`.

    Args:
        fixed_length: pad to `max_length` always, for a model that does not mask its padding;
            otherwise to the longest text of the batch.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    fixed_length: bool

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            padding="max_length" if self.fixed_length else "longest",
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"].bool()


class RetrieverItem(NamedTuple):
    """A question, the passages that the reader scored, and these scores, highest first; and the
    log-probabilities of the answer's tokens given each passage alone, or None. `marks` say which
    passages have an answer; empty if the file does not say so of all."""

    index: int
    question: str
    passages: list[str]
    scores: list[float]
    token_log_probs: list[list[float]] | None = None
    marks: Sequence[bool] = ()


@dataclasses.dataclass
class RetrieverDataset(Dataset):
    """Questions with scored passages of a file, by (epoch, index).

    Args: loss: `contrastive` draws a positive passage and others that are not, anew in each epoch;
        those whose names begin with `emdr2` need the passages' `token_log_probs`.
    """

    examples: Examples
    n_context: int
    use_title: bool = True
    loss: str = "kl"
    seed: int = 0
    question_text: Callable[[str], str] = question_text
    passage_text: Callable[[str, str, bool], str] = passage_text

    def __getitem__(self, key: tuple[int, int]) -> RetrieverItem:
        epoch, index = key
        raw = self.examples[index]
        example = parse_example(raw, index, self.examples.path)
        if self.loss == "contrastive":
            passages = self._draw(example, epoch)
        else:
            passages = [p for p in example.passages[: self.n_context] if p.score is not None]
        for passage in passages:
            if abs(passage.score) > torch.finfo(torch.float32).max:
                where = self.examples.where(index)
                raise InputError(f"{where}: the score {passage.score} is too large for float32")
        marks = [marked(raw["ctxs"][passage.position]) for passage in passages]
        return RetrieverItem(
            index,
            self.question_text(example.question),
            [self.passage_text(p.title, p.text, self.use_title) for p in passages],
            [p.score for p in passages],
            self._token_log_probs(raw, passages) if self.loss.startswith("emdr2") else None,
            () if None in marks else [bool(mark) for mark in marks],
        )

    def _draw(self, example: Example, epoch: int) -> list[Passage]:
        """A positive passage and `n_context - 1` others, the same when a run is resumed."""
        rng = random.Random(f"{self.seed} {epoch} {example.index}")
        scored = [passage for passage in example.passages if passage.score is not None]
        positives = [passage for passage in scored if passage.score > 0]
        others = [passage for passage in scored if passage.score <= 0]
        drawn = rng.sample(others, min(self.n_context - 1, len(others)))
        return [*(rng.sample(positives, 1) if positives else []), *drawn]

    def _token_log_probs(self, raw: dict, passages: list[Passage]) -> list[list[float]]:
        found = [raw["ctxs"][passage.position].get("token_log_probs") for passage in passages]
        rows = [row if isinstance(row, list) else [] for row in found]
        numbers = [isinstance(n, float | int) and math.isfinite(n) for row in rows for n in row]
        if len({len(row) for row in rows}) > 1 or not numbers or not all(numbers):
            raise InputError(
                f"{self.examples.path}, example {raw.get('id', '?')}: a passage has no "
                "token_log_probs; write them with test_reader.py --targets perplexity "
                "--token_log_probs"
            )
        return found


def check_marks(dataset: RetrieverDataset) -> None:
    """Errors: `InputError` when no question's passages are all marked with whether they have an
    answer."""
    if not any(dataset[0, index].marks for index in range(len(dataset.examples))):
        raise InputError(
            f"{dataset.examples.path}: recall needs passages that are marked with hasanswer, which "
            "passage_retrieval.py writes for questions with answers; or choose another --best_by"
        )


@dataclasses.dataclass
class RetrieverCollator:
    """Makes a batch: `question_ids` and `question_mask` [B, L]; `passage_ids` and `passage_mask`
    [B, N, L']; `gold_scores`, `present` and `passage_keys` [B, N]; `index` and `marks`
    (lists); and, if the items have them, `token_log_probs` [B, N, T] with `token_mask` [B, T].

    N is the largest number of passages in the batch; `present` is false on what others lack. Equal
    keys mean equal passages.
    """

    questions: TextCollator
    passages: TextCollator

    def __call__(self, items: list[RetrieverItem]) -> dict[str, Any]:
        B, N = len(items), max(len(item.passages) for item in items)
        present = torch.zeros(B, N, dtype=torch.bool)
        scores = torch.zeros(B, N)
        keys = torch.zeros(B, N, dtype=torch.long)
        for b, item in enumerate(items):
            n = len(item.passages)
            present[b, :n] = True
            scores[b, :n] = torch.tensor(item.scores)
            keys[b, :n] = torch.tensor([_passage_key(text) for text in item.passages])
        # What is missing is filled with an empty text, which has tokens, so that no mean is nan.
        texts = [text for item in items for text in item.passages + [""] * (N - len(item.passages))]
        passage_ids, passage_mask = self.passages(texts)
        question_ids, question_mask = self.questions([item.question for item in items])
        tokens = {}
        if items[0].token_log_probs is not None:
            T = max(len(row) for item in items for row in item.token_log_probs)
            log_probs, mask = torch.zeros(B, N, T), torch.zeros(B, T, dtype=torch.bool)
            for b, item in enumerate(items):
                rows = torch.tensor(item.token_log_probs)
                log_probs[b, : rows.shape[0], : rows.shape[1]] = rows
                mask[b, : rows.shape[1]] = True
            tokens = {"token_log_probs": log_probs, "token_mask": mask}
        return tokens | {
            "index": [item.index for item in items],
            "marks": [item.marks for item in items],
            "question_ids": question_ids,
            "question_mask": question_mask,
            "passage_ids": passage_ids.view(B, N, -1),
            "passage_mask": passage_mask.view(B, N, -1),
            "gold_scores": scores,
            "present": present,
            "passage_keys": keys,
        }


def _passage_key(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# ----------------------------------------------------------------------------------------------
# Order


def training_batches(
    n_examples: int, batch_size: int, rank: int, world_size: int, seed: int, start: int
) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, index) for one process, each epoch in its own random order.

    All processes walk through one sequence, `world_size * batch_size` examples at a time, each
    taking its slice; so K processes with batches of B train on what one with K * B would. `start`
    is the number of examples that have been seen: a resumed run goes on from there.
    """
    position, epoch, order = start, -1, None
    while True:
        places = []
        for offset in range(rank * batch_size, (rank + 1) * batch_size):
            here, index = divmod(position + offset, n_examples)
            if here != epoch:
                epoch, order = here, np.random.default_rng((seed, here)).permutation(n_examples)
            places.append((epoch, int(order[index])))
        yield places
        position += batch_size * world_size


def evaluation_batches(
    n_examples: int, batch_size: int, rank: int, world_size: int
) -> list[list[tuple[int, int]]]:
    """This process's batches over all examples, once and in order: every `world_size`-th batch.

    Whole batches are dealt out, not examples, so that each batch, and with it every computed
    number, is the same under any number of processes.
    """
    batches = [
        [(0, index) for index in range(start, min(start + batch_size, n_examples))]
        for start in range(0, n_examples, batch_size)
    ]
    return batches[rank::world_size]


@functools.cache
def _end_workers_at_exit() -> None:
    """Kill workers that are left when this process exits, which is after an error. (Python sends
    them SIGTERM, which they ignore, and then waits for them for ever.)"""
    atexit.register(end_children)


def make_loader(
    dataset: Dataset,
    batches: Sequence[list] | Iterator[list],
    collate: Callable[[list], dict],
    num_workers: int,
    pin_memory: bool = False,
    n_ahead: int = 2,
) -> DataLoader:
    """A loader of the given batches, lists of (epoch, index). Each worker makes `n_ahead` of them
    in advance. It draws nothing from the global random state."""
    if num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are parallel
        _end_workers_at_exit()
    # PyTorch advises against more workers than CPUs, which a SLURM task often has one of.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=n_ahead if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if num_workers else None,  # its files are open already
        generator=torch.Generator(),  # its own: or each epoch would move the training's state
    )
