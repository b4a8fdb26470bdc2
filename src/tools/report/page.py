"""A run as one offline page for a browser: curves, recall, answers and their passages.

    python -m src.tools.report checkpoint/my_test --retrieved retrieved_round1.json

Numbers come from `survey.py`, charts from `charts.py`; `page.html` is the frame, style and script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.data.examples import load_data
from src.data.outputs import claim_output, write_whole
from src.evaluation.answers import ANSWERS, SCORES, read_answers
from src.evaluation.rankings import Ranking, rank_answers
from src.options import report_parser
from src.runtime.errors import InputError, reports_input_errors, shorten
from src.tools.report import survey
from src.tools.report.charts import Group, Line, bar_chart, legend, line_chart, number
from src.tools.report.survey import Survey, percent

METRICS, OPTIONS = "metrics.jsonl", "options.json"
_DASH = "\N{EN DASH}"
_TITLES = {
    "loss": ("Loss", "loss"),
    "exact_match": ("Exact match on the dev set", "exact match (%)"),
    "f1": ("F1 on the dev set", "F1 (%)"),
    "lr": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
    "inversions": ("Pairs ordered differently from the reader", "pairs per question"),
    "avg_top": ("Retriever's first k among the reader's first k", "share"),
    "idx_top": ("Passages needed to cover the reader's first k", "passages"),
}
Tile = tuple[str, str, str]  # of the headline: name, number, note


def training_section(folder: Path) -> tuple[str, list[Tile]]:
    """The curves of a run, and its headline."""
    path = folder / METRICS
    if not path.exists():
        return _missing(f"There is no {METRICS} in this folder: training writes it."), []
    values = survey.read_metrics(path)
    if not values:
        return _missing(f"{METRICS} contains no numbers yet."), []
    charts: dict[str, list[str]] = {}  # train/loss and dev/loss share one; avg_top1 and avg_top2
    for name in values:
        charts.setdefault(re.sub(r"_top\d+$", "_top", name.split("/")[-1]), []).append(name)
    drawn = ""
    for key in sorted(charts, key=lambda key: [*_TITLES, key].index(key)):
        title, unit = _TITLES.get(key, (key, key))
        thinned = [survey.thin(name, values[name]) for name in charts[key]]
        lines = [line for line, _ in thinned]
        notes = [f"Points of {c.name} are means of {n} updates." for c, n in thinned if n > 1]
        chart = line_chart(lines, "updates", unit, percent=unit.endswith("(%)"))
        drawn += _figure(title, legend(charts[key]) + chart, " ".join(notes))
    tiles = [("updates", f"{max(step for v in values.values() for step, _ in v):,}", "")]
    for name, best in ("best dev exact match", max), ("lowest dev loss", min):
        if points := values.get("dev/" + "_".join(name.split()[2:])):
            step, value = best(points, key=lambda point: point[1])
            tiles.append((name, number(value), f"after update {step:,}"))
    return f'<div class="charts">{drawn}</div>', tiles


def _ks(depth: int) -> list[int]:
    """The k of a recall curve, evenly spaced on a logarithmic scale."""
    return sorted({round(depth ** (part / 60)) for part in range(61)} | {min(5, depth)})


def recall_section(rankings: Sequence[Ranking]) -> str:
    if not rankings:
        return _missing("No file with passages and answers was given: name some with --retrieved.")
    lines, rows = [], []
    ks = [k for k in (1, 5, 20, 100) if k <= max(ranking.depth for ranking in rankings)]
    for r in rankings:
        lines.append(Line(r.name, [(k, r.recall(k)) for k in _ks(r.depth)]))
        cells = [f"{r.recall(k):.1f}" if k <= r.depth else _DASH for k in ks]
        rows.append([escape(r.name), f"{r.n_judged:,}", *cells])
    chart = line_chart(lines, "k: passages from the top", "recall@k (%)", log_x=True, percent=True)
    note = "Share of the questions with gold answers that have one in their first k passages."
    if len({ranking.questions for ranking in rankings}) > 1:
        note += " The files do not ask the same questions: compare with care."
    drawn = legend([ranking.name for ranking in rankings]) + chart
    table = _table(["passages", "n", *(f"@{k}" for k in ks)], rows)
    figures = _figure("Recall by number of passages", drawn, note)
    return f'<div class="charts">{figures}{_figure("Recall@k, in percent", table)}</div>'


def headline(found: Survey) -> list[Tile]:
    """The most important numbers."""
    verdicts = found.verdicts
    without = len(found.data) - len(verdicts)
    note = f"{without:,} without gold answers count nowhere else" if without else ""
    tiles = [("questions", f"{len(found.data):,}", note)]
    if verdicts and found.answered:
        matches = found.mean("match")
        low, high = (100 * end for end in survey.wilson(matches / 100, len(verdicts)))
        interval = f"95 % interval {low:.1f} to {high:.1f}"
        tiles.append(("exact match, %", f"{matches:.1f}", interval))
        tiles.append(("F1, %", f"{found.mean('f1'):.1f}", ""))
    if found.by_score.depth:
        share = percent([v["holding"] > 0 for v in verdicts])
        tiles.append(("answer in a passage read, %", f"{share:.1f}", "recall of what was read"))
        order = "by the reader's score" if found.scored else "by the data's score or order"
        tiles.append(("answer in the top passage, %", f"{found.mean('top'):.1f}", order))
    return tiles


def outcome_table(found: Survey) -> str:
    """Answers judged by where the passages contain one; counts link to the questions."""
    verdicts = found.verdicts
    with_answer = [v for v in verdicts if v["holding"]]
    rows = [("in a passage read", "passages=with", with_answer)]
    if found.scored:
        top, others = ([v for v in with_answer if v["top"] is is_top] for is_top in (True, False))
        rows = [("in the passage attended to most", "attention=top", top)]
        rows.append(("overlooked: only in other passages", "attention=overlooked", others))
    without = [v for v in verdicts if not v["holding"]]
    rows.append(("in none of the passages read", "passages=without", without))
    lines = []
    for name, link, group in rows:
        share = 100 * len(group) / len(verdicts)
        cells = [_link(link, f"{len(group):,}") + f'<br><span class="quiet">{share:.1f} %</span>']
        if found.answered:
            right = sum(verdict["match"] for verdict in group)
            cells.append(_link(f"{link}&verdict=right", f"{right:,}"))
            cells.append(_link(f"{link}&verdict=wrong", f"{len(group) - right:,}"))
            cells.append(f"{100 * right / len(group):.1f}" if group else _DASH)
        lines.append([name, *cells])
    head = ["an answer is", "questions"] + (["right", "wrong", "EM, %"] if found.answered else [])
    return _figure("What was there to find", _table(head, lines))


def verdict_chart(
    title: str, x_name: str, key: str, starts: Sequence[int], verdicts: Sequence[dict]
) -> str:
    """Exact match and F1 by a number in the verdicts, in bins that begin at `starts`."""
    groups = []
    for low, end in zip(starts, [*starts[1:], None], strict=True):
        high = "" if end is None else end - 1
        label = f"{low}+" if end is None else f"{low}{_DASH}{high}" if high != low else str(low)
        group = [v for v in verdicts if low <= v[key] and (not end or v[key] < end)]
        if group:
            means = percent([v["match"] for v in group]), percent([v["f1"] for v in group])
            groups.append(Group(label, len(group), means, f"#{key}={low}-{high}"))
    names = ["exact match", "F1"]
    drawn = legend(names) + bar_chart(groups, names, x_name, "percent")
    return _figure(title, drawn, "Click a bar to see its questions.")


def answers_section(found: Survey | None) -> str:
    if not found:
        return _missing(
            f"There is neither {ANSWERS} nor {SCORES} in this folder: test_reader.py writes them, "
            "with --write_results and --write_crossattention_scores."
        )
    if not found.verdicts:
        return _missing("No question has gold answers: there is nothing to judge.")
    drawn = outcome_table(found) if found.by_score.depth else ""
    if not found.answered:
        note = f"There is no {ANSWERS} in this folder: test_reader.py --write_results writes it."
        return f'<div class="charts">{drawn}</div>{_missing(note)}'
    if found.by_score.depth:
        title, name = "By passages with an answer", "passages read that contain an answer"
        drawn += verdict_chart(title, name, "holding", [0, 1, 2, 3, 5, 10, 20, 50], found.verdicts)
    title, name = "By answer length", "words in the shortest gold answer"
    drawn += verdict_chart(title, name, "length", [0, 1, 2, 3, 4, 5, 6, 10], found.verdicts)
    return f'<div class="charts">{drawn}</div>'


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _link(state: str, text: str) -> str:
    return f'<a href="#{escape(state)}">{text}</a>'


def _figure(title: str, drawn: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{drawn}{caption}</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML, those of the first column headers."""
    lines = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    for name, *cells in rows:
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines += f'</tr><tr><th scope="row">{name}</th>{row}'
    return f'<div class="scroll"><table><tr>{lines}</tr></table></div>'


