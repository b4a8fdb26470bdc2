"""What the benches share: interleaved timing, peak memory of a process, the machine's own speed."""

import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each task, all tasks taking turns, so that what else the machine does
    falls on all alike. The first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _report_peak(task: Callable[..., Any], arguments: tuple, pipe: Any) -> None:
    torch.set_num_threads(arguments[0])
    task(*arguments[1:])
    # (Not getrusage: its figure includes that of the process that started this one.)
    status = Path("/proc/self/status").read_text()
    pipe.send(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def peak_memory(task: Callable[..., Any], *arguments: Any) -> float:
    """The largest resident memory, in MB, of a fresh process that runs a task of this module's
    caller."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_report_peak, args=(task, (torch.get_num_threads(), *arguments), theirs)
    )
    process.start()
    theirs.close()
    megabytes = ours.recv()
    process.join()
    return megabytes


def nothing() -> None:
    """A task to measure what a process takes that does nothing but import what the others do."""


def matrix_peak(size: int = 2048, products: int = 8) -> float:
    """The machine's floating-point operations per second in the fastest of some large float32
    matrix products: whatever else the machine does makes the others slower."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    seconds = []
    for _ in range(products):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def table(rows: list[dict[str, Any]], **facts: str) -> None:
    """Print rows for people, in columns, and for machines, with `facts`, as one JSON line."""
    names = list(rows[0])
    cells = [names] + [[_short(row[name]) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        first, *others = (cell for cell in line)
        shown = [first.ljust(widths[0])]
        shown += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(shown).rstrip())
    # (JSON has no nan, as where a column does not apply.)
    found = [{k: None if v != v else v for k, v in row.items()} for row in rows]
    print(json.dumps(facts | {"rows": found} if facts else found))


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value != value:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
