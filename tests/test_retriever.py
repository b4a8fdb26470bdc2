"""The retriever's numbers equal the reference's, and those of the slow way."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import train_retriever
from src.data.batches import RetrieverCollator, RetrieverDataset, TextCollator
from src.data.examples import load_data
from src.evaluation.rankings import judge_ranks
from src.models.embedder import TextEmbedder
from src.models.losses import in_batch_negatives, kl_divergence, retriever_loss
from src.models.pretrained import load_tokenizer
from src.models.retriever import (
    check_settings,
    gold_ranks,
    load_retriever,
    similarities,
    start_retriever,
)
from src.runtime.device import autocast
from src.runtime.errors import InputError
from tests.test_gpu_search import Waits

NAMES = ["mask_mean", "cls", "nomask_mean"]


@pytest.fixture
def tokenizer(reference: Path):
    return load_tokenizer(str(reference / "bert"), "none")


def load(reference: Path, name: str, dropout: float = 0.0):
    return load_retriever(str(reference / f"legacy_retriever_{name}"), dropout)


def collator(retriever, tokenizer) -> RetrieverCollator:
    config = retriever.config
    return RetrieverCollator(
        TextCollator(tokenizer, config.question_maxlength, not config.apply_question_mask),
        TextCollator(tokenizer, config.passage_maxlength, not config.apply_passage_mask),
    )


def make_batch(reference: Path, retriever, tokenizer, indices=range(6)) -> dict:
    dataset = RetrieverDataset(load_data(reference / "data.json"), n_context=5)
    return collator(retriever, tokenizer)([dataset[0, index] for index in indices])


# --- the reference's numbers


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_reference(name, reference, tokenizer):
    numbers = np.load(reference / f"retriever_{name}.npz")
    retriever = load(reference, name)
    batch = make_batch(reference, retriever, tokenizer)
    L = batch["question_ids"].shape[1]  # with masks, padding goes to the batch's longest only
    assert np.array_equal(batch["question_ids"].numpy(), numbers["question_ids"][:, :L])
    assert not numbers["question_mask"][:, L:].any()
    L = batch["passage_ids"].shape[2]
    assert np.array_equal(batch["passage_ids"].numpy(), numbers["passage_ids"][:, :, :L])
    assert np.array_equal(batch["passage_mask"].numpy(), numbers["passage_mask"][:, :, :L])
    assert L == 64 or name == "mask_mean"
    assert np.abs(batch["gold_scores"].numpy() - numbers["gold_score"]).max() < 1e-6

    questions, passages = retriever(
        batch["question_ids"], batch["question_mask"], batch["passage_ids"], batch["passage_mask"]
    )
    assert np.abs(questions.detach().numpy() - numbers["question_embedding"]).max() < 1e-5
    passages_flat = passages.detach().flatten(0, 1).numpy()
    assert np.abs(passages_flat - numbers["passage_embedding"]).max() < 1e-5
    scores = similarities(questions, passages)
    assert np.abs(scores.detach().numpy() - numbers["score"]).max() < 1e-4
    loss, count, _ = retriever_loss(retriever, batch)
    assert loss.item() == pytest.approx(float(numbers["loss"]), abs=1e-6)
    assert count == 30
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(retriever.parameters(), 1e9)
    assert norm.item() == pytest.approx(float(numbers["grad_norm"]), abs=1e-6)


def test_metrics_equal_the_reference(reference):
    record = json.loads((reference / "retriever_metrics.json").read_text())
    scores = torch.tensor(record["scores"])
    ranks = gold_ranks(scores, torch.ones_like(scores).bool())
    found = [judge_ranks(row, [], (1, 2, 5), ()) for row in ranks]
    assert [row["inversions"] for row in found] == record["inversions"]
    for k in (1, 2, 5):
        shares = [row[f"avg_top{k}"] for row in found]
        assert shares == pytest.approx(record["avg_topk"][str(k)])
        assert [row[f"idx_top{k}"] for row in found] == record["idx_topk"][str(k)]


# --- second ways to compute the same


def test_training_embeds_passages_in_groups_of_like_length(reference, tokenizer, monkeypatch):
    """Embeddings and gradients are those of all passages padded to one length."""
    texts = [f"title: a context: {'a tidal river ' * n}" for n in (9, 1, 4, 9, 2, 30)]
    ids, mask = TextCollator(tokenizer, 64, fixed_length=False)(texts)
    questions = ids[:2, :9], mask[:2, :9]
    widths, results = [], []
    for groups in (True, False):
        retriever = load(reference, "mask_mean").eval()
        if groups:
            monkeypatch.setattr("src.models.retriever.MIN_TOKENS", {"cpu": 1})
            retriever.model.register_forward_pre_hook(
                lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]),
                with_kwargs=True,
            )
            passages = retriever(*questions, ids.view(2, 3, -1), mask.view(2, 3, -1))[1]
        else:
            passages = retriever.embed_passages(ids, mask).view(2, 3, -1)
        passages.pow(2).sum().backward()
        gradients = [p.grad for p in retriever.parameters() if p.grad is not None]
        results.append([passages.detach(), *gradients])
    assert widths[:-1] == sorted(set(mask.sum(dim=1).tolist()), reverse=True)
    for ours, slow in zip(*results, strict=True):
        assert torch.allclose(ours, slow, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_embedder_gives_each_texts_own_embedding_in_order(name, reference, tokenizer):
    retriever = load(reference, name).eval()
    texts = [f"title: {n} context: {'a tidal river ' * (n * 7 % 5)}" for n in range(20)]
    embed = TextEmbedder(retriever, tokenizer, "passages", 32, 3, torch.device("cpu"))
    sizes = []
    retriever.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with Waits() as waits:
        embedded = embed(texts)
    assert waits.n == 0
    assert embedded.dtype == np.float32
    assert embed([]).shape == (0, embedded.shape[1])
    if name == "mask_mean":  # short texts come more at a time
        assert all(n * length <= 3 * 32 for n, length in sizes)
        assert max(n for n, _ in sizes) > 3
    collate = TextCollator(tokenizer, 32, fixed_length=name != "mask_mean")
    for text, row in zip(texts, embedded, strict=True):
        with torch.no_grad():
            alone = retriever.embed_passages(*collate([text]))
        assert np.abs(row - alone.numpy()).max() < 1e-5


def slow_loss(scores, gold, present, negatives=None) -> float:
    """The loss question by question, passage by passage, in double precision."""
    total = 0.0
    for b in range(len(scores)):
        own = [n for n in range(scores.shape[1]) if present[b, n]]
        target = torch.softmax(gold[b, own].double(), dim=0)
        all_scores = scores[b, own].double()
        if negatives is not None:
            others = [float(value) for value in negatives[b] if value > -np.inf]
            all_scores = torch.cat([all_scores, torch.tensor(others).double()])
        log_likelihood = torch.log_softmax(all_scores, dim=0)[: len(own)]
        total += float((target * (target.log() - log_likelihood)).sum())
    return total / int(present.sum())


@pytest.mark.parametrize("with_negatives", [False, True])
def test_loss_of_ragged_batches(with_negatives):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 5, generator=generator, requires_grad=True)
    gold = torch.randn(4, 5, generator=generator) * 3
    present = torch.tensor([[n < limit for n in range(5)] for limit in (5, 1, 3, 4)])
    negatives = None
    if with_negatives:
        negatives = torch.randn(4, 7, generator=generator)
        negatives[1, 2:] = -torch.inf
        negatives[2] = -torch.inf
    batch = {"gold_scores": gold, "present": present}
    loss, _ = kl_divergence(scores, batch, negatives=negatives)
    assert loss.item() == pytest.approx(slow_loss(scores, gold, present, negatives), abs=1e-6)
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[~present] == 0).all()


@pytest.mark.parametrize(
    ("gold", "present", "expected"),
    [([500.0, -500.0], [True, True], np.log(2) / 2), ([0.0, 0.0], [False, False], 0.0)],
    ids=["a sure reader", "no passages"],
)
def test_extreme_losses_have_finite_gradients(gold, present, expected):
    scores = torch.zeros(1, 2, requires_grad=True)
    batch = {"gold_scores": torch.tensor([gold]), "present": torch.tensor([present])}
    loss, _ = kl_divergence(scores, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert torch.isfinite(scores.grad).all()


def test_negatives_by_hand():
    questions = torch.eye(4)[:3]
    passages = torch.arange(24.0).view(3, 2, 4)
    keys = torch.tensor([[1, 2], [2, 3], [4, 0]])
    present = torch.tensor([[True, True], [True, True], [True, False]])
    negatives = in_batch_negatives(questions, passages, keys, present)
    counted = negatives > -torch.inf
    # Passage 2 is the first question's own, wherever it stands; the last one is not there at all.
    assert counted.tolist() == [
        [False, False, False, True, True, False],
        [True, False, False, False, True, False],
        [True, True, True, True, False, False],
    ]
    expected = (questions @ passages.flatten(0, 1).T / 2)[counted]
    assert torch.equal(negatives[counted], expected)


def test_without_projection_it_is_bert_and_a_mean(tmp_path, tokenizer):
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=700, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32,
        )
    ).eval()  # fmt: skip
    bert.save_pretrained(tmp_path)
    for retriever in (
        load_retriever(str(tmp_path)).eval(),
        start_retriever(str(tmp_path), projection=False).eval(),
    ):
        assert retriever.config.indexing_dimension == 24
        texts = ["how long is the river?", "a"]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = bert(**tokens).last_hidden_state
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            embedded = retriever.embed_questions(ids, mask.bool())
        for row, (state, n) in enumerate(zip(states, mask.sum(dim=1), strict=True)):
            assert torch.allclose(embedded[row], state[:n].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_similarities_are_computed_in_float32(precision):
    torch.manual_seed(0)
    questions, passages = torch.randn(2, 64), torch.randn(2, 5, 64)
    keys, present = torch.arange(10).view(2, 5), torch.ones(2, 5).bool()
    results = []
    for used in ("fp32", precision):
        with autocast(torch.device("cpu"), used):
            negatives = in_batch_negatives(questions, passages, keys, present)
            results.append((similarities(questions, passages), negatives))
    for full, half in zip(*results, strict=True):
        assert torch.equal(full, half)


def test_means_over_tokens_are_computed_in_float32(reference, tokenizer, monkeypatch):
    """Also without a projection, where autocast's format is that of the hidden states."""
    retriever = load_retriever(str(reference / "legacy_retriever_mask_mean")).eval()
    retriever.config.projection = False
    ids, mask = TextCollator(tokenizer, 64, fixed_length=False)(["a tidal river " * 15, "a"])
    states = torch.randn(2, ids.shape[1], 24).bfloat16()
    output = SimpleNamespace(last_hidden_state=states)
    monkeypatch.setattr(retriever.model, "forward", lambda **_: output)
    with autocast(torch.device("cpu"), "bf16"):
        embedded = retriever.embed_passages(ids, mask)
    for row, state, n in zip(embedded, states.float(), mask.sum(dim=1), strict=True):
        assert torch.allclose(row, state[:n].mean(dim=0), atol=1e-6)


