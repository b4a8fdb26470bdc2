"""A run as one page for a browser: curves, recall, and what the reader attended to.

    python -m src.report checkpoint/my_experiment
    python -m src.report checkpoint/my_test --retrieved retrieved_bm25.json retrieved_round1.json

The page is one file that needs no network. Its numbers are of all questions; the questions that it
holds to look at are bounded by `--max_questions` and `--passages_shown`, and it says how many they
are. What a run has not written is named where it would stand. `src/report.html` is the page's frame,
style and script; pictures come from `src/charts.py`. No torch here, so that the page can be made
anywhere.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from src.charts import Group, Line, bar_chart, legend, line_chart, number
from src.errors import InputError, reports_input_errors, shorten
from src.evaluation import (
    ANSWERS,
    SCORES,
    answer_spans,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
    read_answers,
)
from src.examples import Example, Examples, check_place, load_data, read_example, write_whole
from src.options import report_parser

METRICS, OPTIONS = "metrics.jsonl", "options.json"
MOST_POINTS = 200  # of a curve; more updates than that are averaged in groups
_LONGEST_TEXT = 2000  # characters of a passage that are shown from its beginning
_MOST_ANSWERS = 10  # right answers of a question that are shown
# How questions are grouped in the charts: from, to.
_COUNTS = [(0, 0), (1, 1), (2, 2), (3, 4), (5, 9), (10, 19), (20, 49), (50, None)]
_LENGTHS = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 9), (10, None)]
_TITLES = {
    "loss": ("Loss", "loss"),
    "exact_match": ("Exact match on the dev set", "exact match (%)"),
    "f1": ("F1 on the dev set", "F1 (%)"),
    "lr": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
    "inversions": ("Pairs in another order than the reader's", "pairs a question"),
    "avg_top": ("The retriever's first k among the reader's first k", "share"),
    "idx_top": ("Passages that hold all of the reader's first k", "passages"),
}


# ----------------------------------------------------------------------------------------------
# What a training run wrote


def read_metrics(path: Path) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """The values of a `metrics.jsonl` by name, as (step, value) in the file's order, and how many
    were left out because they are not finite. A last line that was cut off is passed over.

    Errors: `InputError` when any other line is not a step with numbers.
    """
    values: dict[str, list[tuple[int, float]]] = {}
    left_out = 0
    try:
        with open(path, encoding="utf-8") as file:
            for place, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    step = int(row.pop("step"))
                    for name, value in row.items():
                        if math.isfinite(value):
                            values.setdefault(name, []).append((step, float(value)))
                        else:
                            left_out += 1
                except (ValueError, TypeError, KeyError, AttributeError):
                    if not line.endswith("\n"):
                        break  # of a run that was killed while it wrote, or writes just now
                    raise InputError(
                        f"{path}, line {place}: must be a step with its numbers, such as "
                        f'{{"step": 1, "train/loss": 2.5}}, not {shorten(line.strip(), 40)}; '
                        "remove the line"
                    ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; remove the lines that are not") from None
    return values, left_out


def thin(name: str, points: Sequence[tuple[int, float]]) -> tuple[Line, int]:
    """A curve of at most `MOST_POINTS` points, each the mean of as many values as is also returned,
    at the step of their last; its band runs from the lowest of them to the highest."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size == 1:
        return Line(name, points), 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[value for _, value in part] for part in parts]
    means = [sum(part) / len(part) for part in values]
    steps = [part[-1][0] for part in parts]
    band = [(min(part), max(part)) for part in values]
    return Line(name, list(zip(steps, means, strict=True)), band), size


