"""A run as one page for a browser: curves, recall, and what the reader attended to.

    python -m src.tools.report checkpoint/my_experiment
    python -m src.tools.report checkpoint/my_test --retrieved retrieved_round1.json

The page is one file that needs no network. Its numbers are of all questions; the questions that it
holds to look at are bounded by `--max_questions` and `--passages_shown`, and it says how many they
are. What a run has not written is named where it would stand. Numbers come from `survey.py`,
pictures from `charts.py`; `page.html` is the page's frame, style and script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.data.examples import load_data
from src.data.files import claim_output, write_whole
from src.evaluation.answers import ANSWERS, SCORES, read_answers
from src.options import report_parser
from src.runtime.errors import InputError, reports_input_errors, shorten
from src.tools.report.charts import Group, Line, bar_chart, legend, line_chart, number
from src.tools.report.survey import (
    Ranking,
    Survey,
    Verdict,
    curve_places,
    group_verdicts,
    percent,
    rank_answers,
    read_metrics,
    short_names,
    survey,
    thin,
    wilson,
)

METRICS, OPTIONS = "metrics.jsonl", "options.json"
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
# The sections


def training_section(folder: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """The curves of a run, and its headline: (name, number, note)."""
    path = folder / METRICS
    if not path.exists():
        return _missing(f"There is no {METRICS} in this folder: train_reader.py and "
                        "train_retriever.py write one."), []  # fmt: skip
    values, left_out = read_metrics(path)
    if not values:
        return _missing(f"{METRICS} holds no numbers yet."), []
    charts: dict[str, list[str]] = {}  # train/loss and dev/loss share one; avg_top1 and avg_top2
    for name in values:
        charts.setdefault(re.sub(r"_top\d+$", "_top", name.split("/")[-1]), []).append(name)
    known = [key for key in _TITLES if key in charts]
    figures = []
    for key in known + [key for key in charts if key not in known]:
        title, unit = _TITLES.get(key, (key, key))
        lines, note = [], ""
        for name in charts[key]:
            curve = thin(values[name])
            lines.append(Line(name, curve.points, curve.band))
            if curve.size > 1:
                note = (
                    f"Each point of {name} is the mean of {curve.size} updates; the band runs from "
                    "the lowest of them to the highest."
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
    head = ["passages", "n", *(f"@{k}" for k in ks)]
    table = f"<figure><h3>Recall@k, in percent</h3>{_table(head, rows)}</figure>"
    figure = _figure("Recall by number of passages", legend(names) + chart, note)
    return f'<div class="charts">{figure}{table}</div>'


def headline(found: Survey) -> list[tuple[str, str, str]]:
    """(name, number, note) of the largest numbers on the page."""
    verdicts = found.verdicts
    without = len(found.data) - len(verdicts)
    note = f"{without:,} without right answers count nowhere else" if without else ""
    tiles = [("questions", f"{len(found.data):,}", note)]
    if verdicts and found.answered:
        matches = percent([v.match for v in verdicts])
        low, high = (100 * end for end in wilson(matches / 100, len(verdicts)))
        interval = f"95 % interval {low:.1f} to {high:.1f}"
        tiles.append(("exact match, %", f"{matches:.1f}", interval))
        tiles.append(("F1, %", f"{percent([v.overlap for v in verdicts]):.1f}", ""))
    if found.by_score:
        share = percent([v.holding > 0 for v in verdicts])
        tiles.append(("answer in a passage read, %", f"{share:.1f}", "recall of what was read"))
        top = percent([v.top_holds for v in verdicts])
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
        cells = [_link(link, f"{len(group):,}") + f'<br><span class="quiet">{share:.1f} %</span>']
        if found.answered:
            right = sum(verdict.match for verdict in group)
            cells.append(_link(f"{link}&verdict=right", f"{right:,}"))
            cells.append(_link(f"{link}&verdict=wrong", f"{len(group) - right:,}"))
            cells.append(f"{100 * right / len(group):.1f}" if group else "\N{EN DASH}")
        lines.append([name, *cells])
    head = ["an answer is", "questions"] + (["right", "wrong", "EM, %"] if found.answered else [])
    return f"<figure><h3>What was there to find</h3>{_table(head, lines)}</figure>"


def _group(ends: tuple[int, int | None], group: Sequence[Verdict], key: str) -> Group:
    low, high = ends
    label = f"{low}\N{EN DASH}{high}" if high != low else str(low)
    label = f"{low}+" if high is None else label
    means = (percent([v.match for v in group]), percent([v.overlap for v in group]))
    return Group(label, len(group), means, f"#{key}={low}-{'' if high is None else high}")


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
            groups = [
                _group(ends, group, key)
                for ends, group in group_verdicts(found.verdicts, value, bins)
            ]
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
    claim_output(output, "--output")

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
        answers_part = answers_section(found)
    else:
        answers_part = _missing(
            f"There is neither {ANSWERS} nor {SCORES} in this folder: test_reader.py writes them, "
            "with --write_results and --write_crossattention_scores."
        )
    sections = [("Answers", answers_part), ("Recall", recall_section(compared))]
    sections.insert(len(sections) if found else 0, ("Training", curves))
    summary = [
        f"{name} {run_options[name]}"
        for name in ("model_path", "train_data", "eval_data", "n_context")
        if name in run_options
    ]
    settings = [[escape(key), escape(str(value))] for key, value in run_options.items()]
    parts = {
        "title": escape(folder.resolve().name),
        "tiles": _tiles(tiles),
        "summary": escape(" \N{MIDDLE DOT} ".join(summary)),
        "sections": "".join(f"<h2>{name}</h2>{content}" for name, content in sections),
        "sources": _sources(folder, found, how, options.retrieved),
        "settings": _table(["option", "value"], settings)
        if settings
        else _missing(f"There is no {OPTIONS} in this folder."),
    }
    about = {
        "total": len(found.data) if found else 0,
        "answered": bool(found and found.answered),
        "scored": bool(found and found.scored),
        "rankings": found.compared if found else [],
    }
    records = found.records if found else []
    write_whole(Path(output), [page(parts, records, about)])
    held = f"; it holds {len(records):,} of {about['total']:,} questions" if found else ""
    print(f"{output}: {Path(output).stat().st_size / 1e6:.1f} MB{held}")
