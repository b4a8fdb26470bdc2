"""Fuse what several systems found into one ranking.

    python -m src.tools.fuse retrieved_bm25.json retrieved_round1.json -o fused.json
    python -m src.tools.fuse lucene.trec round1.json -o fused.trec --method sum --weights 1 2

Data files with passages give a data file, which a reader reads; with a TREC run among them the
result is a TREC run, and `passage_retrieval.py --from_trec` adds the texts.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.data.examples import load_data, read_example
from src.data.outputs import claim_output, write_whole
from src.data.trec import Run, run_lines
from src.evaluation.answers import find_answers
from src.evaluation.relevance import load_run
from src.evaluation.retrieved import as_json
from src.options import fusion_parser
from src.runtime.errors import InputError, reports_input_errors, shorten
from src.runtime.terminal import count


@reports_input_errors
def main(arguments: list[str] | None = None) -> None:
    options = fusion_parser().parse_args(arguments)
    claim_output(options.output, "--output", inputs=options.files)
    runs = list(map(load_run, options.files))
    if options.output.endswith((".json", ".jsonl")):
        lines = as_json(options.output, _examples(runs, options))
    else:
        lines = _trec_lines(runs, options)
    write_whole(Path(options.output), lines)
    n = len(dict.fromkeys(question for run in runs for question in run))
    print(f"{options.output}: {count(n, 'question')}, from {count(len(runs), 'file')}")


def fuse(rankings: Sequence[dict[str, float]], options: argparse.Namespace) -> dict[str, float]:
    """One question's fused scores by passage id, best first, at most `n_docs`.

    `rrf`: reciprocal rank fusion, the sum of w / (rrf_k + rank) (Cormack et al., 2009). `sum`: the
    sum of w times the score, scaled to 0 ... 1 over what the system found for the question (1 if
    all are equal), 0 for what it did not find. Equal scores keep the order of the files.
    """
    fused: dict[str, float] = {}
    weights = options.weights or [1.0] * len(rankings)
    for scores, weight in zip(rankings, weights, strict=True):
        low, high = min(scores.values(), default=0), max(scores.values(), default=0)
        for rank, name in enumerate(sorted(scores, key=scores.get, reverse=True), start=1):
            if options.method == "rrf":
                value = 1 / (options.rrf_k + rank)
            else:
                value = (scores[name] - low) / (high - low) if high > low else 1.0
            fused[name] = fused.get(name, 0.0) + weight * value
    best = sorted(fused, key=fused.get, reverse=True)[: options.n_docs]
    return {name: fused[name] for name in best}


def _trec_lines(runs: Sequence[Run], options: argparse.Namespace) -> Iterator[str]:
    for question in dict.fromkeys(question for run in runs for question in run):
        fused = fuse([run.get(question, {}) for run in runs], options)
        for name in (question, *fused):
            if len(name.split()) != 1:
                problem = f"the id {shorten(name)} must not have spaces in a TREC run; write .json"
                raise InputError(f"{options.output}: {problem}")
        yield from run_lines(question, fused.items(), "fused")


def _examples(runs: Sequence[Run], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The first file's examples with the passages of all."""
    for path in options.files:
        if not path.endswith((".json", ".jsonl")):
            how = "fuse into a run (-o fused.trec), and turn that into data with"
            how += " passage_retrieval.py --from_trec"
            raise InputError(f"{path}: a TREC run has no texts: {how}")
    files = list(map(load_data, options.files))
    for index in range(len(files[0])):
        asked, contexts = read_example(files[0], index), {}
        for data, run in zip(files, runs, strict=True):
            if len(data) != len(files[0]) or len(run) != len(data):
                raise InputError(f"{data.path}: needs the questions of {files[0].path}, each once")
            example = read_example(data, index)
            if (example.id, example.question) != (asked.id, asked.question):
                other = f"not question {asked.id} of {files[0].path}; fuse files of the same data"
                raise InputError(f"{data.where(index)}: {other}")
            raw = data[index].get("ctxs")
            for passage in example.passages:
                contexts.setdefault(passage.id, raw[passage.position])
        fused = fuse([run[asked.id] for run in runs], options)
        found = [{**contexts[name], "score": score} for name, score in fused.items()]
        if asked.answers:
            hits = find_answers(asked.answers, (context["text"] for context in found))
            found = [{**c, "hasanswer": hit} for c, hit in zip(found, hits, strict=True)]
        yield {**files[0][index], "ctxs": found}


if __name__ == "__main__":
    main()
