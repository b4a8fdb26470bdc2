"""Line and bar charts as inline SVG. The classes `s0` to `s3` are the page's colours; a `<title>`,
which a browser shows on hovering, holds the value of a point or bar."""

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 400, 250  # about as shown, so that text is as large as the page's
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 22, 26, 44  # margins around the plotted area
N_COLOURS = 4  # of the page; a fifth series has the first one's, dashed


Line = tuple[str, Sequence[tuple[float, float]]]  # a curve's name, and its points by x
# Bars side by side: a label, a number of questions, a value (in percent) for each series, and the
# link that a click follows.
Group = tuple[str, int, Sequence[float], str]


def number(value: float) -> str:
    """A number for people: thousands with a comma, at most four significant digits."""
    is_whole = value == int(value) or abs(value) >= 1000
    return f"{value:,.0f}" if is_whole else f"{value:.4g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) in at most `most` steps: the first at or
    below `low`, the last at or above `high`."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    exponent = math.floor(math.log10((high - low) / most))
    for step in (factor * 10.0 ** (exponent + more) for more in (0, 1) for factor in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [round(n * step, 12 - exponent) for n in range(first, last + 1)]  # 3 * 0.1 is not 0.3


def line_chart(
    lines: Sequence[Line], x_name: str, y_name: str, log_x: bool = False, percent: bool = False
) -> str:
    """Curves over a common x, which starts at 0, or (`log_x`) is logarithmic and at least 1. With
    `percent`, the y axis ends at 100 at most."""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    y_ticks = ticks(min(ys), max(ys))
    if percent:
        y_ticks = [tick for tick in y_ticks if 0 <= tick <= 100]
        y_ticks = y_ticks if len(y_ticks) > 1 else [0, 50, 100]  # all values are 0, or all 100
    x_ticks, on_axis = ticks(min(0, *xs), max(xs)), float
    if log_x:
        decades = [10**n for n in range(len(str(int(max(xs)))))]
        x_ticks = [n * d for d in decades for n in (1, 2, 5) if n * d <= max(xs)]
        on_axis = math.log
    ends = on_axis(x_ticks[0]), on_axis(max(2, *xs) if log_x else x_ticks[-1])
    x_scale = _scale(*ends, _LEFT, WIDTH - _RIGHT)
    y_at = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = _axes(y_ticks, y_at, x_name, y_name)
    parts += [_text(x_scale(on_axis(x)), HEIGHT - _BOTTOM + 16, number(x)) for x in x_ticks]
    circles = ""
    for index, (name, points) in enumerate(lines):
        style, radius = _style(index), 3 if len(points) <= 20 else 1.5
        at = [(x_scale(on_axis(x)), y_at(y)) for x, y in points]
        path = "L".join(f"{left:.1f} {top:.1f}" for left, top in at)
        parts.append(f'<path class="line {style}" d="M{path}"/>')
        for (x, y), (left, top) in zip(points, at, strict=True):
            title = escape(f"{name}: {number(y)}{' %' if percent else ''} at {number(x)}")
            centre = f'cx="{left:.1f}" cy="{top:.1f}" r="{radius}"'
            circles += f'<circle class="point {style}" {centre}><title>{title}</title></circle>'
    names = [name for name, _ in lines]
    return _svg([*parts, circles], f"{y_name} over {x_name}: {', '.join(names)}", names)


def bar_chart(groups: Sequence[Group], names: Sequence[str], x_name: str) -> str:
    """Values in percent, one bar for each name in each group, with the group's count below it."""
    base = HEIGHT - _BOTTOM - 14  # room for a line of counts
    y_at = _scale(0, 100, base, _TOP)
    parts = _axes([0, 25, 50, 75, 100], y_at, x_name, "percent")
    room = (WIDTH - _RIGHT - _LEFT) / len(groups)
    wide = min(24.0, 0.88 * room / len(names))
    for index, (label, count, values, link) in enumerate(groups):
        middle, bars = _LEFT + (index + 0.5) * room, ""
        for series, (name, value) in enumerate(zip(names, values, strict=True)):
            left, top = middle + (series - len(names) / 2) * wide, y_at(value)
            title = f"{x_name}: {label}. {name} {value:.1f} % of {count:,} questions"
            box = f'x="{left:.1f}" y="{top:.1f}" width="{wide - 1:.1f}"'
            box += f' height="{max(base - top, 0.5):.1f}" class="bar {_style(series)}"'
            bars += f"<rect {box}><title>{escape(title)}</title></rect>"
            bars += _text(left + wide / 2 - 0.5, top - 3, f"{value:.0f}", kind="value")
        parts.append(f'<a href="{escape(link)}">{bars}</a>')
        parts.append(_text(middle, base + 16, label, kind="label"))
        parts.append(_text(middle, base + 31, f"{count:,}"))
    parts.append(_text(_LEFT - 6, base + 31, "n", "end"))
    return _svg(parts, f"{' and '.join(names)} by {x_name}", names)


def _style(index: int) -> str:
    return f"s{index % N_COLOURS}" + (" dashed" if index >= N_COLOURS else "")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {at}>{escape(text)}</text>'


def _axes(
    values: Sequence[float], y_at: Callable[[float], float], x_name: str, y_name: str
) -> list[str]:
    parts = [_text(0, 12, y_name, "start", "name")]
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_name, kind="name"))
    for value in values:
        y = y_at(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, number(value), "end"))
    return parts


def _svg(parts: Sequence[str], description: str, names: Sequence[str]) -> str:
    """The drawing, below its colours as a list that wraps."""
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 22 10" aria-hidden="true">'
        f'<path class="line {_style(index)}" d="M1 5H21"/></svg>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return (
        f'<ul class="legend">{legend}</ul><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="group" aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )
