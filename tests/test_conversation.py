"""Questions at a prompt, from a pipe or an option: what is answered, and what is shown of it."""

import io
import json
import re
import shlex
import signal
from pathlib import Path

import pytest

import passage_retrieval
import test_reader
from src.options import ask_parser
from src.tools import ask
from src.tools.replies import Evidence, Reply, clean, show
from tests.conftest import ROOT
from tests.terminal import Terminal

PROMPT = r"question: \Z"


def test_the_tools_own_name_is_in_its_errors(refused):
    line = refused(ask_parser().parse_args, ["--bm25"])
    assert line.endswith("(python -m src.tools.ask --help lists the options)")


def reader(reference: Path) -> list:
    return ["--model_path", reference / "t5", "--n_context", 3, "--text_maxlength", 96]


def ways(reference: Path, passages: Path) -> dict[str, tuple[list, list]]:
    """How the same passages are found by passage_retrieval.py and in a conversation."""
    path, tokenizer = reference / "legacy_retriever_mask_mean", reference / "bert"
    vectors = ["--passages", passages, "--passages_embeddings"]
    vectors += [reference / "legacy_embeddings" / "wiki_*"]
    named = [*vectors, "--retriever_path", path, "--retriever_tokenizer", tokenizer]
    vectors += ["--model_path", path, "--tokenizer", tokenizer]
    words = ["--passages", passages, "--bm25"]
    codes = ["--index_factory", "PQ8x4"]
    return {
        "retriever": (vectors, named),
        "words": (words, words),
        "codes": ([*vectors, *codes], [*named, *codes]),
    }


def run_main(main, *arguments) -> None:
    main([str(word) for word in arguments])


# ----------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("way", ["retriever", "words", "codes"])
def test_replies_are_what_the_scripts_write(way, reference, passages, tmp_path, monkeypatch):
    batch, talk = ways(reference, passages)[way]
    found, runs = tmp_path / "found.json", tmp_path / "runs"
    questions = json.loads((reference / "questions.json").read_text())[:6]
    (tmp_path / "data.json").write_text(json.dumps(questions))
    run_main(
        passage_retrieval.main, *batch, "--data", tmp_path / "data.json", "--output_path", found,
        "--n-docs", 3, "--validation_workers", 1,
    )  # fmt: skip
    run_main(
        test_reader.main, *reader(reference), "--eval_data", found, "--checkpoint_dir", runs,
        "--name", "run", "--write_results", "--write_crossattention_scores", "--num_workers", 0,
        "--attribution",
    )  # fmt: skip
    replies = []
    monkeypatch.setattr(ask, "print_reply", replies.append)
    asked = "\n".join(row["question"] for row in questions)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(asked.encode())))
    run_main(test_reader.main, *reader(reference), *talk, "--interactive")

    answers = (runs / "run" / "final_output.txt").read_text().splitlines()
    assert [" ".join(reply.answer.split()) for reply in replies] == [
        line.split("\t")[1] for line in answers
    ]
    assert len(answers) == 6
    rows = json.loads((runs / "run" / "dataset_wscores.json").read_text())
    ranks = set()
    for reply, row, before in zip(replies, rows, json.loads(found.read_text()), strict=True):
        found_as = {c["id"]: (c["score"], n) for n, c in enumerate(before["ctxs"], start=1)}
        expected = [
            (c["title"], c["text"], c["score"], c["attribution"], *found_as[c["id"]])
            for c in sorted(row["ctxs"], key=lambda c: -c["score"])
        ]
        assert len(reply.passages) == len(expected) == 3
        for ours, theirs in zip(reply.passages, expected, strict=True):
            assert tuple(ours) == pytest.approx(theirs, abs=1e-4)
        ranks.add(tuple(evidence.search_rank for evidence in reply.passages))
    assert len(ranks) > 1  # the reader's order is not the search's


def test_one_question(reference, passages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, talk = ways(reference, passages)["retriever"]
    before = set(tmp_path.rglob("*"))
    long = "where is the river " * 200  # cut, as in retrieval and in reading
    run_main(test_reader.main, *reader(reference), *talk, "--question", f" {long}\udcff\n")
    printed = capsys.readouterr().out
    facts = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+) {2,}(.*)$", printed, re.M)
    assert [name for name, _ in facts] == [
        "ask", "device", "passages", "search", "retriever", "model", "done",
    ]  # fmt: skip
    facts = dict(facts)
    assert facts["passages"] == f"120 passages of {passages}, 3 passages for each question"
    assert re.match(r"120 embeddings of size 32 in 2 shards; exact sear", facts["search"])
    assert re.match(r"1 question in 0:\d\d:\d\d$", facts["done"])
    number = r"-?\d+\.\d\d"
    scores = rf"\n1  reader +{number} \| attribution +{number} \| search {number} \(#[123]\) \| "
    assert re.search(scores, printed)
    assert "\x1b" not in printed
    # No run's folder: nothing but what is kept beside every collection.
    new = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert new <= {".passages.tsv.offsets", ".passages.tsv.ids"}


