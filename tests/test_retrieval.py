"""From passages to retrieved data, from a shell: the reference's results, whatever the shards."""
# ruff: noqa: RUF001 (characters that look like others)

import itertools
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import bm25s
import numpy as np
import pytest

import generate_passage_embeddings
import passage_retrieval
from src.data.examples import load_data, read_example
from src.data.passages import Passages
from src.evaluation import retrieved
from src.models import embedder
from src.options import BM25Options
from src.runtime.errors import InputError
from src.search import bm25 as bm25_module
from src.search import retrieve as retrieve_module
from src.search.bm25 import BM25
from src.search.embeddings import open_shards
from src.search.words import Words, open_stemmer, split_words, stop_words
from tests.conftest import REFERENCE, ROOT, run_well

N_DOCS = 10
LOG = logging.getLogger("tests")
QUESTIONS = REFERENCE / "questions.json"


def model(name: str = "mask_mean") -> list:
    path = REFERENCE / f"legacy_retriever_{name}"
    return ["--model_path", path, "--tokenizer", REFERENCE / "bert"]


def embed(passages, output, shards=1, name="mask_mean") -> None:
    for shard in range(shards):
        command = ["--passages", passages, "--output_path", output, "--num_shards", shards]
        command = [*model(name), *command, "--shard_id", shard]
        generate_passage_embeddings.main(list(map(str, command)))


def search(passages, output, *more) -> None:
    command = ["--passages", passages, "--output_path", output, "--data", QUESTIONS]
    passage_retrieval.main(list(map(str, [*command, "--n-docs", N_DOCS, *more])))


def retrieve(passages, embeddings, output, *more) -> list[dict]:
    search(passages, output, *model(), "--passages_embeddings", embeddings, *more)
    return json.loads(output.read_text())


def beside(output: Path, kind: str) -> dict:
    return json.loads(output.with_name(f"{output.name}.{kind}.json").read_text())


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """The reference's passages and their embeddings, x_00; tests work on copies."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copy(REFERENCE / "passages.tsv", folder)
    embed(folder / "passages.tsv", folder / "x")
    return folder


@pytest.fixture
def passages(embedded: Path, tmp_path: Path) -> Path:
    """A copy, because caches are kept beside a collection; its embeddings are beside it, too."""
    shutil.copytree(embedded, tmp_path, dirs_exist_ok=True)
    return tmp_path / "passages.tsv"


@pytest.mark.parametrize("theirs", [False, True])
def test_results_equal_the_reference(theirs, reference, passages, tmp_path):
    """From our embeddings, and from the reference's own."""
    output = tmp_path / "found.json"
    shards = reference / "legacy_embeddings" / "wiki_*" if theirs else tmp_path / "x_*"
    found = retrieve(passages, shards, output)
    expected = json.loads((reference / "retrieved.json").read_text())
    for ours, right in zip(found, expected["retrieved"], strict=True):
        assert ours["question"] == right["question"]
        for context, wanted in zip(ours["ctxs"], right["ctxs"], strict=True):
            assert context["score"] == pytest.approx(wanted["score"], abs=1e-4)
            assert {**context, "score": 0} == {**wanted, "score": 0}
    for k in (1, 5):
        assert beside(output, "recall")[f"recall@{k}"] == expected["top_k_hits"][k - 1] / 40


@pytest.mark.parametrize("name", ["mask_mean", "cls", "nomask_mean"])
def test_shards_together_hold_every_passage_once(name, passages, tmp_path, monkeypatch):
    """And to the bit what one shard holds, also where they are cut inside blocks and batches."""
    monkeypatch.setattr(embedder, "BLOCK_ROWS", 50)
    ids, found = list(Passages(passages).ids()), []
    for n in (1, 7):
        embed(passages, tmp_path / str(n) / "x", n, name)
        shards = open_shards(str(tmp_path / str(n) / "x_*"))
        assert len(shards) == n
        assert [identity for shard in shards for identity in shard.ids[:]] == ids
        found.append(np.concatenate([shard.embeddings for shard in shards]))
    assert np.array_equal(*found)
    if name == "mask_mean":
        results = [
            retrieve(passages, tmp_path / str(n) / "x_*", tmp_path / f"{n}.json",
                     "--indexing_batch_size", 13 * n)
            for n in (1, 7)
        ]  # fmt: skip
        assert results[0] == results[1]


