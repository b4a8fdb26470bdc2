"""docs/formats.md: its examples are read by the code that reads such files, and its tables are
those of files that the scripts have just written. And what is written comes back equal."""

import json
import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors

import generate_passage_embeddings
import passage_retrieval
import test_reader
import train_reader
import train_retriever
from src.data.examples import Examples, load_data, read_example
from src.data.passages import Passage, Passages
from src.evaluation.answers import measure_answers
from src.evaluation.results import (
    AnswerFile,
    read_parts,
    write_answers,
    write_scores,
)
from src.models.answering import Answer
from src.search.saved_index import read_description
from src.training.checkpoint import read_meta
from src.training.metrics import Metrics
from tests.conftest import REFERENCE, ROOT

FORMATS = (ROOT / "docs" / "formats.md").read_text()
BLOCKS = {
    name: content
    for _, name, content in re.findall(r"^```(json|text) (\S+)\n(.*?)^```$", FORMATS, re.S | re.M)
}


@pytest.fixture
def block(tmp_path):
    """Writes an example of the page to a file of its name."""

    def write(name: str) -> Path:
        (tmp_path / name).write_text(BLOCKS[name])
        return tmp_path / name

    return write


def table(heading: str) -> list[list[str]]:
    """The rows, cell by cell, of the table under these column names."""
    rows = FORMATS.split(f"\n{heading}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# ----------------------------------------------------------------------------------------------
# Examples that others write


def test_every_example_has_a_name():
    assert len(BLOCKS) == FORMATS.count("\n```") / 2


def test_questions(block):
    example = read_example(load_data(block("data.json")), 0)
    assert (example.id, example.target, len(example.answers)) == ("0", "Polonium", 3)
    assert [passage.score for passage in example.passages] == [81.3, 12, None]
    assert [passage.title for passage in example.passages] == ["Marie Curie", "Poland", "Radium"]
    lines = load_data(block("data.jsonl"))
    lines = [read_example(lines, index) for index in (0, 1)]
    assert [line.question for line in lines] == ["Who named polonium?", "What is radium?"]
    assert [line.id for line in lines] == ["0", "1"]
    example = read_example(load_data(block("NQ-open.dev.jsonl")), 0)
    assert example.answers == ["14 December 1972 UTC", "December 1972"]
    example = read_example(load_data(block("queries.jsonl")), 0)
    assert (example.id, example.question) == ("PLAIN-2", "Do statins cause breast cancer?")
    rows = load_data(block("nq-test.csv"))
    assert [rows[0], rows[1]] == [
        {"question": "who sings does he love me with reba", "answers": ["Linda Davis"]},
        {"question": 'who sang "what\'s up"', "answers": ["4 Non Blondes", "Linda Perry's band"]},
    ]


def test_passages(block):
    assert list(Passages(block("passages.tsv"))) == [
        Passage("1", "Nile", "The Nile is a river."),
        Passage("2", "Nile", 'It was called "the river" alone.'),
    ]
    assert list(Passages(block("corpus.jsonl"))) == [
        Passage(
            "MED-10",
            "Statins",
            "A study of statins.",
            more={"metadata": {"url": "http://example.org/10"}},
        )
    ]
    assert list(Passages(block("contents.jsonl"))) == [
        Passage("3", "Nile", "The Nile is a river."),
        Passage("4", "", "A passage without a title."),
    ]


# ----------------------------------------------------------------------------------------------
# What the scripts write

FREE = {"options", "files", "versions", "metadata", "made_by"}  # of which a part is shown


def same_build(shown: object, real: object, free: bool = False) -> bool:
    """Whether an example has the real thing's fields, of the same kinds."""
    if isinstance(shown, dict) and isinstance(real, dict):
        known = shown.keys() <= real.keys() if free else shown.keys() == real.keys()
        return known and all(same_build(shown[key], real[key], key in FREE) for key in shown)
    if isinstance(shown, list) and isinstance(real, list):
        if len(shown) != len(real):  # a list of one kind of thing, of which fewer are shown
            real = real[:1] * len(shown)
        return len(shown) == len(real) and all(map(same_build, shown, real))
    numbers = (int, float)
    both = isinstance(shown, numbers) and isinstance(real, numbers)
    return both or type(shown) is type(real)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder in which each script has run."""
    at = tmp_path_factory.mktemp("written")
    data, shared = REFERENCE / "data.json", ["--checkpoint_dir", at, "--num_workers", 0]
    read = ["--model_path", REFERENCE / "t5", "--text_maxlength", 32, "--n_context", 2]
    train = ["--train_data", data, "--eval_data", data, "--total_steps", 2, "--eval_freq", 2]
    shutil.copy(REFERENCE / "passages.tsv", at)
    retriever = [
        "--model_path", REFERENCE / "legacy_retriever_mask_mean", "--tokenizer", REFERENCE / "bert",
    ]  # fmt: skip
    find = ["--passages", at / "passages.tsv", "--data", REFERENCE / "questions.json"]
    find += ["--n-docs", 5, "--save_or_load_index", "--output_path"]
    dense = [*retriever, "--passages_embeddings", at / "emb" / "wiki_*", "--index_factory", "SQ8"]
    test = ["--eval_data", data, "--write_results", "--write_crossattention_scores"]
    for script, arguments in (
        (train_reader, [*train, *read, *shared, "--name", "run"]),
        (test_reader, [*test, *read, *shared, "--name", "test"]),
        (train_retriever, [*train, *retriever, *shared, "--name", "retriever"]),
        (
            generate_passage_embeddings,
            [*retriever, "--passages", at / "passages.tsv", "--output_path", at / "emb" / "wiki"],
        ),
        (passage_retrieval, [*dense, *find, at / "retrieved_data.json"]),
        (passage_retrieval, ["--bm25", *find, at / "run.trec", "--output_format", "trec"]),
    ):
        script.main(list(map(str, arguments)))
    return at


REAL = {
    "index.json": "emb/index_SQ8/index.json",
    "retrieved_data.json": "retrieved_data.json",
    "retrieved_data.json.recall.json": "retrieved_data.json.recall.json",
    "retrieved_data.json.made_by.json": "retrieved_data.json.made_by.json",
    "dataset_wscores.json.made_by.json": "test/dataset_wscores.json.made_by.json",
    "options.json": "run/options.json",
    "checkpoint.json": "run/checkpoint/step-2/checkpoint.json",
}


@pytest.mark.parametrize("name", REAL)
def test_examples_are_built_as_the_real_files(name, written):
    shown, real = json.loads(BLOCKS[name]), json.loads((written / REAL[name]).read_text())
    assert same_build(shown, real, name in FREE), real


def test_scored_data(block, written):
    """The form of a passage depends on whether it was read; the reader's data shows the rest."""
    shown = read_example(load_data(block("dataset_wscores.json")), 0)
    assert [passage.score for passage in shown.passages] == [1.25, None]
    real = load_data(written / "test" / "dataset_wscores.json")
    for index in range(len(real)):
        scores = ["score" in context for context in real[index]["ctxs"]]
        assert scores == [True, True, False, False, False]  # --n_context 2
    assert BLOCKS["dataset_wscores.json"].startswith("[\n{")
    assert (written / "test" / "dataset_wscores.json").read_text().startswith("[\n{")


def test_answers(block, written):
    file = block("final_output.txt")
    data = file.with_name("questions.json")
    data.write_text(
        '[{"id": "q0", "question": "?", "answers": ["polonium"]}, '
        '{"id": "q1", "question": "?", "answers": ["1898"]}]'
    )
    measured = measure_answers(str(file), Examples(data))
    assert measured == {"questions": 2, "exact match": 50.0, "F1": pytest.approx(100 * 5 / 6)}
    real = (written / "test" / "final_output.txt").read_text()
    assert re.fullmatch(r"(q\d+\t[^\t\n]*\n){24}", real)


def test_a_run_for_trec_eval(block, written):
    line = re.compile(r"\S+ Q0 \S+ [1-9]\d* -?\d+\.\d+ ([0-9a-f]{32}|bm25)")
    for file in (block("run.trec"), written / "run.trec"):
        for text in file.read_text().splitlines():
            assert line.fullmatch(text), text
    assert len((written / "run.trec").read_text().splitlines()) == 40 * 5


def test_metrics(block, written):
    path = block("metrics.jsonl")
    before = path.read_text().splitlines(keepends=True)
    for step, evaluation_due, kept in ((2, False, 3), (2, True, 2), (1, False, 1)):
        path.write_text("".join(before))
        Metrics(path.parent, step, evaluation_due).close()
        assert path.read_text() == "".join(before[:kept])
    real = (written / "run" / "metrics.jsonl").read_text().splitlines()
    shown = [list(json.loads(text)) for text in before]
    assert [list(json.loads(text)) for text in real] == shown


@pytest.mark.parametrize(
    ("name", "read"),
    [("checkpoint.json", read_meta), ("index.json", partial(read_description, verify=False))],
)
def test_descriptions_of_checkpoints_and_indexes(name, read, block, tmp_path):
    shown = json.loads(block(name).read_text())
    for file, size in shown["files"].items():
        (tmp_path / file).write_bytes(bytes(size if isinstance(size, int) else size[0]))
    assert read(tmp_path) == shown
    (tmp_path / next(iter(shown["files"]))).write_bytes(b"")
    assert read(tmp_path) is None


# ----------------------------------------------------------------------------------------------
# Tables


def names(rows: list[list[str]]) -> list[str]:
    return [row[0].strip("`") for row in rows]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_tensors_of_a_shard(written):
    rows = table("| tensor | type | shape | |")
    with safetensors.safe_open(written / "emb" / "wiki_00", "numpy") as file:
        header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    real = [[f"`{name}`", header[name].get_dtype(), str(header[name].get_shape())]
            for name in ("id_offsets", "embeddings", "id_bytes")]  # fmt: skip
    assert [row[:3] for row in rows] == real
    assert len(header) == len(rows)
    assert sorted(names(table("| metadata | |"))) == sorted(metadata)
    described = dict(table("| metadata | |"))["`options`"]
    assert re.findall("`(.*?)`", described) == list(json.loads(metadata["options"]))
    assert metadata["format_version"] == dict(table("| metadata | |"))["`format_version`"]


def test_the_files_of_folders(written):
    assert sorted(names(table("| file | |"))) == listed(written / "emb" / "index_SQ8")
    run = names(table("| in the folder of a training | |"))
    for folder in ("run", "retriever"):
        assert run == listed(written / folder)
    assert listed(written / "run" / "checkpoint") == ["best_dev", "latest", "step-2"]
    checkpoint = names(table("| in a reader's checkpoint | |"))
    assert checkpoint == listed(written / "run" / "checkpoint" / "best_dev")
    retriever = written / "retriever" / "checkpoint" / "best_dev"
    readers_only = {"generation_config.json", "spiece.model"}
    expected = [name for name in checkpoint if name not in readers_only]
    assert sorted([*expected, "modules.json"]) == listed(retriever)
    with safetensors.safe_open(retriever / "model.safetensors", "numpy") as file:
        assert {name.split(".")[0] for name in file.keys()} == {  # noqa: SIM118
            "embeddings", "encoder", "proj", "norm",
        }  # fmt: skip
    config = json.loads((retriever / "config.json").read_text())
    text = FORMATS.split("its `config.json` holds ")[1].split("`modules.json`")[0]
    assert config.keys() >= set(re.findall("`(.*?)`", text))
    assert (written / "passages.tsv.bm25" / "index.json").exists()


# ----------------------------------------------------------------------------------------------
# What is written comes back equal


def random_text(rng: random.Random) -> str:
    letters = 'a"\\[]{},:\t\n\r\u2028é日 \x1c'
    return "x" + "".join(rng.choice(letters) for _ in range(rng.randrange(9)))


@pytest.fixture(params=range(3))
def rng(request) -> random.Random:
    return random.Random(request.param)


def test_answers_and_scores_come_back(rng, tmp_path):
    questions = [
        {"id": random_text(rng), "question": "?", "answers": ["x"],
         "ctxs": [{"title": random_text(rng), "text": random_text(rng)} for _ in range(3)]}
        for _ in range(7)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(questions))
    data = Examples(tmp_path / "data.json")
    answers = [Answer(n, random_text(rng), [rng.random() for _ in range(2)]) for n in range(7)]
    for rank in range(2):
        with AnswerFile(tmp_path, rank, {"model": "m"}) as file:
            for start in range(2 * rank, 7, 4):
                file.write(answers[start : start + 2])
    assert list(read_parts(tmp_path, 2)) == answers
    path = write_answers(tmp_path, data, 2)
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    expected = [
        " ".join(question["id"].split()) + "\t" + " ".join(answer.text.split())
        for question, answer in zip(questions, answers, strict=True)
    ]
    assert lines == expected
    assert measure_answers(str(path), data)["questions"] == 7  # which reads ids and answers
    scored = Examples(write_scores(tmp_path, data, 2, 2, {"model": "m"}))
    for row, question, answer in zip(scored, questions, answers, strict=True):
        contexts = [dict(context) for context in question["ctxs"]]
        for context, score in zip(contexts, answer.scores, strict=False):
            context["score"] = score
        assert row == {**question, "ctxs": contexts}
