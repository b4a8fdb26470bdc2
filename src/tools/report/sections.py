"""The sections of the page about a run, as HTML."""

import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from src.evaluation import calibration, runs
from src.evaluation.answers import ANSWERS, SCORES
from src.evaluation.calibration import percent
from src.evaluation.rankings import Ranking
from src.evaluation.runs import METRICS
from src.tools import targets
from src.tools.frame import figure, link, missing, table
from src.tools.report.charts import Group, bar_chart, line_chart, number
from src.tools.report.survey import Survey

_DASH = "\N{EN DASH}"
_TITLES = {  # with what to look for
    "loss": ("Loss: overfitting where dev rises while train falls", "loss"),
    "exact_match": ("Exact match on dev: train longer if it still rises", "exact match (%)"),
    "f1": ("F1 on dev: should rise with exact match", "F1 (%)"),
    "recall@": ("Recall on dev: train longer if it still rises", "recall@k"),
    "lr": ("Learning rate: is the schedule the one you meant?", "learning rate"),
    "grad_norm": ("Gradient norm before clipping: spikes mean trouble", "norm"),
    "inversions": ("Pairs ordered differently from the reader: should fall", "pairs per question"),
    "avg_top": ("Retriever's first k among the reader's first k: should rise", "share"),
    "idx_top": ("Passages needed to cover the reader's first k: should fall", "passages"),
}
Tile = tuple[str, str, str]  # of the headline: name, number, note


def _charts(*figures: str) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def training_section(folder: Path) -> tuple[str, list[Tile]]:
    """The curves of a run, and its headline; nothing of a run that did not train."""
    path = folder / METRICS
    if not path.exists():
        return "", []
    values = runs.read_metrics(path)
    if not values:
        return missing(f"{METRICS} contains no numbers yet."), []
    charts: dict[str, list[str]] = {}  # train/loss and dev/loss share one; avg_top1 and avg_top2
    for name in values:
        charts.setdefault(re.sub(r"(_top|@)\d+$", r"\1", name.split("/")[-1]), []).append(name)
    drawn = []
    for key in sorted(charts, key=lambda key: [*_TITLES, key].index(key)):
        title, unit = _TITLES.get(key, (f"{key}: does it do what you expect?", key))
        thinned = {name: runs.thin(values[name]) for name in charts[key]}
        lines = [(name, points) for name, (points, _) in thinned.items()]
        sizes = {name: n for name, (_, n) in thinned.items() if n > 1}
        notes = [f"Points of {name} are means of {n} updates." for name, n in sizes.items()]
        chart = line_chart(lines, "updates", unit, percent=unit.endswith("(%)"))
        drawn.append(figure(title, chart, " ".join(notes)))
    tiles = [("updates", f"{max(step for v in values.values() for step, _ in v):,}", "")]
    for name, best in ("best dev exact match", max), ("lowest dev loss", min):
        if points := values.get("dev/" + "_".join(name.split()[2:])):
            step, value = best(points, key=lambda point: point[1])
            tiles.append((name, number(value), f"after update {step:,}"))
    return _charts(*drawn), tiles


def recall_section(rankings: Sequence[Ranking]) -> str:
    if not rankings:
        return missing("No file with passages and answers was given: name some with --retrieved.")
    lines, rows = [], []
    ks = [k for k in (1, 5, 20, 100) if k <= max(ranking.depth for ranking in rankings)]
    for r in rankings:
        even = {round(r.depth ** (part / 60)) for part in range(61)}  # on a logarithmic scale
        curve = sorted(even | {min(5, r.depth)})
        lines.append((r.name, [(k, r.recall(k)) for k in curve]))
        cells = [f"{r.recall(k):.1f}" if k <= r.depth else _DASH for k in ks]
        rows.append([escape(r.name), f"{r.n_judged:,}", *cells])
    chart = line_chart(lines, "k: passages from the top", "recall@k (%)", log_x=True, percent=True)
    note = "Share of the questions with gold answers that have one in their first k passages."
    if len({ranking.questions for ranking in rankings}) > 1:
        note += " The files do not ask the same questions: compare with care."
    title = "How far down is an answer? The higher on the left, the better"
    curves = figure(title, chart, note)
    title = "Recall@k, in percent: the first column is what one passage is worth"
    return _charts(curves, figure(title, table(["passages", "n", *(f"@{k}" for k in ks)], rows)))


