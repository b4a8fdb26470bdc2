"""The page for questions: what it answers, what it refuses, and that it survives both."""

import http.client
import json
import logging
import threading
from collections.abc import Iterable, Iterator

import pytest

import test_reader
from src.runtime.errors import InputError
from src.tools import ask
from src.tools.replies import Evidence, Reply
from src.tools.serve import LARGEST_BODY, Server
from tests.chromium import Chromium
from tests.test_conversation import passages, reader, run_main, ways  # noqa: F401 (a fixture)
from tests.test_report import in_browser

EVIL = "<img src=x onerror=alert(1)> \N{MUSICAL SYMBOL G CLEF} Nile & <b>Nile</b>"


def talk(questions: Iterable[str]) -> Iterator[Reply]:
    for question in questions:
        if question == "bad":
            raise InputError("reader: a score is not finite")
        read = [Evidence(EVIL, f"{question} {EVIL}", -n, 2.5, n + 1) for n in range(2)]
        yield Reply("Nile", read, log_probability=-0.5)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(talk, "127.0.0.1", 0, logging.getLogger("test")) as server:
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
    assert {name: first[name] for name in ("title", "score", "search_score", "search_rank")} == {
        "title": EVIL, "score": 0, "search_score": 2.5, "search_rank": 1,
    }  # fmt: skip
    assert [first["text"][start:end] for start, end in first["marks"]] == ["Nile", "Nile"]
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
    "another method": ("DELETE", "/answer", None, {}, 405),
    "another site": ("POST", "/answer", question("Who?"), {"Host": "evil.example:80"}, 403),
    "a bad host": ("GET", "/", None, {"Host": "[::1"}, 403),
    "bad input": ("POST", "/answer", question("bad"), {}, 500),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, server):
    """With a status and a reason; the next question is answered."""
    *request, headers, expected = REFUSED[case]
    status, sent, content = send(server, *request, **headers)
    assert status == expected
    assert list(content) == ["error"]
    assert ("Allow" in sent) is (status == 405)
    assert send(server, "POST", "/answer", question("Who?"), Host="localhost:1")[0] == 200


def test_one_question_at_a_time(server):
    """A connection that sends nothing, as browsers keep, holds up nobody."""
    idle = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    idle.connect()
    busy, answer = [], server._talk

    def one(questions: Iterable[str]) -> Iterator[Reply]:
        for reply in answer(questions):
            busy.append(server._lock.locked())
            yield reply

    server._talk, replies = one, {}
    asked = [f"Question {n}?" for n in range(8)]
    threads = [
        threading.Thread(
            target=lambda text=text: replies.update(
                {text: send(server, "POST", "/answer", question(text))[2]["passages"][0]["text"]}
            )
        )
        for text in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {text: f"{text} {EVIL}" for text in asked}
    assert busy == [True] * 8
    idle.close()


def test_it_answers_like_a_conversation(reference, passages, monkeypatch):  # noqa: F811
    _, search = ways(reference, passages)["words"]
    served, printed = [], []
    monkeypatch.setattr(ask, "serve", lambda talk, host, port, log: served.append((talk, host)))
    monkeypatch.setattr(ask, "print_replies", lambda replies: printed.extend(replies) or 1)
    run_main(test_reader.main, *reader(reference), *search, "--serve")
    ((answers, host),) = served
    asked = "Where does the Strömgarwen rise?"
    run_main(test_reader.main, *reader(reference), *search, "--question", asked)
    assert list(answers([asked])) == printed
    assert host == "127.0.0.1"


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
            marks = "[...document.querySelector('#passages li').querySelectorAll('mark')]"
            assert browser.ask(f"{marks}.map((mark) => mark.textContent)") == ["Nile"] * 4
            assert browser.ask("document.querySelectorAll('img').length") == 0
        own = {f"asks for {url}", f"asks for {url}answer"}
        assert set(browser.complaints) <= own
