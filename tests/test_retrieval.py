"""From passages to retrieved data, from a shell: the reference's results, whatever the shards."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

import generate_passage_embeddings
import passage_retrieval
from src.data.passages import Passages
from src.runtime.errors import InputError
from src.search import retrieve as search_room
from src.search.bm25 import BM25
from src.search.embeddings import open_shards
from tests.conftest import run_well

N_DOCS = 10


@pytest.fixture
def passages(reference: Path, tmp_path: Path) -> Path:
    """A copy, because side files are kept beside a collection."""
    return Path(shutil.copy(reference / "passages.tsv", tmp_path / "passages.tsv"))


def model(reference: Path, name: str = "mask_mean") -> list:
    folder = reference / f"legacy_retriever_{name}"
    return ["--model_path", folder, "--tokenizer", reference / "bert"]


def embed(reference, passages, output, shards=1, name="mask_mean", **kwargs) -> str:
    printed = ""
    for shard in range(shards):
        command = ["--passages", passages, "--output_path", output, "--num_shards", shards]
        command = [*model(reference, name), *command, "--shard_id", shard]
        if kwargs:
            printed += run_well("generate_passage_embeddings.py", *command, **kwargs)
        else:
            generate_passage_embeddings.main(list(map(str, command)))
    return printed


def retrieve(reference, passages, embeddings, output, *more, **kwargs) -> list[dict]:
    search(reference, passages, embeddings, output, *more, **kwargs)
    return json.loads(output.read_text())


def search(reference, passages, embeddings, output, *more, **kwargs) -> None:
    command = [
        *model(reference), "--passages", passages, "--passages_embeddings", embeddings,
        "--data", reference / "questions.json", "--output_path", output, "--n-docs", N_DOCS, *more,
    ]  # fmt: skip
    if kwargs:
        run_well("passage_retrieval.py", *command, **kwargs)
    else:
        passage_retrieval.main(list(map(str, command)))


def check_against_the_reference(found: list[dict], reference: Path, output: Path) -> None:
    expected = json.loads((reference / "retrieved.json").read_text())
    for ours, theirs in zip(found, expected["retrieved"], strict=True):
        assert ours["question"] == theirs["question"]
        for context, right in zip(ours["ctxs"], theirs["ctxs"], strict=True):
            assert context["score"] == pytest.approx(right["score"], abs=1e-4)
            assert {**context, "score": 0} == {**right, "score": 0}
    recalls = json.loads(output.with_name(output.name + ".recall.json").read_text())
    for k in (1, 5):
        assert recalls[f"recall@{k}"] == pytest.approx(expected["top_k_hits"][k - 1] / 40)


def test_results_equal_the_reference(reference, passages, tmp_path):
    embed(reference, passages, tmp_path / "emb" / "x")
    output = tmp_path / "ours.json"
    found = retrieve(reference, passages, tmp_path / "emb" / "x_*", output)
    check_against_the_reference(found, reference, output)


def test_results_from_the_references_own_embeddings(reference, passages, tmp_path):
    output = tmp_path / "theirs.json"
    found = retrieve(reference, passages, reference / "legacy_embeddings" / "wiki_*", output)
    check_against_the_reference(found, reference, output)


@pytest.mark.parametrize("name", ["mask_mean", "cls", "nomask_mean"])
def test_shards_together_hold_every_passage_once(name, reference, passages, tmp_path, monkeypatch):
    """And to the bit what one shard holds, also where they are cut inside blocks and batches."""
    monkeypatch.setattr(generate_passage_embeddings, "BLOCK_ROWS", 50)
    ids = list(Passages(passages).ids())
    embed(reference, passages, tmp_path / "1" / "x", 1, name)
    whole = open_shards(str(tmp_path / "1" / "x_*"))[0]
    assert whole.ids[:] == ids
    for n in (3, 7):
        embed(reference, passages, tmp_path / str(n) / "x", n, name)
        shards = open_shards(str(tmp_path / str(n) / "x_*"))
        assert len(shards) == n
        assert [identity for shard in shards for identity in shard.ids[:]] == ids
        joined = np.concatenate([shard.embeddings for shard in shards])
        assert np.array_equal(joined, whole.embeddings)


def test_retrieval_is_the_same_over_any_shards(reference, passages, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_passage_embeddings, "BLOCK_ROWS", 50)
    results = []
    for n in (1, 3, 7):
        embed(reference, passages, tmp_path / str(n) / "x", n)
        block = ["--indexing_batch_size", str(13 * n)]
        output = tmp_path / f"{n}.json"
        results.append(retrieve(reference, passages, tmp_path / str(n) / "x_*", output, *block))
    assert results[0] == results[1] == results[2]


def test_two_processes_embed_and_retrieve_as_one(reference, passages, tmp_path):
    header, *rows = passages.read_text().splitlines()
    n_copies = 2 * generate_passage_embeddings.BLOCK_ROWS // len(rows) + 1  # three blocks
    copies = [f"{number}-{row}" for number in range(n_copies) for row in rows]
    passages.write_text("\n".join([header, *copies]) + "\n")
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        embed(reference, passages, folder / "x", processes=processes)
        output = folder / "out.json"
        more = ["--indexing_batch_size", 50]
        retrieve(reference, passages, folder / "x_*", output, *more, processes=processes)
        results.append(((folder / "x_00").read_bytes(), output.read_bytes()))
    assert results[0] == results[1]


def test_a_folder_as_output_path(reference, passages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed(reference, passages, "wikipedia_embeddings", 2)
    assert sorted(path.name for path in (tmp_path / "wikipedia_embeddings").iterdir()) == [
        "wiki_00",
        "wiki_01",
    ]


def test_a_finished_shard_is_left_alone(reference, passages, tmp_path, capsys):
    embed(reference, passages, tmp_path / "x")
    (shard,) = tmp_path.glob("x_00")
    before = shard.stat()
    embed(reference, passages, tmp_path / "x")
    assert "complete already" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == before.st_mtime_ns


def test_compressed_search(reference, passages, tmp_path, capsys):
    embed(reference, passages, tmp_path / "x")
    arguments = [reference, passages, tmp_path / "x_*"]
    exact = retrieve(*arguments, tmp_path / "exact.json")
    for options in (["--index_factory", "Flat"], ["--n-subquantizers", 8, "--n-bits", 4]):
        first = retrieve(*arguments, tmp_path / "a.json", "--save_or_load_index", *options)
        said = capsys.readouterr().out
        assert "saved" in said
        again = retrieve(*arguments, tmp_path / "b.json", "--save_or_load_index", *options)
        assert "loaded" in capsys.readouterr().out
        assert first == again
        ids = [[{c["id"] for c in row["ctxs"]} for row in rows] for rows in (exact, first)]
        kept = np.mean([len(a & b) / N_DOCS for a, b in zip(*ids, strict=True)])
        assert f"finds {100 * kept:.1f} %" in said  # the log's recall is the real one
        assert kept == 1.0 or options[0] != "--index_factory"


@pytest.mark.parametrize(
    ("factory", "keep", "runs"),
    [("HNSW8", ["--save_or_load_index"], (1, 3, 3)), ("PQ8x4", [], (1, 2))],  # built, then loaded
)
def test_compressed_search_by_several_processes(factory, keep, runs, reference, passages, tmp_path):
    """One builds the index; the files, and the recall that is printed, are those of one process."""
    embed(reference, passages, tmp_path / "x")
    results = []
    for processes in runs:
        folder = tmp_path / str(processes)
        folder.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "x_00", folder)
        printed = run_well(
            "passage_retrieval.py", *model(reference), "--passages", passages,
            "--passages_embeddings", folder / "x_*", "--data", reference / "questions.json",
            "--output_path", folder / "out.json", "--n-docs", N_DOCS,
            "--index_factory", factory, *keep, processes=processes,
        )  # fmt: skip
        said = [line for line in printed.splitlines() if f"{factory} finds" in line]
        assert len(said) == 1
        results.append((said[0].split(" ", 2)[2], (folder / "out.json").read_bytes()))
        assert (folder / f"index_{factory}").exists() == bool(keep)
    assert len(set(results)) == 1


def test_words_are_searched_by_two_processes_as_by_one(reference, passages, tmp_path):
    """And one writes the index: they would get into each other's way."""
    for processes in (1, 2):
        run_well(
            "passage_retrieval.py", "--bm25", "--passages", passages, "--save_or_load_index",
            "--data", reference / "questions.json", "--output_path", tmp_path / f"{processes}.json",
            "--n-docs", N_DOCS, processes=processes,
        )  # fmt: skip
        shutil.rmtree(tmp_path / "passages.tsv.bm25")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_questions_are_shared_out_by_groups(reference, passages, tmp_path, monkeypatch):
    """However many questions are asked at once, each gets its own passages, in the data's order."""
    embed(reference, passages, tmp_path / "x")
    arguments = [reference, passages, tmp_path / "x_*", tmp_path / "out.json"]
    found = []
    for at_once in (1024, 7):
        monkeypatch.setattr(search_room, "_QUESTIONS_AT_ONCE", at_once)
        found.append(retrieve(*arguments, "--index_factory", "SQ8"))
    for one, other in zip(*found, strict=True):
        assert [c["id"] for c in one["ctxs"]] == [c["id"] for c in other["ctxs"]]