def embed_and_search(passages: Path, folder: Path) -> None:
    """Embedding, exact search, FAISS with and without a saved index, BM25."""
    embed(passages, folder / "x")
    dense = [*model(), "--passages_embeddings", folder / "x_*", "--indexing_batch_size", 50]
    search(passages, folder / "exact", *dense)
    search(passages, folder / "saved", *dense, "--index_factory", "HNSW8", "--save_or_load_index")
    search(passages, folder / "built", *dense, "--index_factory", "SQ8")
    search(passages, folder / "bm25", "--bm25")


def test_two_processes_find_what_one_does(passages, tmp_path):
    """The same bytes. (All commands run in one launch, in one process group: each takes seconds to
    start.)"""
    header, *rows = passages.read_text().splitlines()
    n_copies = 2 * embedder.BLOCK_ROWS // len(rows) + 1  # three blocks
    copies = [f"{number}-{row}" for number in range(n_copies) for row in rows]
    passages.write_text("\n".join([header, *copies]) + "\n")
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from src.runtime import distributed\n"
        "from tests.test_retrieval import embed_and_search\n"
        "start, stop, distributed.stop = distributed.start, distributed.stop, lambda: None\n"
        "begin = lambda *a: None if distributed.dist.is_initialized() else start(*a)\n"
        "distributed.start = begin\n"
        "embed_and_search(*map(Path, sys.argv[1:]))\n"
        "stop()\n"
    )
    for processes in (1, 2):
        run_well(script, passages, tmp_path / str(processes), processes=processes)
        assert (tmp_path / str(processes) / "index_HNSW8").exists()
        assert not (tmp_path / str(processes) / "index_SQ8").exists()
    for name in ("x_00", "exact", "saved", "built", "bm25"):
        found = [(tmp_path / processes / name).read_bytes() for processes in ("1", "2")]
        assert found[0] == found[1], name


def test_a_folder_as_output_path(passages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # finished shards are left alone
        embed(passages, "wikipedia_embeddings", 2)
        written = {
            path.name: path.stat().st_mtime_ns for path in Path("wikipedia_embeddings").iterdir()
        }
        assert sorted(written) == ["wiki_00", "wiki_01"]
    assert capsys.readouterr().out.count("complete already") == 2


def test_compressed_search(passages, tmp_path, capsys, monkeypatch):
    exact = retrieve(passages, tmp_path / "x_*", tmp_path / "exact.json")
    for options in (["--index_factory", "Flat"], ["--n-subquantizers", 8, "--n-bits", 4]):
        arguments = ["--save_or_load_index", *options]
        first = retrieve(passages, tmp_path / "x_*", tmp_path / "a.json", *arguments)
        said = capsys.readouterr().out
        assert "saved" in said
        monkeypatch.setattr(retrieve_module, "_QUESTIONS_AT_ONCE", 7)
        again = retrieve(passages, tmp_path / "x_*", tmp_path / "b.json", *arguments)
        monkeypatch.undo()
        assert "loaded" in capsys.readouterr().out
        ids = [[[c["id"] for c in row["ctxs"]] for row in rows] for rows in (exact, first, again)]
        assert ids[1] == ids[2]
        kept = np.mean([len(set(a) & set(b)) / N_DOCS for a, b in zip(*ids[:2], strict=True)])
        assert f"finds {100 * kept:.1f} %" in said  # the log's recall is the real one
        assert kept == 1.0 or options[0] != "--index_factory"


def test_bm25(passages, tmp_path, capsys):
    found = []
    for name, said in (("a.json", "saved"), ("b.json", "loaded"), ("c.jsonl", "loaded")):
        search(passages, tmp_path / name, "--bm25", "--save_or_load_index")
        assert said in capsys.readouterr().out
        text = (tmp_path / name).read_text()
        is_json = name.endswith(".json")
        found.append(json.loads(text) if is_json else list(map(json.loads, text.splitlines())))
    assert found[0] == found[1] == found[2]
    for row in found[0]:
        assert len(row["ctxs"]) <= N_DOCS
        words = set(row["question"].strip("?").lower().split()[-1:])
        best = f"{row['ctxs'][0]['title']} {row['ctxs'][0]['text']}"
        assert words <= set(best.lower().replace(",", "").split())


def test_results_record_what_made_them(passages, tmp_path):
    output = tmp_path / "found.json"
    retrieve(passages, tmp_path / "x_*", output)
    shard, record = open_shards(tmp_path / "x_*")[0], beside(output, "made_by")
    assert record["model"] == record["embeddings"]["model"] == shard.metadata["model"]
    assert record["passages"] == shard.metadata["passages"] == Passages(passages).fingerprint()
    assert record["embeddings"] == shard.metadata
    assert record["options"]["n_docs"] == N_DOCS
    assert beside(output, "recall")

    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"question": "Which river?"}]))
    search(passages, output, "--bm25", "--data", data)
    assert beside(output, "made_by")["model"] == "bm25"
    assert beside(output, "made_by")["passages"] == Passages(passages).fingerprint()
    assert not output.with_name("found.json.recall.json").exists()  # the questions have no answers


