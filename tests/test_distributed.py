"""Two processes do what one does: the same weights, the same answers, the same files."""

import json
import socket
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from src.runtime.errors import SharedError, reports_input_errors
from tests.conftest import ROOT, run, run_well


@pytest.fixture
def data(reference: Path, tmp_path: Path) -> Path:
    """23 examples, a number that neither 2 nor a batch of 4 divides; one without passages."""
    examples = json.loads((reference / "data.json").read_text())[:23]
    examples[3]["ctxs"] = examples[3]["ctxs"][:2]
    examples[4].pop("ctxs")
    file = tmp_path / "data.json"
    file.write_text(json.dumps(examples))
    return file


def train(data: Path, reference: Path, folder: Path, processes: int, batch: int, *more) -> dict:
    run_well(
        "train_reader.py", "--train_data", data, "--eval_data", data, "--n_context", 3,
        "--model_path", reference / "t5", "--legacy_position_table", "--text_maxlength", 64,
        "--per_gpu_batch_size", batch, "--total_steps", 8, "--eval_freq", 4, "--dropout", 0,
        "--optim", "adamw", "--lr", 1e-3, "--scheduler", "linear", "--warmup_steps", 2,
        "--checkpoint_dir", folder, "--name", "run", "--num_workers", 0, *more,
        processes=processes,
    )  # fmt: skip
    return load_file(folder / "run" / "checkpoint" / "step-8" / "model.safetensors")


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(data, reference, tmp_path):
    for accumulation in (1, 2):
        more = ["--accumulation_steps", accumulation]
        folders = [tmp_path / f"{processes}-{accumulation}" for processes in (1, 2)]
        one = train(data, reference, folders[0], 1, 2, *more)
        two = train(data, reference, folders[1], 2, 1, *more)
        assert one.keys() == two.keys()
        for name in one:
            assert (one[name] - two[name]).abs().max() < 1e-5, name
        start = load_file_of_t5(reference)
        assert (one["shared.weight"] - start).abs().max() > 1e-3  # something was learned
        for row, other in zip(*(read_metrics(folder / "run") for folder in folders), strict=True):
            assert row == pytest.approx(other, rel=1e-4)


def load_file_of_t5(reference: Path):
    return torch.load(reference / "t5" / "pytorch_model.bin")["shared.weight"]


def test_two_processes_answer_as_one(data, reference, tmp_path):
    outputs = []
    for processes in (1, 2):
        text = run_well(
            "test_reader.py", "--eval_data", data, "--n_context", 4, "--text_maxlength", 96,
            "--model_path", reference / "legacy_reader/checkpoint/step-20",
            "--tokenizer", reference / "t5", "--per_gpu_batch_size", 4, "--write_results",
            "--write_crossattention_scores", "--checkpoint_dir", tmp_path, "--name", processes,
            processes=processes,
        )  # fmt: skip
        folder = tmp_path / str(processes)
        result = next(line for line in text.splitlines() if "exact match" in line)
        outputs.append(
            (
                result.split(" ", 2)[2],
                (folder / "final_output.txt").read_bytes(),
                (folder / "dataset_wscores.json").read_bytes(),
                (folder / "answers.jsonl").read_bytes(),
            )
        )
        assert sorted(path.name for path in folder.iterdir()) == [
            "answers.jsonl",
            "dataset_wscores.json",
            "dataset_wscores.json.made_by.json",
            "final_output.txt",
            "options.json",
            "run.log",
        ]
    assert outputs[0] == outputs[1]
    # And they are right: the file's order, all examples, scores where passages were read.
    examples = json.loads(data.read_text())
    lines = outputs[0][1].decode().splitlines()
    assert [line.split("\t")[0] for line in lines] == [example["id"] for example in examples]
    scored = json.loads(outputs[0][2])
    for example, given in zip(scored, examples, strict=True):
        contexts = example.get("ctxs", [])
        assert [type(context.get("score")) for context in contexts[:4]] == [float] * len(
            contexts[:4]
        )
        assert all("score" not in context for context in contexts[4:])
        texts = [context["text"] for context in contexts]
        assert sorted(texts) == sorted(context["text"] for context in given.get("ctxs", []))
        assert {**example, "ctxs": 0} == {**given, "ctxs": 0}


