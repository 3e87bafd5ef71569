"""Line and bar charts as inline SVG, in the page's light or dark colours, with values on hover."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deepspeed_chat_tlcr.pictures.text import Html, escape, join

WIDTH, HEIGHT = 380, 236  # of the drawing in its own units; the page scales it
RIGHT, TOP, BOTTOM = 8, 10, 36
MOST_POINTS = 400  # per line: more cannot be told apart on a screen
HOVER_COLUMNS = 80
FEW_POINTS = 12
NAMED_POINTS = 5
WIDEST_BAR = 64
# Series also differ in dashes, for print and the colour-blind. Colours are the style sheet's --s0 … --s7.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x`` with an optional band from ``low`` to ``high`` (all of one length).

    ``color``: a number of the style sheet's colours; None: its place in the chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: int | None = None

    def __post_init__(self):
        sizes = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(sizes) != 1 or (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r}: x, y and the band's two edges must have one length, got {sizes}")


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Weighted mean of the values around each, by ``weight ** distance``, equally far to both sides.

    So a line begins and ends at its own values, and a straight line stays straight. Gaps (NaN) stay gaps.
    """
    reach = math.ceil(math.log(1e-3) / math.log(weight)) if weight > 0 else 0  # beyond it the weights are nothing
    smoothed = []
    for place, value in enumerate(values):
        half = min(place, len(values) - 1 - place, reach)
        around = range(place - half, place + half + 1)
        known = [(weight ** abs(at - place), values[at]) for at in around if math.isfinite(values[at])]
        mean = sum(share * one for share, one in known) / sum(share for share, _ in known) if known else math.nan
        smoothed.append(mean if math.isfinite(value) else math.nan)
    return smoothed


Limits = tuple[float | None, float | None]
"""The least and greatest value that a measure can have, or None. No axis or band goes beyond."""


