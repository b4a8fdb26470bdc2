"""The pictures in docs/, of the quickstart's report and of its page for questions.

    python -m tests.pictures quickstart/seed-0

Needs a run of quickstart.sh and Chromium.
"""

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from src.evaluation.answers import exact_match
from src.tools.report.__main__ import main as report
from tests.chromium import Chromium
from tests.conftest import ROOT


def save(browser: Chromium, name: str) -> None:
    shot = browser.call("Page.captureScreenshot", format="png")
    (ROOT / "docs" / name).write_bytes(base64.b64decode(shot["data"]))


def ask(browser: Chromium, question: str) -> str:
    """Type a question; returns the answer that the page shows."""
    browser.type("#question", question)
    browser.ask("document.querySelector('form button').click()")
    asked = json.dumps(question)
    browser.wait_for(f"document.getElementById('asked').textContent === {asked}")
    return browser.ask("document.getElementById('answer').textContent")


def main(out: Path) -> None:
    runs, folder = out / "runs", Path(tempfile.mkdtemp())
    found = [str(out / f"{name}_test.jsonl") for name in ("bm25", "distilled")]
    report([str(runs / "test_distilled_8"), "-o", str(folder / "page.html"), "--retrieved", *found])
    command = [
        sys.executable, "-m", "src.tools.ask", "--serve", "--port", "0", "--n_context", "8",
        "--text_maxlength", "40", "--generation_max_length", "8",
        "--model_path", runs / "reader_8" / "checkpoint" / "latest",
        "--retriever_path", runs / "retriever" / "checkpoint" / "latest",
        "--passages", out / "data" / "passages.tsv", "--passages_embeddings", out / "embeddings/*",
    ]  # fmt: skip
    test = json.loads((out / "data" / "test.json").read_text())[:3]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with Chromium(folder / "browser") as browser:
        browser.show(1200, 1000)
        browser.open(folder / "page.html")
        save(browser, "report.png")
        url = next(line.split()[3] for line in server.stdout if " page " in line)
        browser.show(1000, 700)
        browser.call("Page.navigate", url=url)
        browser.wait_for(f"location.href === '{url}' && document.readyState === 'complete'")
        for example in test:
            answer = ask(browser, example["question"])
            print(example["question"], answer, exact_match(answer, example["answers"]), sep=" | ")
        save(browser, "ask.png")
    server.terminate()
    server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
