"""A run as one offline page for a browser: curves, recall, answers and their passages.

    python -m src.tools.report checkpoint/my_test --retrieved retrieved_round1.json

Numbers come from `survey.py`, charts from `charts.py`, both put together by `sections.py`;
`page.html` is the frame and script.
"""

import re
from html import escape
from pathlib import Path

from src.data.outputs import claim_output, write_whole
from src.evaluation import runs
from src.evaluation.answers import ANSWERS, SCORES
from src.evaluation.rankings import rank_answers
from src.evaluation.runs import CURVE, METRICS, OPTIONS, PROBABILITIES
from src.options import report_parser
from src.runtime.errors import InputError, reports_input_errors
from src.tools.frame import frame, missing, table, tiles
from src.tools.report import sections
from src.tools.report.survey import survey, to_json


def find_files(run: Path) -> list[Path]:
    """The files of a run that are shown, or a data file by itself. Errors: `InputError`."""
    if run.is_file():
        return [run]
    needed = METRICS, ANSWERS, SCORES
    if not any((run / name).exists() for name in needed):
        lacks = f"neither {METRICS} nor {ANSWERS} nor {SCORES} is in this folder"
        problem = lacks if run.is_dir() else "no such folder"
        raise InputError(f"{run}: {problem}; give a run's (--checkpoint_dir/--name)")
    return [run / n for n in (*needed, PROBABILITIES, CURVE) if (run / n).exists()]


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = report_parser().parse_args(arguments)
    run = Path(options.run)
    files, is_run = find_files(run), run.is_dir()
    default = run / "report.html" if is_run else run.with_name(f"{run.name}.report.html")
    output = Path(options.output or default)
    inputs = [*map(str, files), *filter(None, [options.data]), *options.retrieved]
    claim_output(str(output), "--output", inputs=inputs)

    run_options = runs.read_run_options(run)
    path = runs.find_data(run, options.data, run_options)
    names = [Path(path).stem for path in options.retrieved]
    names = names if len(set(names)) == len(names) else options.retrieved
    compared = [rank_answers(*pair) for pair in zip(options.retrieved, names, strict=True)]
    found = survey(path, options, run_options, compared)
    if found.by_score.depth and (found.scored or not compared or not is_run):
        compared += [found.as_found] if found.scored and not compared else []
        compared.append(found.by_score)
    elif not is_run:
        problem = "no question in this file has both answers and passages (ctxs)"
        raise InputError(f"{run}: {problem}; give what passage_retrieval.py wrote")

    curves, numbers = sections.training_section(run)
    against = Path(options.against).name if options.against else ""
    parts = {
        "Answers": sections.answers_section(found, run / CURVE) if is_run else "",
        "Confidence": sections.confidence_section(found),
        f"Compared with {against}": sections.against_section(found, against) if against else "",
        "Recall": sections.recall_section(compared),
        "Targets": sections.targets_section(found),
    }
    parts = parts | {"Training": curves} if found.data else {"Training": curves} | parts
    named = [n for n in ("model_path", "train_data", "eval_data", "n_context") if n in run_options]
    summary = " \N{MIDDLE DOT} ".join(f"{name} {run_options[name]}" for name in named)
    settings = [[escape(key), escape(str(value))] for key, value in run_options.items()]
    no_options = missing(f"There is no {OPTIONS} in this folder.")
    sources = dict.fromkeys([*map(str, files), *[path] * bool(path), *options.retrieved])
    about = found.for_script(against)
    html, policy = frame(Path(__file__).with_name("page.html"))
    texts = {
        "title": escape(run.resolve().name),
        "tiles": tiles(sections.headline(found) + numbers),
        "summary": escape(summary),
        "quick": sections.quick_links(found),
        "sections": "".join(f"<h2>{escape(n)}</h2>{text}" for n, text in parts.items() if text),
        "sources": table(["files shown"], [[escape(source)] for source in sources]),
        "settings": table(["option", "value"], settings) if settings else no_options,
        "policy": policy,
        "data": to_json(about),
    }
    write_whole(output, [re.sub(r"\{\{(\w+)\}\}", lambda name: texts[name[1]], html)])
    held = f"; it holds {len(about['questions']):,} of {about['total']:,} questions"
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB{held if found.data else ''}")


if __name__ == "__main__":
    main()
