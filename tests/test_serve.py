"""The page for questions: what it answers, what it refuses, and that it survives both."""

import http.client
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import test_reader
from src.data.batches import ReaderCollator, ReaderItem
from src.models.pretrained import load_tokenizer
from src.models.reader import load_reader
from src.options import GenerationOptions
from src.runtime.errors import InputError
from src.tools import ask
from src.tools.replies import Evidence, Reply
from src.tools.serve import LARGEST_BODY, Server, as_json
from tests.chromium import Chromium
from tests.test_conversation import reader, run_main, ways
from tests.test_report import in_browser

EVIL = "<img src=x onerror=alert(1)> \N{MUSICAL SYMBOL G CLEF} Nile & <b>Nile</b>"


def answer(question: str) -> Reply:
    if question == "bad":
        raise InputError("reader: a score is not finite")
    read = [Evidence(EVIL, f"{question} {EVIL}", -n, 0.25 * n, 2.5, n + 1) for n in range(2)]
    return Reply("Nile", read, log_probability=-0.5)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(answer, "127.0.0.1", 0, logging.getLogger("test")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(server: Server, method: str, path: str, body: bytes | None = None, **headers):
    """The status of a request's response, its headers, and its JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json", **names})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, response.headers, json.loads(content) if is_json else content


def question(text: str) -> bytes:
    return json.dumps({"question": text}).encode()


def test_an_answer(server):
    status, headers, reply = send(server, "POST", "/answer", question(" Which river? "))
    assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    assert (reply["question"], reply["answer"]) == ("Which river?", "Nile")
    assert reply["probability"] == pytest.approx(0.60653, abs=1e-5)
    first = reply["passages"][0]
    text = first["text"]
    assert [text[start:end] for start, end in first.pop("marks")] == ["Nile", "Nile"]
    assert first == {
        "title": EVIL, "text": f"Which river? {EVIL}", "score": 0, "attribution": 0,
        "search_score": 2.5, "search_rank": 1,
    }  # fmt: skip
    status, headers, page = send(server, "GET", "/")
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert b"{{" not in page


REFUSED = {  # method, path, body, headers: status
    "invalid JSON": ("POST", "/answer", b"{", {}, 400),
    "no text": ("POST", "/answer", b"\xff\xfe", {}, 400),
    "no object": ("POST", "/answer", b"[]", {}, 400),
    "no question": ("POST", "/answer", b"{}", {}, 400),
    "an empty question": ("POST", "/answer", question("  "), {}, 400),
    "deep JSON": ("POST", "/answer", b"[" * 50_000, {}, 400),
    "a large body": ("POST", "/answer", b"x" * (LARGEST_BODY + 1), {}, 413),
    "10 MB": ("POST", "/answer", bytes(10_000_000), {}, 413),
    "no length": ("POST", "/answer", b"", {"Content_Length": "-1"}, 411),
    "a form": ("POST", "/answer", b"q=1", {"Content_Type": "text/plain"}, 415),
    "a wrong path": ("GET", "/etc/passwd", None, {}, 404),
    "a wrong path with a body": ("POST", "/", b"{}", {}, 405),
    "a question by GET": ("GET", "/answer", None, {}, 405),
    "another site": ("POST", "/answer", question("Who?"), {"Host": "evil.example:80"}, 403),
    "a bad host": ("GET", "/", None, {"Host": "[::1"}, 403),
    "bad input": ("POST", "/answer", question("bad"), {}, 500),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, server):
    """With a status and a reason; the next question is answered."""
    *request, headers, expected = REFUSED[case]
    status, _, content = send(server, *request, **headers)
    assert status == expected
    assert list(content) == ["error"]
    assert send(server, "POST", "/answer", question("Who?"), Host="localhost:1")[0] == 200


def test_one_question_at_a_time(server, monkeypatch):
    """A connection that sends nothing, as browsers keep, holds up nobody."""
    idle = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    idle.connect()
    busy = []

    def one(text: str) -> Reply:
        busy.append(server._lock.locked())
        return answer(text)

    monkeypatch.setattr(server, "_answer", one)
    asked = [f"Question {n}?" for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        sent = pool.map(lambda text: send(server, "POST", "/answer", question(text))[2], asked)
        assert [reply["passages"][0]["text"] for reply in sent] == [f"{t} {EVIL}" for t in asked]
    assert busy == [True] * 8
    idle.close()


def test_attribution_equals_reading_without_the_passage(reference, passages, monkeypatch):
    """In the JSON of a real conversation; the log-probability, too, by teacher forcing."""
    served = []
    monkeypatch.setattr(ask, "serve", lambda answer, host, *_: served.append((answer, host)))
    _, search = ways(reference, passages)["words"]
    run_main(test_reader.main, *reader(reference), *search, "--serve")
    ((answers, host),) = served
    assert host == "127.0.0.1"
    asked = "Where does the Strömgarwen rise?"
    for _ in range(2):  # the second time with what was laid out for the first
        reply = as_json(asked, answers(asked))
    read = sorted(reply["passages"], key=lambda passage: passage["search_rank"])
    assert [p["score"] for p in reply["passages"]] == sorted(
        (p["score"] for p in read), reverse=True
    )
    t5, tokenizer = (
        load_reader(str(reference / "t5")).eval(),
        load_tokenizer(str(reference / "t5"), "none"),
    )
    texts = [f"question: {asked} title: {p['title']} context: {p['text']}" for p in read]
    coded = ReaderCollator(tokenizer, 96)([ReaderItem(0, texts, None)])
    ids, mask = coded["input_ids"], coded["attention_mask"]
    found = t5.answer(ids, mask, GenerationOptions())
    tokens = found.tokens[0, 1:]
    tokens = tokens[: (tokens == 1).nonzero()[0, 0] + 1] if (tokens == 1).any() else tokens

    def log_probability(rows: list[int]) -> float:
        with torch.no_grad():
            return -len(tokens) * t5(ids[:, rows], mask[:, rows], tokens[None])[0].item()

    everything = log_probability([0, 1, 2])
    assert reply["log_probability"] == pytest.approx(everything, abs=1e-4)
    for n, passage in enumerate(read):
        rest = [row for row in range(3) if row != n]
        assert passage["attribution"] == pytest.approx(everything - log_probability(rest), abs=1e-4)
    assert max(abs(passage["attribution"]) for passage in read) > 1e-3


@in_browser
def test_the_page_in_a_browser(server, tmp_path):
    """Texts stay texts; the page talks to its own server alone."""
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    with Chromium(tmp_path / "browser") as browser:
        for width, dark in ((400, True), (1400, False)):
            browser.show(width, dark=dark)
            browser.call("Page.navigate", url=url)
            browser.wait_for(f"location.href === '{url}' && document.readyState === 'complete'")
            browser.type("#question", EVIL)
            browser.ask("document.querySelector('form button').click()")
            browser.wait_for("document.querySelectorAll('#passages li').length === 2")
            assert browser.ask("document.documentElement.scrollWidth") == width
            assert browser.ask("document.getElementById('answer').textContent") == "Nile"
            facts = browser.ask("document.getElementById('facts').textContent")
            assert facts == "probability 60.7 %"
            text = browser.ask("document.querySelector('#passages li p').textContent")
            assert text == f"{EVIL}. {EVIL} {EVIL}"
            names = "[...document.querySelectorAll('#passages li:first-child .measure')]"
            assert browser.ask(f"{names}.map((row) => row.textContent)") == [
                "attention0.00", "attribution0.00",
            ]  # fmt: skip
            marks = "[...document.querySelector('#passages li').querySelectorAll('mark')]"
            assert browser.ask(f"{marks}.map((mark) => mark.textContent)") == ["Nile"] * 4
            assert browser.ask("document.querySelectorAll('img').length") == 0
        own = {f"asks for {url}", f"asks for {url}answer"}
        assert set(browser.complaints) <= own
