"""Answers judged by more than exact match, against second implementations and worked examples."""

import itertools
import json
import math
import random
import statistics
import sys

import pytest

from src.evaluation.answers import contains_answer, exact_match, rouge_l
from src.evaluation.calibration import (
    coverage_curve,
    expected_calibration_error,
    rank_correlation,
    reliability,
)
from src.evaluation.groups import question_type
from src.tools.evaluate import main


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("It is the Nile, of course.", "Nile", True),
        ("Nilean", "Nile", False),
        ("The United States of America", "the united states", True),
        ("States united", "united states", False),
        ("anything", "the", False),  # no words are left of it
        ("the", "a", True),
        ("", "", True),
    ],
)
def test_an_answer_is_contained_in_words(prediction, answer, expected):
    assert contains_answer(prediction, ["other one", answer]) is expected
    assert exact_match(prediction, [answer]) <= expected


def longest_common(first: list[str], second: list[str]) -> int:
    """By trying every subsequence of the first."""
    for n in range(len(first), 0, -1):
        for words in itertools.combinations(first, n):
            rest = iter(second)
            if all(word in rest for word in words):
                return n
    return 0


def test_rouge_l_equals_its_definition():
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices(["red", "old", "sea", "map"], k=rng.randint(1, 6)) for _ in "ab")
        expected = 2 * longest_common(a, b) / (len(a) + len(b))
        assert rouge_l(" ".join(a), ["zzz", " ".join(b)]) == pytest.approx(expected)


def test_rouge_l_without_its_library(monkeypatch):
    rouge_l.__globals__["_rouge_scorer"].cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        rouge_l("a", ["b"])


def test_calibration_of_a_worked_example():
    sure, right = [0.0, 0.05, 0.1, 0.95, 1.0, 1.0], [False, True, True, True, True, False]
    bins = reliability(sure, right)
    assert [(b.low, b.count) for b in bins] == [(0.0, 2), (0.1, 1), (0.9, 3)]
    assert bins[2].confidence == pytest.approx(2.95 / 3)
    gaps = 2 * (0.5 - 0.025) + 1 * (1 - 0.1) + 3 * (2.95 / 3 - 2 / 3)
    assert expected_calibration_error(bins) == pytest.approx(gaps / 6)


def test_coverage_equals_thresholds():
    rng = random.Random(1)
    sure = [rng.choice([0.1, 0.2, 0.5, rng.random()]) for _ in range(200)]
    right = [rng.random() < p for p in sure]
    expected = []
    for threshold in sorted(set(sure), reverse=True):
        given = [r for p, r in zip(sure, right, strict=True) if p >= threshold]
        expected.append((len(given) / 200, sum(given) / len(given)))
    assert coverage_curve(sure, right) == expected


def test_rank_correlation_equals_pairs():
    """Spearman's is Pearson's of the ranks; a rank counts the values below, and ties by half."""
    rng = random.Random(2)
    for _ in range(50):
        pair = [[rng.randint(0, 5) for _ in range(8)] for _ in "ab"]
        ranks = [[sum((o < v) + (o == v) / 2 for o in x) for v in x] for x in pair]
        expected = statistics.correlation(*ranks) if min(map(len, map(set, pair))) > 1 else None
        assert rank_correlation(*pair) == pytest.approx(expected)
    assert rank_correlation([1.0], [2.0]) is None
    assert rank_correlation([1, 1], [1, 2]) is None


def test_question_types():
    asked = "Who is it?|How many are there|how much is it|How?|In which year?|the who"
    kinds = [question_type(question) for question in asked.split("|")]
    assert kinds == ["who", "how many", "how much", "how", "other", "who"]


def test_the_table_by_groups(tmp_path, capsys):
    rows = [("Who?", ["Ann"], "Ann", 0.9), ("Who else?", ["Bob"], "it is Bob", 0.5),
            ("Where?", ["in Rome"], "Rome", 0.3), ("When?", [], "now", 0.1)]  # fmt: skip
    data = [{"id": str(n), "question": q, "answers": a} for n, (q, a, *_) in enumerate(rows)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    given = [f"{n}\t{row[2]}\n" for n, row in enumerate(rows)]
    (tmp_path / "final_output.txt").write_text("".join(given))
    records = [{"id": str(n), "log_probability": math.log(row[3])} for n, row in enumerate(rows)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    train = [{"question": "who", "answers": ["X"]}, {"question": "Y?", "target": "the Bob"}]
    (tmp_path / "train.json").write_text(json.dumps(train))
    files = [str(tmp_path / "final_output.txt"), "--data", str(tmp_path / "data.json")]
    more = ["--also", "contained", "calibration", "--by", "type", "overlap"]
    main([*files, *more, "--train_data", str(tmp_path / "train.json")])
    lines = capsys.readouterr().out.splitlines()[1:]
    cells = {line[: len(files[0])].strip(): line[len(files[0]) :].split() for line in lines}
    gap = 100 * (0.1 + 0.5 + 0.3) / 3
    all_three = ["3", "33.33", "66.67", "66.67", "56.67", f"{gap:.2f}"]
    assert cells.pop(files[0])[:2] == all_three[:2]
    assert list(cells) == [
        "who", "where", "question in training data", "only answer in training data",
        "neither in training data",
    ]  # fmt: skip
    assert cells["who"] == ["2", "50.00", "75.00", "100.00", "70.00", "30.00"]
    assert cells["where"][:2] == ["1", "0.00"]
    assert [row[0] for row in list(cells.values())[2:]] == ["1", "1", "1"]
    (tmp_path / "better.txt").write_text("0\tAnn\n1\tBob\n2\tRome\n3\t\n")  # rows of its own
    main([files[0], str(tmp_path / "better.txt"), *files[1:], "--by", "type"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("  who ")] == [
        ["who", "2", "50.00"], ["who", "2", "100.00"],
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").unlink()
    problems = (more[3:], "--train_data must name"), (more[:3], "no such file; test_reader")
    for wrong, message in problems:
        with pytest.raises(SystemExit):
            main([*files, *wrong])
        assert message in capsys.readouterr().err
