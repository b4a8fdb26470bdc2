"""Probabilities, alternatives, and the curve over passages, each computed a second way."""

import json
import math

import numpy as np
import pytest
import torch

import test_reader
from src.data.batches import ReaderCollator, ReaderDataset, evaluation_batches, make_loader
from src.data.examples import load_data
from src.evaluation.answers import judge, measure_answers
from src.models.answering import Answer, answer_questions
from src.models.pretrained import load_tokenizer
from src.models.reader import FiDT5, load_reader
from src.options import GenerationOptions
from tests.conftest import REFERENCE

CPU = torch.device("cpu")
TOKENIZER = load_tokenizer(str(REFERENCE / "t5"), "none")


@pytest.fixture(scope="module", params=["t5", "legacy_reader/checkpoint/step-20"])
def reader(request) -> FiDT5:
    """One whose answers differ in length and depend on the passages."""
    torch.manual_seed(1)
    reader = load_reader(str(REFERENCE / request.param)).eval()
    with torch.no_grad():
        head = reader.t5.lm_head.weight.clone()
        head[1] += 0.02 * torch.randn_like(head[1])
        reader.t5.lm_head.weight = torch.nn.Parameter(head)
    return reader


def batches(n_context: int, size: int = 4) -> list[dict]:
    """Ragged: the reference's questions have from none to several passages."""
    data = load_data(REFERENCE / "data.json")
    dataset, collate = ReaderDataset(data, n_context), ReaderCollator(TOKENIZER, 48)
    order = evaluation_batches(len(data), size, 0, 1)
    return list(make_loader(dataset, order, collate, 0))


def answers(reader: FiDT5, n_context: int, **options) -> list[Answer]:
    found = answer_questions(
        reader, TOKENIZER, batches(n_context), CPU, options=GenerationOptions(**options)
    )
    return [answer for part in found for answer in part]


def teacher_forced(reader: FiDT5, batch: dict, tokens: torch.Tensor) -> list[float]:
    """Each answer's log-probability, by the loss's own forward pass."""
    sums = []
    for row in range(len(tokens)):
        ids = tokens[row, 1:].tolist()
        ids = ids[: ids.index(1) + 1] if 1 in ids else ids
        inputs = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        with torch.no_grad():
            loss, _ = reader(*inputs, torch.tensor([ids]))
        sums.append(-len(ids) * loss.item())
    return sums


@pytest.mark.parametrize("decoder", ["fast", "transformers"])
@pytest.mark.parametrize("n_best", [1, 3])
def test_log_probabilities_equal_teacher_forcing(reader, decoder, n_best):
    options = GenerationOptions(8, max(1, n_best), decoder, n_best)
    for batch in batches(3):
        inputs = batch["input_ids"], batch["attention_mask"]
        found = reader.answer(*inputs, options, reader.decoder(decoder))
        for rank in range(n_best):
            expected = teacher_forced(reader, batch, found.tokens[rank::n_best])
            assert np.allclose(found.log_probs[rank::n_best], expected, rtol=0, atol=1e-4)


def test_the_best_comes_first_and_is_the_answer_of_beam_search(reader):
    alone = answers(reader, 3, generation_max_length=8, num_beams=4)
    several = answers(reader, 3, generation_max_length=8, num_beams=4, n_best=4)
    for answer, best in zip(several, alone, strict=True):
        assert (answer.text, answer.log_probability) == (best.text, best.log_probability)
        candidates = [(answer.log_probability, answer.n_tokens)]
        candidates += [(log_probability, n) for _, log_probability, n in answer.alternatives]
        means = [log_probability / n for log_probability, n in candidates]
        assert len(means) == 4
        assert means == sorted(means, reverse=True)  # by which beam search ranks


def test_sizes_of_batches_do_not_matter(reader):
    for size in (1, 7):
        found = answer_questions(reader, TOKENIZER, batches(3, size), CPU)
        found = [answer.log_probability for part in found for answer in part]
        expected = [answer.log_probability for answer in answers(reader, 3)]
        assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"decoder": "transformers"}, {"num_beams": 2, "n_best": 2}])
def test_the_curve_equals_separate_runs(reader, more):
    curve = answers(reader, 5, generation_max_length=6, n_context_curve="1,2,5", **more)
    for n in (1, 2, 5):
        alone = answers(reader, n, generation_max_length=6, **more)
        assert [answer.by_context[str(n)] for answer in curve] == [a.text for a in alone]
    plain = answers(reader, 5, generation_max_length=6, **more)
    assert [answer.text for answer in curve] == [answer.text for answer in plain]
    found, expected = ([a.log_probability for a in part] for part in (curve, plain))
    assert np.allclose(found, expected, atol=1e-4)


@pytest.fixture
def run(tmp_path):
    """Tests a reader; returns the run's folder."""

    def run_test(name: str, *more):
        command = ["--eval_data", REFERENCE / "data.json", "--model_path", REFERENCE / "t5",
                   "--text_maxlength", 48, "--generation_max_length", 6, "--write_results",
                   "--checkpoint_dir", tmp_path, "--name", name, "--num_workers", 0]  # fmt: skip
        test_reader.main([str(word) for word in [*command, *more]])
        return tmp_path / name

    return run_test


def test_files(run):
    folder = run("a", "--n_context", 4, "--num_beams", 3, "--n_best", 2,
                 "--n_context_curve", "4,1,2", "--per_gpu_batch_size", 3)  # fmt: skip
    data = load_data(REFERENCE / "data.json")
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    lines = (folder / "final_output.txt").read_text().splitlines()
    assert [f"{row['id']}\t{' '.join(row['answer'].split())}" for row in records] == lines
    for row, example in zip(records, data, strict=True):
        n = row["n_tokens"]
        assert row["mean_log_probability"] == pytest.approx(row["log_probability"] / n)
        assert len(row["alternatives"]) == 1
        gold = example.get("answers") or []
        assert row.get("correct") == (judge(row["answer"], gold)[0] if gold else None)
    curve = json.loads((folder / "n_context_curve.json").read_text())
    assert list(curve) == ["1", "2", "4"]
    for n, values in curve.items():
        alone = run(f"n{n}", "--n_context", n, "--num_beams", 3)
        judged = measure_answers(str(alone / "final_output.txt"), data)
        assert values["questions"] == judged["questions"]
        measured = values["exact_match"], values["f1"]
        assert measured == pytest.approx((judged["exact match"], judged["F1"]))


def test_abstaining(run):
    plain = run("plain")
    rows = [json.loads(line) for line in (plain / "answers.jsonl").read_text().splitlines()]
    probabilities = [math.exp(row["log_probability"]) for row in rows]
    threshold = sorted(probabilities)[len(rows) // 2]
    sure = [probability >= threshold for probability in probabilities]
    assert 0 < sum(sure) < len(sure)
    careful = run("careful", "--abstain_below", repr(threshold))
    before, after = ((f / "final_output.txt").read_text().splitlines() for f in (plain, careful))
    assert after == [
        line if keeps else line.split("\t")[0] + "\t"
        for line, keeps in zip(before, sure, strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--n_best", "2"], "--n_best 2 needs as many beams, not --num_beams 1"),
        (["--n_context_curve", "1,9"], "--n_context_curve 1,9 goes beyond --n_context 1"),
        (["--n_context_curve", "1,x"], "'x' is not a whole number"),
        (["--abstain_below", "1.5"], "1.5 must be at least 0 and at most 1"),
    ],
)
def test_wrong_options(options, problem, capsys):
    with pytest.raises(SystemExit, match="2"):
        test_reader.main(options)
    assert problem in capsys.readouterr().err