def test_mismatches_can_be_allowed(passages, tmp_path, capsys):
    """Another model, another collection, a shard left out, shards of two runs, an index of other
    shards: each error names --allow_mismatch, which accepts it, and says how many passages have no
    embedding."""
    embed(passages, tmp_path / "a" / "x", 2)
    embed(passages, tmp_path / "b" / "x", 2, "cls")
    other = tmp_path / "other.tsv"
    other.write_text(passages.read_text() + "9999\tA brook.\tBrook\n")
    mixed, codes = tmp_path / "mixed", ["--index_factory", "Flat", "--save_or_load_index"]
    shutil.copytree(tmp_path / "a", mixed)
    retrieve(passages, mixed / "x_*", tmp_path / "out.json", *codes)
    shutil.copy(tmp_path / "b" / "x_01", mixed)
    shutil.copytree(mixed / "index_Flat", tmp_path / "b" / "index_Flat")
    cases = {
        "the model": (passages, tmp_path / "b" / "x_*", []),
        "the collection": (other, tmp_path / "a" / "x_*", []),
        "shard 1 of 2 is missing": (passages, tmp_path / "a" / "x_00", []),
        "model is": (passages, mixed / "x_*", []),
        # With the right model: nothing but the index is wrong.
        "index_Flat and": (passages, tmp_path / "b" / "x_*", [*codes, *model("cls")]),
    }
    for said, (collection, embeddings, more) in cases.items():
        output = tmp_path / "found.json"
        with pytest.raises(SystemExit) as exited:
            retrieve(collection, embeddings, output, *more)
        assert exited.value.code == 2
        assert said in capsys.readouterr().err
        assert not output.exists()
        assert len(retrieve(collection, embeddings, output, "--allow_mismatch", *more))
        missing = [row for row in capsys.readouterr().out.splitlines() if " missing " in row]
        lost = {"the collection": "1 of 121", "shard 1 of 2 is missing": "60 of 120"}.get(said)
        assert len(missing) == bool(lost)
        assert not lost or f"{lost} passages have no embedding and cannot be found" in missing[0]
        output.unlink()


def test_a_trec_run(passages, tmp_path):
    """It holds what the JSON holds: the same questions, passages, ranks and scores. Questions
    without ids are numbered."""
    questions = json.loads(QUESTIONS.read_text())
    data = tmp_path / "data.jsonl"
    named = [{**row, "id": f"q-{n * 7}"} if n else row for n, row in enumerate(questions)]
    data.write_text("".join(json.dumps(row) + "\n" for row in named))
    output, run = tmp_path / "found.json", tmp_path / "found.trec"
    more = [*model(), "--passages_embeddings", tmp_path / "x_*", "--data", data]
    search(passages, output, *more)
    search(passages, run, *more, "--output_format", "trec")
    lines = [line.split(" ") for line in run.read_text().splitlines()]
    assert [line[:5] for line in lines] == [
        [str(row.get("id", number)), "Q0", context["id"], str(rank), str(context["score"])]
        for number, row in enumerate(json.loads(output.read_text()))
        for rank, context in enumerate(row["ctxs"], start=1)
    ]
    assert {tuple(line[5:]) for line in lines} == {(beside(run, "made_by")["model"],)}
    assert beside(run, "recall") == beside(output, "recall")


# ----------------------------------------------------------------------------------------------
# BM25