def ticks(low: float, high: float, about: int = 5, limits: Limits = (None, None)) -> list[float]:
    """Round numbers that enclose ``[low, high]``, with steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = within(low - pad, limits), within(high + pad, limits)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def within(value: float, limits: Limits) -> float:
    """The value, cut at the limits."""
    low, high = limits
    value = value if low is None else max(value, low)
    return value if high is None else min(value, high)


def short(value: float) -> str:
    """Four significant digits or fewer, for people."""
    if not math.isfinite(value):
        return "—"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k" if abs(value) < 1e6 else f"{value / 1e6:.4g}M"
    return f"{value:.4g}".replace("-", "−") if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("-", "−")


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str = "",
    y_label: str = "",
    smoothing: float = 0.0,
    y_range: tuple[float, float] | None = None,
    limits: Limits = (None, None),
) -> Html:
    """Several runs in one chart. With ``smoothing`` in (0, 1) the raw values are a faint line behind.

    Values that are not finite leave a gap. Hovering lists every series' value at a position.
    """
    colored = [(index if one.color is None else one.color, one) for index, one in enumerate(series)]
    lines = [(color, one) for color, one in colored if any(map(math.isfinite, one.y))]
    if not lines:
        return missing_chart(title, "nothing recorded")
    smoothed = [smooth(one.y, smoothing) if smoothing else list(one.y) for _, one in lines]
    edges = [within(edge, limits) for _, one in lines for edge in (*(one.low or ()), *(one.high or ()))]
    seen = [value for value in (*(y for _, one in lines for y in one.y), *edges) if math.isfinite(value)]
    xs = [value for _, one in lines for value in one.x]
    low, high = y_range or (min(seen), max(seen))
    plot = _Plot(min(xs), max(xs), ticks(low, high, limits=limits))
    body = [plot.frame(x_label, y_label, [t for t in ticks(min(xs), max(xs)) if min(xs) <= t <= max(xs)])]
    for index, one in lines:
        if one.low is not None:
            kept = [i for i in range(len(one.x)) if math.isfinite(one.low[i]) and math.isfinite(one.high[i])]
            edge = [(one.x[i], within(one.high[i], limits)) for i in kept]
            edge += [(one.x[i], within(one.low[i], limits)) for i in reversed(kept)]
            points = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in edge)
            body.append(Html(f'<polygon class="band" style="--k:var(--s{index % 8})" points="{points}"/>'))
        if smoothing:
            body.append(plot.path(one.x, one.y, "series raw", f'style="--k:var(--s{index % 8})"'))
    for (index, one), line in zip(lines, smoothed, strict=True):
        style = f'style="--k:var(--s{index % 8});stroke-dasharray:{DASHES[index % 8] or "none"}"'
        body.append(plot.path(one.x, line, "series", style))
    named = [(one, line) for (_, one), line in zip(lines, smoothed, strict=True)]
    body.append(plot.hovers(named, x_label, bool(smoothing)))
    key = legend([(one.name, index, True) for index, one in lines]) if len(lines) > 1 else ""
    return figure(title, key, join(body))


def bar_chart(
    groups: Sequence[str],
    series: dict[str, Sequence[float | None]],
    title: str,
    y_label: str = "",
    intervals: dict[str, Sequence[tuple[float, float] | None]] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Html:
    """Grouped bars: one cluster per group, one colour per series; ``intervals`` draw (low, high) whiskers.

    A value of None is a missing bar. The axis contains zero and ``y_range``, by which charts can share an axis.
    """
    intervals = intervals or {}
    values = [v for row in series.values() for v in row if v is not None and math.isfinite(v)]
    values += [edge for row in intervals.values() for pair in row if pair for edge in pair]
    if not values:
        return missing_chart(title, "nothing recorded")
    plot = _Plot(0, len(groups), ticks(min(0, *values, *(y_range or ())), max(0, *values, *(y_range or ()))))
    body = [plot.frame("", y_label, [])]
    room = min(0.76 / len(series), WIDEST_BAR / (plot.x(1) - plot.x(0)))
    names = [group if len(group) <= 22 else group[:21] + "…" for group in groups]
    turn, depth = plot.turn(names)
    for place, group in enumerate(groups):
        body.append(plot.group_label(place + 0.5, names[place], turn))
        for index, (name, row) in enumerate(series.items()):
            value = row[place]
            if value is None or not math.isfinite(value):
                continue
            left = place + 0.5 + (index - len(series) / 2) * room
            interval = intervals.get(name, [None] * len(groups))[place]
            words = [f"{group}", f"{name}: {short(value)}"]
            words += [f"interval {short(interval[0])} to {short(interval[1])}"] if interval else []
            body.append(plot.bar(left, left + room * 0.92, value, index, "\n".join(words), interval))
    key = legend([(name, index, False) for index, name in enumerate(series)]) if len(series) > 1 else ""
    return figure(title, key, join(body), HEIGHT + depth)


def point_chart(
    points: Sequence[tuple[str, float, float]],
    title: str,
    x_label: str = "",
    y_label: str = "",
    intervals: Sequence[tuple[float, float] | None] | None = None,
    line: Sequence[str] = (),
) -> Html:
    """One dot for each finite ``(name, x, y)``; ``intervals`` draw (low, high) whiskers of y.

    ``line``: names of points that a line connects, in its order.
    Up to ``NAMED_POINTS`` names stand beside their dots; more would cover each other and go into a legend.
    """
    intervals = intervals or [None] * len(points)
    shown = [
        (index, point, interval)
        for index, (point, interval) in enumerate(zip(points, intervals, strict=True))
        if math.isfinite(point[1]) and math.isfinite(point[2])
    ]
    if not shown:
        return missing_chart(title, "nothing recorded")
    xs = [x for _, (_, x, _), _ in shown]
    x_ticks = ticks(min(xs), max(xs))
    heights = [y for _, (_, _, y), _ in shown] + [edge for *_, pair in shown if pair for edge in pair]
    plot = _Plot(x_ticks[0], x_ticks[-1], ticks(min(heights), max(heights)))
    body = [plot.frame(x_label, y_label, x_ticks)]
    if line:
        at = {name: (x, y) for _, (name, x, y), _ in shown}
        across, up = zip(*(at[name] for name in line), strict=True)
        body.append(plot.path(across, up, "series raw", 'style="--k:var(--s0)"'))
    taken: list[tuple[float, float, float]] = []
    for index, (name, x, y), interval in sorted(shown, key=lambda one: one[1][2], reverse=True):
        named = len(shown) <= NAMED_POINTS
        body.append(plot.point(name, x, y, index, interval, taken if named else None))
    key = "" if len(shown) <= NAMED_POINTS else legend([(name, index, False) for index, (name, *_), _ in shown])
    return figure(title, key, join(body))


def histogram(
    values: Sequence[float],
    title: str,
    x_label: str = "",
    y_label: str = "count",
    bins: int = 20,
    x_range: tuple[float, float] | None = None,
) -> Html:
    """Counts of values in ``bins`` equal bins of ``x_range`` (default: theirs); those outside go to the end bins."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return missing_chart(title, "nothing recorded")
    low, high = x_range or (min(finite), max(finite))
    high = high if high > low else low + 1
    counts = [0] * bins
    for value in finite:
        counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    plot = _Plot(low, high, ticks(0, max(counts)))
    body = [plot.frame(x_label, y_label, [t for t in ticks(low, high) if low <= t <= high])]
    width = (high - low) / bins
    for index, count in enumerate(counts):
        left = low + index * width
        words = f"{short(left)} to {short(left + width)}\n{count:,} of {len(finite):,} ({count / len(finite):.1%})"
        body.append(plot.bar(left, left + width * 0.94, count, 0, words))
    return figure(title, "", join(body))


def missing_chart(title: str, reason: str) -> Html:
    """An empty chart with the reason why."""
    caption, text = f"<figcaption>{escape(title)}</figcaption>", f'<p class="quiet">{escape(reason)}</p>'
    return Html(f'<figure class="chart">{caption}{text}</figure>')


def figure(title: str, key: object, body: Html, height: int = HEIGHT) -> Html:
    """A chart: its title, its legend, and ``body`` in a drawing of ``WIDTH`` times ``height``."""
    label, box = escape(title), f"0 0 {WIDTH} {height}"
    return Html(
        f'<figure class="chart"><figcaption>{label}</figcaption>{escape(key)}'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{label}">{body}</svg></figure>'
    )


def legend(entries: Sequence[tuple[str, int, bool]]) -> Html:
    """Which colour is whose: name, number of the series, and whether it is a line."""
    keys = []
    for name, index, is_line in entries:
        color = f"--k:var(--s{index % 8})"
        mark = (
            f'<path class="series" style="{color};stroke-dasharray:{DASHES[index % 8] or "none"}" d="M1 6H23"/>'
            if is_line
            else f'<rect class="bar" style="{color}" x="6" width="12" height="12" rx="2"/>'
        )
        keys.append(Html(f'<span><svg viewBox="0 0 24 12" aria-hidden="true">{mark}</svg>{escape(name)}</span>'))
    return Html(f'<div class="legend">{join(keys)}</div>')