def training_section(folder: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """The curves of a run, and its headline: (name, number, note)."""
    path = folder / METRICS
    if not path.exists():
        return _missing(f"There is no {METRICS} in this folder: train_reader.py and "
                        "train_retriever.py write one."), []  # fmt: skip
    values, left_out = read_metrics(path)
    if not values:
        return _missing(f"{METRICS} holds no numbers yet."), []
    charts: dict[str, list[str]] = {}
    for (
        name
    ) in values:  # train/loss and dev/loss share a chart, as do dev/avg_top1 and dev/avg_top2
        charts.setdefault(re.sub(r"\d+$", "", name.split("/")[-1]), []).append(name)
    known = [key for key in _TITLES if key in charts]
    figures = []
    for key in known + [key for key in charts if key not in known]:
        title, unit = _TITLES.get(key, (key, key))
        lines, note = [], ""
        for name in charts[key]:
            line, size = thin(name, values[name])
            lines.append(line)
            if size > 1:
                note = (
                    f"Each point of {name} is the mean of {size} updates; the band runs from the "
                    "lowest of them to the highest."
                )
        chart = line_chart(lines, "updates", unit, percent=unit.endswith("(%)"))
        figures.append(_figure(title, legend(charts[key]) + chart, note))
    if left_out:
        figures.append(_missing(f"{left_out:,} values that are not finite are left out."))
    tiles = [("updates", f"{max(step for v in values.values() for step, _ in v):,}", "")]
    for name, label, best in [
        ("dev/exact_match", "best dev exact match", max),
        ("dev/loss", "lowest dev loss", min),
    ]:
        if name in values:
            step, value = best(values[name], key=lambda point: point[1])
            tiles.append((label, number(value), f"after update {step:,}"))
    return f'<div class="charts">{"".join(figures)}</div>', tiles


# ----------------------------------------------------------------------------------------------
# Where files of passages have their answers


class Ranking(NamedTuple):
    """Where questions have the first of their passages with an answer.

    `firsts` has, for each question, that passage's place from 1, 0 if no passage has one, or None
    if nobody can say because the question has no right answers. `questions` tells whether two
    files ask the same.
    """

    name: str
    firsts: list[int | None]
    depth: int
    questions: str

    def judged(self) -> list[int]:
        return [first for first in self.firsts if first is not None]

    def recall(self, k: int) -> float:
        """In percent, over the questions with right answers."""
        judged = self.judged()
        return 100 * sum(0 < first <= k for first in judged) / len(judged)


def rank_answers(path: str, name: str) -> Ranking:
    """Read a file of questions with passages. Errors: `InputError` when it has no passages, or no
    answers to look for."""
    data = load_data(path)
    firsts: list[int | None] = []
    depth, digest = 0, hashlib.sha256()
    for index in range(len(data)):
        example = read_example(data, index)
        digest.update(_identity(example))
        if example.answers:
            texts = (passage.text for passage in example.passages)
            firsts.append(_first(has_answer(example.answers, text) for text in texts))
            depth = max(depth, len(example.passages))
        else:
            firsts.append(None)
    if depth == 0:
        raise InputError(
            f"{path}: no question in this file has both answers and passages (ctxs); give what "
            "passage_retrieval.py wrote of questions with answers"
        )
    return Ranking(name, firsts, depth, digest.hexdigest())


def _identity(example: Example) -> bytes:
    return json.dumps([example.id, example.question]).encode()


def _first(flags: Iterable[bool]) -> int:
    return next((place for place, flag in enumerate(flags, start=1) if flag), 0)


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without folder and ending where that tells them apart, else the paths."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def curve_places(depth: int) -> list[int]:
    """The k of a recall curve: every one at first, then evenly on a scale that counts in powers."""
    return sorted({round(depth ** (part / 60)) for part in range(61)} | {min(5, depth)})


def recall_section(rankings: Sequence[Ranking]) -> str:
    if not rankings:
        return _missing("No file with passages and answers was given: name some with --retrieved.")
    lines = [
        Line(ranking.name, [(k, ranking.recall(k)) for k in curve_places(ranking.depth)])
        for ranking in rankings
    ]
    chart = line_chart(lines, "k: passages from the top", "recall@k (%)", log_x=True, percent=True)
    names = [ranking.name for ranking in rankings]
    note = "Share of the questions with right answers that have one in their first k passages."
    if len({ranking.questions for ranking in rankings}) > 1:
        note += " The files do not ask the same questions: compare with care."
    ks = [k for k in (1, 5, 20, 100) if k <= max(ranking.depth for ranking in rankings)]
    rows = []
    for ranking in rankings:
        cells = [f"{ranking.recall(k):.1f}" if k <= ranking.depth else "\N{EN DASH}" for k in ks]
        cells = [f"{len(ranking.judged()):,}", *cells]
        rows.append([escape(ranking.name), *cells])
    head = ["passages", "questions", *(f"recall@{k}" for k in ks)]
    table = f"<figure><h3>In percent</h3>{_table(head, rows)}</figure>"
    figure = _figure("Recall", legend(names) + chart, note)
    return f'<div class="charts wide">{figure}{table}</div>'


# ----------------------------------------------------------------------------------------------
# Questions, answers, passages


class Verdict(NamedTuple):
    """What there is to say of a question with right answers. `match` and `overlap` are None when
    no answer was given; `holding` counts the passages with an answer among those that were read."""

    match: bool | None
    overlap: float | None
    length: int
    holding: int
    top_holds: bool


@dataclasses.dataclass
class Survey:
    """All questions judged, and records of those that the page holds.

    `by_score` and `as_found` are the rankings of the data's own passages, None without any.
    """

    data: Examples
    answered: bool
    scored: bool
    verdicts: list[Verdict]
    records: list[dict[str, Any]]
    by_score: Ranking | None
    as_found: Ranking | None


def survey(
    data: Examples,
    answers: list[str] | None,
    n_context: int | None,
    rankings: Sequence[Ranking],
    max_questions: int,
    passages_shown: int,
) -> Survey:
    """Judge every question of a data file, one after the other.

    Args:
        answers: those given, in the data's order.
        n_context: how many passages were read, where it is known; the reader's own scores
            (dataset_wscores.json) tell it better.
        rankings: other files; those of the same questions are told of in the records.
    """
    scored = Path(data.path).name == SCORES
    shown = {place * len(data) // max_questions for place in range(max_questions)}
    shown = shown if max_questions < len(data) else set(range(len(data)))
    verdicts, records = [], []
    by_score: list[int | None] = []
    as_found: list[int | None] = []
    depth, digest = 0, hashlib.sha256()
    for index in range(len(data)):
        example = read_example(data, index)
        passages = example.passages
        digest.update(_identity(example))
        depth = max(depth, len(passages))
        n_read = len(passages) if n_context is None else min(n_context, len(passages))
        if scored:
            n_read = sum(passage.score is not None for passage in passages)
        right = example.answers
        flags = [bool(right) and has_answer(right, passage.text) for passage in passages]
        given = None if answers is None else answers[index]
        verdict = None
        if right:
            judged = given is not None
            verdict = Verdict(
                match=exact_match(given, right) if judged else None,
                overlap=f1(given, right) if judged else None,
                length=min(len(normalize_answer(answer).split()) for answer in right),
                holding=sum(flags[:n_read]),
                top_holds=any(flags[: min(1, n_read)]),
            )
            verdicts.append(verdict)
        by_score.append(_first(flags) if right else None)
        places = [p.place for p, flag in zip(passages, flags, strict=True) if flag]
        as_found.append(min(places, default=-1) + 1 if right else None)
        if index in shown:
            record = _record(example, given, verdict, flags, n_read, passages_shown)
            record["first"] = [r.firsts[index] if index < len(r.firsts) else 0 for r in rankings]
            records.append(record)
    same = [ranking.questions == digest.hexdigest() for ranking in rankings]
    for record in records:  # of other questions nothing can be said
        record["first"] = [first for first, s in zip(record["first"], same, strict=True) if s]
    name = short_names([data.path])[0]
    has_both = depth and verdicts
    return Survey(
        data=data,
        answered=answers is not None,
        scored=scored,
        verdicts=verdicts,
        records=records,
        by_score=Ranking(f"{name}, by the reader's attention" if scored else name, by_score, depth,
                         digest.hexdigest()) if has_both else None,
        as_found=Ranking(f"{name}, as found" if scored else name, as_found, depth,
                         digest.hexdigest()) if has_both else None,
    )  # fmt: skip


def _record(
    example: Example,
    given: str | None,
    verdict: Verdict | None,
    flags: list[bool],
    n_read: int,
    passages_shown: int,
) -> dict[str, Any]:
    """A question as the page's script reads it (see `src/report.html`)."""
    places = list(range(min(passages_shown, len(flags))))
    if (first := _first(flags)) > passages_shown:
        places.append(first - 1)
    passages = []
    for place in places:
        passage = example.passages[place]
        spans = answer_spans(example.answers, passage.text) if flags[place] else []
        parts, hidden = excerpt(passage.text, spans)
        passages.append(
            {"k": place, "found": passage.place + 1, "title": passage.title, "parts": parts}
            | ({"hidden": hidden} if hidden else {})
        )
    scores = [None if p.score is None else float(f"{p.score:.4g}") for p in example.passages]
    return {
        "id": example.id,
        "question": example.question,
        "given": given,
        "right": example.answers[:_MOST_ANSWERS],
        "more": max(0, len(example.answers) - _MOST_ANSWERS),
        "match": verdict and verdict.match,
        "f1": None if verdict is None or verdict.overlap is None else round(verdict.overlap, 4),
        "length": verdict and verdict.length,
        "holding": verdict and verdict.holding,
        "read": n_read,
        "scores": scores,
        "flags": "".join("1" if flag else "0" for flag in flags),
        "passages": passages,
    }


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
    """A passage for the page: pieces of its text, of which every second is a marked answer, and how
    many characters are left out. A long text is cut, but keeps its first answer."""
    length = len(text)
    kept = [(0, length if length <= _LONGEST_TEXT else _LONGEST_TEXT)]
    if spans and spans[0][0] >= kept[0][1]:
        kept.append((max(kept[0][1], spans[0][0] - 200), min(length, spans[0][1] + 300)))
    parts, before, hidden = [""], 0, length
    for start, end in kept:
        end = max([end, *(right for left, right in spans if left < end < right)])  # not through one
        hidden -= end - start
        parts[-1] += " [\N{HORIZONTAL ELLIPSIS}] " if start > before else ""
        before = start
        for left, right in spans:
            if start <= left < end:
                parts[-1] += text[before:left]
                parts += [text[left:right], ""]
                before = right
        parts[-1] += text[before:end]
        before = end
    return parts, hidden


# ----------------------------------------------------------------------------------------------
# What the answers come to


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent questions, both in [0, 1] (Wilson, 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def headline(found: Survey) -> list[tuple[str, str, str]]:
    """(name, number, note) of the largest numbers on the page."""
    verdicts = found.verdicts
    without = len(found.data) - len(verdicts)
    note = f"{without:,} without right answers count nowhere else" if without else ""
    tiles = [("questions", f"{len(found.data):,}", note)]
    if verdicts and found.answered:
        matches = _percent([v.match for v in verdicts])
        low, high = (100 * end for end in wilson(matches / 100, len(verdicts)))
        interval = f"95 % interval {low:.1f} to {high:.1f}"
        tiles.append(("exact match, %", f"{matches:.1f}", interval))
        tiles.append(("F1, %", f"{_percent([v.overlap for v in verdicts]):.1f}", ""))
    if found.by_score:
        share = _percent([v.holding > 0 for v in verdicts])
        tiles.append(("answer in a passage read, %", f"{share:.1f}", "recall of what was read"))
        top = _percent([v.top_holds for v in verdicts])
        which = "by the reader's score" if found.scored else "by the data's score or order"
        tiles.append(("answer in the top passage, %", f"{top:.1f}", which))
    return tiles


def outcome_table(found: Survey) -> str:
    """How often there was an answer to find, and what came of it; counts lead to the questions."""
    rows: list[tuple[str, str, Callable[[Verdict], bool]]]
    rows = [("in none of the passages read", "passages=without", lambda v: not v.holding)]
    if found.scored:
        rows = [
            ("in the passage attended to most", "attention=top", lambda v: v.top_holds),
            ("only in others: the reader looked past it", "attention=past",
             lambda v: bool(v.holding) and not v.top_holds),
        ] + rows  # fmt: skip
    else:
        rows = [("in a passage read", "passages=with", lambda v: bool(v.holding)), *rows]
    lines = []
    for name, link, belongs in rows:
        group = [verdict for verdict in found.verdicts if belongs(verdict)]
        share = 100 * len(group) / len(found.verdicts)
        cells = [_link(link, f"{len(group):,}") + f' <span class="quiet">{share:.1f} %</span>']
        if found.answered:
            right = sum(verdict.match for verdict in group)
            cells.append(_link(f"{link}&verdict=right", f"{right:,}"))
            cells.append(_link(f"{link}&verdict=wrong", f"{len(group) - right:,}"))
            cells.append(f"{100 * right / len(group):.1f}" if group else "\N{EN DASH}")
        lines.append([name, *cells])
    head = ["an answer is", "questions"] + (["right", "wrong", "EM, %"] if found.answered else [])
    return f"<figure><h3>What was there to find</h3>{_table(head, lines)}</figure>"


def group_verdicts(
    verdicts: Sequence[Verdict],
    value: Callable[[Verdict], int],
    bins: Sequence[tuple[int, int | None]],
    key: str,
) -> list[Group]:
    """Exact match and F1, in percent, of the questions in each bin that has some."""
    groups = []
    for low, high in bins:
        chosen = [v for v in verdicts if low <= value(v) and (high is None or value(v) <= high)]
        if chosen:
            label = f"{low}\N{EN DASH}{high}" if high != low else str(low)
            means = (_percent([v.match for v in chosen]), _percent([v.overlap for v in chosen]))
            label = f"{low}+" if high is None else label
            link = f"#{key}={low}-{'' if high is None else high}"
            groups.append(Group(label, len(chosen), means, link))
    return groups


def answers_section(found: Survey) -> str:
    if not found.verdicts:
        return _missing("No question has right answers: there is nothing to judge.")
    figures = [outcome_table(found)] if found.by_score else []
    names = ["exact match", "F1"]
    charts = [
        ("By passages with an answer", "passages read that hold an answer",
         lambda v: v.holding, _COUNTS, "holding"),
        ("By answer length", "words in the shortest right answer",
         lambda v: v.length, _LENGTHS, "length"),
    ]  # fmt: skip
    if found.answered:
        for title, x_name, value, bins, key in charts[0 if found.by_score else 1 :]:
            groups = group_verdicts(found.verdicts, value, bins, key)
            chart = bar_chart(groups, names, x_name, "percent")
            figures.append(_figure(title, legend(names) + chart, "A bar leads to its questions."))
    section = f'<div class="charts">{"".join(figures)}</div>'
    if not found.answered:
        section += _missing(f"There is no {ANSWERS} in this folder, so no answer can be judged: "
                            "test_reader.py --write_results writes it.")  # fmt: skip
    return section


# ----------------------------------------------------------------------------------------------
# The page


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _link(state: str, text: str) -> str:
    return f'<a href="#{escape(state)}">{text}</a>'


def _figure(title: str, drawn: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{drawn}{caption}</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML; the first column names the rows."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'


def _tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        + (f'<dd class="quiet">{escape(note)}</dd>' if note else "")
        + "</div>"
        for name, value, note in tiles
    )


def fill(frame: str, parts: dict[str, str]) -> str:
    """Put the parts in the places of a frame that name them: {{name}}."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def page(parts: dict[str, str], records: list[dict], about: dict[str, Any]) -> str:
    """The page's HTML. `parts` are HTML; what the script shows of the questions is escaped as JSON
    in HTML must be, and shown as text."""
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", frame, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps({**about, "questions": records}, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    # The browser runs the frame's own script and nothing else, and loads nothing.
    return fill(frame, {**parts, "script_digest": digest, "data": data})


def read_run_options(folder: Path) -> dict[str, Any]:
    """What a run was started with; {} where it did not say."""
    path = folder / OPTIONS
    if not path.exists():
        return {}
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        options = None
    if not isinstance(options, dict):
        raise InputError(f"{path}: not the options that a run writes; remove the file")
    return options


def find_data(folder: Path, given: str | None, run_options: dict[str, Any]) -> tuple[str, str]:
    """The questions' file and how it was found; two empty strings when nothing was answered."""
    if given:
        return given, "--data"
    if (folder / SCORES).exists():
        return str(folder / SCORES), "in the run's folder"
    if not (folder / ANSWERS).exists():
        return "", ""
    named = run_options.get("eval_data")
    if isinstance(named, str) and Path(named).is_file():
        return named, f"named by {OPTIONS}"
    where = f"the file of its questions, {shorten(named)}, is not here" if named else ""
    raise InputError(
        f"{folder / ANSWERS}: {where or 'nothing says which questions it answers'}; give --data"
    )


def _sources(folder: Path, found: Survey | None, how: str, retrieved: Sequence[str]) -> str:
    rows = []
    for name, what in [
        (METRICS, "training curves"),
        (ANSWERS, "answers given"),
        (SCORES, "the reader's passage scores"),
    ]:
        there = (folder / name).exists()
        rows.append([what, escape(str(folder / name)) if there else "not in the run's folder"])
    if found:
        rows.append(["questions, right answers, passages", f"{escape(found.data.path)} ({how})"])
    rows += [["passages to compare", escape(path)] for path in retrieved]
    return _table(["what", "from"], rows)


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = report_parser().parse_args(arguments)
    folder = Path(options.run)
    if not folder.is_dir():
        raise InputError(f"{options.run}: no such folder; give a run's (--checkpoint_dir/--name)")
    if not any((folder / name).exists() for name in (METRICS, ANSWERS, SCORES)):
        raise InputError(
            f"{options.run}: neither {METRICS} nor {ANSWERS} nor {SCORES} is in this folder; give "
            "a run's (--checkpoint_dir/--name)"
        )
    output = options.output or str(folder / "report.html")
    check_place(output, "--output")

    # What there is
    run_options = read_run_options(folder)
    path, how = find_data(folder, options.data, run_options)
    curves, tiles = training_section(folder)
    names = short_names(options.retrieved)
    rankings = [rank_answers(*pair) for pair in zip(options.retrieved, names, strict=True)]
    found = None
    if path:
        data = load_data(path)
        answers = folder / ANSWERS
        given = read_answers(str(answers), data) if answers.exists() else None
        n_context = run_options.get("n_context")
        n_context = n_context if given is not None and isinstance(n_context, int) else None
        found = survey(
            data, given, n_context, rankings, options.max_questions, options.passages_shown
        )

    # The page
    compared = list(rankings)
    if found and found.by_score and (found.scored or not rankings):
        own = [found.by_score] if rankings or not found.scored else [found.as_found, found.by_score]
        compared += own
    if found:
        tiles = headline(found) + tiles
        same = [
            r.name for r in rankings if found.by_score and r.questions == found.by_score.questions
        ]
        answers_part = answers_section(found)
    else:
        same = []
        answers_part = _missing(
            f"There is neither {ANSWERS} nor {SCORES} in this folder: test_reader.py writes them, "
            "with --write_results and --write_crossattention_scores."
        )
    settings = [[escape(key), escape(str(value))] for key, value in run_options.items()]
    parts = {
        "title": escape(folder.resolve().name),
        "tiles": _tiles(tiles),
        "training": curves,
        "answers": answers_part,
        "recall": recall_section(compared),
        "sources": _sources(folder, found, how, options.retrieved),
        "settings": _table(["option", "value"], settings)
        if settings
        else _missing(f"There is no {OPTIONS} in this folder."),
    }
    about = {
        "total": len(found.data) if found else 0,
        "answered": bool(found and found.answered),
        "scored": bool(found and found.scored),
        "rankings": same,
    }
    records = found.records if found else []
    write_whole(Path(output), [page(parts, records, about)])
    held = f"; it holds {len(records):,} of {about['total']:,} questions" if found else ""
    print(f"{output}: {Path(output).stat().st_size / 1e6:.1f} MB{held}")


if __name__ == "__main__":
    main()