@pytest.mark.parametrize("part", [7, 1 << 13])
def test_the_index_is_bm25s(part, passages, tmp_path, monkeypatch):
    """Built as a stream, it holds the bytes that bm25s computes from the same words."""
    monkeypatch.setattr(bm25_module, "_PART", part)
    collection = Passages(passages)
    words = [split_words(f"{passage.title} {passage.text}") for passage in collection]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(itertools.chain(*words)))}
    theirs = bm25s.BM25(k1=0.9, b=0.4)
    ids = [[vocabulary[word] for word in text] for text in words]
    theirs.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    BM25.load_or_build(collection, tmp_path / "index", LOG)
    ours = bm25s.BM25.load(tmp_path / "index")
    assert ours.vocab_dict == theirs.vocab_dict
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(ours.scores[name], theirs.scores[name]), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Model T, vitamin C: x_1!", ["model", "t", "vitamin", "c", "x_1"]),
        (
            "caf\u00e9 cafe\u0301 \ufb01n STRASSE stra\u00dfe",
            ["caf\u00e9"] * 2 + ["fin"] + ["strasse"] * 2,
        ),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowels are combining marks
        ("co\u00adop می\u200cخواهم", ["coop", "میخواهم"]),
        ("東京タワーgo", ["東京", "京タ", "タワ", "ワー", "go"]),
        ("\uff21\uff29 水", ["ai", "水"]),
        ("กินข้าว", ["กิน"[:2] + "น", "นข้", "ข้า", "าว"]),
        ("", []),
    ],
)
def test_words_of_any_script(text, words):
    assert split_words(text) == words


def test_stems_and_stop_words(tmp_path):
    texts = ["the running of rivers", "a lake", "the the"]
    collection = write_collection(tmp_path / "p.tsv", texts)
    question = ["The river runs"]
    plain = BM25.load_or_build(collection, tmp_path / "index", LOG).search(question, 3)
    assert sorted(plain.rows()[0]) == [0, 2]
    options = BM25Options(bm25_stop_words="english", bm25_k1=0.0)
    for _ in range(2):  # an index with other options is built again, then loaded
        found = BM25.load_or_build(collection, tmp_path / "index", LOG, options)
        assert found.search([*question, "lake"], 3).rows() == [[], [1]]
    scores = found.search(["rivers lake"], 3).scores[0, :2]
    assert scores == pytest.approx([np.log(1 + 2.5 / 1.5)] * 2)
    with pytest.raises(InputError, match=r"--bm25_stop_words klingon: .* none or one of .*eng"):
        stop_words("klingon")


def test_stemming_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(InputError, match=r"--bm25_stemmer english needs .*pip install PyStemmer"):
        open_stemmer("english")
    fake = SimpleNamespace(
        algorithms=lambda: ["english"],
        Stemmer=lambda language: SimpleNamespace(stemWord=lambda word: word.removesuffix("s")),
    )
    monkeypatch.setitem(sys.modules, "Stemmer", fake)
    assert Words(BM25Options(bm25_stemmer="english"))("Rivers run") == ["river", "run"]
    with pytest.raises(InputError, match=r"--bm25_stemmer latin: must be none or one of english"):
        open_stemmer("latin")


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
    for k in (1, 3, 50, 354):
        found = index.search(questions, k)
        assert np.array_equal(found.positions, longest.positions[:, :k])
        assert np.array_equal(found.scores, longest.scores[:, :k])
        assert np.array_equal(index.search(questions[1:2], k).positions, found.positions[1:2])
    assert index.search(["lonely"], 3).positions.tolist() == [[300, 301, 302]]


def test_a_collection_without_words(tmp_path):
    collection = write_collection(tmp_path / "p.tsv", ["-", "? !", ""])
    with pytest.raises(InputError, match=r"p\.tsv: no passage has a word, so"):
        BM25.load_or_build(collection, tmp_path / "index", LOG)
    assert not (tmp_path / "index").exists()


