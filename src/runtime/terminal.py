"""What a person at a terminal sees of a script: facts in aligned lines, bars, the next command."""

import contextlib
import datetime
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

# Opens a progress bar, by total, unit and what is done: a context of something with `update(n)`.
Bar = Callable[[int, str, str], contextlib.AbstractContextManager]


def say(log: logging.Logger, name: str, text: str, *values: object) -> None:
    """A fact under its name, in line with the others. `text` and `values` as a log takes them."""
    log.info(f"%-10s {text}", name, *values)


def say_next(log: logging.Logger, what_for: str, *commands: Sequence[object]) -> None:
    """The commands that come next, each on a line of its own, quoted as a shell needs it."""
    lines = [f"\n    {shlex.join(['python', *map(str, command)])}" for command in commands]
    say(log, "next", "%s:%s", what_for, "".join(lines))


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 process", "2 processes"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(n_bytes: float) -> str:
    """Bytes as people read them: "40 kB", "1.6 GB"."""
    unit = 0
    while n_bytes >= 999.5 and unit < 3:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.{1 if unit and n_bytes < 9.95 else 0}f} {('B', 'kB', 'MB', 'GB')[unit]}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells below a head: the first cells to the left, the others to the right."""
    widths = [max(11, *map(len, cells)) for cells in zip(head, *rows, strict=True)]
    for name, *cells in (head, *rows):
        columns = zip(cells, widths[1:], strict=True)
        print(f"{name:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in columns))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03"."""
    return str(datetime.timedelta(seconds=round(seconds)))


def has_bars() -> bool:
    """Whether someone can see progress bars."""
    return sys.stderr.isatty()


def progress_bar(total: int, unit: str, initial: int = 0, shown: bool = True, **more: Any) -> tqdm:
    """A progress bar with rate and time left, on a terminal only."""
    silent = not shown or not has_bars()
    spaced = unit if unit == "B" else f" {unit}"
    return tqdm(
        total=total, initial=initial, unit=spaced, disable=silent, dynamic_ncols=True, **more
    )


def passing_bar(total: int, unit: str, what: str, shown: bool = True) -> tqdm:
    """The bar of a step on the way, which says what is done: it shows itself when the step takes
    over a second, and goes away with it. The unit "B" (bytes) is scaled."""
    more = {"desc": what, "leave": False, "delay": 1.0, "unit_scale": unit == "B"}
    return progress_bar(total, unit, shown=shown, **more)


def no_bar(total: int, unit: str, what: str) -> contextlib.AbstractContextManager:
    """A `Bar` that shows nothing."""
    return contextlib.nullcontext(SimpleNamespace(update=lambda n: None))
