"""Verdicts on answers equal the reference's; F1 as SQuAD's evaluation defines it."""
# ruff: noqa: RUF001 (characters that look like others are the point)

import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.evaluation.answers import (
    answer_spans,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
    tokenize,
)
from src.tools.evaluate import main


@pytest.fixture
def verdicts(reference: Path) -> dict:
    return json.loads((reference / "evaluation.json").read_text())


def test_verdicts_equal_the_reference(verdicts):
    assert (len(verdicts["exact_match"]), len(verdicts["has_answer"])) == (676, 408)
    for prediction, answer, verdict in verdicts["exact_match"]:
        assert exact_match(prediction, [answer]) is verdict, (prediction, answer)
    for text, answer, verdict in verdicts["has_answer"]:
        assert has_answer([answer], text) is verdict, (text, answer)
    for text, tokens in verdicts["tokenize"]:
        assert tokenize(text) == [unicodedata.normalize("NFD", token) for token in tokens]


def slow_has_answer(answers: list[str], text: str) -> bool:
    """The rule, written naively."""
    tokens = tokenize(text)
    wanted = [tokenize(answer) for answer in answers]
    return any(
        tokens[start : start + len(answer)] == answer
        for answer in wanted
        for start in range(len(tokens) - len(answer) + 1)
    )


# Letters, digits, marks, signs, spaces and controls that are hard on the rule.
HARD = (
    "aab bB1 ½Ⅷⅷ.-'’()é\u0301\u0323Çç İıIi ΣσςΑα ßẞ Ⓐⓐ ʼ \u00ad\u200b\u200d\x00\t\n\u2028"
    "日本ق\u064b\u0e01\u0e31 ǅǆ ﬁ 𝐀 𐐀𐐨 \ue000 \U000e0001 =≠\u212a;\u037e"
)


def hard_cases(n: int, alphabet: str = HARD) -> Iterator[tuple[str, str]]:
    """Random texts, each with an answer that is often a piece of it; the last half also of any
    characters whose lower case differs."""
    rng = random.Random(0)
    cased = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.lower() != c)
    for number in range(n):
        letters = alphabet if 2 * number < n else alphabet[:20] + "".join(rng.choices(cased, k=9))
        text = "".join(rng.choices(letters, k=rng.randint(0, 14)))
        start = rng.randint(0, len(text))
        cut = text[start : start + rng.randint(0, 5)]
        other = "".join(rng.choices(letters, k=2))
        yield text, rng.choice([cut, cut.swapcase(), other, f" {cut}."])


def test_has_answer_equals_the_rule_on_random_texts():
    found = 0
    for text, answer in hard_cases(20_000):
        verdict = has_answer([answer], text)
        assert verdict is slow_has_answer([answer], text), (answer, text)
        found += verdict
    assert 4_000 < found < 16_000


def test_answers_are_marked_where_has_answer_finds_them():
    """There is a span exactly when there is an answer; each holds one, and outside is none."""
    marked = 0
    for text, answer in hard_cases(8_000, HARD + "≠\u0338\u0344\u0f73각\u11a8"):
        spans = answer_spans([answer], text)
        if not tokenize(answer):
            assert spans == []
            continue
        assert bool(spans) is has_answer([answer], text), (answer, text)
        rest, end = "", 0
        for start, stop in spans:
            assert end <= start < stop <= len(text)
            assert has_answer([answer], text[start:stop]), (answer, text)
            rest, end = rest + text[end:start] + " ☃ ", stop
        assert not has_answer([answer], rest + text[end:]), (answer, text)
        marked += len(spans)
    assert marked > 1_000


@pytest.mark.parametrize(
    ("text", "answers", "marked"),
    [
        ("In 1903, Marie CURIE came.", ["marie curie", "1903"], ["1903", "Marie CURIE"]),
        ("café cafe\u0301 cafe", ["CAFÉ"], ["café", "cafe\u0301"]),
        ("a a a, b", ["a a"], ["a a a"]),  # overlapping: one mark
        ("New York City", ["New York", "York City"], ["New York City"]),
        ("a ≠ b", ["="], ["≠"]),
        ("scattered", ["cat"], []),
        ("anything", [""], []),
        ("", ["x"], []),
    ],
)
def test_marked_answers(text, answers, marked):
    assert [text[start:end] for start, end in answer_spans(answers, text)] == marked


def test_the_best_of_several_answers_counts():
    assert exact_match("the Seine", ["Loire", "seine!"])
    assert not exact_match("the Seine", ["Loire"])
    assert not exact_match("the Seine", [])
    assert has_answer(["Loire", "Seine"], "Paris lies on the Seine.")
    assert not has_answer([], "Paris lies on the Seine.")
    assert f1("blue whale", ["whale", "big blue whale"]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "cat sat", 1.0),  # articles do not count
        ("cat cat dog", "cat dog dog", 2 / 3),  # repeated words count as often as both have them
        ("a b c d", "c d e", 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_f1(prediction, answer, expected):
    assert f1(prediction, [answer]) == pytest.approx(expected)


def test_f1_is_one_exactly_when_the_words_are_the_same(verdicts):
    for prediction, answer, verdict in verdicts["exact_match"]:
        if verdict:
            assert f1(prediction, [answer]) == 1.0
        words = [sorted(normalize_answer(text).split()) for text in (prediction, answer)]
        assert (f1(prediction, [answer]) == 1.0) is (words[0] == words[1])


# --- from the shell


@pytest.fixture
def questions(reference: Path, tmp_path: Path) -> Path:
    found = json.loads((reference / "retrieved.json").read_text())
    (tmp_path / "found.json").write_text(json.dumps(found["retrieved"]))
    return tmp_path / "found.json"


def test_files_side_by_side(questions, reference, tmp_path, capsys):
    hits = json.loads((reference / "retrieved.json").read_text())["top_k_hits"]
    rows = json.loads(questions.read_text())
    answers = "".join(
        f"{row['id']}\t{row['answers'][0] if number < 30 else 'no idea'}\n"
        for number, row in enumerate(rows)
    )
    (tmp_path / "final_output.txt").write_text(answers)
    main([str(questions), str(tmp_path / "final_output.txt"), "--data", str(questions)])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["questions", "recall@1", "recall@5", "exact", "match", "F1"]
    expected = [40, 100 * hits[0] / 40, 100 * hits[4] / 40]
    assert [float(cell) for cell in first.split()[1:4]] == pytest.approx(expected)
    assert first.split()[4:] == ["-", "-"]
    assert [float(second.split()[column]) for column in (1, 4, 5)] == [40, 75, 75]
