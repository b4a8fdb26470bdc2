"""examples/reproduce, every line of it, against a server on this machine with made-up data and
models; its verdicts; its table."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from examples.reproduce import verdict
from src import options
from src.evaluation.answers import normalize_answer
from src.models.pretrained import load_tokenizer
from tests.conftest import REFERENCE, ROOT
from tests.test_example_scripts import (
    PARSERS,
    commands_only,
    environment,  # noqa: F401
    options_of,
)
from tests.test_get import READER, VARIABLES, Server, data, tar_gz  # noqa: F401
from tests.test_seed import LARGE_READER

FIGURES = verdict.read_figures()
RUN = "examples/reproduce/run.sh"


# ----------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize(
    ("expected", "tolerance", "got", "within"),
    [
        ("50.1", "0.3", [49.8], True),  # in floats, 50.1 - 49.8 exceeds 0.3
        ("50.1", "0.3", [50.4], True),
        ("50.1", "0.3", [49.795], True),  # 49.80 as shown
        ("50.1", "0.3", [49.79], False),
        ("50.1", "0.3", [50.41], False),
        ("48.2", "1.0", [49.2], True),
        ("48.2", "1.0", [47.19], False),
        ("70/80/90", "0.5", [70.5, 79.5, 90.0], True),
        ("70/80/90", "0.5", [70.5, 79.5, 89.49], False),
        ("70/80/90", "0.5", [69.4, 80.0, 90.0], False),
        ("50.1", "0", [50.1], True),
    ],
)
def test_the_boundary(expected, tolerance, got, within):
    assert verdict.is_reproduced(got, expected, tolerance) == within


@pytest.fixture
def results(tmp_path) -> dict[str, str]:
    """Four questions with six passages each, and answers, three of them correct."""
    texts = [[f"only a{k}" for k in range(i - 1, i + 5)] for i in range(4)]
    rows = [
        {"id": i, "question": "q", "answers": [f"a{i}"], "ctxs": [{"text": t} for t in texts[i]]}
        for i in range(4)
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "answers.txt").write_text("0\ta0\n1\tThe a1.\n2\ta2\n3\tno\n")
    return {name: str(tmp_path / name) for name in ("test.json", "answers.txt")}


@pytest.mark.parametrize(
    ("more", "line", "status"),
    [
        (["--expected", "75.3"], "expected 75.3 ± 0.3, got 75.00 on 4 questions: reproduced", 0),
        (["--expected", "75.31"], "expected 75.31 ± 0.3, got 75.00 on 4 questions: NOT", 3),
        ([], "expected 50.1 ± 0.3, got 75.00 on 4 questions: NOT reproduced", 3),
    ],
)
def test_the_line(more, line, status, results, capsys):
    arguments = ["nq_reader_base", results["answers.txt"], "--questions", results["test.json"]]
    assert run_verdict(*arguments, *more) == status
    assert capsys.readouterr().out.startswith(f"nq_reader_base: exact match, {line}")


def test_recall(results, capsys, monkeypatch):
    """Of three values; the answer is each question's second passage."""
    row = {"measure": "recall@1/5", "expected": "-", "tolerance": "0.5"}
    monkeypatch.setitem(FIGURES, "nq_retriever", {**FIGURES["nq_retriever"], **row})
    monkeypatch.setattr(verdict, "read_figures", lambda: FIGURES)
    assert run_verdict("nq_retriever", results["test.json"]) == 3
    said = "no published value in figures.tsv, got 0.00/100.00 on 4 questions: not compared\n"
    assert capsys.readouterr().out == f"nq_retriever: recall@1/5, {said}"
    assert run_verdict("nq_retriever", results["test.json"], "--expected", "0.5/99.5") == 0
    assert run_verdict("nq_retriever", results["test.json"], "--expected", "0.5/99.4") == 3


@pytest.mark.parametrize(
    ("row", "expected", "message"),
    [
        ("nq_retriever", "70/80/90", "test.json: too few passages for recall@20; retrieve more"),
        ("nq_reader_base", "5O.1", "the expected value '5O.1' must be 1 numbers joined by"),
        ("nq_reader_base", "50/60", "the expected value '50/60' must be 1 numbers joined by"),
        ("nq_reader_base", "nan", "the expected value 'nan' must be 1 numbers joined by slashes"),
    ],
)
def test_what_cannot_be_compared(row, expected, message, results, capsys):
    result = results["test.json" if row == "nq_retriever" else "answers.txt"]
    arguments = [row, result, "--questions", results["test.json"], "--expected", expected]
    assert run_verdict(*arguments) == 2
    assert message in capsys.readouterr().err