def test_bm25(reference, passages, tmp_path, capsys):
    def search(output: str) -> str:
        passage_retrieval.main(
            ["--bm25", "--passages", str(passages), "--data", str(reference / "questions.json"),
             "--output_path", str(tmp_path / output), "--n-docs", "5", "--save_or_load_index"]
        )  # fmt: skip
        return (tmp_path / output).read_text()

    first = search("a.json")
    assert "saved" in capsys.readouterr().out
    assert search("b.json") == first
    assert "loaded" in capsys.readouterr().out
    lines = search("c.jsonl").splitlines()
    rows = json.loads(first)
    assert [json.loads(line) for line in lines] == rows
    for row in rows:
        scores = [context["score"] for context in row["ctxs"]]
        assert scores == sorted(scores, reverse=True)
        words = set(row["question"].strip("?").lower().split()[-1:])
        assert words <= set(
            f"{row['ctxs'][0]['title']} {row['ctxs'][0]['text']}".lower().replace(",", "").split()
        )


def made_by(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".made_by.json").read_text())


def test_what_was_found_says_what_made_it(reference, passages, tmp_path):
    embed(reference, passages, tmp_path / "x", 2)
    output = tmp_path / "found.json"
    retrieve(reference, passages, tmp_path / "x_*", output)
    shard = open_shards(tmp_path / "x_*")[0]
    record = made_by(output)
    assert record["model"] == record["embeddings"]["model"] == shard.metadata["model"]
    assert record["passages"] == shard.metadata["passages"] == Passages(passages).fingerprint()
    assert record["embeddings"] == shard.metadata
    assert record["options"]["n_docs"] == N_DOCS
    assert record["options"]["passages"] == str(passages)

    other = tmp_path / "other.tsv"
    other.write_text(passages.read_text().replace("river", "brook"))
    passage_retrieval.main(
        ["--bm25", "--passages", str(other), "--data", str(reference / "questions.json"),
         "--output_path", str(output)]
    )  # fmt: skip
    assert made_by(output)["model"] == "bm25"
    assert made_by(output)["passages"] == Passages(other).fingerprint() != record["passages"]


