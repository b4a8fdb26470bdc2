"""Other people's encoders and embeddings, made as their projects write them, from end to end:
what passage_retrieval.py finds is what BERT itself says, computed directly."""

import csv
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    DPRConfig,
    DPRQuestionEncoder,
    DPRReader,
)

import generate_passage_embeddings
import passage_retrieval
import test_reader
import train_reader
from src.data.examples import load_data
from src.data.passages import Passages
from src.evaluation import answers as evaluation
from src.models.retriever import load_retriever
from src.runtime.errors import InputError
from src.search.embeddings import open_shards
from tests.conftest import REFERENCE

SHAPE = {
    "vocab_size": 700, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
N_DOCS = 5


@pytest.fixture
def tokenizer(reference: Path) -> BertTokenizer:
    return BertTokenizer.from_pretrained(reference / "bert")


def make_contriever(folder: Path) -> BertModel:
    """A folder as `facebook/contriever` has it: BERT's own keys, the pooler's among them, in a
    `.bin`, and a config that names a class which Transformers does not know."""
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SHAPE, initializer_range=0.3)).eval()
    folder.mkdir()
    config = {**bert.config.to_dict(), "architectures": ["Contriever"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(bert.state_dict(), folder / "pytorch_model.bin")
    shutil.copy(REFERENCE / "bert" / "vocab.txt", folder)
    return bert


def mean_pooled(bert: BertModel, tokenizer: BertTokenizer, texts: list[str]) -> np.ndarray:
    """Contriever's embeddings: the mean of the last hidden states over real tokens."""
    rows = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=200)
        with torch.no_grad():
            rows.append(bert(**tokens).last_hidden_state[0].mean(dim=0).numpy())
    return np.stack(rows)


def retrieve(model: Path, passages: Path, embeddings: Path, data: Path, *more) -> list[dict]:
    output = passages.with_name("found.json")
    command = ["--model_path", model, "--passages", passages, "--passages_embeddings", embeddings]
    command += ["--data", data, "--output_path", output, "--n-docs", N_DOCS, *more]
    passage_retrieval.main(list(map(str, command)))
    return json.loads(output.read_text())


def expect(found: list[dict], questions: np.ndarray, vectors: np.ndarray, passages: Path) -> None:
    """The ids are those of the collection, by the inner products of the embeddings."""
    scores, ids = questions @ vectors.T, list(Passages(passages).ids())
    assert len(found) == len(questions)
    for row, expected in zip(found, scores, strict=True):
        best = np.argsort(-expected)[:N_DOCS]
        assert [context["id"] for context in row["ctxs"]] == [ids[place] for place in best]
        assert [c["score"] for c in row["ctxs"]] == pytest.approx(expected[best], rel=1e-4)


def texts_of(data: Path) -> list[str]:
    return [row["question"] for row in json.loads(data.read_text())]


@pytest.mark.parametrize("plain", [True, False])
def test_contriever_embeds_as_bert_with_a_mean(plain, reference, passages, tokenizer, tmp_path):
    bert = make_contriever(tmp_path / "contriever")
    more = ["--plain_text"] if plain else []
    generate_passage_embeddings.main(
        ["--model_path", str(tmp_path / "contriever"), "--passages", str(passages),
         "--output_path", str(tmp_path / "emb" / "wiki"), *more]
    )  # fmt: skip
    (shard,) = open_shards(tmp_path / "emb" / "wiki_*")
    collection = list(Passages(passages))
    form = "{} {}" if plain else "title: {} context: {}"
    texts = [form.format(passage.title, passage.text) for passage in collection]
    vectors = mean_pooled(bert, tokenizer, texts)
    assert np.allclose(shard.embeddings, vectors, atol=1e-5)

    data = reference / "questions.json"
    questions = [text if plain else f"question: {text}" for text in texts_of(data)]
    found = retrieve(tmp_path / "contriever", passages, tmp_path / "emb" / "wiki_*", data, *more)
    expect(found, mean_pooled(bert, tokenizer, questions), vectors, passages)


def test_contrievers_own_shards(reference, passages, tokenizer, tmp_path):
    """`(list of texts, array)`, as its generate_passage_embeddings.py pickles them."""
    bert = make_contriever(tmp_path / "contriever")
    collection = list(Passages(passages))
    ids = [passage.id for passage in collection]
    texts = [f"{passage.title} {passage.text}" for passage in collection]
    vectors = mean_pooled(bert, tokenizer, texts).astype(np.float16)
    (tmp_path / "emb").mkdir()
    for number, rows in enumerate((slice(0, 50), slice(50, None))):
        with open(tmp_path / "emb" / f"passages_{number:02d}", "wb") as file:
            pickle.dump((ids[rows], torch.from_numpy(vectors[rows]).numpy()), file)
    data = reference / "questions.json"
    found = retrieve(
        tmp_path / "contriever", passages, tmp_path / "emb" / "passages_*", data, "--plain_text"
    )
    expect(
        found, mean_pooled(bert, tokenizer, texts_of(data)), vectors.astype(np.float32), passages
    )


def make_dpr(
    folder: Path, kind: type = DPRQuestionEncoder, projection_dim: int = 0
) -> torch.nn.Module:
    torch.manual_seed(len(folder.name))
    sizes = {**SHAPE, "initializer_range": 0.3, "projection_dim": projection_dim}
    encoder = kind(DPRConfig(**sizes)).eval()
    encoder.save_pretrained(folder)
    shutil.copy(REFERENCE / "bert" / "vocab.txt", folder)
    return encoder


def dpr_questions(encoder: DPRQuestionEncoder, tokenizer, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        outputs = [encoder(**tokenizer(text, return_tensors="pt")) for text in texts]
    return np.concatenate([output.pooler_output.numpy() for output in outputs])


@pytest.mark.parametrize("prefix", ["wiki:", ""])
def test_dprs_own_shards_and_questions(prefix, reference, passages, tokenizer, tmp_path):
    """A list of `(id, vector)`, each vector a row of a tensor, as its generate_dense_embeddings.py
    pickles them; ids with the prefix of its `dpr_wiki` source, or without, as before; questions in
    its `.csv`, embedded by its question encoder."""
    encoder = make_dpr(tmp_path / "dpr")
    ids = list(Passages(passages).ids())
    vectors = torch.randn(len(ids), SHAPE["hidden_size"])
    for number, rows in enumerate((range(60), range(60, len(ids)))):
        content = [(prefix + ids[row], vectors[row].view(-1).numpy()) for row in rows]
        with open(tmp_path / f"shard_{number}", mode="wb") as file:
            pickle.dump(content, file)
    examples = json.loads((reference / "questions.json").read_text())
    with open(tmp_path / "test.csv", "w", newline="") as file:
        rows = [(row["question"], str(row["answers"])) for row in examples]
        csv.writer(file, delimiter="\t").writerows(rows)
    found = retrieve(
        tmp_path / "dpr", passages, tmp_path / "shard_*", tmp_path / "test.csv", "--plain_text"
    )
    questions = dpr_questions(encoder, tokenizer, [row["question"] for row in examples])
    expect(found, questions, vectors.numpy(), passages)
    for row, example in zip(found, examples, strict=True):
        assert (row["question"], row["answers"]) == (example["question"], example["answers"])
    assert (tmp_path / "found.json.recall.json").exists()


def test_dprs_reader_is_refused(tmp_path):
    DPRReader(DPRConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"only question encoders and context .* not \['DPRReader"):
        load_retriever(str(tmp_path))


def test_dprs_questions_in_the_readers_scripts(reference, tmp_path):
    """Without passages; what is trained on is one of the answers."""
    questions = tmp_path / "nq-dev.csv"
    questions.write_text(
        "who sang it\t['Reba', \"4 Non Blondes\"]\nhow long is the river\t['7 km']\n"
    )
    shared = ["--checkpoint_dir", tmp_path, "--num_workers", 0, "--model_path", reference / "t5"]
    train = ["--train_data", questions, "--eval_data", questions, "--total_steps", 1]
    train_reader.main(list(map(str, [*train, *shared, "--name", "run"])))
    numbers = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "dev/exact_match" in numbers
    test_reader.main(
        list(map(str, ["--eval_data", questions, *shared, "--name", "test", "--write_results"]))
    )
    answers = tmp_path / "test" / "final_output.txt"
    assert [line.split("\t")[0] for line in answers.read_text().splitlines()] == ["0", "1"]
    measured = evaluation.measure_answers(str(answers), load_data(questions))
    assert measured["questions"] == 2