def distil(reference: Path, folder: Path, train: list, dev: list, *more: str) -> list[dict]:
    """One update on all of the training data, so small that nothing changes; the metrics."""
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "dev.json").write_text(json.dumps(dev))
    options = [
        "--train_data", folder / "train.json", "--eval_data", folder / "dev.json",
        "--model_path", reference / "legacy_retriever_mask_mean", "--tokenizer",
        reference / "bert", "--n_context", 4, "--per_gpu_batch_size", len(train), "--lr", 1e-12,
        "--dropout", 0, "--total_steps", 1, "--eval_freq", 1, "--checkpoint_dir", folder,
        "--name", "run", "--num_workers", 0, *more,
    ]  # fmt: skip
    train_retriever.main(list(map(str, options)))
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [[], ["--in_batch_negatives"]], ids=["own", "negatives"])
def test_the_dev_loss_is_the_training_loss(more, reference, tmp_path):
    examples = json.loads((reference / "data.json").read_text())[:6]
    examples[1]["ctxs"] = examples[1]["ctxs"][:2]
    rows = distil(reference, tmp_path, examples, examples, *more)
    values = {name: value for row in rows for name, value in row.items()}
    assert values["dev/loss"] == pytest.approx(values["train/loss"], rel=1e-5)


# --- settings, saving and loading


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_retrievers_are_the_same(name, reference, tmp_path):
    retriever = load(reference, name)
    retriever.save_pretrained(tmp_path)
    loaded = load_retriever(str(tmp_path), 0.0)
    weights, loaded_weights = retriever.state_dict(), loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    assert {key.split(".")[0] for key in weights} == {"model", "proj", "norm"}
    assert all(torch.equal(weights[key], loaded_weights[key]) for key in weights)
    for setting in ("indexing_dimension", "extract_cls", "apply_passage_mask", "projection",
                    "question_maxlength", "passage_maxlength", "apply_question_mask"):  # fmt: skip
        assert getattr(loaded.config, setting) == getattr(retriever.config, setting), setting


