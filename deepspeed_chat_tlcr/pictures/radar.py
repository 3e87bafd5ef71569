"""Radar charts: several models over the same categories, as inline SVG like the other charts."""

import math
from collections.abc import Mapping, Sequence

from deepspeed_chat_tlcr.pictures.charts import DASHES, WIDTH, figure, legend, missing_chart, short
from deepspeed_chat_tlcr.pictures.text import Html, escape, join

HEIGHT, RADIUS, RINGS = 300, 104, 5


def radar_chart(axes: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, most: float) -> Html:
    """One corner for each of at least three ``axes``, from 0 in the middle to ``most``; None leaves a corner open.

    The hover text of each corner lists every series' value there.
    """
    lines = [(index, name, row) for index, (name, row) in enumerate(series.items()) if any(map(known, row))]
    if len(axes) < 3 or not lines:
        return missing_chart(title, "nothing recorded" if not lines else "a radar needs three categories")
    centre = (WIDTH / 2, HEIGHT / 2)

    def at(place: float, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * place / len(axes) - math.pi / 2
        reach = RADIUS * min(max(value, 0), most) / most
        return centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle)

    def polygon(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    body = []
    for ring in range(1, RINGS + 1):
        corners = polygon([at(place, most * ring / RINGS) for place in range(len(axes))])
        body.append(Html(f'<polygon class="grid" fill="none" points="{corners}"/>'))
    x, y = at(0, most)
    body.append(Html(f'<text x="{x + 4:.1f}" y="{y + 12:.1f}">{escape(short(most))}</text>'))
    for index, _, row in lines:
        color = f"--k:var(--s{index % 8})"
        points = [at(place, value) for place, value in enumerate(row) if known(value)]
        dash = f"stroke-dasharray:{DASHES[index % 8] or 'none'}"
        body.append(Html(f'<polygon class="series" style="{color};{dash}" points="{polygon(points)}"/>'))
        body += [Html(f'<circle class="lone" style="{color}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>') for x, y in points]
    for place, name in enumerate(axes):
        # The spoke, its name, and the wedge that shows the values under the pointer.
        x, y = at(place, most)
        label_x, label_y = centre[0] + (x - centre[0]) * 1.1, centre[1] + (y - centre[1]) * 1.14 + 4
        side = "middle" if abs(x - centre[0]) < 8 else "start" if x > centre[0] else "end"
        words = [name, *(f"{one}: {short(row[place]) if known(row[place]) else '—'}" for _, one, row in lines)]
        wedge = polygon([centre, at(place - 0.5, most), at(place, most), at(place + 0.5, most)])
        body.append(
            Html(
                f'<text x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{side}">{escape(name)}</text>'
                f'<g class="hover"><title>{escape(chr(10).join(words))}</title><polygon class="hit" points="{wedge}"/>'
                f'<path class="grid" d="M{centre[0]:.1f} {centre[1]:.1f}L{x:.1f} {y:.1f}"/></g>'
            )
        )
    key = legend([(name, index, True) for index, name, _ in lines]) if len(lines) > 1 else ""
    return figure(title, key, join(body), HEIGHT)


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
