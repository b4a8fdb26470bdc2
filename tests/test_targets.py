"""Targets equal the numbers that Atlas computed, or that their definitions give in float64."""

import json

import numpy as np
import pytest
import torch

import test_reader
from src.evaluation.answers import has_answer
from src.models.answering import answer_questions
from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from src.models.scores import SCORES
from src.models.targets import (
    AGGREGATES,
    attribution,
    cross_attention,
    questions,
    score_passages,
)
from src.options import TARGETS, GenerationOptions, TargetOptions
from src.runtime.errors import InputError
from src.tools import targets as targets_tool
from tests.conftest import REFERENCE

FOLDER = REFERENCE.parent / "reference_targets"
NUMBERS = {
    "attention_all": "scores_avg",
    "attention_max_heads": "plain_agg_max_heads_first",
    "attention_max_layers": "plain_agg_max_layers_first",
    "attention_max_tokens": "plain_agg_max_tokens_first",
    "attention_first_layer": "plain_agg_first_layer_first",
    "attention_last_layer": "plain_agg_last_layer_first",
    "attention_mass": "plain_prob_mass_first",
    "attention_mass_all": "plain_prob_mass_all",
    "attention_norm": "plain_norm_mass_all",
    "perplexity": "pdist",
    "leave_one_out": "loop",
    "token_log_probs": "token_logprob",
}


@pytest.fixture(scope="module")
def reader():
    """The reference's T5 without its position table."""
    return load_reader(str(REFERENCE / "t5")).eval()


@pytest.fixture(scope="module", params=["cut", "padded"])
def numbers(request):
    return np.load(FOLDER / f"{request.param}.npz")


def real_labels(numbers) -> list[torch.Tensor]:
    return [torch.tensor(row[row != -100]).long() for row in numbers["labels"]]


def targets(reader, numbers, n_passages: int, batch_size: int) -> dict[str, np.ndarray]:
    ids = torch.tensor(numbers["input_ids"][:, :n_passages])
    mask = torch.tensor(numbers["attention_mask"][:, :n_passages]).bool()
    found: dict[str, list] = {}
    answers = iter(real_labels(numbers))
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        with torch.no_grad():
            encoded = reader.encode(ids[rows], mask[rows])
        for question in questions(encoded, mask[rows]):
            names = [*AGGREGATES, "perplexity", "leave_one_out"]
            scores = score_passages(reader.decoder(), question, next(answers), names)
            for name, values in scores.items():
                found.setdefault(name, []).append(values)
    width = numbers["labels"].shape[1]
    tokens = found.pop("token_log_probs")
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in tokens]
    found["token_log_probs"] = padded
    return {name: torch.stack(values).numpy() for name, values in found.items()}


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("n_passages", [3, 2])
def test_targets_equal_the_reference(n_passages, batch_size, reader, numbers):
    found = targets(reader, numbers, n_passages, batch_size)
    assert found.keys() == NUMBERS.keys()
    for name, theirs in NUMBERS.items():
        expected = numbers[theirs if n_passages == 3 else f"two_{theirs}"]
        assert np.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name
    scaled = numbers["norms_sum" if n_passages == 3 else "two_norms_sum"]  # Atlas divides by 256
    assert np.allclose(found["attention_norm"] / 256, scaled, rtol=1e-4, atol=1e-7)


def test_leave_one_out_equals_reading_without_the_passage(reader, numbers):
    """Attribution, too; by readings that never see the passage."""
    ids, mask = torch.tensor(numbers["input_ids"]), torch.tensor(numbers["attention_mask"]).bool()
    with torch.no_grad():
        found = questions(reader.encode(ids, mask), mask)
    for row, (question, answer) in enumerate(zip(found, real_labels(numbers), strict=True)):
        names = ["leave_one_out"]
        losses = score_passages(reader.decoder(), question, answer, names)["leave_one_out"]
        drops = attribution(reader.decoder(), question, answer)
        with torch.no_grad():
            loss, _ = reader(ids[row : row + 1], mask[row : row + 1], answer[None])
            for n in range(3):
                rest = [other for other in range(3) if other != n]
                without, _ = reader(
                    ids[row : row + 1, rest], mask[row : row + 1, rest], answer[None]
                )
                assert losses[n].item() == pytest.approx(without.item(), abs=1e-5)
                assert drops[n].item() == pytest.approx(
                    len(answer) * (without - loss).item(), abs=1e-4
                )


def test_a_question_with_one_passage(reader, numbers):
    ids = torch.tensor(numbers["input_ids"][:1, :1])
    mask = torch.tensor(numbers["attention_mask"][:1, :1]).bool()
    with torch.no_grad():
        (question,) = questions(reader.encode(ids, mask), mask)
    names = [*AGGREGATES, "perplexity", "leave_one_out"]
    found = score_passages(reader.decoder(), question, real_labels(numbers)[0], names)
    assert all(values.isfinite().all() for values in found.values())
    assert found["attention_mass"].item() == pytest.approx(1)