def _tiles(tiles: Sequence[Tile]) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        + (f'<dd class="quiet">{escape(note)}</dd>' if note else "")
        + "</div>"
        for name, value, note in tiles
    )


def page(parts: dict[str, str], about: dict[str, Any]) -> str:
    """The page's HTML. `parts` are HTML; `about` is data for the script, which shows it as text."""
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", frame, re.DOTALL)[1]
    # The browser runs the frame's own script and nothing else, and loads nothing.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(about, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {**parts, "script_digest": digest, "data": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def read_run_options(folder: Path) -> dict[str, Any]:
    """The options of a run; {} if it wrote none."""
    path = folder / OPTIONS
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes())["options"])
    except (OSError, ValueError, KeyError, TypeError):
        problem = "not the options that a run writes; remove the file"
        raise InputError(f"{path}: {problem}") from None


def find_data(folder: Path, given: str | None, run_options: dict[str, Any]) -> str:
    """The questions' file; empty when nothing was answered."""
    if given or (folder / SCORES).exists():
        return given or str(folder / SCORES)
    if not (folder / ANSWERS).exists():
        return ""
    named = run_options.get("eval_data")
    if isinstance(named, str) and Path(named).is_file():
        return named
    where = f"the file of its questions, {shorten(named)}, is not here" if named else ""
    raise InputError(
        f"{folder / ANSWERS}: {where or 'nothing says which questions it answers'}; give --data"
    )


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = report_parser().parse_args(arguments)
    folder = Path(options.run)
    remedy = "give a run's (--checkpoint_dir/--name)"
    if not folder.is_dir():
        raise InputError(f"{options.run}: no such folder; {remedy}")
    files = [folder / name for name in (METRICS, ANSWERS, SCORES) if (folder / name).exists()]
    if not files:
        wanted = f"neither {METRICS} nor {ANSWERS} nor {SCORES} is in this folder"
        raise InputError(f"{options.run}: {wanted}; {remedy}")
    output = Path(options.output or folder / "report.html")
    claim_output(str(output), "--output")

    run_options = read_run_options(folder)
    path = find_data(folder, options.data, run_options)
    curves, tiles = training_section(folder)
    names = survey.short_names(options.retrieved)
    rankings = [rank_answers(*pair) for pair in zip(options.retrieved, names, strict=True)]
    compared, found = list(rankings), None
    about = {"total": 0, "answered": False, "scored": False, "rankings": [], "questions": []}
    if path:
        data, answers = load_data(path), folder / ANSWERS
        given = read_answers(str(answers), data) if answers.exists() else None
        n_context = run_options.get("n_context") if given is not None else None
        n_context = n_context if isinstance(n_context, int) else None
        limits = options.max_questions, options.passages_shown
        found = survey.survey(data, given, n_context, rankings, *limits)
        tiles = headline(found) + tiles
        if found.by_score.depth and (found.scored or not rankings):
            compared += [found.as_found] if found.scored and not rankings else []
            compared.append(found.by_score)
        about = {"total": len(data), "answered": found.answered, "scored": found.scored}
        about |= {"rankings": found.compared, "questions": found.records}

    sections = [("Answers", answers_section(found)), ("Recall", recall_section(compared))]
    sections.insert(len(sections) if found else 0, ("Training", curves))
    named = [n for n in ("model_path", "train_data", "eval_data", "n_context") if n in run_options]
    summary = " \N{MIDDLE DOT} ".join(f"{name} {run_options[name]}" for name in named)
    settings = [[escape(key), escape(str(value))] for key, value in run_options.items()]
    no_options = _missing(f"There is no {OPTIONS} in this folder.")
    sources = dict.fromkeys([*map(str, files), *[path] * bool(path), *options.retrieved])
    parts = {
        "title": escape(folder.resolve().name),
        "tiles": _tiles(tiles),
        "summary": escape(summary),
        "sections": "".join(f"<h2>{name}</h2>{content}" for name, content in sections),
        "sources": _table(["files shown"], [[escape(source)] for source in sources]),
        "settings": _table(["option", "value"], settings) if settings else no_options,
    }
    write_whole(output, [page(parts, about)])
    held = f"; it holds {len(about['questions']):,} of {about['total']:,} questions"
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB{held if found else ''}")