def test_a_bm25_index_that_was_altered_is_built_again(tmp_path, caplog):
    """As any saved index (see test_compressed.py); and one of another collection."""
    caplog.set_level("INFO")
    texts = [f"word{row} other{row % 7} common" for row in range(200)]
    collection = write_collection(tmp_path / "p.tsv", texts)
    questions, folder = ["word5 other3", "common"], tmp_path / "p.tsv.bm25"

    def found() -> list:
        return BM25.load_or_build(collection, folder, LOG).search(questions, 5).rows()

    expected = found()
    for file in sorted(folder.iterdir()):
        file.write_bytes(file.read_bytes()[:-5])
        caplog.clear()
        assert found() == expected
        assert "made with other options: building it again" in caplog.text
    collection = write_collection(tmp_path / "p.tsv", texts[::-1])
    assert found()[0][0] == 199 - expected[0][0]


@pytest.mark.parametrize("output_format", ["json", "trec"])
def test_questions_that_share_no_word(output_format, tmp_path, capsys):
    write_collection(tmp_path / "p.tsv", ["a red river", "a blue lake"])
    rows = [{"id": "a", "question": "red?", "answers": ["river"]}]
    rows += [{"id": name, "question": name * 5, "answers": ["lake"]} for name in "xyz"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    output = tmp_path / "out.json"
    more = ["--data", tmp_path / "data.json", "--n-docs", 2, "--output_format", output_format]
    search(tmp_path / "p.tsv", output, "--bm25", *more)
    assert "3 of 4 questions share no word with any passage\n" in capsys.readouterr().out
    if output_format == "trec":
        (line,) = output.read_text().splitlines()
        assert line.split()[:4] == ["a", "Q0", "0", "1"]
    else:
        assert [len(row["ctxs"]) for row in json.loads(output.read_text())] == [1, 0, 0, 0]
    recall = json.loads((tmp_path / "out.json.recall.json").read_text())
    assert recall == {"recall@1": 0.25, "questions": 4}


def test_one_process_or_many_look_for_answers(passages, tmp_path, monkeypatch):
    outputs = tmp_path / "one.json", tmp_path / "many.json"
    search(passages, outputs[0], "--bm25")
    monkeypatch.setattr(retrieved, "_PAIRS_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(retrieved, "available_cpus", lambda: 3)
    search(passages, outputs[1], "--bm25", "--validation_workers", 32)
    assert outputs[0].read_text() == outputs[1].read_text()


# ----------------------------------------------------------------------------------------------
# What other systems found, and other fields


def test_a_run_of_another_system_becomes_data(passages, tmp_path, capsys):
    """BM25's data and the data made from its run are the same; passages of other collections and
    other questions are refused."""
    output, run, again = (tmp_path / name for name in ("a.json", "run.trec", "b.json"))
    search(passages, output, "--bm25")
    search(passages, run, "--bm25", "--output_format", "trec")
    search(passages, again, "--from_trec", run)
    assert json.loads(again.read_text()) == json.loads(output.read_text())
    for line, said in (
        ("r0 Q0 nowhere 1 1.5 x", "no passage has the id 'nowhere'"),
        ("unasked Q0 1 1 1.5 x", "none of the questions has passages in this run"),
        ("0 Q0 1 1", "line 1: .*a line of a run must be question Q0 passage rank score name"),
        (
            "r0 Q0 1 1 2 x\nr0 Q0 1 2 1 x",
            "line 2: .*a passage only once for a question, not 'r0 Q0",
        ),
        ("", "the file is empty"),
    ):
        run.write_text(line)
        with pytest.raises(SystemExit):
            search(passages, again, "--from_trec", run)
        assert re.search(said, capsys.readouterr().err)


def test_other_fields_of_passages_are_carried(tmp_path):
    url = {"url": "https://example.org/a"}
    rows = [{"id": "a", "text": "a red river", "score": 9, "metadata": {}} | url]
    rows += [{"_id": "b", "text": "a red lake", "title": "Lake", "metadata": {"page": 3}}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"question": "red river", "answers": ["river"]}]))
    search(tmp_path / "p.jsonl", tmp_path / "out.json", "--bm25", "--data", data)
    first, second = json.loads((tmp_path / "out.json").read_text())[0]["ctxs"]
    assert list(first) == ["id", "title", "text", "score", "hasanswer", "url"]
    assert first["score"] < 9
    assert second["metadata"] == {"page": 3}
    read = read_example(load_data(tmp_path / "out.json"), 0).passages
    assert [passage.more for passage in read] == [url, {"metadata": {"page": 3}}]
