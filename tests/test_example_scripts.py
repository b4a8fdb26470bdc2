"""The scripts of examples/ on small files and tiny models; the commands of quickstart.sh, which
takes minutes itself."""

import glob
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from transformers import BertConfig, BertModel

from src import options
from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from tests.conftest import REFERENCE, ROOT
from tests.test_seed import LARGE_READER
from tests.warm_python import warm_python

# Instead of srun: no cluster, one task.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""

PARSERS = {
    "train_reader.py": options.train_reader_parser,
    "test_reader.py": options.test_reader_parser,
    "train_retriever.py": options.train_retriever_parser,
    "generate_passage_embeddings.py": options.passage_embeddings_parser,
    "passage_retrieval.py": options.passage_retrieval_parser,
    "src.tools.report": options.report_parser,
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Small data and tiny models, as the scripts' variables, and a quick `python`."""
    at = tmp_path_factory.mktemp("small")
    examples = json.loads((REFERENCE / "data.json").read_text())
    (at / "train.json").write_text(json.dumps(examples[:6]))
    (at / "dev.json").write_text(json.dumps(examples[6:9]))
    (at / "test.json").write_text(json.dumps(examples[9:12]))
    load_reader(str(REFERENCE / "t5")).save_pretrained(at / "t5")
    load_tokenizer(str(REFERENCE / "t5"), "none").save_pretrained(at / "t5")
    shape = BertConfig(
        vocab_size=700, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    BertModel(shape).save_pretrained(at / "bert")
    load_tokenizer(str(REFERENCE / "bert"), "none").save_pretrained(at / "bert")
    (at / "passages.tsv").write_text((REFERENCE / "passages.tsv").read_text())
    variables = {"TRAIN": "train.json", "DEV": "dev.json", "TEST": "test.json", "MODEL": "t5"}
    variables |= {"PASSAGES": "passages.tsv", "READER": "t5", "RETRIEVER": "bert"}
    variables = {name: str(at / file) for name, file in variables.items()}
    with warm_python(at, {**os.environ, "OMP_NUM_THREADS": "1"}) as warm:
        yield {**warm, **variables, "ACCUMULATE": "1"}


def run_script(script: str, *arguments: str | Path, **environment: str) -> str:
    done = subprocess.run(
        ["bash", ROOT / script, *arguments], env=environment, capture_output=True, text=True,
        check=False, cwd="/",  # paths are relative to the repository, wherever it is started from
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def options_of(run: Path) -> dict:
    return json.loads((run / "options.json").read_text())["options"]


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def test_few_passages_then_many(environment, tmp_path):
    small = {"OUT": str(tmp_path), "FEW": "2", "MANY": "5", "FEW_STEPS": "3", "MANY_STEPS": "2"}
    run_script("examples/read_25_then_100.sh", **environment, **small)
    few, many = options_of(tmp_path / "read_2"), options_of(tmp_path / "read_5")
    assert (few["n_context"], few["total_steps"]) == (2, 3)
    assert (many["n_context"], many["total_steps"]) == (5, 2)
    assert many["model_path"] == str(tmp_path / "read_2" / "checkpoint" / "best_dev")
    paper = {"lr": 1e-4, "optim": "adam", "scheduler": "fixed", "dropout": 0.1}
    assert few.items() >= paper.items()
    before = weights(tmp_path / "read_5" / "checkpoint" / "latest")
    assert before != weights(tmp_path / "read_2" / "checkpoint" / "latest")
    again = run_script("examples/read_25_then_100.sh", **environment, **small)
    assert again.count("updates are done") == 2
    assert weights(tmp_path / "read_5" / "checkpoint" / "latest") == before


@pytest.mark.parametrize(("gpus", "accumulation"), [("1", "64"), ("8", "8")])
def test_the_papers_batch_of_64(gpus, accumulation, tmp_path):
    """By default, GPUS times ACCUMULATE is 64 questions an update."""
    run_script("examples/read_25_then_100.sh", **commands_only(tmp_path), GPUS=gpus)
    for line in (tmp_path / "commands").read_text().splitlines():
        assert f"--accumulation_steps {accumulation} " in line
        assert ("--nproc_per_node=8" in line) == (gpus == "8")


def commands_only(folder: Path) -> dict[str, str]:
    """An environment in which `python` and `torchrun` only append their arguments, quoted, to the
    file `commands` in a folder."""
    (folder / "bin").mkdir()
    for name in ("python", "torchrun"):
        stub = f"""#!/usr/bin/env bash\n{{ printf '%q ' "$@"; echo; }} >> '{folder}/commands'\n"""
        (folder / "bin" / name).write_text(stub)
        (folder / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_rounds_of_distillation(environment, tmp_path):
    out = tmp_path / "rounds"
    small = {"OUT": str(out), "N": "3", "READER_STEPS": "2", "RETRIEVER_STEPS": "2", "ROUNDS": "1"}
    printed = run_script("examples/iterate_distillation.sh", **environment, **small)
    for number in (0, 1):
        found = out / f"round-{number}"
        for part, count in (("train", 6), ("dev", 3), ("test", 3)):
            rows = map(json.loads, (found / f"{part}.jsonl").read_text().splitlines())
            assert [len(row["ctxs"]) for row in rows] == [3] * count
        assert len((found / "runs/test/final_output.txt").read_text().splitlines()) == 3
    # Each step read the output of the one before it.
    zero, one = out / "round-0", out / "round-1"
    best = "checkpoint/best_dev"
    scores = options_of(one / "runs/scores_train")
    assert scores["model_path"] == str(zero / "runs/reader" / best)
    assert scores["eval_data"] == str(zero / "train.jsonl")
    retriever = options_of(one / "runs/retriever")
    assert retriever["train_data"] == str(one / "runs/scores_train/dataset_wscores.json")
    assert retriever["scheduler_steps"] == 3
    reader = options_of(one / "runs/reader")
    assert reader["train_data"] == str(one / "train.jsonl")
    assert reader["model_path"] == str(zero / "runs/reader" / best)
    made_by = [json.loads((at / "test.jsonl.made_by.json").read_text()) for at in (zero, one)]
    assert made_by[0]["model"] == "bm25"
    assert made_by[1]["model"] == made_by[1]["embeddings"]["model"]
    # The tables at the end show both rounds.
    assert re.search(r"round-0\S*test\.jsonl", printed)
    assert re.search(r"round-1\S*final_output\.txt", printed)

    # Started again, it has nothing to do; another round starts where this one ended.
    recorded = {**environment, "PATH": commands_only(tmp_path)["PATH"]}
    log = tmp_path / "commands"
    run_script("examples/iterate_distillation.sh", **recorded, **small)
    assert {line.split()[1] for line in log.read_text().splitlines()} == {"src.tools.evaluate"}
    log.unlink()
    run_script("examples/iterate_distillation.sh", **recorded, **small | {"ROUNDS": "2"})
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == [
        "test_reader.py", "test_reader.py", "train_retriever.py", "generate_passage_embeddings.py",
        "passage_retrieval.py", "passage_retrieval.py", "passage_retrieval.py", "train_reader.py",
        "test_reader.py", "-m", "-m",
    ]  # fmt: skip
    assert f"--model_path {one / 'runs/reader' / best} " in lines[0]
    assert f"--model_path {one / 'runs/retriever' / best} " in lines[2]


def test_contrastive_training(environment, tmp_path):
    """Mined with BM25; both retrievers, and both fused with BM25, are evaluated."""
    small = {"OUT": str(tmp_path / "out"), "N": "9", "MINED": "6", "STEPS": "2", "BATCH": "3"}
    variables = environment | small | {"NEGATIVES": "2"}
    rounds = [
        run_script("examples/contrastive.sh", "--temperature", "0.5", **variables) for _ in range(2)
    ]
    out = tmp_path / "out"
    trained = options_of(out / "runs/retriever")
    expected = {"loss": "contrastive", "negatives": 2, "n_context": 3, "temperature": 0.5}
    assert trained.items() >= expected.items()
    assert [trained[f"{part}_data"] for part in ("train", "eval")] == [
        str(out / "bm25" / name) for name in ("train.jsonl", "dev.jsonl")
    ]
    made_by = [
        json.loads((out / name / "test.jsonl.made_by.json").read_text())["model"]
        for name in ("bm25", "before", "after")
    ]
    assert len(set(made_by)) == 3
    for name in ("before", "after"):
        rows = map(json.loads, (out / name / "fused.jsonl").read_text().splitlines())
        assert [len(row["ctxs"]) for row in rows] == [9] * 3
    tables = [printed[printed.rindex("recall@1") :] for printed in rounds]
    assert tables[0].count("jsonl") == 5
    assert tables[0] == tables[1]
    assert rounds[1].count("done already") == 10


START_FILES = {"bm25": ("--bm25", 3), "bert": ("--passages_embeddings", 3), "dpr": ("", 0)}


@pytest.mark.parametrize("start", START_FILES)
@pytest.mark.parametrize("each_round", ["continue", "restart"])
def test_the_rounds_commands(start, each_round, environment, tmp_path):
    """Where the first passages come from, and what each round's models start from."""
    out = tmp_path / "rounds"
    recorded = {**environment, "PATH": commands_only(tmp_path)["PATH"], "OUT": str(out)}
    chosen = {"START": start, "EACH_ROUND": each_round}
    run_script("examples/iterate_distillation.sh", **recorded, **chosen)
    lines = (tmp_path / "commands").read_text().splitlines()
    commands = [line.split() for line in lines]
    parsed = [
        (command[0], vars(PARSERS[command[0]]().parse_args(command[1:])))
        for command in commands[:-2]
    ]
    first = [script for script, _ in parsed].index("train_reader.py")
    option, n_retrievals = START_FILES[start]
    retrievals = [o for script, o in parsed[:first] if script == "passage_retrieval.py"]
    assert len(retrievals) == n_retrievals
    assert all(f" {option} " in line for line in lines[:first] if "retrieval" in line)
    if start == "bert":  # embedded and searched with the model as it is
        assert {o["model_path"] for _, o in parsed[:first]} == {environment["RETRIEVER"]}
    # The reader and the scores of a round see its passages.
    passages = [str(out / "round-0" / "train.jsonl"), str(out / "round-1" / "train.jsonl")]
    if start == "dpr":
        passages[0] = environment["TRAIN"]
    readers = [options for script, options in parsed if script == "train_reader.py"]
    assert [reader["train_data"] for reader in readers[:2]] == passages
    scores = [options for _, options in parsed if options.get("name") == "scores_train"]
    assert [options["eval_data"] for options in scores] == passages
    assert commands[-2][2] == passages[0].replace("train.json", "test.json")
    # Scores are those of the reader of the round before, whatever the next one starts from.
    best = "checkpoint/best_dev"
    trained = [str(out / f"round-{number}/runs/reader" / best) for number in (0, 1)]
    assert [options["model_path"] for options in scores] == trained
    retrievers = [options for script, options in parsed if script == "train_retriever.py"]
    assert retrievers[0]["retriever_model"] == environment["RETRIEVER"]
    if each_round == "continue":
        assert [r["model_path"] for r in readers] == [environment["READER"], *trained]
        assert retrievers[1]["model_path"] == str(out / "round-1/runs/retriever" / best)
    else:
        assert [r["model_path"] for r in readers] == 3 * [environment["READER"]]
        assert retrievers[1]["retriever_model"] == environment["RETRIEVER"]
        assert retrievers[1]["model_path"] == "none"


@pytest.mark.parametrize("start", ["bert", "dpr"])
def test_other_first_passages(start, environment, tmp_path):
    """A round from them, on small models."""
    out = tmp_path / "rounds"
    small = {"OUT": str(out), "N": "3", "READER_STEPS": "2", "RETRIEVER_STEPS": "2", "ROUNDS": "1"}
    small |= {"START": start, "EACH_ROUND": "restart"}
    run_script("examples/iterate_distillation.sh", **environment, **small)
    assert (out / "round-0/test.jsonl").exists() == (start == "bert")
    first = options_of(out / "round-0/runs/test")["eval_data"]
    assert first == (environment["TEST"] if start == "dpr" else str(out / "round-0/test.jsonl"))
    assert len((out / "round-1/runs/test/final_output.txt").read_text().splitlines()) == 3
    if start == "bert":  # no projection: embeddings have BERT's hidden size
        shard = safetensors.numpy.load_file(out / "round-0/embeddings/wiki_00")
        assert shard["embeddings"].shape == (120, 24)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"START": "bm42"}, "START=bm42: must be bm25, bert or dpr"),
        ({"EACH_ROUND": "x"}, "EACH_ROUND=x: must be continue or restart"),
        ({"START": "bert"}, "{out} was made with START=bm25 EACH_ROUND=continue; name another OUT"),
    ],
)
def test_wrong_rounds(wrong, message, tmp_path):
    """And rounds of one kind are not continued as another."""
    out = tmp_path / "rounds"
    out.mkdir()
    (out / "settings").write_text("START=bm25 EACH_ROUND=continue\n")
    done = subprocess.run(
        ["bash", ROOT / "examples/iterate_distillation.sh"], capture_output=True, text=True,
        env={**commands_only(tmp_path), "OUT": str(out), **wrong}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: " + message.format(out=out))
    assert not (tmp_path / "commands").exists()


def test_ablations(environment, tmp_path):
    """Cells are trained from their seed's start, and measured; nothing is done twice."""
    out = tmp_path / "ablations"
    rows = json.loads(Path(environment["TRAIN"]).read_text())
    for row in rows[1:]:
        row["answers"].append(row["ctxs"][0]["text"].split()[0])  # contrastive needs an answer
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"OUT": str(out), "TRAIN": str(tmp_path / "train.jsonl"), "QUESTIONS": "5", "N": "3"}
    small |= {"LOSSES": "kl emdr2 contrastive", "TARGETS": "attention leave_one_out"}
    small |= {"SEEDS": "0 1", "STEPS": "2", "START_STEPS": "2", "BATCH": "2"}
    small |= {"MODEL_CONFIG": f"{environment['RETRIEVER']}/config.json"}
    printed = run_script("examples/ablations.sh", **environment | small)
    names = ["start.-", "kl.attention", "emdr2.likelihood", "contrastive.has_answer"]
    names += ["kl.leave_one_out"]
    at_start = {}
    scored = json.loads((out / "scored/dataset_wscores.json").read_text())
    assert len(scored) == 5
    deviations = {
        name: np.mean([np.std([c["scores"][name] for c in q["ctxs"][:3]]) for q in scored])
        for name in ("attention", "leave_one_out")
    }
    table = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [".".join(row[:2]).strip("| ") for row in table[1:]] == names
    for name, row in zip(names, table[1:], strict=True):
        recalls, gains = [], []
        for seed in ("0", "1"):
            cell = out / "cells" / f"{name}.{seed}"
            found = list(map(json.loads, (cell / "test.jsonl").read_text().splitlines()))
            recalls.append(
                100 * np.mean([any(c["hasanswer"] for c in q["ctxs"][:5]) for q in found])
            )
            first = 100 * np.mean([q["ctxs"][0]["hasanswer"] for q in found])
            gains.append(first - at_start.setdefault(seed, first))
            assert options_of(cell / "read")["eval_data"] == str(cell / "test.jsonl")
            if name != "start.-":
                trained, (loss, target) = options_of(cell / "retriever"), name.split(".")
                assert (trained["loss"], trained["seed"]) == (loss, int(seed))
                assert trained["target"] == {"likelihood": "perplexity", "has_answer": None}.get(
                    target, target
                )
                if loss == "kl":
                    expected = pytest.approx(deviations[target] / 2.5, rel=1e-2)
                    assert trained["target_temperature"] == expected
                    assert row[2] == f"{trained['target_temperature']:.3g}"
                start = out / "cells" / f"start.-.{seed}" / "retriever" / "checkpoint" / "latest"
                assert trained["model_path"] == str(start)
        if name != "start.-":
            assert row[5] == f"{np.mean(gains):+.1f} ± {np.std(gains, ddof=1):.1f}"
        assert row[4] == f"{np.mean(recalls):.1f} ± {np.std(recalls, ddof=1):.1f}"

    done = subprocess.run(
        ["bash", ROOT / "examples/ablations.sh"], env={**environment, **small, "STEPS": "3"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out} was made with")
    (out / "cells/kl.attention.1/read/final_output.txt").unlink()
    recorded = {**environment, "PATH": commands_only(tmp_path)["PATH"]}
    run_script("examples/ablations.sh", **recorded | small)
    commands = [line.split()[1] for line in (tmp_path / "commands").read_text().splitlines()]
    assert commands == ["examples.one_process", "examples.ablations_table"]


def test_a_retriever_whose_training_failed_is_not_evaluated(tmp_path):
    """Its checkpoint may be from before the last update."""
    variables = commands_only(tmp_path)
    stub = f"""#!/usr/bin/env bash
echo "$1" >> '{tmp_path}/commands'
echo "error: it failed" >&2
[ "$1" != train_retriever.py ]"""
    (tmp_path / "bin" / "python").write_text(stub)
    (tmp_path / "train.jsonl").write_text("{}\n")
    variables |= {"TRAIN": str(tmp_path / "train.jsonl"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", ROOT / "examples/ablations.sh"], env=variables | {"SEEDS": "0", "START": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: begin 0: error: it failed (see " in done.stderr
    commands = (tmp_path / "commands").read_text().split()
    assert commands == ["test_reader.py", "-m", "train_retriever.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("script", "done"),
    [
        ("quickstart.sh", []),
        ("examples/contrastive.sh", []),
        ("examples/iterate_distillation.sh", []),
        ("examples/ablations.sh", []),
        ("examples/ablations.sh", ["scored/dataset_wscores.json", "temperatures"]),  # training
    ],
)
def test_what_is_stopped_leaves_nothing_running(script, done, number, tmp_path):
    """The signal is for the script alone. All that it has started holds a pipe open; training saves
    before it ends."""
    read, write = os.pipe()
    variables = commands_only(tmp_path)
    stub = f"""#!/usr/bin/env bash
case $1 in *.py) ;; *) exit ;; esac
trap 'sleep 0.2; echo saved >&{write}; exit' TERM
echo started >&{write}
sleep 20 & wait
echo finished >&{write}"""
    (tmp_path / "bin" / "python").write_text(stub)
    for name in ("train.jsonl", *done):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    variables |= {"TRAIN": str(tmp_path / "train.jsonl"), "OUT": str(tmp_path), "JOBS": "1"}
    variables |= {"VIRTUAL_ENV": "active", "START": "bm25" if "iterate" in script else ""}
    arguments = ["-o", tmp_path / "out"] if script == "quickstart.sh" else []
    running = subprocess.Popen(
        ["bash", ROOT / script, *arguments], env=variables, pass_fds=[write],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may ignore it
    )  # fmt: skip
    os.close(write)
    assert os.read(read, 100) == b"started\n"
    running.send_signal(number)
    assert running.wait() == 128 + number
    os.set_blocking(read, False)
    assert [os.read(read, 100), os.read(read, 100)] == [b"saved\n", b""]
    os.close(read)


def test_the_large_reader(environment, tmp_path):
    """It has the original's hyperparameters, and a job's own options override the file's."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    variables = {**environment, "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
    variables |= {"VIRTUAL_ENV": "active", "SLURM_CPUS_PER_TASK": "1"}
    run = ["--train_data", variables["TRAIN"], "--eval_data", variables["DEV"]]
    run += ["--model_path", variables["MODEL"], "--total_steps", "2", "--name", "large"]
    done = subprocess.run(
        ["bash", ROOT / "examples/slurm/large_readers.sbatch", *run, "--checkpoint_dir", tmp_path],
        env=variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "large/checkpoint/best_dev/model.safetensors").exists()
    given = LARGE_READER.split("train_reader.py")[1].replace("\\", "").split()
    original = vars(options.train_reader_parser().parse_args(given))
    own = {"train_data", "eval_data", "name", "checkpoint_dir", "model_path", "total_steps"}
    own |= {"model_size", "save_freq", "keep_checkpoints"}
    ours = options_of(tmp_path / "large")
    assert {n: ours[n] for n in original if n not in own} == {
        n: value for n, value in original.items() if n not in own
    }


@pytest.mark.parametrize("name", ["out", 'it\'s [1]="$(exit 3)" *'])
def test_the_quickstarts_commands(name, tmp_path):
    """Their options exist, also those of the command printed at the end; folders have any name."""
    out = tmp_path / name
    out.mkdir()
    (out / "bm25_train.jsonl").write_text("{}\n" * 6)  # awk takes a fifth of it
    environment = {**commands_only(tmp_path), "VIRTUAL_ENV": "active"}
    printed = run_script("quickstart.sh", "-o", out, **environment)
    assert (out / "to_score_train.jsonl").read_text() == "{}\n" * 2
    talk = printed.splitlines()[-1]
    assert talk.startswith("python test_reader.py --interactive ")
    subprocess.run(["bash", "-c", talk], env=environment, check=True)
    commands = map(shlex.split, (tmp_path / "commands").read_text().splitlines())
    commands = [command[1:] if command[0] == "-m" else command for command in commands]
    parsed = [
        (command[0], vars(PARSERS[command[0]]().parse_args(command[1:])))
        for command in commands
        if command[0] in PARSERS
    ]
    # besides: Python's version, pip, the corpus, the table
    assert len(parsed) == len(commands) - 4
    # The report is of a run that has answers and scores, beside both ways to find passages.
    script, report = parsed[-2]
    assert script == "src.tools.report"
    (tested,) = [o for _, o in parsed[:-2] if f"{out}/runs/{o.get('name')}" == report["run"]]
    assert tested["write_results"]
    assert tested["write_crossattention_scores"]
    assert report["retrieved"] == [f"{out}/bm25_test.jsonl", f"{out}/distilled_test.jsonl"]
    assert tested["eval_data"] == report["retrieved"][1]
    # The embeddings are found there.
    (out / "embeddings").mkdir()
    (out / "embeddings" / "wiki_00").touch()
    assert glob.glob(parsed[-1][1]["passages_embeddings"]) == [f"{out}/embeddings/wiki_00"]
