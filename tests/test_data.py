"""Token ids equal the reference's; the order of training and evaluation is as it says."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from src.data.batches import (
    ReaderCollator,
    ReaderDataset,
    draw_target,
    evaluation_batches,
    make_loader,
    reader_texts,
    training_batches,
)
from src.data.examples import load_data, parse_example
from src.models.pretrained import load_tokenizer


@pytest.fixture
def tokenizer(reference: Path):
    return load_tokenizer(str(reference / "t5"), "none")


@pytest.fixture
def data(reference: Path):
    return load_data(reference / "data.json")


def test_texts():
    contexts = [{"title": "T", "text": "a b"}, {"title": "U", "text": "c", "score": 1}]
    example = parse_example({"question": "Who?", "ctxs": contexts}, 0, "")
    both = ["question: Who? title: U context: c", "question: Who? title: T context: a b"]
    assert reader_texts(example, 5) == both
    assert reader_texts(example, 1) == both[:1]
    assert reader_texts(example, 1, use_title=False) == ["question: Who? context: c"]
    assert reader_texts(parse_example({"question": "Who?"}, 0, ""), 5) == ["question: Who?"]


def test_batches_equal_the_reference(reference, tokenizer, data):
    numbers = np.load(reference / "reader_t5.npz")
    dataset = ReaderDataset(data, n_context=5, with_target=True)
    items = [dataset[0, int(index)] for index in numbers["index"]]
    batch = ReaderCollator(tokenizer, text_maxlength=96)(items)
    assert batch["index"] == list(range(0, 16, 2))
    for name in ("input_ids", "attention_mask", "labels"):
        assert np.array_equal(batch[name].numpy(), numbers[name]), name


def test_no_end_token_on_passages_and_one_on_targets(tokenizer, data):
    dataset = ReaderDataset(data, n_context=5, with_target=True)
    items = [dataset[0, index] for index in range(24)]
    for length in (300, 20):  # with room to spare, and cut
        ids = ReaderCollator(tokenizer, length)(items)["input_ids"]
        assert not (ids == tokenizer.eos_token_id).any()
    full = ReaderCollator(tokenizer, 20)(items)["labels"]
    assert (full == tokenizer.eos_token_id).sum(dim=1).tolist() == [1] * 24
    cut = ReaderCollator(tokenizer, 20, answer_maxlength=2)(items)["labels"]
    assert cut.shape == (24, 2)
    assert (cut == tokenizer.eos_token_id).sum(dim=1).tolist() == [1] * 24
    assert (cut[:, 0] == full[:, 0]).all()
    padded = ReaderCollator(tokenizer, 20, answer_maxlength=40)(items)["labels"]
    assert padded.shape == (24, 40)
    assert (padded[:, full.shape[1] :] == -100).all()


def test_different_numbers_of_passages(tokenizer):
    def item(n: int):
        contexts = [{"title": f"t{i}", "text": f"text {i}"} for i in range(n)]
        example = parse_example({"question": "Who?", "ctxs": contexts}, n, "")
        return reader_texts(example, 5)

    from src.data.batches import ReaderItem

    items = [ReaderItem(n, item(n), None) for n in (0, 3, 1)]
    batch = ReaderCollator(tokenizer, 16)(items)
    assert batch["input_ids"].shape == (3, 3, 16)
    assert batch["attention_mask"].any(dim=2).sum(dim=1).tolist() == [1, 3, 1]
    assert "labels" not in batch
    alone = ReaderCollator(tokenizer, 16)(items[2:])
    assert (batch["input_ids"][2, :1] == alone["input_ids"][0]).all()


def test_targets_are_drawn_by_seed_epoch_and_example():
    raw = {"question": "?", "answers": ["a", "b", "c"]}
    examples = [parse_example(raw, index, "") for index in range(300)]
    draws = [draw_target(example, seed=0, epoch=0) for example in examples]
    assert draws == [draw_target(example, seed=0, epoch=0) for example in examples]
    assert draws != [draw_target(example, seed=0, epoch=1) for example in examples]
    assert draws != [draw_target(example, seed=1, epoch=0) for example in examples]
    assert min(Counter(draws)[answer] for answer in "abc") > 60  # of 300 in expectation 100
    given = parse_example({**raw, "target": "T"}, 0, "")
    assert {draw_target(given, 0, epoch) for epoch in range(20)} == {"T"}


@pytest.mark.parametrize(("n", "size", "processes"), [(10, 2, 1), (7, 3, 1), (5, 1, 4), (3, 4, 2)])
def test_training_order(n, size, processes):
    def stream(rank: int, world: int, batch: int, start: int = 0):
        return training_batches(n, batch, rank, world, seed=5, start=start)

    rows = [list(itertools.islice(stream(rank, processes, size), 12)) for rank in range(processes)]
    joint = [place for batches in zip(*rows, strict=True) for batch in batches for place in batch]
    # K processes with batches of B walk through what one process with K * B walks through,
    one = list(itertools.islice(stream(0, 1, size * processes), 12))
    assert joint == [place for batch in one for place in batch]
    # each epoch has every example once, in an order of its own,
    epochs = [joint[i : i + n] for i in range(0, len(joint) - n + 1, n)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, index) for index in range(n)]
    assert n < 5 or epochs[0] != [(0, index) for _, index in epochs[1]]
    # and a resumed run goes on where it was, also with other batches.
    seen = 5 * size * processes
    rest = list(itertools.islice(stream(0, 1, 1, start=seen), 6))
    assert [batch[0] for batch in rest] == joint[seen : seen + 6]


@pytest.mark.parametrize(("n", "size", "processes"), [(10, 4, 1), (10, 4, 2), (3, 1, 5), (9, 2, 3)])
def test_evaluation_order(n, size, processes):
    shares = [evaluation_batches(n, size, rank, processes) for rank in range(processes)]
    whole = evaluation_batches(n, size, 0, 1)
    dealt = [shares[i % processes][i // processes] for i in range(len(whole))]
    assert dealt == whole  # each batch as in one process, so that its numbers are the same
    assert [index for batch in whole for _, index in batch] == list(range(n))


def test_workers_give_the_same_batches_and_leave_the_random_state_alone(tokenizer, data):
    import torch

    collate = ReaderCollator(tokenizer, 32)
    dataset = ReaderDataset(data, 3, with_target=True)

    def read(workers: int) -> list[dict]:
        places = training_batches(24, 4, 0, 1, seed=0, start=0)
        return list(itertools.islice(iter(make_loader(dataset, places, collate, workers)), 8))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    alone, helped = read(0), read(2)
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(alone, helped, strict=True):
        assert one["index"] == other["index"]
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


def test_the_files_format_does_not_matter(tmp_path, reference, tokenizer, data):
    raw = json.loads((reference / "data.json").read_text())
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, raw)))
    lines = ReaderDataset(load_data(tmp_path / "data.jsonl"), 5, with_target=True)
    listed = ReaderDataset(data, 5, with_target=True)
    assert [lines[1, i] for i in range(24)] == [listed[1, i] for i in range(24)]
