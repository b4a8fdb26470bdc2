"""From a shell, on real text: a fresh reader learns 64 questions; testing agrees with training."""

import csv
import json
import random
import re
from pathlib import Path

import pytest

from tests.conftest import run_well
from tests.make_models import make_t5_config, make_tokenizer

N_CONTEXT = 5


def make_inputs(xquad: Path, folder: Path) -> list[dict]:
    """64 questions with their own passages and others, 5 in all; a tokenizer; a T5's shape."""
    with open(xquad / "passages.tsv", newline="") as file:
        passages = {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}
    questions = json.loads((xquad / "questions.json").read_text())
    rng = random.Random(0)
    chosen = rng.sample(questions, 64)
    for question in chosen:
        own = question["gold_passages"]
        others = rng.sample([name for name in passages if name not in own], N_CONTEXT)
        names = (own + others)[:N_CONTEXT]
        rng.shuffle(names)
        question["ctxs"] = [passages[name] for name in names]
    (folder / "questions.json").write_text(json.dumps(chosen))
    texts = [f"question: {question['question']}" for question in questions]
    texts += [f"title: {row['title']} context: {row['text']}" for row in passages.values()]
    make_tokenizer(texts, 4000, folder / "tokenizer")
    make_t5_config(
        folder / "config.json",
        vocab_size=4096,
        d_model=256,
        d_kv=64,
        d_ff=768,
        num_layers=2,
        num_decoder_layers=3,
    )
    return chosen


def exact_matches(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"exact_?\s?match ([\d.]+)", log)]


@pytest.mark.slow  # minutes
def test_a_reader_from_nothing_learns_real_questions(xquad, tmp_path):
    make_inputs(xquad, tmp_path)
    data = tmp_path / "questions.json"
    common = [
        "--eval_data", data, "--n_context", N_CONTEXT, "--text_maxlength", 200,
        "--per_gpu_batch_size", 8, "--checkpoint_dir", tmp_path, "--generation_max_length", 30,
    ]  # fmt: skip
    training = [
        "train_reader.py", "--train_data", data, "--model_config", tmp_path / "config.json",
        "--tokenizer", tmp_path / "tokenizer", "--eval_freq", 50, "--save_freq", 50,
        "--lr", 1e-3, "--optim", "adamw", "--weight_decay", 0.01, "--dropout", 0,
        "--scheduler", "linear", "--scheduler_steps", 200, "--warmup_steps", 20,
        "--name", "reader", *common,
    ]  # fmt: skip
    run = tmp_path / "reader"

    log = run_well(*training, "--total_steps", 150, OMP_NUM_THREADS="2")
    assert "training on 64 of 64 examples" in log
    assert re.search(r"model +5\.\d+M parameters", log)
    best = max(exact_matches(log))
    assert best >= 100 * 60 / 64

    tested = run_well(
        "test_reader.py", "--model_path", run / "checkpoint/best_dev", "--name", "test",
        "--write_results", *common, OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert exact_matches(tested) == [best]
    answers = (tmp_path / "test" / "final_output.txt").read_text().splitlines()
    assert len(answers) == 64

    resumed = run_well(*training, "--total_steps", 152, OMP_NUM_THREADS="2")
    assert f"resuming from {run}/checkpoint/step-150" in resumed
    assert "total_steps was 150 and is 152" in resumed
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 153))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[150] == pytest.approx(losses[149], abs=0.3)  # it goes on, it does not begin
    assert losses[0] > 5
