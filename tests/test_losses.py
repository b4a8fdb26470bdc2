"""Losses and their gradients equal Atlas', EMDR2's, and those of the definitions in float64."""

import json
import logging

import numpy as np
import pytest
import torch

import train_retriever
from src.data.batches import RetrieverDataset
from src.data.examples import load_data, skip_unscored
from src.models.losses import DISTILLATION_LOSSES
from src.models.retriever import open_retriever
from src.options import LOSSES, LossOptions
from src.runtime.errors import InputError
from tests.conftest import REFERENCE

FOLDER = REFERENCE.parent / "reference_targets"
KL = ("pdist", "loop", "scores_first", "probs_sum", "norms_sum", "norms_first")


@pytest.fixture(params=["cut", "padded"])
def numbers(request):
    return np.load(FOLDER / f"{request.param}.npz")


def check(name, batch, options, similarity, loss, gradient, tolerance=1e-5):
    """The loss and its gradient, alone and in a batch with a missing third passage."""
    scores = torch.tensor(similarity, requires_grad=True)
    value, _ = DISTILLATION_LOSSES[name](scores, batch, options, None)
    value.backward()
    assert value.item() == pytest.approx(float(loss), rel=tolerance, abs=1e-7)
    if gradient is not None:
        assert np.abs(scores.grad.numpy() - gradient).max() < 2e-5 * np.abs(gradient).max() + 1e-9


def make_batch(numbers, gold: np.ndarray, tokens: np.ndarray, n: int) -> dict:
    """As the collator makes them; with two passages of each question, the third is missing."""
    present = torch.ones(8, 3, dtype=torch.bool)
    present[:, n:] = False
    full = {"gold_scores": np.zeros((8, 3)), "token_log_probs": np.zeros((8, 3, 5))}
    full["gold_scores"][:, :n], full["token_log_probs"][:, :n] = gold, tokens
    batch = {key: torch.tensor(value, dtype=torch.float32) for key, value in full.items()}
    return batch | {"present": present, "token_mask": torch.tensor(numbers["labels"] != -100)}


def padded(gradient: np.ndarray) -> np.ndarray:
    return np.pad(gradient, ((0, 0), (0, 3 - gradient.shape[1])))


@pytest.mark.parametrize("n", [3, 2])
def test_losses_equal_the_reference(n, numbers):
    def of(name: str) -> np.ndarray:
        return numbers[name if n == 3 else f"two_{name}"]

    u = numbers["similarity"].astype(np.float32)
    for row, (gold_temperature, temperature) in enumerate(numbers["temperatures"].tolist()):
        options = LossOptions("", temperature, gold_temperature)
        for target in KL:
            batch = make_batch(numbers, of(target), of("token_logprob"), n)
            gradient = padded(of(f"kl_{target}_grad")[row])
            check("kl", batch, options, u, of(f"kl_{target}_loss")[row], gradient)
        batch = make_batch(numbers, of("pdist"), of("emdr_token_logprob")[row], n)
        check("emdr2", batch, options, u, of("emdr_loss")[row], padded(of("emdr_grad")[row]))
        batch = make_batch(numbers, of("pdist"), of("token_logprob"), n)
        loss, gradient = (of(f"plain_emdr_sequence_{part}")[row] for part in ("loss", "grad"))
        check("emdr2_sequence", batch, options, u, loss, padded(gradient))
    batch = make_batch(numbers, of("scores_first"), of("token_logprob"), n)
    check(
        "emdr2",
        batch,
        LossOptions(),
        u,
        of("emdr2_official_loss"),
        padded(of("emdr2_official_grad")),
    )
    check("mse", batch, LossOptions(), u, of("plain_mse_loss"), padded(of("plain_mse_grad")))
    for row, gamma in enumerate(numbers["gammas"].tolist()):
        loss, gradient = (of(f"plain_margin_{part}")[row] for part in ("loss", "grad"))
        check("margin", batch, LossOptions(margin=gamma), u, loss, padded(gradient))
    batch = make_batch(numbers, of("pdist"), of("token_logprob"), n)
    value, count = DISTILLATION_LOSSES["kl"](torch.tensor(u), batch, LossOptions(), None)
    sums = value * count / 8  # EMDR2's alternative is averaged over questions
    assert sums.item() == pytest.approx(float(of("emdr2_official_kl_loss")), rel=1e-5)