def run_verdict(*arguments: str) -> int:
    try:
        verdict.main(list(arguments))
    except SystemExit as end:
        return end.code
    return 0


# ----------------------------------------------------------------------------------------------
# Every figure, against a server


class World(NamedTuple):
    """A folder, the scripts' variables, and the server."""

    folder: Path
    variables: dict[str, str]
    server: Server

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", ROOT / RUN, *arguments], env={**self.variables, **variables}, cwd="/",
            capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(environment, data, tmp_path_factory) -> Iterator[World]:  # noqa: F811
    """Data of get-data.sh's tests, with answers that passages contain; DPR's; models of the
    reference with their tokenizers. (Released archives have none: it comes from the hub.)"""
    folder = tmp_path_factory.mktemp("world")
    server = Server(dict(data["served"]))
    answers = [{"question": f"which {i}", "answer": [f"Thing {20 * i + 1}"]} for i in range(15)]
    server.files["NQ-open.dev.jsonl"] = "".join(json.dumps(a) + "\n" for a in answers).encode()
    readers = [name for name in FIGURES if re.fullmatch("(nq|tqa)_reader_(base|large)", name)]
    serve_models(server, readers, READER, REFERENCE / "t5", folder)
    retriever = REFERENCE / "legacy_retriever_cls"
    serve_models(server, ["nq_retriever", "tqa_retriever"], retriever, REFERENCE / "bert", folder)
    for part in ("train", "dev", "test"):
        rows = []
        for example in data["expected"][f"NQ/{part}.json"]:
            found = [{**c, "score": str(9 - n)} for n, c in enumerate(example["ctxs"])]
            rows.append({**example, "ctxs": found})
            del rows[-1]["id"]
        server.files[f"nq-{part}.json.gz"] = gzip.compress(json.dumps(rows).encode())
    variables = {**environment, **dict.fromkeys(VARIABLES, server.url)}
    variables |= {"FID_DPR_PASSAGES_URL": server.url, "no_proxy": "127.0.0.1", "FID_PAUSE": "0"}
    variables |= {"VIRTUAL_ENV": sys.prefix, "DATA": f"{folder}/data", "MODELS": f"{folder}/models"}
    variables |= {"OUT": f"{folder}/out", "T5_BASE": environment["MODEL"], "N": "3", "FEW": "2"}
    variables |= {"T5_LARGE": environment["MODEL"], "BASE_STEPS": "2", "LARGE_STEPS": "2"}
    variables |= {"FEW_STEPS": "2", "MANY_STEPS": "1", "BATCH": "2"}
    yield World(folder, variables, server)
    server.shutdown()
    server.server_close()


def serve_models(
    server: Server, names: list[str], model: Path, tokenizer: Path, folder: Path
) -> None:
    load_tokenizer(str(tokenizer), "none").save_pretrained(folder / tokenizer.name)
    files = [*model.iterdir(), *(folder / tokenizer.name).iterdir()]
    contents = {path.name: path.read_bytes() for path in files if path.suffix != ".tar"}
    for name in names:
        server.files[f"{name}.tar.gz"] = tar_gz({f"{name}/{n}": c for n, c in contents.items()})


@pytest.fixture(scope="module")
def lines(world) -> dict[str, str]:
    """Download, then run everything. Returns the printed lines by figure."""
    fetched = world.run("--fetch", "all")
    assert (fetched.returncode, fetched.stdout) == (0, ""), fetched.stderr
    assert not (world.folder / "out").exists()
    assert {path for path, _ in world.server.requests} == world.server.files.keys()
    world.server.requests.clear()
    done = world.run("all")
    assert done.returncode == 3, done.stderr
    assert not world.server.requests
    return {line.split(":")[0]: line for line in done.stdout.splitlines()}


