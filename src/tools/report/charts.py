"""Pictures for a web page: line and bar charts as inline SVG, coloured by the page's style.

A chart is drawn 400 units wide and shown about as wide, so that its words are as large as the
page's on a phone and on a desk. Classes `s0` to `s3` are the colours of its series; each point and
bar has a `<title>`, which a browser shows when it is pointed at.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 22, 26, 44  # margins around the plotted area
N_COLOURS = 4  # of the page; a fifth series has the first one's, dashed


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: (x, y) by x, and for each point, if given, the lowest and highest y around it."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True)
class Group:
    """The bars that stand together: their label, how many things are behind them, one value for
    each series, and where on the page a click on them leads."""

    label: str
    count: int
    values: Sequence[float]
    link: str = ""


def number(value: float) -> str:
    """A number as people write it: thousands with a comma, at most four digits that matter."""
    if value == int(value) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif abs(value) < 0.001:
        digits, _, exponent = f"{value:.3e}".partition("e")
        text = f"{float(digits):g}e{int(exponent)}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers with even steps (1, 2 or 5 times a power of ten): the first at or below `low`,
    the last at or above `high`, in at most `most` steps."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    exponent = math.floor(math.log10((high - low) / most))
    for step in (factor * 10.0 ** (exponent + more) for more in (0, 1) for factor in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    # Rounded, as 3 * 0.1 is not 0.3.
    return [round(place * step, 12 - exponent) for place in range(first, last + 1)]


def line_chart(
    lines: Sequence[Line], x_name: str, y_name: str, log_x: bool = False, percent: bool = False
) -> str:
    """Curves over a common x.

    Args:
        log_x: x is counted in powers (and is at least 1); otherwise its axis begins at 0.
        percent: y is in percent: its axis ends at 100 at most.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for pair in line.band for y in pair]
    y_ticks = ticks(min(ys), max(ys))
    if percent:
        y_ticks = [tick for tick in y_ticks if 0 <= tick <= 100] or [0, 100]
        if len(y_ticks) == 1:  # everything is 0, or everything 100
            y_ticks = [0, 50, 100]
    if log_x:
        decades = [10**n for n in range(len(str(int(max(xs)))))]
        x_ticks = [n * d for d in decades for n in (1, 2, 5) if n * d <= max(xs)]
        x_place = _scale(0.0, math.log(max(2, *xs)), _LEFT, WIDTH - _RIGHT)
        place_x = lambda x: x_place(math.log(x))  # noqa: E731
    else:
        x_ticks = ticks(min(0, *xs), max(xs))
        place_x = _scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    place_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = _y_axis(y_ticks, place_y, y_name)
    for tick in x_ticks:
        parts.append(_text(place_x(tick), HEIGHT - _BOTTOM + 16, number(tick), "middle"))
    parts.append(_text(_middle(), HEIGHT - 6, x_name, "middle", "name"))
    for place, line in enumerate(lines):
        points = [(place_x(x), place_y(y)) for x, y in line.points]
        if line.band:
            lower = [(x, place_y(low)) for (x, _), (low, _) in zip(points, line.band, strict=True)]
            upper = [(x, place_y(up)) for (x, _), (_, up) in zip(points, line.band, strict=True)]
            around = _path([*lower, *reversed(upper)])
            parts.append(f'<path class="band {_style(place)}" d="{around}Z"/>')
        parts.append(f'<path class="line {_style(place)}" d="{_path(points)}"/>')
    for place, line in enumerate(lines):
        radius = 3 if len(line.points) <= 20 else 1.5
        for x, y in line.points:
            title = f"{line.name}: {number(y)}{' %' if percent else ''} at {number(x)}"
            parts.append(
                f'<circle class="point {_style(place)}" cx="{place_x(x):.1f}" '
                f'cy="{place_y(y):.1f}" r="{radius}"><title>{escape(title)}</title></circle>'
            )
    return _svg(parts, f"{y_name} over {x_name}: {', '.join(line.name for line in lines)}")


def bar_chart(groups: Sequence[Group], names: Sequence[str], x_name: str, y_name: str) -> str:
    """Values in percent, one bar for each name in each group, with the group's count below it."""
    base = HEIGHT - _BOTTOM - 14  # there is a line of counts more below than in a line chart
    place_y = _scale(0, 100, base, _TOP)
    parts = _y_axis([0, 25, 50, 75, 100], place_y, y_name)
    room = (WIDTH - _RIGHT - _LEFT) / len(groups)
    wide = min(24.0, 0.88 * room / len(names))
    for place, group in enumerate(groups):
        middle = _LEFT + (place + 0.5) * room
        bars = []
        for which, (name, value) in enumerate(zip(names, group.values, strict=True)):
            left = middle + (which - len(names) / 2) * wide
            top = place_y(value)
            title = f"{x_name}: {group.label}. {name} {value:.1f} % of {group.count:,} questions"
            bars.append(
                f'<rect class="bar {_style(which)}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{wide - 1:.1f}" height="{max(base - top, 0.5):.1f}">'
                f"<title>{escape(title)}</title></rect>"
            )
            bars.append(_text(left + wide / 2 - 0.5, top - 3, f"{value:.0f}", "middle", "value"))
        drawn = "".join(bars)
        parts.append(f'<a href="{escape(group.link)}">{drawn}</a>' if group.link else drawn)
        parts.append(_text(middle, base + 16, group.label, "middle", "label"))
        parts.append(_text(middle, base + 31, f"{group.count:,}", "middle"))
    parts.append(_text(_LEFT - 6, base + 31, "n", "end"))
    parts.append(_text(_middle(), HEIGHT - 6, x_name, "middle", "name"))
    return _svg(parts, f"{' and '.join(names)} by {x_name}")


def legend(names: Sequence[str]) -> str:
    """What the colours of a chart mean, as HTML that wraps."""
    items = [
        f'<li><svg class="key" viewBox="0 0 22 10" aria-hidden="true">'
        f'<path class="line {_style(place)}" d="M1 5H21"/></svg>{escape(name)}</li>'
        for place, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _style(place: int) -> str:
    return f"s{place % N_COLOURS}" + (" dashed" if place >= N_COLOURS else "")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Where a value between low and high stands between start and end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _middle() -> float:
    return (_LEFT + WIDTH - _RIGHT) / 2


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _y_axis(values: Sequence[float], place: Callable[[float], float], name: str) -> list[str]:
    parts = [_text(0, 12, name, "start", "name")]
    for value in values:
        y = place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, number(value), "end"))
    return parts


def _svg(parts: Sequence[str], description: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
    )
