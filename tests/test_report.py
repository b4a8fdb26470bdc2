"""The report of a run: its numbers equal the evaluation's, and a browser shows them."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.data.examples import Example, Examples, load_data, read_example
from src.evaluation.answers import exact_match, f1, has_answer, measure_answers
from src.evaluation.calibration import percent, wilson
from src.evaluation.rankings import measure_retrieval
from src.evaluation.runs import read_metrics, thin
from src.tools.report import survey
from src.tools.report.__main__ import main
from src.tools.report.charts import ticks
from src.tools.report.survey import excerpt, to_json
from src.tools.targets import measure
from tests.chromium import PACKAGE, Chromium, program

N_QUESTIONS, N_PASSAGES, N_READ = 60, 12, 8
WORDS = ["river", "Émile", "of", "Zürich", "the", "old", "1903", "is", "Σίσυφος", "and", "café"]


def make_data(rng: random.Random) -> list[dict]:
    """Questions with scored passages, answers of one to four words, some of them in passages."""
    data = []
    for number in range(N_QUESTIONS):
        answer = " ".join(f"{word}{number}" for word in rng.choices(WORDS, k=rng.randint(1, 4)))
        contexts = []
        for rank in range(N_PASSAGES):
            words = rng.choices(WORDS, k=12)
            if rng.random() < 0.2:
                words.insert(rng.randint(0, 12), answer.upper())
            context = {"id": str(rank), "title": f"Title {rank}", "text": " ".join(words)}
            contexts.append(context | ({"score": rng.gauss(-3, 2)} if rank < N_READ else {}))
        contexts[0]["title"] = "<i>no mark-up</i>"
        question = f"What of number {number}? <script>complain()</script>"
        answers = [f"{WORDS[0]} or not", answer]
        row = {"id": f"q{number}", "question": question, "answers": answers, "ctxs": contexts}
        data.append(row)
    data[7]["answers"] = []
    return data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with all that training and testing write, beside two files to compare with."""
    rng = random.Random(0)
    data = make_data(rng)
    folder = tmp_path / "my <run>"
    folder.mkdir()
    (folder / "dataset_wscores.json").write_text(json.dumps(data))
    answers = [rng.choice([*row["answers"], "the bridge", ""]) for row in data]
    lines = [f"{row['id']}\t{answer}\n" for row, answer in zip(data, answers, strict=True)]
    (folder / "final_output.txt").write_text("".join(lines), encoding="utf-8")
    rows = [{"step": s, "train/loss": 3 / s, "train/lr": 1e-4 * s / 450} for s in range(1, 451)]
    rows += [{"step": s, "dev/exact_match": s / 9, "dev/f1": s / 6} for s in (150, 300, 450)]
    rows += [{"step": 450, "dev/loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "options.json").write_text(json.dumps({"options": {"n_context": N_READ}}))
    for name in ("bm25", "round_1"):
        for row in data:
            rng.shuffle(row["ctxs"])
            for rank, context in enumerate(row["ctxs"]):
                context["score"] = 100 - rank
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return folder


def report(folder: Path, *options: str | Path) -> str:
    """The page about a run."""
    page = folder.parent / "page.html"
    main([str(folder), "-o", str(page), *map(str, options)])
    return page.read_text(encoding="utf-8")


def held(page: str) -> dict:
    """The data for the page's script."""
    return json.loads(re.search(r'<script type="application/json".*?>(.*?)</script>', page)[1])


def tiles(page: str) -> dict[str, str]:
    return dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd>", page))


def rows_of(folder: Path) -> list[Example]:
    data = load_data(folder / "dataset_wscores.json")
    return [read_example(data, index) for index in range(len(data))]


def judged_ones(page: str) -> list[dict]:
    return [question for question in held(page)["questions"] if question["match"] is not None]


# --- numbers


def test_the_headline_equals_the_evaluation(run):
    rows = [row for row in rows_of(run) if row.answers]
    answers = measure_answers(
        str(run / "final_output.txt"), load_data(run / "dataset_wscores.json")
    )
    recall = measure_retrieval(str(run / "dataset_wscores.json"))
    read = [any(has_answer(r.answers, p.text) for p in r.passages[:N_READ]) for r in rows]
    assert answers["questions"] == N_QUESTIONS - 1
    assert tiles(report(run)) == {
        "questions": str(N_QUESTIONS),
        "exact match, %": f"{answers['exact match']:.1f}",
        "F1, %": f"{answers['F1']:.1f}",
        "answer in a passage read, %": f"{percent(read):.1f}",
        "answer in the top passage, %": f"{recall['recall@1']:.1f}",
        "updates": "450",
        "best dev exact match": "50",
        "lowest dev loss": "0.5",
    }


def test_recall_equals_the_evaluation(run):
    files = [run.parent / "bm25.json", run.parent / "round_1.json"]
    page = report(run, "--retrieved", *files)
    expected = [measure_retrieval(str(file)) for file in [*files, run / "dataset_wscores.json"]]
    names = ["bm25", "round_1", "by the reader&#x27;s attention"]
    for name, values in zip(names, expected, strict=True):
        cells = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', page)[1]
        cells = [float(cell) for cell in re.findall("<td>(.*?)</td>", cells)]
        assert cells == pytest.approx(list(values.values()), abs=0.051)
    other = json.loads(files[0].read_text())[:-1]
    files[0].write_text(json.dumps(other))
    assert "do not ask the same questions" not in page
    page = report(run, "--retrieved", *files)
    assert "do not ask the same questions" in page
    assert held(page)["rankings"] == ["round_1"]


def test_records_equal_the_data(run):
    """Also: exactly the passages with an answer have a marked one."""
    options = ["--retrieved", run.parent / "bm25.json", "--passages_shown", N_PASSAGES]
    records = held(report(run, *options))["questions"]
    given = (run / "final_output.txt").read_text(encoding="utf-8").splitlines()
    compared = Examples(run.parent / "bm25.json")
    for row, line, record in zip(rows_of(run), given, records, strict=True):
        answer = line.split("\t")[1]
        flags = [bool(row.answers) and has_answer(row.answers, p.text) for p in row.passages]
        assert (record["id"], record["question"]) == (row.id, row.question)
        assert (record["given"], record["read"]) == (answer, N_READ)
        assert record["flags"] == "".join("01"[flag] for flag in flags)
        scores = [passage.score for passage in row.passages]
        assert record["scores"] == [s and pytest.approx(s, rel=1e-3) for s in scores]
        for passage, flag, shown in zip(row.passages, flags, record["passages"], strict=True):
            assert "".join(shown["parts"]) == passage.text
            assert (len(shown["parts"]) > 1) is flag
            assert all(has_answer(row.answers, mark) for mark in shown["parts"][1::2])
        if not row.answers:
            assert (record["match"], record["f1"], record["first"]) == (None, None, [None])
            continue
        assert record["match"] is exact_match(answer, row.answers)
        assert record["f1"] == pytest.approx(f1(answer, row.answers), abs=1e-4)
        assert record["holding"] == sum(flags[:N_READ])
        found = [
            has_answer(row.answers, p.text) for p in read_example(compared, row.index).passages
        ]
        assert record["first"] == [found.index(True) + 1 if any(found) else 0]


def test_the_bars_take_every_question_once(run):
    page = report(run)
    for key in ("holding", "length"):
        total = 0
        for low, high, bars in re.findall(rf'<a href="#{key}=(\d+)-(\d*)">(.*?)</a>', page):
            group = [q for q in judged_ones(page) if int(low) <= q[key] <= int(high or 1000)]
            numbers = [float(n) for n in re.findall(r"([\d.]+) % of", bars)]
            means = [percent([q[name] for q in group]) for name in ("match", "f1")]
            assert numbers == pytest.approx(means, abs=0.06)
            total += len(group)
        assert total == N_QUESTIONS - 1


def test_wilson_interval():
    # Newcombe, 1998, table I: 81 of 263, and 0 of 20, by the score method.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


# --- confidence, attribution, another run


@pytest.fixture
def judged(run: Path) -> Path:
    """The run with probabilities, attributions and a curve, beside another run, `<other>`."""
    rng = random.Random(2)
    data = json.loads((run / "dataset_wscores.json").read_text())
    records = []
    for row, line in zip(data, (run / "final_output.txt").read_text().splitlines(), strict=True):
        others = [{"answer": "<b>no</b>", "log_probability": -3.0, "mean_log_probability": -3.0}]
        records.append({"id": row["id"], "answer": line.split("\t")[1], "alternatives": others})
        records[-1]["log_probability"] = math.log(rng.choice([0.05, 0.3, 0.55, 0.555, 0.9999, 1]))
        for context in row["ctxs"][:N_READ]:
            context["attribution"] = rng.gauss(context["score"], 1)
            context["scores"] = {"attention": context["score"], "chance": rng.random()}
    (run / "dataset_wscores.json").write_text(json.dumps(data))
    (run / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curve = {n: {"exact_match": 30 + n, "f1": 40 + n, "questions": 60} for n in (10, 1, 5)}
    (run / "n_context_curve.json").write_text(json.dumps(curve))
    other = run.parent / "<other>"
    other.mkdir()
    lines = [f"{row['id']}\t{row['answers'][-1:] and rng.choice([row['answers'][-1], 'no'])}\n"
             for row in data]  # fmt: skip
    (other / "final_output.txt").write_text("".join(lines))
    return run


def test_flips_confidence_and_attribution(judged):
    other = judged.parent / "<other>"
    page = report(judged, "--against", other)
    about, questions = held(page), judged_ones(page)
    assert (about["against"], about["judged"]) == ("<other>", True)
    data = load_data(judged / "dataset_wscores.json")
    there = measure_answers(str(other / "final_output.txt"), data)["exact match"]
    assert percent([q["other_match"] for q in questions]) == pytest.approx(there)
    for kind, pair in [("gained", (True, False)), ("lost", (False, True)), ("both", (True, True))]:
        assert (n := sum((q["match"], q["other_match"]) == pair for q in questions))
        assert f'<a href="#against={kind}">{n}</a>' in page
    # Each answer is in one bin, and the link of a bin names the same questions.
    sizes, gaps = [], []
    for low, high, bars in re.findall(r'<a href="#p=(\d+)-(\d+)">(.*?)</a>', page):
        group = [q for q in questions if int(low) <= min(99, 100 * q["p"]) < int(high) + 1]
        assert f"of {len(group)} questions" in bars
        means = [percent([q[name] for q in group]) for name in ("p", "match")]
        sizes.append(len(group))
        gaps.append(len(group) * abs(means[0] - means[1]))
    assert sum(sizes) == len(questions)
    assert tiles(page)["expected calibration error, %"] == f"{sum(gaps) / len(questions):.1f}"
    correlations = []
    for row, record in zip(rows_of(judged), about["questions"], strict=True):
        raw = data[row.index]["ctxs"]
        causes = [raw[passage.position]["attribution"] for passage in row.passages[:N_READ]]
        assert record["causes"] == pytest.approx(causes, rel=1e-2)
        order = sorted(range(N_READ), key=lambda k: -causes[k])
        squares = sum((k - order.index(k)) ** 2 for k in range(N_READ))  # scores are in order
        correlations.append(1 - 6 * squares / (N_READ * (N_READ**2 - 1)))
    mean = f"{sum(correlations) / len(correlations):.2f}"
    assert tiles(page)["attention&#x27;s correlation with attribution"] == mean
    # Targets, as src.tools.targets has them.
    head, ((name, *cells), _) = measure(str(judged / "dataset_wscores.json"))
    assert (head[-2:], name) == (["1", "2"], "1 attention")
    assert f"1 attention</th><td>{'</td><td>'.join(cells)}</td>" in page


def test_nothing_is_shown_of_what_was_not_computed(run):
    page = report(run)
    about = held(page)
    assert (about["against"], about["judged"]) == ("", False)
    for text in ("Confidence</h2>", "Targets</h2>", "attribution", "How many passages", "#against"):
        assert text not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert all(q["p"] is None and q["causes"] == [] for q in about["questions"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("answers.jsonl", "{}\n", r"answers\.jsonl: 1 lines of answers to the 60 questions"),
        ("answers.jsonl", '{"id": "q0", "log_probability": NaN}\n' * 60,
         r"answers\.jsonl, line 1: must be the answer to question q0"),
        ("answers.jsonl", '{"id": "q0", "log_probability": -1}\n' * 60,
         r"answers\.jsonl, line 2: must be the answer to question q1"),
        ("answers.jsonl", "[" * 100_000 + "\n" * 60,
         r"answers\.jsonl, line 1: must be the answer to question q0"),
        ("n_context_curve.json", '{"5": 3}', r"n_context_curve\.json: not as a run writes it"),
        ("options.json", "[3]", r"options\.json: not as a run writes it"),
        ("../<other>/final_output.txt", None, r"final_output\.txt: cannot be read \(No such file"),
    ],
)  # fmt: skip
def test_bad_files_of_a_run_are_one_line(file, content, message, judged, refused):
    (judged / file).unlink()
    if content:
        (judged / file).write_text(content)
    line = refused(report, judged, "--against", judged.parent / "<other>")
    assert re.match(f"error: .*{message}", line), line


def test_a_retrieved_file_alone(run, capsys):
    file = run.parent / "bm25.json"
    main([str(file)])
    page = (run.parent / "bm25.json.report.html").read_text(encoding="utf-8")
    headings = ["Recall", "Questions", "What this page was made from"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    recall = measure_retrieval(str(file))["recall@1"]
    assert tiles(page)["answer in the top passage, %"] == f"{recall:.1f}"
    (run.parent / "q.json").write_text('[{"question": "Who?", "answers": ["I"]}]')
    with pytest.raises(SystemExit):
        main([str(run.parent / "q.json")])
    assert "no question in this file has both answers and passages" in capsys.readouterr().err


# --- parts that are left out, or missing


def test_the_page_says_how_much_it_holds(run, capsys):
    page = report(run, "--max_questions", "7", "--passages_shown", "2")
    about = held(page)
    assert about["total"] == N_QUESTIONS
    assert [q["id"] for q in about["questions"]] == ["q0", "q8", "q17", "q25", "q34", "q42", "q51"]
    assert "it holds 7 of 60 questions" in capsys.readouterr().out
    firsts = [question["flags"].find("1") for question in about["questions"]]
    assert max(firsts) >= 2
    for question, first in zip(about["questions"], firsts, strict=True):
        expected = [0, 1] + ([first] if first >= 2 else [])
        assert [passage["k"] for passage in question["passages"]] == expected
    assert tiles(page) == tiles(report(run))  # the numbers are of all questions


@pytest.mark.parametrize("most_bytes", [100_000, 50_000])
def test_the_page_has_a_largest_size(most_bytes, run, monkeypatch):
    """Passages are left out, the last first, and never the first with an answer before others."""
    options = "--max_questions", N_QUESTIONS, "--passages_shown", N_PASSAGES
    everything = len(to_json(held(report(run, *options))["questions"]).encode())
    monkeypatch.setattr(survey, "MOST_BYTES", most_bytes)
    questions = held(report(run, *options))["questions"]
    assert 0.6 * most_bytes < len(to_json(questions).encode()) < most_bytes + 2000 < everything
    for question in questions:
        ranks, first = [p["k"] for p in question["passages"]], question["flags"].find("1")
        others = [rank for rank in ranks if rank != first]
        assert others == [rank for rank in range(N_PASSAGES) if rank != first][: len(others)]
        assert first < 0 or first in ranks or not ranks


def test_a_long_passage_keeps_its_answers():
    text = "x " * 1500 + "Nile" + " y" * 1500
    parts, hidden = excerpt(text, [(3000, 3004)])
    assert parts[1] == "Nile"
    shown = "".join(parts).replace(" [\N{HORIZONTAL ELLIPSIS}] ", "")
    assert len(shown) + hidden == len(text)
    assert (parts[0][:4], parts[0][-4:], parts[2][:4]) == ("x x ", "x x ", " y y")
    assert len(shown) < 4100
    assert excerpt("a Nile b", [(2, 6)]) == (["a ", "Nile", " b"], 0)
    parts, hidden = excerpt("a " * 10**6, [(n, n + 1) for n in range(0, 2 * 10**6, 2)])
    assert len("".join(parts)) < 3000


NEITHER = "There is neither final_output.txt nor dataset_wscores.json"
MISSING = {  # files left out: what the page says, tiles, whether it has the reader's scores
    "final_output.txt dataset_wscores.json": (NEITHER, "updates", False),
    "metrics.jsonl dataset_wscores.json": ("Are long answers harder?", "F1, %", False),
    "options.json dataset_wscores.json": ("no options.json in this folder", "updates", False),
    "final_output.txt": ("There is no final_output.txt", "answer in the top passage, %", True),
}


@pytest.mark.parametrize("missing", MISSING)
def test_a_run_without_some_files(missing, run):
    said, tile, scored = MISSING[missing]
    for name in missing.split():
        (run / name).unlink()
    answered = (run / "final_output.txt").exists()
    options = ["--data", run.parent / "bm25.json"] if answered else []
    page = report(run, *options)
    assert said in page
    assert ("<h2>Training</h2>" in page) is (run / "metrics.jsonl").exists()
    about = held(page)
    assert (about.get("answered", False), about.get("scored", False)) == (answered, scored)
    assert ("attended to most" in page) is scored  # BM25's scores are not the reader's
    assert tile in tiles(page)
    assert ("exact match, %" in tiles(page)) is answered
    read = {N_READ} if scored or (run / "options.json").exists() else {N_PASSAGES}
    assert {question["read"] for question in about["questions"]} <= read
    assert bool(about["questions"]) is (answered or scored)


def test_the_questions_are_found_by_the_runs_options(run):
    (run / "dataset_wscores.json").unlink()
    options = {"n_context": 5, "eval_data": str(run.parent / "bm25.json")}
    (run / "options.json").write_text(json.dumps({"options": options}))
    assert {question["read"] for question in held(report(run))["questions"]} == {5}


def test_questions_without_passages_or_answers(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final_output.txt").write_text("0\tParis\n1\t\n")
    data = tmp_path / "q.json"
    data.write_text('[{"question": "Where?", "answers": ["Paris"]}, {"question": "Who?"}]')
    found = tiles(report(tmp_path / "run", "--data", data))
    assert found["exact match, %"] == "100.0"
    assert "answer in a passage read, %" not in found
    data.write_text('[{"question": "Where?"}, {"question": "Who?"}]')
    assert "No question has gold answers" in report(tmp_path / "run", "--data", data)


def test_texts_of_the_data_are_no_mark_up(run):
    page = report(run)
    assert page.count("<script") == 2
    assert not re.search("<script>complain|<i>|<run>|src=", page)
    assert "default-src 'none'" in page


# --- curves


def test_metrics_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "train/loss": 2.5}', '{"step": 2, "train/loss": NaN}', '{"step": 3, "tr']
    path.write_text("\n".join(lines))
    assert read_metrics(path) == {"train/loss": [(1, 2.5)]}


def test_many_points_become_means():
    points = [(step, math.sin(step)) for step in range(1, 1051)]
    curve, size = thin(points)
    assert (size, [step for step, _ in curve]) == (6, list(range(6, 1051, 6)))
    means = [sum(y for _, y in points[end - 6 : end]) / 6 for end, _ in curve]
    assert [mean for _, mean in curve] == pytest.approx(means)
    assert thin(points[:200]) == (points[:200], 1)


@pytest.mark.parametrize(
    "ends", [(0.013, 0.094), (-3.7, 12.0), (5, 5), (0, 0), (1e-6, 3e-6), (980, 1020)]
)
def test_ticks_are_round_and_enclose_the_values(ends):
    found = ticks(*ends)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert found[0] <= ends[0] <= ends[1] <= found[-1]
    assert 2 <= len(found) <= 6
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0], rel=1e-6)


# --- in a browser

in_browser = pytest.mark.skipif(
    program() is None,
    reason=f"needs Chromium: as root, apt-get install --no-install-recommends {PACKAGE}",
)
# Texts of a chart that overlap, and texts outside their frame.
CROWDED = """[...document.querySelectorAll('.chart')].flatMap((chart) => {
  const frame = chart.closest('figure').getBoundingClientRect();
  const texts = [...chart.querySelectorAll('text')]
    .map((t) => [t.textContent, t.getBBox(), t.getBoundingClientRect()]);
  const outside = ([, , r]) => r.left < frame.left || r.right > frame.right;
  const overlap = (b, d) => b.x < d.x + d.width - 1 && d.x < b.x + b.width - 1
    && b.y < d.y + d.height - 3 && d.y < b.y + b.height - 3;
  const found = texts.filter(outside).map(([t]) => t);
  for (const [i, [a, b]] of texts.entries()) for (const [c, d] of texts.slice(i + 1))
    if (overlap(b, d)) found.push(a + ' on ' + c);
  return found;
})"""
STATUS = "document.getElementById('status').textContent"
TITLES = "[...document.querySelectorAll('.card h3')].map((title) => title.textContent)"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "browser") as browser:
        yield browser
        assert browser.complaints == []


def check_layout(browser: Chromium, page: Path) -> None:
    """It fits phones and desks, in the colours that a user likes."""
    for width, dark in ((400, True), (1400, False)):
        browser.show(width, dark=dark)
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert browser.ask(CROWDED) == []
        colour = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour))) < 64) is dark


