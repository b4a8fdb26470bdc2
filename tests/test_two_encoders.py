"""Embedding settings and pairs of encoders in the scripts: what passage_retrieval.py finds is what
the encoders say, computed directly."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    DPRContextEncoder,
    DPRQuestionEncoder,
)

import generate_passage_embeddings
import train_retriever
from src.data.passages import Passages
from src.models.retriever import fingerprint, load_retriever
from src.search.embeddings import open_shards
from tests import test_others as others
from tests.conftest import REFERENCE
from tests.test_others import SHAPE, expect, make_dpr

QUESTIONS = REFERENCE / "questions.json"


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer.from_pretrained(REFERENCE / "bert")


def embed(model: Path, passages: Path, *more: str) -> np.ndarray:
    """The passages' embeddings, by the script."""
    output = passages.with_name("emb") / "x"
    command = ["--model_path", model, "--passages", passages, "--output_path", output, *more]
    generate_passage_embeddings.main(list(map(str, command)))
    (shard,) = open_shards(f"{output}_*")
    return np.array(shard.embeddings)


def retrieve(model: Path, passages: Path, *more: str) -> list[dict]:
    return others.retrieve(model, passages, passages.with_name("emb") / "x_*", QUESTIONS, *more)


def pooled(model: torch.nn.Module, encoded: list, pooling: str) -> np.ndarray:
    with torch.no_grad():
        states = [model(row["input_ids"]).last_hidden_state[0] for row in encoded]
    rows = [state[0] if pooling == "cls" else state.mean(dim=0) for state in states]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("projection_dim", [0, 8])
def test_dprs_two_encoders(projection_dim, passages, tokenizer, tmp_path):
    """Titles and texts as its own tokenizers join them: with [SEP] between, of one type."""
    question = make_dpr(tmp_path / "question", DPRQuestionEncoder, projection_dim)
    context = make_dpr(tmp_path / "ctx", DPRContextEncoder, projection_dim)
    vectors = embed(tmp_path / "ctx", passages)
    texts = [row["question"] for row in json.loads(QUESTIONS.read_text())]
    pairs = [(passage.title, passage.text) for passage in Passages(passages)]
    with torch.no_grad():
        ids = [tokenizer(*pair, return_tensors="pt")["input_ids"] for pair in pairs]
        expected = torch.cat([context(row).pooler_output for row in ids]).numpy()
        ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        questions = torch.cat([question(row).pooler_output for row in ids]).numpy()
    assert np.allclose(vectors, expected, atol=1e-5)
    expect(retrieve(tmp_path / "question", passages), questions, vectors, passages)


def test_an_encoder_of_one_side_embeds_only_this_side(passages, tmp_path, refused):
    make_dpr(tmp_path / "question", DPRQuestionEncoder)
    make_dpr(tmp_path / "ctx", DPRContextEncoder)
    line = refused(embed, tmp_path / "question", passages)
    assert "question: this encoder is one of questions, and cannot embed passages" in line
    embed(tmp_path / "ctx", passages)
    line = refused(retrieve, tmp_path / "ctx", passages)
    assert "ctx: this encoder is one of passages, and cannot embed questions" in line
    shutil.rmtree(tmp_path / "emb")  # embeddings of some other model
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path / "bert")
    shutil.copy(REFERENCE / "bert" / "vocab.txt", tmp_path / "bert")
    embed(tmp_path / "bert", passages)
    line = refused(retrieve, tmp_path / "question", passages)
    assert "do not belong together: the model" in line


def train(tmp_path: Path, *more: str) -> Path:
    shared = ["--train_data", REFERENCE / "data.json", "--eval_data", "none", "--n_context", 3]
    shared += ["--tokenizer", REFERENCE / "bert", "--checkpoint_dir", tmp_path, "--num_workers", 0]
    shared += ["--passage_maxlength", 64, "--lr", 0.01, "--name", "run", "--total_steps", 2]
    train_retriever.main(list(map(str, [*shared, *more])))
    return tmp_path / "run" / "checkpoint" / "latest"


def new_retriever(tmp_path: Path) -> list[str]:
    config = {"model_type": "bert", "initializer_range": 0.3} | SHAPE
    (tmp_path / "shape.json").write_text(json.dumps(config))
    return ["--model_config", str(tmp_path / "shape.json"), "--no_projection"]