def test_what_stood_beside_earlier_results_goes_with_them(reference, passages, tmp_path):
    """The recall of questions with answers is not that of questions without."""
    data = tmp_path / "data.json"
    output = tmp_path / "found.json"
    for answers in (["Po"], []):
        data.write_text(json.dumps([{"question": "Which river?", "answers": answers}]))
        passage_retrieval.main(
            ["--bm25", "--passages", str(passages), "--data", str(data), "--output_path",
             str(output)]
        )  # fmt: skip
        assert output.with_name("found.json.recall.json").exists() == bool(answers)


def test_mismatches_for_those_who_mean_them(reference, passages, tmp_path, capsys):
    """Each error that names --allow_mismatch goes away by it: another model, another collection,
    a shard left out, shards of two runs, an index of other shards."""
    embed(reference, passages, tmp_path / "a" / "x", 2)
    embed(reference, passages, tmp_path / "b" / "x", 2, "cls")
    other = tmp_path / "other.tsv"
    other.write_text(passages.read_text() + "9999\tA brook.\tBrook\n")
    mixed, codes = tmp_path / "mixed", ["--index_factory", "Flat", "--save_or_load_index"]
    shutil.copytree(tmp_path / "a", mixed)
    retrieve(reference, passages, mixed / "x_*", tmp_path / "out.json", *codes)
    shutil.copy(tmp_path / "b" / "x_01", mixed)
    cases = {
        "the model": (passages, tmp_path / "b" / "x_*", []),
        "the collection": (other, tmp_path / "a" / "x_*", []),
        "shard 1 of 2 is missing": (passages, tmp_path / "a" / "x_00", []),
        "model is": (passages, mixed / "x_*", []),
        # With the right model: nothing but the index is wrong.
        "index_Flat and": (passages, tmp_path / "b" / "x_*", [*codes, *model(reference, "cls")]),
    }
    shutil.copytree(mixed / "index_Flat", tmp_path / "b" / "index_Flat")
    for said, (collection, embeddings, more) in cases.items():
        output = tmp_path / "found.json"
        with pytest.raises(SystemExit) as exited:
            retrieve(reference, collection, embeddings, output, *more)
        assert exited.value.code == 2
        assert said in capsys.readouterr().err
        assert not output.exists()
        assert len(retrieve(reference, collection, embeddings, output, "--allow_mismatch", *more))
        output.unlink()