@in_browser
def test_every_picture_has_its_points(run, browser):
    page = report(run, "--retrieved", run.parent / "bm25.json", run.parent / "round_1.json")
    browser.open(run.parent / "page.html")
    counts = browser.ask(
        "[...document.querySelectorAll('.chart')].map((chart) => "
        "[chart.closest('figure').querySelector('h3').textContent, "
        "chart.querySelectorAll('.point').length, chart.querySelectorAll('.bar').length])"
    )
    n_lengths = len({question["length"] for question in judged_ones(page)})
    n_holding = len(re.findall('href="#holding=', page))
    assert counts == [
        ["Does it need several passages with the answer? Bars should rise early", 0, 2 * n_holding],
        ["Are long answers harder? If so, bars fall", 0, 2 * n_lengths],
        ["How far down is an answer? The higher on the left, the better", 3 * N_PASSAGES, 0],
        # 450 updates, three to a point, and one of the dev set
        ["Loss: overfitting where dev rises while train falls", 150 + 1, 0],
        ["Exact match on dev: train longer if it still rises", 3, 0],
        ["F1 on dev: should rise with exact match", 3, 0],
        ["Learning rate: is the schedule the one you meant?", 150, 0],
    ]


@in_browser
@pytest.mark.parametrize("missing", ["", *MISSING])
def test_it_fits_phones_and_desks(missing, run, browser):
    for name in missing.split():
        (run / name).unlink()
    files = [run.parent / "bm25.json", run.parent / "round_1.json"]
    report(run, "--data", files[0], *(["--retrieved", *files] if not missing else []))
    check_layout(browser, run.parent / "page.html")


