"""A run as one offline page for a browser: curves, recall, answers and their passages.

    python -m src.tools.report checkpoint/my_test --retrieved retrieved_round1.json

Numbers come from `survey.py`, charts from `charts.py`, both put together by `sections.py`;
`page.html` is the frame and script.
"""

import argparse
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.data.examples import load_data
from src.data.outputs import claim_output, write_whole
from src.evaluation import runs
from src.evaluation.answers import ANSWERS, SCORES
from src.evaluation.rankings import Ranking, rank_answers
from src.evaluation.runs import CURVE, METRICS, OPTIONS, PROBABILITIES, Given, read_given
from src.options import report_parser
from src.runtime.errors import InputError, reports_input_errors
from src.tools.frame import frame, missing, table, tiles
from src.tools.report import sections, survey
from src.tools.report.survey import Survey


def page(parts: dict[str, str], about: dict[str, Any]) -> str:
    """The page's HTML. `parts` are HTML; `about` is data for the script, which shows it as text."""
    html, policy = frame(Path(__file__).with_suffix(".html"))
    data = json.dumps(about, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {**parts, "policy": policy, "data": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], html)


def find_files(run: Path) -> list[Path]:
    """The files of a run that are shown, or a data file by itself. Errors: `InputError`."""
    if run.is_file():
        return [run]
    remedy = "give a run's (--checkpoint_dir/--name)"
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; {remedy}")
    needed = METRICS, ANSWERS, SCORES
    if not any((run / name).exists() for name in needed):
        wanted = f"neither {METRICS} nor {ANSWERS} nor {SCORES} is in this folder"
        raise InputError(f"{run}: {wanted}; {remedy}")
    return [run / n for n in (*needed, PROBABILITIES, CURVE) if (run / n).exists()]


def show_questions(
    options: argparse.Namespace,
    path: str,
    run_options: dict[str, Any],
    rankings: Sequence[Ranking],
) -> tuple[Survey, dict[str, Any]]:
    """The questions judged, and what the page's script is to know. Errors: `InputError`."""
    data, run, other = load_data(path), Path(options.run), Path(options.against or ".")
    given = read_given(run, data)
    against = read_given(other, data) if options.against else Given()
    if options.against and not against.answers:
        raise InputError(f"--against {other}: there is no {ANSWERS}; give a test run's folder")
    n_context = run_options.get("n_context") if given.answers else None
    n_context = n_context if isinstance(n_context, int) else None
    limits = options.max_questions, options.passages_shown
    found = survey.survey(data, given, against, n_context, rankings, *limits)
    if run.is_file() and not found.by_score.depth:
        problem = "no question in this file has both answers and passages (ctxs)"
        raise InputError(f"{run}: {problem}; give what passage_retrieval.py wrote")
    about = {"total": len(data), "answered": found.answered, "scored": found.scored}
    about |= {"against": other.name if options.against else "", "judged": given.confidences != []}
    return found, about | {"rankings": found.compared, "questions": found.records}


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = report_parser().parse_args(arguments)
    run = Path(options.run)
    files, is_run = find_files(run), run.is_dir()
    default = run / "report.html" if is_run else run.with_name(f"{run.name}.report.html")
    output = Path(options.output or default)
    claim_output(str(output), "--output")

    run_options = runs.read_run_options(run) if is_run else {}
    path = runs.find_data(run, options.data, run_options) if is_run else str(run)
    curves, numbers = sections.training_section(run)
    names = survey.short_names(options.retrieved)
    compared = [rank_answers(*pair) for pair in zip(options.retrieved, names, strict=True)]
    found, about = None, {"total": 0, "questions": []}
    if path:
        found, about = show_questions(options, path, run_options, compared)
        numbers = sections.headline(found) + numbers
        if found.by_score.depth and (found.scored or not compared or not is_run):
            compared += [found.as_found] if found.scored and not compared else []
            compared.append(found.by_score)

    answers = sections.answers_section(found, runs.read_curve(run / CURVE)) if is_run else ""
    parts = [("Answers", answers)]
    parts.append(("Confidence", sections.confidence_section(found)))
    if options.against and found:
        name = about["against"]
        parts.append((f"Compared with {name}", sections.against_section(found, name)))
    parts.append(("Recall", sections.recall_section(compared)))
    parts.insert(len(parts) if found else 0, ("Training", curves))
    named = [n for n in ("model_path", "train_data", "eval_data", "n_context") if n in run_options]
    summary = " \N{MIDDLE DOT} ".join(f"{name} {run_options[name]}" for name in named)
    settings = [[escape(key), escape(str(value))] for key, value in run_options.items()]
    no_options = missing(f"There is no {OPTIONS} in this folder.")
    sources = dict.fromkeys([*map(str, files), *[path] * bool(path), *options.retrieved])
    texts = {
        "title": escape(run.resolve().name),
        "tiles": tiles(numbers),
        "summary": escape(summary),
        "quick": sections.quick_links(found),
        "sections": "".join(f"<h2>{escape(n)}</h2>{html}" for n, html in parts if html),
        "sources": table(["files shown"], [[escape(source)] for source in sources]),
        "settings": table(["option", "value"], settings) if settings else no_options,
    }
    write_whole(output, [page(texts, about)])
    held = f"; it holds {len(about['questions']):,} of {about['total']:,} questions"
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB{held if found else ''}")