def test_one_broken_share_ends_all_processes(data, reference, tmp_path):
    examples = json.loads(data.read_text())
    examples[5]["answers"] = "not a list"  # the second process's share
    data.write_text(json.dumps(examples, indent=1))
    done = run(
        "test_reader.py", "--eval_data", data, "--model_path", reference / "t5",
        "--checkpoint_dir", tmp_path, processes=2,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert lines  # from both, unless the launcher ends one before it has said so
    assert all("example 6" in line and "not a list" in line for line in lines)


def test_collectives(tmp_path):
    """What each collective returns in each of three processes."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys, time
            sys.path.insert(0, {str(ROOT)!r})
            import torch
            from src.runtime import distributed
            from src.runtime.errors import InputError, SharedError
            from src.training.metrics import Average
            from src.runtime.launch import detect_launch

            distributed.start(detect_launch(os.environ), timeout=8)
            rank = distributed.rank()
            assert distributed.world_size() == 3
            tensor = torch.tensor([1.0, rank])
            assert distributed.sum_tensor(tensor).tolist() == [3.0, 3.0]
            assert tensor.tolist() == [1.0, rank]  # the argument is left alone
            assert distributed.sum_numbers(1, 0.5) == [3, 1.5]
            assert distributed.any_process(rank == 2) and not distributed.any_process(False)
            gathered = distributed.gather({{"rank": rank}})
            assert gathered == ([{{"rank": r}} for r in range(3)] if rank == 0 else [])
            average = Average()
            average.add(rank, weight=rank)
            assert abs(average.over_all().value() - 5 / 3) < 1e-12
            assert distributed.raise_on_all(lambda: rank) == rank

            def task():
                if rank == 1:
                    raise InputError("bad file")

            try:
                distributed.raise_on_all(task)
            except SharedError as error:
                assert str(error) == "bad file"
            else:
                raise SystemExit("no error reached this process")
            assert distributed.run_on_main(lambda: rank) == (0 if rank == 0 else None)
            distributed.run_on_main(lambda: time.sleep(9))  # longer than the timeout

            def task():
                raise InputError(f"process {{rank}}'s file")

            try:
                distributed.run_on_main(task)
            except SharedError as error:
                assert str(error) == "process 0's file"
            else:
                raise SystemExit("no error reached this process")
            distributed.barrier()
            distributed.stop()
            # (Not printed: lines of several processes can run into one another.)
            open(f"{tmp_path}/fine-{{rank}}", "w").close()
            """
        )
    )
    run_well(script, processes=3)
    assert sorted(path.name for path in tmp_path.glob("fine-*")) == ["fine-0", "fine-1", "fine-2"]


def test_an_error_of_all_is_printed_once(monkeypatch, capsys):
    def fail() -> None:
        raise SharedError("bad file")

    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            reports_input_errors(fail)()
        assert ended.value.code == 2
    assert capsys.readouterr().err == "error: bad file\n"


LOSSES_AND_MORE = [
    ("kl", []), ("kl", ["--in_batch_negatives"]), ("mse", []), ("margin", []), ("emdr2", []),
    ("emdr2_sequence", []), ("contrastive", []), ("contrastive", ["--in_batch_negatives"]),
]  # fmt: skip
# Trains several times, meeting the other processes each time at another port.
TRAIN_MANY = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_retriever

os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
for port, arguments in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(port)
    train_retriever.main(arguments)
"""


@pytest.mark.fast
def test_two_processes_distil_as_one(data, reference, tmp_path):
    """With each loss, also where each process has other numbers of tokens or positive passages."""
    examples = [e for e in json.loads(data.read_text()) if e.get("ctxs")]
    rng = np.random.default_rng(0)
    for number, example in enumerate(examples):
        for n, context in enumerate(example["ctxs"]):
            context["token_log_probs"] = (-rng.random(1 + number % 3)).tolist()
            context["hasanswer"] = n == number % 4
    data.write_text(json.dumps(examples))
    (tmp_path / "train_many.py").write_text(TRAIN_MANY)
    for processes, batch in ((1, 4), (2, 2)):
        folder, runs = tmp_path / str(processes), []
        for number, (loss, more) in enumerate(LOSSES_AND_MORE):
            arguments = [
                "--train_data", data, "--eval_data", data, "--n_context", 4, "--dropout", 0,
                "--model_path", reference / "legacy_retriever_mask_mean", "--loss", loss,
                "--tokenizer", reference / "bert", "--per_gpu_batch_size", batch, "--lr", 1e-4,
                "--total_steps", 6, "--eval_freq", 3, "--best_by", "recall@1", "--num_workers", 0,
                "--checkpoint_dir", folder, "--name", number, *more,
            ]  # fmt: skip
            with socket.create_server(("127.0.0.1", 0)) as server:
                runs.append([server.getsockname()[1], list(map(str, arguments))])
        (tmp_path / "runs.json").write_text(json.dumps(runs))
        run_well(tmp_path / "train_many.py", tmp_path / "runs.json", processes=processes)
    for number, (loss, _) in enumerate(LOSSES_AND_MORE):
        one, two = (tmp_path / processes / str(number) for processes in ("1", "2"))
        weights = [load_file(run / "checkpoint/step-6/model.safetensors") for run in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        # Where a gradient is nearly 0, as those of keys' biases always are, Adam turns rounding
        # errors into steps: one in a thousand weights may differ by more.
        names = [name for name in weights[0] if not name.endswith("key.bias")]
        gaps = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in names])
        assert (gaps < 1e-5).float().mean() > 0.999, loss
        assert gaps.max() < 1e-4, loss
        for row, other in zip(read_metrics(one), read_metrics(two), strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6), loss
        assert row["dev/loss"] > 0
        assert 0 < row["dev/recall@1"] < 1