def test_two_towers(passages, tokenizer, tmp_path):
    start = [*new_retriever(tmp_path), "--two_towers"]
    saved = train(tmp_path, *start, "--pooling", "cls", "--passage_prefix", "", "--save_freq", "1")
    retriever = load_retriever(str(saved))
    sides = {fingerprint(retriever, side) for side in ("questions", "passages")}
    assert len(sides) == 2
    assert fingerprint(load_retriever(str(saved / "passage_encoder"))) in sides

    vectors = embed(saved, passages)
    collection = [f"{passage.title} {passage.text}" for passage in Passages(passages)]
    texts = [f"question: {row['question']}" for row in json.loads(QUESTIONS.read_text())]
    cut = {"return_tensors": "pt", "truncation": True}
    encoded = [tokenizer(text, max_length=64, **cut) for text in collection]
    towers = [AutoModel.from_pretrained(path) for path in (saved, saved / "passage_encoder")]
    assert np.allclose(vectors, pooled(towers[1], encoded, "cls"), atol=1e-5)
    encoded = [tokenizer(text, max_length=40, **cut) for text in texts]
    questions = pooled(towers[0], encoded, "cls")
    expect(retrieve(saved, passages), questions, vectors, passages)

    straight = retriever.state_dict()  # a run resumed after its first update ends in the same way
    for path in (tmp_path / "run" / "checkpoint").glob("step-2"):
        shutil.rmtree(path)
    train(tmp_path, *start, "--pooling", "cls", "--passage_prefix", "", "--save_freq", "1")
    for name, tensor in load_retriever(str(saved)).state_dict().items():
        assert torch.equal(tensor, straight[name]), name


def test_training_keeps_settings_and_an_existing_retriever_its_own(tmp_path, refused):
    given = ["--normalize", "--question_prefix", "query: ", "--passage_prefix", "passage: "]
    saved = train(tmp_path, *new_retriever(tmp_path), *given)
    config = load_retriever(str(saved)).config
    assert (config.normalize, config.pooling, config.passage_prefix) == (True, "mean", "passage: ")
    again = ["--model_path", str(saved), "--name", "other"]
    assert train(tmp_path, *again, "--question_prefix", "query: ").exists()
    line = refused(train, tmp_path, *again, "--name", "third", "--pooling", "cls")
    assert "latest: this retriever has pooling mean, not cls; leave out --pooling" in line


SETTINGS = ["--pooling", "cls", "--normalize", "--question_prefix", "query: "]
SETTINGS += ["--passage_prefix", "passage: "]


def test_settings_of_a_folder_without_its_own(passages, tokenizer, tmp_path, refused):
    load_retriever(str(REFERENCE / "legacy_retriever_cls")).model.save_pretrained(tmp_path / "b")
    for name in ("indexing_dimension", "pooling"):  # an ordinary BERT
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        (tmp_path / "b" / "config.json").write_text(
            json.dumps({key: config[key] for key in config if key != name})
        )
    shutil.copy(REFERENCE / "bert" / "vocab.txt", tmp_path / "b")
    vectors = embed(tmp_path / "b", passages, *SETTINGS)
    model = AutoModel.from_pretrained(tmp_path / "b")
    texts = [f"passage: {passage.title} {passage.text}" for passage in Passages(passages)]
    cut = {"return_tensors": "pt", "truncation": True}
    expected = pooled(model, [tokenizer(text, max_length=200, **cut) for text in texts], "cls")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(vectors, expected, atol=1e-5)
    texts = [f"query: {row['question']}" for row in json.loads(QUESTIONS.read_text())]
    questions = pooled(model, [tokenizer(text, max_length=40, **cut) for text in texts], "cls")
    questions /= np.linalg.norm(questions, axis=1, keepdims=True)
    expect(retrieve(tmp_path / "b", passages, *SETTINGS), questions, vectors, passages)
    line = refused(retrieve, tmp_path / "b", passages, *SETTINGS[:-1], "text: ")
    assert "--passage_prefix is 'text: ' in the first and 'passage: ' in the second" in line
    assert "the model is" in refused(retrieve, tmp_path / "b", passages, *SETTINGS[:-2])
    line = refused(embed, tmp_path / "b", passages, *SETTINGS, "--plain_text")
    assert "--plain_text embeds without prefixes: leave out it or --question_prefix" in line