@pytest.fixture
def bert_config(tmp_path: Path) -> str:
    shape = {
        "model_type": "bert", "vocab_size": 700, "hidden_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return str(tmp_path / "config.json")


def test_settings_do_what_they_say(bert_config, tmp_path):
    retriever = start_retriever(
        bert_config, 0.23, indexing_dimension=10, extract_cls=True, apply_passage_mask=False
    )
    assert retriever.proj.weight.shape == (10, 24)
    retriever.save_pretrained(tmp_path / "saved")
    loaded = load_retriever(str(tmp_path / "saved"), 0.23)
    assert loaded.proj.weight.shape == (10, 24)
    assert torch.equal(loaded.proj.weight, retriever.proj.weight)
    config = loaded.config
    assert (config.extract_cls, config.apply_passage_mask) == (True, False)
    assert config.apply_question_mask
    rates = {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.23}
    with pytest.raises(InputError, match=r"indexing_dimension 10, not 256"):
        check_settings(config, {"indexing_dimension": 256}, "x")
    check_settings(config, {"indexing_dimension": 10, "extract_cls": True}, "x")


def test_impossible_settings(bert_config):
    with pytest.raises(InputError, match=r"hidden size 24, not 10.*--no_projection"):
        start_retriever(bert_config, projection=False, indexing_dimension=10)
    with pytest.raises(InputError, match=r"at most 256 tokens, not 300"):
        start_retriever(bert_config, passage_maxlength=300)