@in_browser
def test_one_click_and_confidence(judged, browser):
    """Also: it fits, with all of its charts."""
    questions = held(report(judged, "--against", judged.parent / "<other>"))["questions"]
    check_layout(browser, judged.parent / "page.html")
    wanted = [q for q in questions if q["match"] is False and q["holding"]]
    wanted.sort(key=lambda q: -q["p"])
    browser.ask("document.querySelector('.quick a').click()")
    browser.wait_for(f"{STATUS} === '{len(wanted)} of 60 questions.'")
    assert browser.ask(TITLES) == [question["question"] for question in wanted[:10]]
    card = browser.ask("document.querySelector('.card dl').textContent")
    assert f"probability{100 * wanted[0]['p']:.0f} %" in card
    assert "<b>no</b> (5.0 %)" in card
    assert f"in <other>{'✓' if wanted[0]['other_match'] else '✗'} " in card
    assert browser.ask("document.querySelectorAll('.card .track.cause').length") > 10
    flips = [q for q in questions if q["match"] is False and q["other_match"]]
    between = [q for q in questions if 0.5 <= q["p"] < 0.6]
    assert len(between) > 5
    for state, expected in (("against=lost", flips), ("p=50-59", between)):
        browser.open(judged.parent / "page.html", state)
        assert browser.ask(STATUS).startswith(f"{len(expected)} of 60")
        assert browser.ask(TITLES) == [question["question"] for question in expected[:10]]


