"""The colours of all pictures, for light and dark surroundings, which the colour-blind can tell apart."""

import math
from dataclasses import dataclass

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Background, text, both ends of the token colours, and the colours of up to eight series of a chart."""

    paper: Color
    ink: Color
    positive: Color
    negative: Color
    series: tuple[str, ...]

    def css_variables(self) -> str:
        names = {"paper": self.paper, "ink": self.ink, "pos": self.positive, "neg": self.negative}
        lines = [f"--{name}: {r} {g} {b};" for name, (r, g, b) in names.items()]
        return " ".join(lines + [f"--s{index}: {color};" for index, color in enumerate(self.series)])


# Blue-green against orange-red differ under all three colour blindnesses, the light theme's also in lightness, and ink
# stays readable on both at full strength (contrast of at least 4.5).
LIGHT = Theme(
    paper=(253, 253, 252),
    ink=(28, 30, 33),
    positive=(84, 202, 176),
    negative=(238, 110, 62),
    series=("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#946200", "#1864ab", "#495057"),
)
DARK = Theme(
    paper=(20, 23, 26),
    ink=(240, 240, 236),
    positive=(0, 120, 104),
    negative=(158, 50, 18),
    series=("#4dd0e1", "#ff8a5c", "#b197fc", "#69db7c", "#f783ac", "#ffd43b", "#74c0fc", "#ced4da"),
)


def strength(value: float | None) -> float:
    """How strongly a token is coloured: ``|value|``, at most 1. None and NaN have no colour."""
    return 0.0 if value is None or math.isnan(value) else min(1.0, abs(value))


def token_color(value: float | None, theme: Theme = LIGHT) -> Color:
    """Background of a token: the theme's paper, blended towards positive or negative by ``|value|``."""
    amount, full = strength(value), theme.positive if (value or 0) > 0 else theme.negative
    red, green, blue = (round(p + (f - p) * amount) for p, f in zip(theme.paper, full, strict=True))
    return red, green, blue