# ----------------------------------------------------------------------------------------------
# What is shown


def reply(*texts: str, answer: str = "Garøy") -> Reply:
    read = [Evidence("T", text, -n, 0.0, 20.0 - n, n + 1) for n, text in enumerate(texts)]
    return Reply(answer, read, -0.5)


def test_the_answer_then_passages_with_scores():
    passages = [
        Evidence("Rivers", "It ends.", 1.5, 12.25, 8.25, 12),
        Evidence("", "No.", -10.25, -0.004, 90.0, 1),
    ]
    assert show(Reply("Garøy", passages, -0.5), 80, bold=False).splitlines() == [
        "Garøy (probability 0.607)",
        "",
        "1  reader   1.50 | attribution 12.25 | search 8.25 (#12) | Rivers",
        "   It ends.",
        "2  reader -10.25 | attribution  0.00 | search 90.00 (#1)",
        "   No.",
    ]


def test_a_long_passage_is_shown_around_its_answer():
    words = [f"word{n}" for n in range(300)]
    beginning = show(reply(" ".join(words)), 80, bold=False).splitlines()[3:]
    assert len(beginning) == 3
    assert beginning[0].startswith("   word0 word1 ")
    assert beginning[-1].endswith(" ...")
    for start in (3, 150, 299):  # at the beginning, in the middle, at the end
        for answer in ("Garøy", "the Garøy of the far and frozen north"):
            text = " ".join([*words[:start], answer, *words[start:]])
            shown = show(reply(text, answer=answer), 80, bold=True)
            lines = shown.splitlines()[3:]
            assert len(lines) == 3
            plain = " ".join(line.strip() for line in lines)
            assert f"word{start - 1} \x1b[1m{answer}\x1b[22m" in plain
            assert (lines[0][:7] == "   ... ") == (start > 3)
            assert (lines[-1][-4:] == " ...") == (start < 299)
            assert shown.count("\x1b[1m") <= shown.count("\x1b[22m")  # nothing stays bold


def test_five_passages_are_shown_and_the_rest_counted():
    shown = show(reply(*["text"] * 8), 80, bold=False).splitlines()
    assert [line[0] for line in shown[2::2]] == ["1", "2", "3", "4", "5", "a"]
    assert shown[-1] == "and 3 more"
    assert "more" not in show(reply(*["text"] * 5), 80, bold=False)
    assert show(reply(answer=""), 80, bold=False) == "(no answer) (probability 0.607)\n"


@pytest.mark.parametrize("width", [60, 120])
def test_lines_fit_the_terminal(width):
    long = "x" * 300 + " é" * 100 + " word" * 100
    passages = [
        Evidence(long, long, -12.345, -12.3, 123.4, 100),
        Evidence("T", "y", 0.0, 0.0, 1.0, 1),
    ]
    for answer in ("Garøy", long[:200]):
        for line in show(Reply(answer, passages, -1.0), width, bold=False).splitlines():
            assert len(line) <= width, line


def test_no_control_character_reaches_the_terminal():
    evil = "a\x1b[2J\x07\x9b31m\u202egnp\x00\r\n\tb\u2028c \ud83d\x02d"
    assert clean(evil) == "a[2J31mgnp b c d"
    shown = show(Reply(evil, [Evidence(evil, evil, 1.0, 1.0, 1.0, 1)], -1.0), 80, bold=False)
    assert all(character.isprintable() for character in shown.replace("\n", ""))


# ----------------------------------------------------------------------------------------------
# Bad use