def test_contrastive_by_hand():
    generator = torch.Generator().manual_seed(0)
    scores, negatives = (torch.randn(4, n, generator=generator) for n in (3, 2))
    gold = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    present = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()
    batch = {"gold_scores": gold, "present": present}
    loss, count = DISTILLATION_LOSSES["contrastive"](
        scores, batch, LossOptions(temperature=0.5), negatives
    )
    expected = []
    for row in (0, 1, 3):
        own = [(2 * scores[row, n]).exp().item() for n in range(3) if present[row, n]]
        right = [(2 * scores[row, n]).exp().item() for n in range(3) if gold[row, n]]
        others = (2 * negatives[row]).exp().sum().item()
        expected.append(-np.log(sum(right) / (sum(own) + others)))
    assert count == 3
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_questions_without_passages_have_no_gradient(name):
    scores = torch.zeros(2, 3, requires_grad=True)
    batch = {"gold_scores": torch.zeros(2, 3), "present": torch.zeros(2, 3, dtype=torch.bool)}
    batch |= {"token_log_probs": torch.zeros(2, 3, 4), "token_mask": torch.ones(2, 4).bool()}
    loss, _ = DISTILLATION_LOSSES[name](scores, batch, LossOptions(), None)
    loss.backward()
    assert loss.item() == 0
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_count_by_their_elements(name):
    """So that processes with a part each train as one with all of it (`training/loop.py`)."""
    generator = torch.Generator().manual_seed(3)
    scores, gold = torch.randn(2, 6, 4, generator=generator)
    present = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 4])[:, None]
    batch = {"gold_scores": gold, "present": present}
    batch["token_log_probs"] = -torch.rand(6, 4, 5, generator=generator)
    batch["token_mask"] = torch.arange(5) < torch.tensor([5, 2, 3, 1, 5, 4])[:, None]
    loss, options = DISTILLATION_LOSSES[name], LossOptions()
    whole, count = loss(scores, batch, options, None)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = {key: value[rows] for key, value in batch.items()}
        parts.append(loss(scores[rows], part, options, None))
    assert sum(n for _, n in parts) == count
    joint = sum(value * n for value, n in parts) / count
    assert joint.item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_table_has_the_names_of_the_options():
    assert tuple(DISTILLATION_LOSSES) == LOSSES


# --- from files


@pytest.fixture
def data(tmp_path):
    """Questions whose passages have several scores."""
    rng = np.random.default_rng(0)
    rows = json.loads((REFERENCE / "data.json").read_text())[:8]
    for row in rows:
        for n, context in enumerate(row["ctxs"]):
            values = {
                "attention": rng.normal(),
                "perplexity": rng.normal(),
                "has_answer": float(n < 2),
            }
            context |= {"scores": values, "token_log_probs": rng.normal(size=3).tolist()}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_target_is_read_by_name(data):
    rows = json.loads(data.read_text())
    for target in ("attention", "perplexity"):
        examples = load_data(data, needs_scores=5, target=target)
        item = RetrieverDataset(examples, 5)[0, 3]
        scores = [context["scores"][target] for context in rows[3]["ctxs"]]
        assert item.scores == sorted(scores, reverse=True)
    assert load_data(data, needs_scores=5, target="leave_one_out").unscored == list(range(8))


def test_positives_and_negatives_are_drawn_anew_each_epoch(data):
    examples = load_data(data, needs_scores=5, target="has_answer")
    dataset = RetrieverDataset(examples, 3, loss="contrastive", seed=1)
    drawn = [dataset[epoch, 2] for epoch in range(12)]
    assert drawn == [dataset[epoch, 2] for epoch in range(12)]
    assert all(item.scores == [1.0, 0.0, 0.0] for item in drawn)
    assert len({item.passages[0] for item in drawn}) == 2
    assert len({tuple(sorted(item.passages[1:])) for item in drawn}) == 3


def test_dprs_training_files(tmp_path):
    passage = {"title": "A", "text": "b"}
    row = {"question": "who?", "answers": ["b"], "positive_ctxs": [passage],
           "negative_ctxs": [passage] * 2, "hard_negative_ctxs": [passage]}  # fmt: skip
    (tmp_path / "dpr.json").write_text(json.dumps([row]))
    examples = load_data(tmp_path / "dpr.json", needs_scores=4, target="has_answer")
    item = RetrieverDataset(examples, 4, loss="contrastive")[0, 0]
    assert item.scores == [1.0, 0.0, 0.0, 0.0]


def test_questions_without_a_positive_are_skipped(data):
    rows = json.loads(data.read_text())
    for row in rows[2:]:
        for context in row["ctxs"]:
            context["scores"]["has_answer"] = 0.0
    data.write_text(json.dumps(rows))
    examples = load_data(data, needs_scores=5, target="has_answer")
    assert examples.unscored == list(range(2, 8))
    with pytest.raises(InputError, match="has an answer by hasanswer, which passage_retrieval"):
        skip_unscored(examples, [list(range(8))], logging.getLogger("fid"), "has_answer")
    with pytest.raises(InputError, match=r"by perplexity; .* --targets perplexity"):
        skip_unscored(examples, [list(range(8))], logging.getLogger("fid"), "perplexity")


@pytest.mark.parametrize("wrong", [None, [], [1.0, "x", 2.0], [1.0, 2.0], [float("nan")] * 3])
def test_token_log_probs_that_are_none(wrong, data):
    rows = json.loads(data.read_text())
    rows[1]["ctxs"][0]["token_log_probs"] = wrong
    data.write_text(json.dumps(rows))
    examples = load_data(data, needs_scores=5, target="attention")
    with pytest.raises(InputError, match=r"--targets perplexity --token_log_probs"):
        RetrieverDataset(examples, 5, loss="emdr2")[0, 1]