def test_every_figure_has_its_line(lines, world):
    """With the value that a simpler program finds in the results."""
    assert list(lines) == list(FIGURES)
    for figure, line in lines.items():
        out, dataset = world.folder / "out" / figure, figure.split("_")[0].upper()
        split = "dev" if figure.endswith("_dev") else "test"
        asked = json.loads((world.folder / "data" / dataset / f"{split}.json").read_text())
        if "retriever" in figure:
            rows = map(json.loads, (out / "retrieved.jsonl").read_text().splitlines())
            rows = [(row["answers"], [c["text"] for c in row["ctxs"]]) for row in rows]
            values = [100 * sum(found(*row, k) for row in rows) / len(rows) for k in (5, 20, 100)]
            assert figure != "nq_retriever" or values[-1] > 0
        else:
            given = (out / "final_output.txt").read_text().splitlines()
            given = [normalize_answer(row.split("\t")[1]) for row in given]
            right = [
                a in map(normalize_answer, q["answers"]) for a, q in zip(given, asked, strict=True)
            ]
            values = [100 * sum(right) / len(right)]
        shown = "/".join(f"{value:.2f}" for value in values)
        expected = FIGURES[figure]["expected"]
        said = f"expected {expected} ± {FIGURES[figure]['tolerance']}, got"
        said = "no published value in figures.tsv, got" if expected == "-" else said
        end = "not compared" if expected == "-" else "NOT reproduced"
        said = f"{FIGURES[figure]['measure']}, {said} {shown} on {len(asked)} questions: {end}"
        assert line == f"{figure}: {said}"


def found(answers: list[str], texts: list[str], k: int) -> bool:
    return any(re.search(rf"\b{re.escape(a)}\b", t, re.I) for a in answers for t in texts[:k])


def test_what_was_run(lines, world):
    given, out = world.folder / "data", world.folder / "out"
    reading = {"n_context": 3, "text_maxlength": 250, "write_results": True}
    released = options_of(out / "tqa_reader_large_dev")
    where = {"model_path": f"{world.folder}/models/tqa_reader_large"}
    assert released.items() >= {**reading, **where, "eval_data": f"{given}/TQA/dev.json"}.items()
    for figure, run in (("dpr_base", "reader"), ("dpr_25_then_100_dev", "read_3")):
        tested, best = options_of(out / figure), f"{out}/{figure}/{run}/checkpoint/best_dev"
        part = "dev" if figure.endswith("_dev") else "test"
        where = {"model_path": best, "eval_data": f"{given}/DPR/{part}.json"}
        assert tested.items() >= {**reading, **where}.items()
        trained = options_of(out / figure / run)
        paper = {"lr": 1e-4, "optim": "adam", "scheduler": "fixed", "dropout": 0.1}
        paper |= {"train_data": f"{given}/DPR/train.json", "eval_data": f"{given}/DPR/dev.json"}
        assert trained.items() >= {**paper, "n_context": 3, "text_maxlength": 250}.items()
    made_by = json.loads((out / "nq_retriever/retrieved.jsonl.made_by.json").read_text())
    assert made_by["model"] == made_by["embeddings"]["model"]
    assert made_by["options"]["data"] == f"{given}/NQ/test.json"
    assert made_by["options"]["model_path"] == f"{world.folder}/models/nq_retriever"


def test_finished_figures_are_only_compared(lines, world):
    (got,) = re.findall(r"got (\S+) on", lines["tqa_reader_base"])
    before = {path: path.stat().st_mtime_ns for path in (world.folder / "out").rglob("*")}
    done = world.run("tqa_reader_base", EXPECTED=str(float(got) + 0.3))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        rf"tqa_reader_base: .*, got {got} on 8 questions: reproduced\n", done.stdout
    )
    assert {path: path.stat().st_mtime_ns for path in (world.folder / "out").rglob("*")} == before
    assert not world.server.requests


# ----------------------------------------------------------------------------------------------
# Commands