@in_browser
def test_search_and_filters(run, browser):
    page = report(run)
    browser.open(run.parent / "page.html")
    assert browser.ask(STATUS).startswith("60 questions.")
    assert "complain()" in browser.ask(TITLES)[0]

    # An answer's text is found, and marked in the passages.
    wanted = next(q for q in held(page)["questions"] if q["flags"][0] == "1")
    answer = wanted["right"][1].upper()
    browser.type("#q", answer)
    browser.wait_for(f"{STATUS}.startsWith('1 of 60')")
    marks = browser.ask("[...document.querySelectorAll('.card mark')].map((m) => m.textContent)")
    assert set(marks) == {answer}
    assert browser.ask("CSS.highlights.get('found').size") >= len(marks)
    browser.type("#q", "nobody says this")
    browser.wait_for(f"{STATUS}.startsWith('0 of 60')")

    # Filters, by the links of tables and bars.
    overlooked = [q for q in judged_ones(page) if q["holding"] and q["flags"][0] == "0"]
    with_two = [q for q in judged_ones(page) if q["holding"] == 2]
    for link, expected in [
        ("attention=overlooked", overlooked),
        ("attention=overlooked&verdict=wrong", [q for q in overlooked if not q["match"]]),
        ("passages=without", [q for q in judged_ones(page) if not q["holding"]]),
        ("holding=2-2", with_two),
        ("verdict=wrong", [q for q in judged_ones(page) if not q["match"]]),
    ]:
        assert expected
        browser.open(run.parent / "page.html", link)
        assert browser.ask(STATUS).startswith(f"{len(expected)} of 60 questions.")
        assert browser.ask(TITLES) == [question["question"] for question in expected[:10]]
    browser.open(run.parent / "page.html")
    browser.ask("document.querySelector('a[href=\"#holding=2-2\"]').dispatchEvent("
                "new MouseEvent('click', {bubbles: true, cancelable: true}))")  # fmt: skip
    browser.wait_for(f"{STATUS}.startsWith('{len(with_two)} of 60')")


@in_browser
def test_pages_and_more_passages(run, browser):
    report(run)
    browser.open(run.parent / "page.html")
    where = "document.getElementById('where').textContent"
    assert browser.ask(where) == "page 1 of 6"
    browser.ask("document.getElementById('next').click()")
    browser.wait_for(f"{where} === 'page 2 of 6'")
    first = "document.querySelector('.card')"
    assert "number 10?" in browser.ask(TITLES)[0]
    assert browser.ask(f"{first}.querySelectorAll('li').length") in (3, 4)  # or the first answer
    browser.ask(f"{first}.querySelector('button').click()")
    assert browser.ask(f"{first}.querySelectorAll('li').length") >= 10
    assert "of 12 passages are on this page" in browser.ask(f"{first}.textContent")
    assert browser.ask(f"{first}.querySelectorAll('.strip i').length") == N_PASSAGES