def test_a_trec_run(reference, passages, tmp_path):
    """It holds what the JSON holds: read back, the same questions, passages, ranks and scores."""
    questions = json.loads((reference / "questions.json").read_text())
    data = tmp_path / "data.jsonl"
    named = [{**row, "id": f"q-{number * 7}"} for number, row in enumerate(questions)]
    data.write_text("".join(json.dumps(row) + "\n" for row in named))
    embed(reference, passages, tmp_path / "x")
    outputs = tmp_path / "found.json", tmp_path / "found.trec"
    more = ["--data", data, "--output_format"]
    found = retrieve(reference, passages, tmp_path / "x_*", outputs[0], *more, "json")
    search(reference, passages, tmp_path / "x_*", outputs[1], *more, "trec")
    lines = [line.split(" ") for line in outputs[1].read_text().splitlines()]
    expected = [
        [row["id"], "Q0", context["id"], str(rank), str(context["score"])]
        for row in found
        for rank, context in enumerate(row["ctxs"], start=1)
    ]
    assert [line[:5] for line in lines] == expected
    assert {line[5] for line in lines} == {made_by(outputs[1])["model"]}
    recalls = [output.with_name(output.name + ".recall.json").read_text() for output in outputs]
    assert recalls[0] == recalls[1]


def test_a_trec_run_of_questions_without_ids(reference, passages, tmp_path):
    """They are called by their places, as everywhere."""
    passage_retrieval.main(
        ["--bm25", "--passages", str(passages), "--data", str(reference / "questions.json"),
         "--output_path", str(tmp_path / "run"), "--n-docs", "2", "--output_format", "trec"]
    )  # fmt: skip
    rows = json.loads((reference / "questions.json").read_text())
    names = [str(row.get("id", number)) for number, row in enumerate(rows)]
    lines = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    assert [line[0] for line in lines] == [name for name in names for _ in range(2)]
    assert {line[5] for line in lines} == {"bm25"}
    assert {len(line) for line in lines} == {6}


def bm25_by_hand(question: str, texts: list[str]) -> np.ndarray:
    """Lucene's BM25 with k1 0.9 and b 0.4, from its formula."""
    import re

    documents = [re.findall(r"(?u)\b\w\w+\b", text.lower()) for text in texts]
    mean = np.mean([len(document) for document in documents])
    scores = np.zeros(len(texts))
    for word in re.findall(r"(?u)\b\w\w+\b", question.lower()):
        holding = sum(word in document for document in documents)
        weight = np.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for row, document in enumerate(documents):
            count = document.count(word)
            scores[row] += weight * count / (count + 0.9 * (0.6 + 0.4 * len(document) / mean))
    return scores


LOG = logging.getLogger("tests")


def test_bm25_scores_are_bm25s(reference, passages, tmp_path):
    collection = Passages(passages)
    texts = [f"{passage.title} {passage.text}" for passage in collection]
    questions = [row["question"] for row in json.loads((reference / "questions.json").read_text())]
    found = BM25.load_or_build(collection, None, LOG).search(questions, 5)
    for question, scores, positions in zip(questions, *found, strict=True):
        expected = bm25_by_hand(question, texts)
        assert scores == pytest.approx(np.sort(expected)[::-1][:5], rel=1e-4)
        assert expected[positions] == pytest.approx(scores, rel=1e-4)


def write_collection(path: Path, texts: list[str]) -> Passages:
    path.write_text("".join(f"{row}\t{text}\t\n" for row, text in enumerate(texts)))
    return Passages(path)