def headline(found: Survey) -> list[Tile]:
    """The most important numbers."""
    if not found.data:
        return []
    verdicts = found.verdicts
    without = len(found.data) - len(verdicts)
    note = f"{without:,} without gold answers count nowhere else" if without else ""
    tiles = [("questions", f"{len(found.data):,}", note)]
    if verdicts and found.answers:
        matches = found.mean("match")
        low, high = (100 * end for end in calibration.wilson(matches / 100, len(verdicts)))
        interval = f"95 % interval {low:.1f} to {high:.1f}"
        tiles.append(("exact match, %", f"{matches:.1f}", interval))
        tiles.append(("F1, %", f"{found.mean('f1'):.1f}", ""))
    if bins := _bins(found):
        error = f"{100 * calibration.expected_calibration_error(bins):.1f}"
        note = f"{calibration.N_BINS} bins of equal width; 0 is perfect"
        tiles.append(("expected calibration error, %", error, note))
    if found.by_score.depth:
        share = percent([v["holding"] > 0 for v in verdicts])
        read = "read" if found.answers or found.scored else "found"
        tiles.append(
            (f"answer in a passage {read}, %", f"{share:.1f}", f"recall of what was {read}")
        )
        order = "by the reader's score" if found.scored else "by the data's score or order"
        tiles.append(("answer in the top passage, %", f"{found.mean('top'):.1f}", order))
    if found.agreements:
        mean, n = statistics.mean(found.agreements), len(found.agreements)
        note = f"by ranks, mean over {n:,} questions; 1: same order, 0: by chance"
        tiles.append(("attention's correlation with attribution", f"{mean:.2f}", note))
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
    for name, state, group in rows:
        share = 100 * len(group) / len(verdicts)
        cells = [link(state, f"{len(group):,}") + f'<br><span class="quiet">{share:.1f} %</span>']
        if found.answers:
            right = sum(verdict["match"] for verdict in group)
            cells.append(link(f"{state}&verdict=right", f"{right:,}"))
            cells.append(link(f"{state}&verdict=wrong", f"{len(group) - right:,}"))
            cells.append(f"{100 * right / len(group):.1f}" if group else _DASH)
        lines.append([name, *cells])
    head = ["an answer is", "questions"] + (["right", "wrong", "EM, %"] if found.answers else [])
    title = "Retrieval or reading? Wrong answers without, and with, one in a passage"
    return figure(title, table(head, lines))


def _bar_figure(title: str, groups: Sequence[Group], names: Sequence[str], x_name: str) -> str:
    return figure(title, bar_chart(groups, names, x_name), "Click a bar to see its questions.")


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
            groups.append((label, len(group), means, f"#{key}={low}-{high}"))
    return _bar_figure(title, groups, ["exact match", "F1"], x_name)


def answers_section(found: Survey, curve_file: Path) -> str:
    if not found.data:
        which = f"There is neither {ANSWERS} nor {SCORES} in this folder: test_reader.py writes"
        return missing(f"{which} them, with --write_results and --write_crossattention_scores.")
    if not found.verdicts:
        return missing("No question has gold answers: there is nothing to judge.")
    drawn = [outcome_table(found)] if found.by_score.depth else []
    if not found.answers:
        note = f"There is no {ANSWERS} in this folder: test_reader.py --write_results writes it."
        return _charts(*drawn) + missing(note)
    if drawn:
        title = "Does it need several passages with the answer? Bars should rise early"
        name, bins = "passages read that contain an answer", [0, 1, 2, 3, 5, 10, 20, 50]
        drawn.append(verdict_chart(title, name, "holding", bins, found.verdicts))
    title, name = "Are long answers harder? If so, bars fall", "words in the shortest gold answer"
    drawn.append(verdict_chart(title, name, "length", [0, 1, 2, 3, 4, 5, 6, 10], found.verdicts))
    if curve := runs.read_curve(curve_file):
        lines = list(curve.items())
        chart = line_chart(lines, "passages read", "percent", log_x=True, percent=True)
        title = "How many passages are enough? Where the curve flattens"
        drawn.append(figure(title, chart))
    return _charts(*drawn)