class _Plot:
    """The rectangle inside the axes: from data to drawing units, and what is drawn."""

    def __init__(self, x_low: float, x_high: float, y_ticks: list[float]):
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1
        self.y_ticks, self.y_low, self.y_high = y_ticks, y_ticks[0], y_ticks[-1]
        self.left = 24 + 6.6 * max(len(short(tick)) for tick in y_ticks)  # room for the axis' label and numbers

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        share = (min(max(value, self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_label: str, y_label: str, x_ticks: Sequence[float]) -> Html:
        """Grid lines with their numbers, the zero line or the bottom as axis, both labels."""
        parts = []
        base = 0 if self.y_low <= 0 <= self.y_high else self.y_low
        for tick in self.y_ticks:
            y, kind = self.y(tick), "axis" if tick == base else "grid"
            parts.append(f'<path class="{kind}" d="M{self.left} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
        for tick in x_ticks:
            place = f'x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text {place} text-anchor="middle">{short(tick)}</text>')
        if x_label:
            middle = (self.left + WIDTH - RIGHT) / 2
            parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        if y_label:
            place = f'transform="translate(9 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
            parts.append(f'<text {place} text-anchor="middle">{escape(y_label)}</text>')
        return Html("".join(parts))

    def path(self, xs: Sequence[float], ys: Sequence[float], kind: str, style: str) -> Html:
        """A line with gaps; the points of a short line, and a lone point between gaps, are dots."""
        runs: list[list[tuple[float, float]]] = [[]]
        for x, y in thin(xs, ys):
            if math.isfinite(y):
                runs[-1].append((self.x(x), self.y(y)))
            elif runs[-1]:
                runs.append([])
        few = sum(map(len, runs)) <= FEW_POINTS and "raw" not in kind
        lone = [point for run in runs if few or len(run) == 1 for point in run]
        moves = ["M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) for run in runs if len(run) > 1]
        dots = [f'<circle class="lone" {style} cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in lone]
        return Html(f'<path class="{kind}" {style} d="{"".join(moves)}"/>' + "".join(dots))

    def hovers(self, lines: Sequence[tuple[Series, list[float]]], x_label: str, smoothed: bool) -> Html:
        """Invisible columns over the plot, each with the values of the steps it covers last."""
        xs = sorted({x for one, _ in lines for x in one.x})
        stride = -(-len(xs) // HOVER_COLUMNS)
        places = xs[::-1][::stride][::-1]
        edges = [self.x(self.x_low), *((self.x(a) + self.x(b)) / 2 for a, b in pairwise(places)), self.x(self.x_high)]
        finite = [[i for i in range(len(one.x)) if math.isfinite(one.y[i])] for one, _ in lines]
        parts = []
        for place, (left, right) in zip(places, pairwise(edges), strict=True):
            words = [f"{x_label or 'x'} {short(place)}"]
            for (one, line), known in zip(lines, finite, strict=True):
                last = bisect_right(known, place, key=one.x.__getitem__) - 1
                if last >= 0:
                    at = known[last]
                    also = f" (smoothed {short(line[at])})" if smoothed else ""
                    words.append(f"{one.name}: {short(one.y[at])}{also}")
            box = f'x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
            parts.append(
                f'<g class="hover"><title>{escape(chr(10).join(words))}</title><rect class="hit" {box}/>'
                f'<path class="guide" d="M{self.x(place):.1f} {TOP}V{HEIGHT - BOTTOM}"/></g>'
            )
        return Html("".join(parts))

    def bar(self, left: float, right: float, value: float, index: int, words: str, interval=None) -> Html:
        top, bottom = sorted((self.y(value), self.y(min(max(0, self.y_low), self.y_high))))
        x0, x1 = self.x(left), self.x(right)
        whisker = ""
        if interval:
            middle, low, high = (x0 + x1) / 2, self.y(interval[0]), self.y(interval[1])
            whisker = f'<path class="whisker" d="M{middle - 3:.1f} {high:.1f}h6m-3 0V{low:.1f}m-3 0h6"/>'
        box = f'x="{x0:.1f}" y="{top:.1f}" width="{max(x1 - x0, 0.5):.1f}" height="{max(bottom - top, 0.5):.1f}"'
        color = f"--k:var(--s{index % 8})"
        return Html(
            f'<g class="hover"><title>{escape(words)}</title>'
            f'<rect class="bar" style="{color}" {box} rx="1.5"/>{whisker}</g>'
        )

    def point(self, name: str, x: float, y: float, index: int, interval, taken: list | None) -> Html:
        """A dot with its name beside it, below the names in ``taken`` (left, right, height) that it would cover.

        Without ``taken`` the name shows on hover only.
        """
        words = [name, f"{short(x)}, {short(y)}"]
        words += [f"interval {short(interval[0])} to {short(interval[1])}"] if interval else []
        at, height, width = self.x(x), self.y(y), 6.4 * len(name)
        to_left = at + 8 + width > WIDTH
        left, right = (at - 8 - width, at - 8) if to_left else (at + 8, at + 8 + width)
        base = height + 4
        for low, high, other in sorted(taken or (), key=lambda one: one[2]):
            if low < right and left < high and abs(base - other) < 12:
                base = other + 12
        whisker = ""
        if interval:
            whisker = f'<path class="whisker" d="M{at:.1f} {self.y(interval[0]):.1f}V{self.y(interval[1]):.1f}"/>'
        label = ""
        if taken is not None:
            taken.append((left, right, base))
            anchor = f'x="{right:.1f}" text-anchor="end"' if to_left else f'x="{left:.1f}"'
            label = f'<text {anchor} y="{base:.1f}">{escape(name)}</text>'
        return Html(
            f'<g class="hover"><title>{escape(chr(10).join(words))}</title>{whisker}'
            f'<circle class="dot" style="--k:var(--s{index % 8})" cx="{at:.1f}" cy="{height:.1f}" r="4"/>{label}</g>'
        )

    def turn(self, names: Sequence[str]) -> tuple[int, int]:
        """The angle of all names under the clusters, in degrees, at which none touches its neighbour, and the room that
        they then need below the drawing."""
        longest, room = 6.2 * max(map(len, names)), (WIDTH - self.left - RIGHT) / len(names)
        if longest <= room:
            return 0, 0
        angle = 28 if room * math.sin(math.radians(28)) >= 12 else 50
        return angle, max(0, math.ceil(longest * math.sin(math.radians(angle))) + 16 - BOTTOM)

    def group_label(self, place: float, name: str, turn: int) -> Html:
        """A name under a cluster, turned by so many degrees."""
        x, y = self.x(place), HEIGHT - BOTTOM + 15
        if not turn:
            return Html(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(name)}</text>')
        place_and_turn = f'transform="translate({x + 3:.1f} {y - 3}) rotate({-turn})"'
        return Html(f'<text {place_and_turn} text-anchor="end">{escape(name)}</text>')


def thin(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """At most about ``MOST_POINTS`` points, with the extremes of every bucket, so that no spike disappears."""
    points = list(zip(xs, ys, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    size, kept = -(-2 * len(points) // MOST_POINTS), []
    for start in range(0, len(points), size):
        bucket = [point for point in points[start : start + size] if math.isfinite(point[1])]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])} if bucket else {points[start]}
        kept += sorted(ends, key=lambda p: p[0])
    return kept
