"""What quickstart.sh came to: its figures, its report in a browser, its models asked questions.

These tests need its run, which takes minutes: they are skipped where there is none.
"""

import json
import re
import shlex
import subprocess

import pytest

from src.data.examples import load_data
from src.evaluation.answers import exact_match, measure_answers
from src.evaluation.rankings import measure_retrieval
from tests.chromium import Chromium
from tests.conftest import ROOT
from tests.terminal import Terminal
from tests.test_conversation import PROMPT
from tests.test_example_scripts import commands_only
from tests.test_report import CROWDED, held, in_browser

OUT = ROOT / "quickstart" / "seed-0"
REPORT = OUT / "runs" / "test_distilled_8" / "report.html"
pytestmark = pytest.mark.skipif(
    not REPORT.exists(), reason="needs a run of quickstart.sh, which takes minutes"
)


def last_lines(tmp_path) -> list[str]:
    """What quickstart.sh prints when all is there; `python` is not run again."""
    done = subprocess.run(
        ["bash", ROOT / "quickstart.sh", "-o", OUT.relative_to(ROOT)],
        env={**commands_only(tmp_path), "VIRTUAL_ENV": "active"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_distilled_retriever_finds_what_words_do_not():
    data = load_data(OUT / "data" / "test.json")
    by_words, distilled = (
        measure_retrieval(str(OUT / f"{name}_test.jsonl")) for name in ("bm25", "distilled")
    )
    assert by_words["recall@1"] < 70
    assert distilled["recall@1"] > by_words["recall@1"] + 20
    for how in ("bm25", "distilled"):
        answers = OUT / "runs" / f"test_{how}_8" / "final_output.txt"
        assert measure_answers(str(answers), data)["exact match"] > 95


@in_browser
def test_its_report_in_a_browser(tmp_path):
    questions = held(REPORT.read_text())["questions"]
    with Chromium(tmp_path / "browser") as browser:
        for width in (400, 1400):
            browser.show(width, dark=False)
            browser.open(REPORT)
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.ask(CROWDED) == []
        counts = browser.ask(
            "[...document.querySelectorAll('.chart')].map((chart) => "
            "chart.querySelectorAll('.point').length + chart.querySelectorAll('.bar').length)"
        )
        assert len(counts) >= 3  # passages with an answer, answer length, recall
        assert all(counts)
        # In the reader's order, by words and by the retriever, at each of 20 numbers of passages.
        assert counts[-1] == 3 * 20
        # An answer's text is found, and marked in the passages.
        status = "document.getElementById('status').textContent"
        wanted = next(q for q in questions if "1" in q["flags"])
        answer = wanted["right"][0]
        browser.type("#q", answer)
        browser.wait_for(f"{status}.includes(' of {len(questions)} questions')")
        assert int(re.match(r"\d+", browser.ask(status))[0]) >= 1
        marks = browser.ask("[...document.querySelectorAll('.card mark')].map(m => m.textContent)")
        assert answer.lower() in [mark.lower() for mark in marks]
        assert browser.complaints == []


def test_its_models_answer_at_a_prompt(tmp_path):
    """By the command that quickstart.sh ends with."""
    command = shlex.split(last_lines(tmp_path)[-1])
    assert command[0] == "python"
    run = OUT / "runs" / "test_distilled_8" / "final_output.txt"
    given = dict(line.split("\t") for line in run.read_text().splitlines())
    test = json.loads((OUT / "data" / "test.json").read_text())
    # By far the most are answered rightly; what the reader says is the same here and in the run.
    right = [e for e in test if exact_match(given[e["id"]], e["answers"])]
    terminal = Terminal(*command[1:], XDG_STATE_HOME=str(tmp_path), TERM="xterm")
    terminal.read(until=PROMPT)
    for example in right[:3]:
        printed = terminal.type(f"{example['question']}\n", PROMPT)
        answer = re.search(r"\r\n\r\n\x1b\[1m(.*?)\x1b\[22m \(.*\)\r\n\r\n1  reader ", printed)[1]
        assert exact_match(answer, example["answers"])
        first = printed[printed.index("\n1  reader ") : printed.index("\n2  reader ")]
        assert re.search(rf"\x1b\[1m{re.escape(answer)}\x1b\[22m", first, re.IGNORECASE)
    terminal.type("\x04", "done +3 questions")
    terminal.read()
    assert terminal.process.wait() == 0