@pytest.mark.parametrize("loss", LOSSES)
def test_training_with_each_loss(loss, data, tmp_path):
    more = ["--target", "perplexity"] if loss != "contrastive" else ["--in_batch_negatives"]
    train_retriever.main(
        ["--train_data", str(data), "--eval_data", str(data), "--n_context", "3", "--loss", loss,
         "--model_path", str(REFERENCE / "legacy_retriever_mask_mean"), "--total_steps", "3",
         "--tokenizer", str(REFERENCE / "bert"), "--checkpoint_dir", str(tmp_path), "--name", "r",
         "--eval_freq", "3", "--per_gpu_batch_size", "4", "--num_workers", "0", *more]
    )  # fmt: skip
    rows = [json.loads(row) for row in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.isfinite(losses).all()
    assert np.isfinite(rows[-1]["dev/loss"])


def train(data, tmp_path, *more):
    train_retriever.main(
        ["--train_data", str(data), "--eval_data", str(data), "--n_context", "5", "--lr", "0.01",
         "--model_path", str(REFERENCE / "legacy_retriever_mask_mean"), "--total_steps", "6",
         "--tokenizer", str(REFERENCE / "bert"), "--checkpoint_dir", str(tmp_path), "--name", "r",
         "--eval_freq", "1", "--save_freq", "1", "--num_workers", "0", *more]
    )  # fmt: skip


@pytest.mark.parametrize("marks", ["scores", "hasanswer", "positive_ctxs"])
def test_recall_picks_the_best(marks, data, tmp_path, monkeypatch):
    """Recall on dev is that of passages sorted by the checkpoint's own embeddings."""
    rows = json.loads(data.read_text())
    for number, row in enumerate(rows):
        for n, context in enumerate(row["ctxs"]):
            context["scores"]["has_answer"] = float(n == number % 4)
            if marks != "scores":
                context["hasanswer"] = bool(context["scores"].pop("has_answer"))
        if marks == "positive_ctxs":
            contexts = row.pop("ctxs")
            row["positive_ctxs"] = [c for c in contexts if c["hasanswer"]]
            row["negative_ctxs"] = [c for c in contexts if not c["hasanswer"]]
    data.write_text(json.dumps(rows))
    target = "has_answer" if marks == "positive_ctxs" else "attention"
    train(data, tmp_path, "--target", target, "--best_by", "recall@2", "--dropout", "0")
    lines = [json.loads(row) for row in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    recalls = {row["step"]: row["dev/recall@2"] for row in lines if "dev/loss" in row}
    assert len(set(recalls.values())) > 1
    found, checkpoints = {}, tmp_path / "r" / "checkpoint"
    for name in ("best_dev", *(f"step-{step}" for step in recalls)):
        retriever, tokenizer = open_retriever(str(checkpoints / name), "none")
        hits = []
        for row in rows:
            contexts = row.get("ctxs") or row["positive_ctxs"] + row["negative_ctxs"]
            texts = [f"title: {c['title']} context: {c['text']}" for c in contexts]
            sides = ([f"question: {row['question']}"], 40), (texts, 200)
            vectors = []
            for (side, length), is_question in zip(sides, (True, False), strict=True):
                tokens = tokenizer(side, truncation=True, max_length=length, padding=True,
                                   return_tensors="pt")  # fmt: skip
                embed = retriever.embed_questions if is_question else retriever.embed_passages
                vectors.append(embed(tokens["input_ids"], tokens["attention_mask"].bool()))
            order = (vectors[1] @ vectors[0][0]).argsort(descending=True)[:2]
            has = [
                c["hasanswer"] if "hasanswer" in c else c["scores"]["has_answer"] for c in contexts
            ]
            hits.append(any(has[n] for n in order))
        found[name] = np.mean(hits)
    assert {f"step-{step}": value for step, value in recalls.items()} == pytest.approx(
        {name: value for name, value in found.items() if name != "best_dev"}
    )
    assert found["best_dev"] == max(recalls.values())


def test_recall_without_marks(data, tmp_path, capsys):
    rows = json.loads(data.read_text())
    for row in rows:
        del row["ctxs"][0]["scores"]["has_answer"]
    data.write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match="2"):
        train(data, tmp_path, "--best_by", "recall@1")
    assert f"error: {data}: recall needs passages that are marked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--loss", "mse", "--in_batch_negatives"], "--loss mse has no in-batch negatives"),
        (["--negatives", "1"], "--loss kl does not use --negatives"),
        (["--loss", "contrastive", "--negatives", "1", "--n_context", "3"], "leave out --n_cont"),
        (["--loss", "contrastive", "--target", "attention"], "learns from has_answer"),
        (["--loss", "kl", "--margin", "1"], "--loss kl does not use --margin"),
        (
            ["--best_by", "recall@4", "--n_context", "4"],
            "needs more than 4 passages to choose from",
        ),
        (["--best_by", "recall@0"], "'recall@0' is not loss, inversions, avg_top1 or recall@k"),
        (["--loss", "emdr2", "--target_temperature", "2"], "does not use --target_temperature"),
    ],
)
def test_wrong_options(options, problem, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_retriever.main(options)
    assert problem in capsys.readouterr().err