def test_the_position_table_counts(numbers):
    """Of a legacy reader: `perplexity` equals the loss on the passage alone."""
    reader = load_reader(str(REFERENCE / "t5"), use_position_table=True).eval()
    ids, mask = torch.tensor(numbers["input_ids"]), torch.tensor(numbers["attention_mask"]).bool()
    with torch.no_grad():
        encoded = reader.encode(ids, mask)
        expected = reader.answer(ids, mask, GenerationOptions(4), score="attention").scores
    answers = real_labels(numbers)
    for row, question in enumerate(questions(encoded, mask)):
        names = ["attention_mass", "perplexity", "leave_one_out"]
        found = score_passages(reader.decoder(), question, answers[row], names)
        a = cross_attention(reader.decoder(), question, answers[row], False)
        first = a.mean(a.scores[:, :, 0]).mean(dim=(0, 1))
        assert torch.allclose(first, expected[row], atol=1e-4)
        for n in range(3):
            one = slice(row, row + 1), slice(n, n + 1)
            with torch.no_grad():
                loss, _ = reader(ids[one], mask[one], answers[row][None])
            assert found["perplexity"][n].item() == pytest.approx(-loss.item(), abs=1e-5)


def test_the_tables_have_the_names_of_the_options():
    assert set(TARGETS) == {*SCORES, *AGGREGATES, "perplexity", "leave_one_out", "has_answer"}


# --- files


def test_scored_data(tmp_path, capsys):
    """By two processes' batches or one's: the same file; and what the tool makes of it."""
    names = "has_answer,attention,attention_norm,perplexity,leave_one_out"
    command = ["--eval_data", REFERENCE / "data.json", "--model_path", REFERENCE / "t5",
               "--n_context", 3, "--text_maxlength", 48, "--generation_max_length", 4,
               "--write_crossattention_scores", "--checkpoint_dir", tmp_path, "--num_workers", 0,
               "--targets", names, "--token_log_probs", "--attribution"]  # fmt: skip
    for size in (1, 5):
        more = ["--name", f"by-{size}", "--per_gpu_batch_size", size]
        test_reader.main([str(word) for word in [*command, *more]])
    files = [tmp_path / f"by-{size}" / "dataset_wscores.json" for size in (1, 5)]
    one, five = (json.loads(file.read_text()) for file in files)
    examples = json.loads((REFERENCE / "data.json").read_text())
    read = 0
    for a, b, example in zip(one, five, examples, strict=True):
        for x, y in zip(a.get("ctxs", []), b.get("ctxs", []), strict=True):
            if "score" not in x:
                assert "scores" not in x
                continue
            read += 1
            assert list(x["scores"]) == names.split(",")
            assert x["score"] == x["scores"]["has_answer"]
            assert x["score"] == float(has_answer(example["answers"], x["text"]))
            found, expected = ([*v["scores"].values(), v["attribution"]] for v in (x, y))
            assert np.allclose(found, expected, rtol=1e-3, atol=1e-4)
            assert np.mean(x["token_log_probs"]) == pytest.approx(x["scores"]["perplexity"], 1e-4)
    assert read > 40
    capsys.readouterr()
    targets_tool.main([str(files[0])])
    table = capsys.readouterr().out
    flags = [[c["score"] for c in row["ctxs"] if "score" in c] for row in one if row.get("ctxs")]
    judged = [row for row in flags if row]
    share = 100 * np.mean([max(row) for row in judged])
    (line,) = (line for line in table.splitlines() if "has_answer" in line)
    assert line.split()[2] == f"{share:.1f}"  # an oracle: what can be found comes first
    assert line.split()[5] == "0.0"


def test_scores_of_another_reader_do_not_stay(tmp_path):
    """A scored file that is scored again, with fewer targets and passages."""
    rows = json.loads((REFERENCE / "data.json").read_text())[:2]
    for context in (context for row in rows for context in row["ctxs"]):
        context |= {"scores": {"perplexity": 7.0}, "token_log_probs": [1.0], "attribution": 2.0}
    (tmp_path / "data.json").write_text(json.dumps(rows))
    command = ["--eval_data", tmp_path / "data.json", "--model_path", REFERENCE / "t5",
               "--n_context", 2, "--text_maxlength", 48, "--generation_max_length", 4,
               "--write_crossattention_scores", "--num_workers", 0, "--checkpoint_dir", tmp_path,
               "--name", "again"]  # fmt: skip
    test_reader.main([str(word) for word in command])
    for row in json.loads((tmp_path / "again" / "dataset_wscores.json").read_text()):
        assert ["score" in context for context in row["ctxs"]] == [True, True, False, False, False]
        for context in row["ctxs"]:
            assert not context.keys() & {"scores", "token_log_probs", "attribution"}


def test_a_changed_decoder_is_refused():
    reader = load_reader(str(REFERENCE / "t5"))
    reader.t5.decoder.block[0].register_forward_hook(lambda *call: None)
    tokenizer = load_tokenizer(str(REFERENCE / "t5"), "none")
    options = TargetOptions("attention_norm")
    with pytest.raises(InputError, match="only attention can be computed"):
        next(
            answer_questions(
                reader, tokenizer, [], torch.device("cpu"), with_scores=True, targets=options
            )
        )


def test_an_example_without_answers(tmp_path, capsys):
    (tmp_path / "data.json").write_text('[{"question": "who?", "ctxs": [{"text": "he"}]}]')
    command = ["--eval_data", tmp_path / "data.json", "--model_path", REFERENCE / "t5",
               "--write_crossattention_scores", "--targets", "perplexity", "--num_workers", 0,
               "--checkpoint_dir", tmp_path, "--name", "r"]  # fmt: skip
    command = [str(word) for word in command]
    with pytest.raises(SystemExit, match="2"):
        test_reader.main(command)
    assert "example 0 (the first is 0): no target and no answers" in capsys.readouterr().err
    test_reader.main([*command, "--score_own_answer"])
    (row,) = json.loads((tmp_path / "r" / "dataset_wscores.json").read_text())
    assert np.isfinite(row["ctxs"][0]["scores"]["perplexity"])