def targets_section(found: Survey) -> str:
    """What the targets in scored data are worth; empty without several."""
    if not (found.scored and any("scores" in c for c in found.data[0].get("ctxs") or ())):
        return ""
    head, rows = targets.measure(found.data.path)
    title = "Which target finds answers? Look for high recall and few misses"
    note = "Passages sorted by each target. Misses: the first passage has no answer, another has."
    note += " Right: rank correlation with target 1, 2, ..., averaged over questions."
    return figure(title, table(head, [[escape(cell) for cell in row] for row in rows]), note)


def _bins(found: Survey) -> list[calibration.Bin]:
    known = found.verdicts if found.confidences else []
    return calibration.reliability([v["p"] for v in known], [v["match"] for v in known])


def confidence_section(found: Survey) -> str:
    """Whether the reader's probabilities can be trusted; empty without any."""
    if not (bins := _bins(found)):
        return ""
    groups = []
    for low, count, sure, right in bins:
        low = round(100 * low)
        state = f"#p={low}-{low + 100 // calibration.N_BINS - 1}"
        groups.append((str(low), count, (100 * sure, 100 * right), state))
    title = "Is it right as often as it is sure? Both bars of a pair should be equal"
    x_name = "probability of the answer: from, in %"
    bars = _bar_figure(title, groups, ["mean probability", "exact match"], x_name)
    values = [v["p"] for v in found.verdicts], [v["match"] for v in found.verdicts]
    points = [(100 * x, 100 * y) for x, y in calibration.coverage_curve(*values)]
    points = points[:: -(-len(points) // 100)] + points[-1:]
    names = "surest answers given, in %", "exact match (%)"
    chart = line_chart([("exact match", points)], *names, percent=True)
    title = "Does it know when to abstain? The curve should fall from left to right"
    return _charts(bars, figure(title, chart))


def against_section(found: Survey, name: str) -> str:
    """Both runs' verdicts on each question; counts link to the questions."""
    if not (found.answers and found.verdicts):
        return missing("There are no judged answers to compare.")
    pairs = [(v["match"], v["other_match"]) for v in found.verdicts]
    kinds = {(True, False): ("right here, wrong there", "gained"),
             (False, True): ("wrong here, right there", "lost"),
             (True, True): ("right in both", "both"),
             (False, False): ("wrong in both", "neither")}  # fmt: skip
    rows = []
    for pair, (says, kind) in kinds.items():
        n = pairs.count(pair)
        rows.append([says, link(f"against={kind}", f"{n:,}"), f"{100 * n / len(pairs):.1f}"])
    here, there = (percent(values) for values in zip(*pairs, strict=True))
    note = f"Exact match {here:.1f} here, {there:.1f} in {name}: {here - there:+.1f} points."
    title = "Which questions flipped, and why? Click the first two numbers"
    return _charts(figure(title, table(["answers are", "questions", "%"], rows), note))


def quick_links(found: Survey) -> str:
    """Lists that are worth a click."""
    if not (found.answers and found.verdicts):
        return ""
    order, surest = ("&order=sure", ", surest first") if found.confidences else ("", "")
    links = [link(f"passages=with&verdict=wrong{order}", f"answer read but not given{surest}")]
    lucky = f"right without reading it{surest}"
    links.append(link(f"passages=without&verdict=right{order}", lucky))
    if found.confidences:
        links.append(link("verdict=right&order=unsure", "right, least sure first"))
    return f'<p class="how quick">Worth a look: {" | ".join(links)}</p>'
