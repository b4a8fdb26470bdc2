"""What is shown of an answer and its passages on a terminal."""

import math
import os
import shutil
import sys
import textwrap
import unicodedata
from typing import NamedTuple

from src.evaluation.answers import answer_spans

_SHOWN, _LINES = 5, 3  # passages that are shown of a reply, and lines of each
_LONGEST = 5000  # characters of a passage that are searched for the answer
_ON, _OFF = "\x02", "\x03"  # around an answer to mark; `clean` removes these characters from texts


class Evidence(NamedTuple):
    """A passage that was read: the reader's attention, how far the answer's log-probability drops
    without it, its score by search, and its rank there, from 1."""

    title: str
    text: str
    score: float
    attribution: float
    search_score: float
    search_rank: int


class Reply(NamedTuple):
    """An answer, the passages that were read for it, by attention, highest first, and the answer's
    log-probability."""

    answer: str
    passages: list[Evidence]
    log_probability: float

    @property
    def probability(self) -> float:
        return math.exp(min(0.0, self.log_probability))


def print_reply(reply: Reply) -> None:
    """Show a reply, fitted to the terminal."""
    bold = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    print(f"\n{show(reply, width, bold)}\n", flush=True)


def show(reply: Reply, width: int, bold: bool) -> str:
    """A reply as text for a terminal of `width` cells: the answer, then the first passages, each
    with its scores and the lines around the answer, which is printed in bold if `bold`."""
    given = f"{_ON}{clean(reply.answer) or '(no answer)'}{_OFF}"
    lines = [*textwrap.wrap(f"{given} (probability {reply.probability:.3f})", width), ""]
    shown = reply.passages[:_SHOWN]
    heads = [
        f"{rank}  reader {e.score:6.2f} | attribution {round(e.attribution, 2) + 0.0:5.2f} | "
        f"search {e.search_score:.2f} (#{e.search_rank})"
        for rank, e in enumerate(shown, start=1)
    ]
    widest = max(map(len, heads), default=0)
    room = width - widest - 7
    for head, evidence in zip(heads, shown, strict=True):
        title = textwrap.wrap(clean(evidence.title), room if room >= 12 else width - 7)
        if title:  # in a narrow terminal on a line of its own
            head = f"{head:{widest}} | " if room >= 12 else f"{head}\n   "
            head += f"{title[0]}{' ...' if len(title) > 1 else ''}"
        lines.append(head)
        lines += [f"   {line}" for line in _excerpt(evidence.text, reply.answer, width - 3)]
    if len(reply.passages) > _SHOWN:
        lines += [f"and {len(reply.passages) - _SHOWN} more"]
    text = "\n".join(lines)
    return text.replace(_ON, "\x1b[1m" if bold else "").replace(_OFF, "\x1b[22m" if bold else "")


def clean(text: str) -> str:
    """The text on one line, without control characters: these could do anything to a terminal."""
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join("".join(kept).split())


def _excerpt(text: str, answer: str, width: int) -> list[str]:
    """The lines of a passage around the first occurrence of the answer, or else its beginning."""
    text = clean(text[:_LONGEST])
    pieces, end = [], 0
    for start, stop in answer_spans([answer], text):
        pieces += [text[end:start], _ON, text[start:stop], _OFF]
        end = stop
    lines = textwrap.wrap("".join([*pieces, text[end:]]), width - 4)  # with room for the dots
    marked = next((number for number, line in enumerate(lines) if _ON in line), 0)
    first = max(0, min(marked - 1, len(lines) - _LINES))
    excerpt = lines[first : first + _LINES]
    if first > 0:
        excerpt[0] = f"... {excerpt[0]}"
    if first + _LINES < len(lines):
        excerpt[-1] += f"{_OFF} ..."
    return excerpt