def test_bm25_lists_begin_every_longer_one(tmp_path):
    """Ties in the collection's order; only passages that share a word; each question by itself."""
    draw = np.random.default_rng(0)
    words = np.array(["red", "green", "blue", "river", "lake", "the"])
    texts = [" ".join(draw.choice(words[:5], 3)) + " the" for _ in range(300)]
    texts += ["lonely"] * 50 + ["red"] * 5
    index = BM25.load_or_build(write_collection(tmp_path / "p.tsv", texts), None, LOG)
    questions = ["red river", "the", "blue blue lake", "lonely", "nothing here", "", "? !", "Red!"]
    longest = index.search(questions, 1000)
    for row, (question, positions) in enumerate(zip(questions, longest.rows(), strict=True)):
        asked = set(question.lower().strip("!? ").split())
        assert sorted(positions) == [n for n, text in enumerate(texts) if asked & set(text.split())]
        scores = longest.scores[row, : len(positions)]
        assert (scores > 0).all()
        assert (np.lexsort((positions, -scores)) == np.arange(len(positions))).all()
        assert np.isneginf(longest.scores[row, len(positions) :]).all()
    for k in (1, 2, 3, 7, 50, 299, 354):
        found = index.search(questions, k)
        assert np.array_equal(found.positions, longest.positions[:, :k])
        assert np.array_equal(found.scores, longest.scores[:, :k])
        assert np.array_equal(index.search(questions[1:2], k).positions, found.positions[1:2])
    assert index.search(["lonely"], 3).positions.tolist() == [[300, 301, 302]]


@pytest.mark.parametrize("text", ["a", "? !", ""])
def test_a_collection_without_words(text, tmp_path):
    collection = write_collection(tmp_path / "p.tsv", [text, text])
    with pytest.raises(InputError, match=r"p\.tsv: no passage has a word of two letters"):
        BM25.load_or_build(collection, tmp_path / "index", LOG)
    assert not (tmp_path / "index").exists()


def test_a_bm25_index_that_was_altered_is_built_again(tmp_path, caplog):
    caplog.set_level("INFO")
    texts = [f"word{row} other{row % 7} common" for row in range(200)]
    collection = write_collection(tmp_path / "p.tsv", texts)
    questions, folder = ["word5 other3", "common"], tmp_path / "p.tsv.bm25"

    def found() -> list:
        return BM25.load_or_build(collection, folder, LOG).search(questions, 5).rows()

    expected = found()
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        altered = bytearray(content)
        altered[len(content) * 3 // 4] ^= 1
        for wrong in (altered, content[:-5], content + b"0", b"", None):
            file.unlink() if wrong is None else file.write_bytes(wrong)
            caplog.clear()
            assert found() == expected
            assert "altered or of another collection: building it again" in caplog.text
    caplog.clear()
    assert found() == expected
    assert caplog.messages == [f"loaded {folder}"]
    collection = write_collection(tmp_path / "p.tsv", texts[::-1])
    assert found()[0][0] == 199 - expected[0][0]
    (folder / "thesis.txt").write_text("not an index's")
    (folder / "params.index.json").write_text("")
    with pytest.raises(InputError, match=r"p\.tsv\.bm25: not a BM25 index, it holds thesis\.txt"):
        found()
    assert (folder / "thesis.txt").exists()


@pytest.mark.parametrize("output_format", ["json", "trec"])
def test_questions_that_share_no_word(output_format, tmp_path, capsys):
    write_collection(tmp_path / "p.tsv", ["a red river", "a blue lake"])
    rows = [{"id": "a", "question": "red?", "answers": ["river"]}]
    rows += [{"id": name, "question": name * 5, "answers": ["lake"]} for name in "xyz"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    output = tmp_path / "out.json"
    passage_retrieval.main(
        ["--bm25", "--passages", str(tmp_path / "p.tsv"), "--data", str(tmp_path / "data.json"),
         "--output_path", str(output), "--n-docs", "2", "--output_format", output_format]
    )  # fmt: skip
    assert "3 of 4 questions share no word with any passage\n" in capsys.readouterr().out
    if output_format == "trec":
        assert [line.split()[:4] for line in output.read_text().splitlines()] == [
            ["a", "Q0", "0", "1"]
        ]
    else:
        assert [len(row["ctxs"]) for row in json.loads(output.read_text())] == [1, 0, 0, 0]
    recall = json.loads((tmp_path / "out.json.recall.json").read_text())
    assert recall == {"recall@1": 0.25, "questions": 4}


@pytest.mark.slow
def test_answers_are_looked_for_alike_by_one_process_and_many(reference, passages, monkeypatch):
    from src.evaluation import results

    data = json.loads((reference / "retrieved.json").read_text())["retrieved"]
    tasks = [(row["answers"], [c["text"] for c in row["ctxs"]]) for row in data] * 3
    expected = [(True, [c["hasanswer"] for c in row["ctxs"]]) for row in data] * 3
    for pairs in (1, 100_000):
        monkeypatch.setattr(results.os, "cpu_count", lambda: 2)
        assert list(results._find_answers(iter(tasks), len(tasks), pairs, 32)) == expected