FROM, ASK = "--passages {passages}", "--passages {passages} --question Who?"
VECTORS = "--retriever_path {retriever} --passages_embeddings {shards}"
BAD = [
    (f"{ASK} --bm25 --interactive", "--interactive and --question: give one"),
    (f"{FROM} --bm25 --serve --interactive", "--interactive and --serve: give one of them"),
    (f"{ASK} --bm25 --host 0.0.0.0", "--host: for a web page; add --serve"),
    (
        f"{FROM} --bm25 --serve --host 192.0.2.1",  # no address of this machine
        "192.0.2.1, port 8000: cannot be served .*; give another --host or --port",
    ),
    (f"{FROM} --bm25 --question '  '", "--question is empty: give it"),
    ("--interactive --bm25", "--passages is missing: the collection to find"),
    (ASK, "give either --retriever_path and --passages_embeddings, or --bm25"),
    (f"{ASK} --bm25 --retriever_path x", "give either --retriever_path and --pass"),
    (f"{ASK} --retriever_path x", "--passages_embeddings is missing, for example"),
    (f"{ASK} --bm25 --write_results", "--write_results: for a file of questions; leave this out"),
    (f"{FROM} --bm25 --no_fp16", "--passages, --bm25, --no_fp16: for a conversation; add --inter"),
    (f"{ASK} {VECTORS}", "bert-base-uncased: no tokenizer .*; give one with --retriever_tokenizer"),
    (
        f"{ASK} {VECTORS} --retriever_tokenizer {{t5}}",
        "the tokenizer .*t5; give its own with --retriever_tokenizer",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_use_is_one_line(options, message, reference, passages, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"retriever": "legacy_retriever_mask_mean", "shards": "legacy_embeddings/wiki_*"}
    paths = {name: reference / path for name, path in {**names, "t5": "t5"}.items()}
    options = [word.format(**paths, passages=passages) for word in shlex.split(options)]
    line = refused(run_main, test_reader.main, "--model_path", reference / "t5", *options)
    assert re.match(f"error: .*{message}", line), line


# ----------------------------------------------------------------------------------------------
# Pipes and terminals


def test_a_pipe(reference, passages, capfd, monkeypatch):
    """Without prompt, bars and control characters; and invalid text does no harm."""
    _, talk = ways(reference, passages)["words"]
    asked = "Where does the Strömgarwen rise?\n\n \nwhat is \x1b[31m\udcff?"
    piped = io.BytesIO(asked.encode(errors="surrogateescape"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped))
    run_main(test_reader.main, *reader(reference), *talk, "--interactive")
    printed = capfd.readouterr()
    assert printed.err == ""
    assert re.findall("^question: .*", printed.out, re.M) == [
        "question: Where does the Strömgarwen rise?",
        "question: what is [31m\N{REPLACEMENT CHARACTER}?",
    ]
    assert printed.out.count("\n1  reader ") == 2
    assert all(character.isprintable() for character in printed.out.replace("\n", ""))
    assert re.search(r" done +2 questions in 0:\d\d:\d\d\n\Z", printed.out)


# A search that does not come back.
SLOW = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import test_reader
from src.search import retrieve
def search(self, questions, k):
    print("searching", flush=True)
    while True:
        pass
retrieve.BM25Search.search = search
test_reader.main(sys.argv[1:])
"""


def test_a_terminal(reference, passages, tmp_path):
    _, talk = ways(reference, passages)["words"]
    command = [*reader(reference), *talk, "--interactive"]
    terminal = Terminal("test_reader.py", *command, TERM="xterm")
    terminal.read(until=PROMPT)
    assert " ready      type a question; Ctrl-D leaves\r\n" in terminal.screen
    first = terminal.type("Where does the Strömgarwen rise?\n", PROMPT)
    assert re.search(r"\r\n\r\n\x1b\[1m.*\x1b\[22m \(probability .*\)\r\n\r\n1  reader ", first)
    assert "reader" not in terminal.type("  \n", PROMPT)
    terminal.type("Who was", "Who was")
    assert "reader" not in terminal.type("\x03", PROMPT)  # Ctrl-C: the line is gone
    assert "reader" not in terminal.type("\n", PROMPT)
    again = terminal.type("\x1b[A\x1b[A\n", PROMPT)  # what was asked before
    assert again.split("\r\n", 1)[1] == first.split("\r\n", 1)[1]
    assert "Where does the Strömgarwen rise?" in again
    terminal.type("\x04", "\r\n")
    assert re.search(
        r"question: \r\n\S+ \S+ done +2 questions in 0:\d\d:\d\d\r\n\Z", terminal.read()
    )
    assert terminal.process.wait() == 0

    # Ctrl-C, while the machine is busy, leaves.
    (tmp_path / "slow.py").write_text(SLOW)
    terminal = Terminal(tmp_path / "slow.py", *command, TERM="xterm")
    terminal.read(until=PROMPT)
    terminal.type("Who?\n", "searching")
    seconds, status, printed = terminal.press_ctrl_c()
    assert seconds < 2
    assert status == 128 + signal.SIGINT
    line = "stopped by Ctrl-C; the same command starts again"
    assert printed.replace("^C", "").strip() == line
