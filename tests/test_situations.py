"""Situations of a user's machine, each answered in one line: names, encodings, launchers."""

import argparse
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import generate_passage_embeddings
import passage_retrieval
from src import options as all_options
from src.data.examples import load_data
from src.evaluation.answers import read_answers
from src.evaluation.results import AnswerFile, check_results
from src.models.answering import Answer
from src.models.pretrained import load_config, load_tokenizer
from src.models.reader import load_reader
from src.runtime.errors import InputError, reports_input_errors
from src.runtime.launch import detect_launch
from src.search.embeddings import open_shards
from src.search.shards import ShardWriter
from tests.conftest import REFERENCE, run


def retrieve(folder: Path, **changes: str) -> list[str]:
    (folder / "p.tsv").write_text("id\ttext\ttitle\n1\tThe Nile is long.\tNile\n")
    (folder / "q.json").write_text('[{"question": "How long?", "answers": ["long"]}]')
    given = {"data": folder / "q.json", "passages": folder / "p.tsv", "output_path": folder / "o"}
    words = [word for name, value in (given | changes).items() for word in (f"--{name}", value)]
    return ["--bm25", *map(str, words)]


NAMES = {
    "a shard": ("wiki_00", "wiki_00 is a file that this command reads"),
    "an input": ("q.json", "q.json is a file that this command reads"),
    "the collection": ("p.tsv", "p.tsv is a file that this command reads"),
    "a link's target": ("link", "is a"),
    "an input beside it": ("r", "is a file that this command reads"),
    "a long name": ("n" * 240, "File name too long"),
    "a long path": ("/".join(["n" * 200] * 25), "File name too long"),
    "a NUL": ("a\0b", "no text in UTF-8"),
    "a surrogate": ("a\udcff", r"'.*a\\udcff' is no text in UTF-8"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_cannot_be_written(case, tmp_path, refused):
    name, message = NAMES[case]
    command = retrieve(tmp_path, output_path=f"{tmp_path}/{name}")
    if case == "a shard":
        (tmp_path / "wiki_00").touch()
        command += ["--passages_embeddings", f"{tmp_path}/wiki_*", "--model_path", "x"]
        command.remove("--bm25")
    if case == "a link's target":
        (tmp_path / "link").symlink_to("q.json")
    if case == "an input beside it":
        (tmp_path / "r.recall.json").hardlink_to(tmp_path / "q.json")
    before = (tmp_path / "q.json").read_text()
    line = refused(passage_retrieval.main, command)
    assert message.split("'")[0] in line
    assert (tmp_path / "q.json").read_text() == before


def test_a_test_does_not_replace_what_it_reads(tmp_path):
    scores = tmp_path / "dataset_wscores.json"
    scores.write_text("[]")
    check_results(tmp_path, "other.json")
    with pytest.raises(
        InputError, match=r"dataset_wscores\.json is a file that this command reads"
    ):
        check_results(tmp_path, str(scores))


def test_embeddings_do_not_replace_their_passages(passages, refused):
    collection = passages.rename(passages.with_name("p_00"))
    model = ["--model_path", REFERENCE / "legacy_retriever_mask_mean"]
    command = [*model, "--tokenizer", REFERENCE / "bert", "--passages", collection]
    command += ["--output_path", collection.with_name("p")]
    line = refused(generate_passage_embeddings.main, list(map(str, command)))
    assert "p_00 is a file that this command reads" in line


def test_a_pattern_without_quotes(tmp_path, refused):
    command = retrieve(tmp_path)
    line = refused(passage_retrieval.main, [*command, str(tmp_path / "p.tsv")])
    assert "a pattern with * must be in quotes" in line


def test_an_output_in_ascii(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    reports_input_errors(lambda: print("é\udcff"))()
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\\udcff\n"


def test_a_folder_that_is_gone(tmp_path, refused):
    line = refused(reports_input_errors(lambda: (tmp_path / "gone" / "x").read_text()))
    assert (
        line
        == f"error: {tmp_path}/gone/x: No such file or directory; check the path, and try again"
    )


@pytest.mark.parametrize("folder", ["run[1]", "[ab]", "a*b", "r[1"])
def test_brackets_in_a_folders_name(folder, tmp_path):
    shard = tmp_path / folder / "wiki_00"
    shard.parent.mkdir()
    (tmp_path / "run1").mkdir()
    with ShardWriter(shard, 1, 2, np.dtype(np.float32), {}) as writer:
        writer.append(["1"], np.ones((1, 2), np.float32))
        writer.finish()
    (tmp_path / "run1" / "wiki_00").write_bytes(b"another")
    for pattern in (str(shard), f"{tmp_path}/{folder}/wiki_*"):
        assert [found.path for found in open_shards(pattern)] == [str(shard)]


LAUNCHES = [
    {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"},
    {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "http://a b"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "5"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "9"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "a"},
]  # fmt: skip


@pytest.mark.parametrize("environ", LAUNCHES, ids=str)
def test_launcher_variables(environ):
    with pytest.raises(InputError, match="invalid launcher environment variables: "):
        detect_launch(environ)


@pytest.mark.parametrize("factory", ["HNSW1000000", "HNSW0", "IVF99999999999,Flat", "PQ64x30",
    "PQ64x0", "Pad1000000000,Flat", "IVF0,Flat", "RQ1000000000x8", "IVF4_HNSW99999"])  # fmt: skip
def test_absurd_factories(factory):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a factory string of FAISS"):
        all_options._factory(factory)


@pytest.mark.parametrize("factory", ["PQ64", "IVF4096,PQ64", "HNSW32", "IVF262144_HNSW32,PQ32x12",
    "OPQ64_256,IVF65536(IVF256,Flat),PQ64x4fs,RFlat", "SQ8", "PCAR64,SQfp16"])  # fmt: skip
def test_usual_factories(factory):
    assert all_options._factory(factory) == factory


@pytest.mark.parametrize("change", [
    {"num_layers": 0}, {"num_heads": -1}, {"d_model": 0}, {"vocab_size": 0}, {"pad_token_id": -5},
    {"decoder_start_token_id": 10**9}, {"eos_token_id": [1, 10**9]}, {"eos_token_id": "x"},
], ids=str)  # fmt: skip
def test_absurd_configs(change, tmp_path):
    config = json.loads((REFERENCE / "t5" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + json.dumps(config), encoding="utf-8")  # a byte-order mark is no harm
    assert load_config(str(path), "t5").vocab_size == config["vocab_size"]
    path.write_text(json.dumps(config | change))
    for where in (path, tmp_path):
        with pytest.raises(InputError, match=f"^{where}: no model config can be read there"):
            load_config(str(where), "t5")


PANICS = {
    "of a normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "while encoding": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAECAwRhYmM="}
    },
    "no panic, but only while encoding": {
        "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", PANICS)
def test_a_tokenizer_that_panics(case, tmp_path, capfd):
    load_tokenizer(str(REFERENCE / "t5"), "none").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PANICS[case]))
    with pytest.raises(InputError, match=f"^{tmp_path}: no tokenizer can be read there .*give one"):
        load_tokenizer(str(tmp_path), "none")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("settings", [
    {"max_new_tokens": -1}, {"temperature": -1.0}, {"early_stopping": 7}, {"top_p": 0.5},
    {"num_return_sequences": 3}, {"cache_implementation": "none such"}, {"pad_token_id": -5},
    [1], "x",
], ids=str)  # fmt: skip
def test_invalid_generation_settings(settings, tmp_path):
    """Transformers loads some of them, and refuses to save them, after training."""
    load_reader(str(REFERENCE / "t5")).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    names = "|".join(settings) if isinstance(settings, dict) else ""
    message = f"^{tmp_path}: its generation_config.json is refused .*({names}).*; correct or remove"
    with pytest.raises(InputError, match=message):
        load_reader(str(tmp_path))


def test_a_run_folder_deleted_under_tensorboard(tmp_path):
    program = """if True:
        import shutil, sys
        from pathlib import Path
        from src.runtime.errors import reports_input_errors
        from src.training.metrics import Metrics
        @reports_input_errors
        def main(folder):
            metrics = Metrics(folder, 0)
            metrics.write(1, {"train/loss": 1.0})
            metrics._board.flush()
            shutil.rmtree(folder)
            for step in range(2, 100):
                metrics.write(step, {"train/loss": 1.0})
                metrics._board.flush()
        main(Path(sys.argv[1]))
    """
    done = run("-c", program, tmp_path / "run")
    assert done.returncode == 2
    assert re.fullmatch(f"error: {tmp_path}/run/tensorboard/.*: No such file .*\n", done.stderr)


def test_models_that_are_something_else(tmp_path):
    (tmp_path / "checkpoint" / "best_dev").mkdir(parents=True)
    (tmp_path / "checkpoint" / "best_dev" / "config.json").write_text("{}")
    for folder, rest in ((tmp_path, "checkpoint/best_dev"), (tmp_path / "checkpoint", "best_dev")):
        with pytest.raises(
            InputError, match=f"no config.json in .*give its model: {folder}/{rest}$"
        ):
            load_config(str(folder), "bert")
    (tmp_path / "biencoder.cp").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"biencoder\.cp: a file, not .* DPR's \.cp, must be conv"):
        load_config(str(tmp_path / "biencoder.cp"), "bert")


@pytest.mark.parametrize("text", ["q0\tI\nq1\té", "\ufeffq0\tI\nq1\té\n", "q0\tI\r\nq1\té\r\n"])
def test_answer_files_of_other_editors(text, tmp_path):
    (tmp_path / "q.json").write_text(
        '[{"id": "q0", "question": "a"}, {"id": "q1", "question": "b"}]'
    )
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert read_answers(str(tmp_path / "a.txt"), load_data(tmp_path / "q.json")) == ["I", "é"]


@pytest.mark.parametrize("damage", [b"\xff\n", b"null\n", b"[1]\n", b'[[0, "a"', b"[[0, 1, 2]]\n"])
def test_a_damaged_part_is_continued_before_the_damage(damage, tmp_path):
    with AnswerFile(tmp_path, 0, {"model": "a"}) as part:
        part.write([Answer(0, "I", [1.5])])
        part.write([Answer(1, "me", None)])
    good = part.path.read_bytes()
    part.path.write_bytes(good + damage)
    assert [len(batch) for batch in AnswerFile(tmp_path, 0, {"model": "a"}).finished] == [1, 1]
    assert part.path.read_bytes() == good
    assert AnswerFile(tmp_path, 0, {"model": "b"}).finished == []
    assert os.listdir(tmp_path) == [part.path.name]