@pytest.fixture
def recorded(tmp_path) -> dict[str, str]:
    """Variables with which everything is downloaded, and commands are only written down."""
    for name in ("NQ", "TQA", "DPR"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in ("train", "dev", "test"):
            (tmp_path / "data" / name / f"{part}.json").touch()
    (tmp_path / "data" / "psgs_w100.tsv").touch()
    for name in FIGURES:
        (tmp_path / "models" / name).mkdir(parents=True)
    folders = {name: str(tmp_path / name.lower()) for name in ("DATA", "MODELS", "OUT")}
    return {**commands_only(tmp_path), **folders, "VIRTUAL_ENV": "active"}


def run_job(job: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / job, *arguments], env=variables, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_published_settings(recorded, tmp_path):
    done = run_job(RUN, "all", **recorded)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    assert [line[1] for line in lines if line[0] == "-m"] == ["examples.reproduce.verdict"] * 13
    trained = {}
    for script, *given in lines:
        if script == "-m":
            continue
        parsed = vars(PARSERS[script]().parse_args(given))
        if script == "train_reader.py":
            trained[parsed["total_steps"]] = parsed
            assert parsed["per_gpu_batch_size"] * parsed["accumulation_steps"] == 64
        if script == "test_reader.py":
            assert parsed["n_context"] == 100
    assert trained.keys() == {10000, 15000, 1000}
    seed = LARGE_READER.split("train_reader.py")[1].replace("\\", "").split()
    seed = vars(options.train_reader_parser().parse_args(["--train_data", "x", *seed]))
    own = {"train_data", "eval_data", "name", "checkpoint_dir", "model_path", "model_size"}
    own |= {"accumulation_steps", "save_freq", "keep_checkpoints"}
    ours = {name: value for name, value in trained[15000].items() if name not in own}
    assert ours == {name: value for name, value in seed.items() if name not in own}


@pytest.mark.parametrize("status", [0, 138])
def test_under_slurm(status, recorded, tmp_path):
    """srun starts each command; a stopped one requeues the job."""
    for name, end in (("srun", status), ("scontrol", 0)):
        stub = f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/{name}; exit {end}\n'
        (tmp_path / "bin" / name).write_text(stub)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_CPUS_PER_TASK": "2"}
    done = run_job("examples/reproduce/job.sbatch", "dpr_base", **recorded, **slurm)
    assert done.returncode == status, done.stderr
    started = (tmp_path / "srun").read_text().splitlines()
    assert [line.split()[:4] for line in started] == [
        ["--kill-on-bad-exit=1", "--cpus-per-task=2", "python", script]
        for script in ("train_reader.py", "test_reader.py")[: 1 if status else 2]
    ]
    assert "--accumulation_steps 4 " in started[0]
    if status:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    else:
        assert not (tmp_path / "scontrol").exists()


def test_wrong_figures(recorded, tmp_path):
    done = run_job(RUN, "dpr_base", "nq", **recorded)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nq: no such figure; the figures are nq_reader_base nq_")
    done = run_job(RUN, "all", **recorded, EXPECTED="50")
    assert done.stderr == "error: EXPECTED is the value of one figure; name one\n"
    assert not (tmp_path / "commands").exists()
    assert run_job(RUN, **recorded).stdout == verdict.FIGURES.read_text()


@pytest.mark.parametrize(
    ("given", "message"), [("-x", "-x: no such option"), ("-o", "-o '': this folder cannot")]
)
def test_wrong_use_of_dpr_passages(given, message):
    done = run_job("examples/dpr_passages.sh", given, PATH=os.environ["PATH"])
    assert (done.returncode, done.stderr.startswith(f"error: {message}")) == (2, True)


# ----------------------------------------------------------------------------------------------
# The table

README = (ROOT / "examples/reproduce/README.md").read_text()


def test_the_readmes_table():
    """It has the values of figures.tsv; the hours follow from docs/scale.md as the page says."""
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \| (.*) \| (.*) \| (.*) \|$", README, re.M)
    shown = {row: dict(zip(("row", "measure", "expected", "tolerance"), (row, *more), strict=False))
             for row, *more in rows}  # fmt: skip
    assert shown == FIGURES
    scale = (ROOT / "docs/scale.md").read_text()
    for fact in ("79,168 train", "| 32 minutes", "| 13 hours", "| 115 hours", "| 42 minutes"):
        assert fact in scale
    base, large = 32 / 60 / 79_168, 115 / 960_000 / 4  # hours per question
    sizes = {"nq": {"dev": 8757, "test": 3610}, "tqa": {"dev": 8837, "test": 11_313}}
    dev, test = 8757, 3610
    hours = {
        "nq_retriever": 42 / 60,
        "tqa_retriever": 42 / 60,
        "dpr_base": 13 * 4 / 3 + (20 * dev + test) * base,
        "dpr_large": 115 + (30 * dev + test) * large,
        "dpr_25_then_100_dev": 13 / 4 + 1.3 * 4 / 3 + (20 * dev / 4 + 3 * dev) * base,
    }
    for row, *_, estimate in rows:
        if row not in hours:
            dataset, _, size, *split = row.split("_")
            questions = sizes[dataset][split[0] if split else "test"]
            hours[row] = questions * (base if size == "base" else large)
        digits = len(estimate.partition(".")[2])
        assert f"{hours[row]:.{digits}f}" == estimate, row
