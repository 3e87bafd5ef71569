"""The same pictures as PNG files for a README or a paper, drawn with matplotlib (imported only when called)."""

from collections.abc import Sequence
from pathlib import Path

from deepspeed_chat_tlcr.pictures.charts import DASHES, Series, smooth
from deepspeed_chat_tlcr.pictures.colors import LIGHT, strength, token_color
from deepspeed_chat_tlcr.pictures.heatmap import LONG_TOKEN, NEUTRAL, TokenScores, leading_space
from deepspeed_chat_tlcr.pictures.text import shorten, visible

_QUIET = "#686c72"


def heatmap_png(path: str | Path, texts: Sequence[TokenScores]) -> None:
    """Texts under one another as coloured tokens, each below its caption; 9 inches wide, as high as needed."""
    width, font_size = 9.0, 11.0
    from matplotlib.patches import Rectangle

    figure, axes = _figure(width, 1.0)
    axes.set_axis_off()
    measure = figure.canvas.get_renderer()
    line = font_size * 1.9 / 72 * figure.dpi
    right, x, y = width * figure.dpi - 20, 20.0, 20.0
    drawn: list[tuple[float, float, str, float, float | None]] = []

    def extent(text: str, size: float) -> float:
        # Matplotlib measures no trailing space, so a mark behind it is measured too and subtracted.
        drawing = axes.text(0, 0, text + "|", fontsize=size, parse_math=False)
        both = drawing.get_window_extent(measure).width
        drawing.set_text("|")
        alone = drawing.get_window_extent(measure).width
        drawing.remove()
        return both - alone

    for scores in texts:
        drawn.append((20.0, y, visible(scores.caption), 0.0, None))
        x, y = 20.0, y + line
        for token, value in zip(scores.tokens, scores.values, strict=True):
            space, token = leading_space(token)
            x += extent(space, font_size) if space and x > 20.0 else 0.0
            for part in visible(shorten(token, LONG_TOKEN)).replace("\t", "    ").replace("\n", "↵\n").splitlines(True):
                shown = part.rstrip("\n") or "‥"
                size = extent(shown, font_size)
                if x + size > right and x > 20.0:
                    x, y = 20.0, y + line
                drawn.append((x, y, shown, size, value))
                x += size
                if part.endswith("\n"):
                    x, y = 20.0, y + line
        y += line * 1.5
    height = y
    figure.set_size_inches(width, height / figure.dpi)
    axes.set(xlim=(0, width * figure.dpi), ylim=(height, 0), position=(0, 0, 1, 1))
    for x, y, text, size, value in drawn:
        caption = size == 0.0
        if strength(value):
            color = [channel / 255 for channel in token_color(value)]
            axes.add_patch(Rectangle((x, y - line * 0.02), size - 1, line * 0.84, facecolor=color, edgecolor="none"))
            if value < 0 and strength(value) >= NEUTRAL:
                axes.plot([x, x + size - 1], [y + line * 0.8] * 2, color="#b2340a", lw=1.2, ls=(0, (1, 1)))
        axes.text(
            x,
            y + line * 0.58,
            text,
            fontsize=font_size * (0.85 if caption else 1),
            color=_QUIET if caption else [channel / 255 for channel in LIGHT.ink],
            verticalalignment="baseline",
            parse_math=False,
        )
    figure.savefig(path)


def line_chart_png(
    path: str | Path, series: Sequence[Series], title: str, x_label: str = "", y_label: str = "", smoothing: float = 0.0
) -> None:
    """``line_chart`` as a PNG of 6.0 x 3.6 inches."""
    figure, axes = _figure(6.0, 3.6)
    for place, one in enumerate(series):
        index = place if one.color is None else one.color
        color = LIGHT.series[index % 8]
        if one.low is not None:
            axes.fill_between(one.x, one.low, one.high, color=color, alpha=0.16, lw=0)
        if smoothing:
            axes.plot(one.x, one.y, color=color, alpha=0.3, lw=0.8)
        dashes = (0, tuple(map(int, DASHES[index % 8].split()))) if DASHES[index % 8] else "-"
        ys = smooth(one.y, smoothing) if smoothing else one.y
        axes.plot(one.x, ys, color=color, ls=dashes, lw=1.8, label=visible(one.name))
    # Texts are drawn as they are: a dollar sign does not begin a formula.
    axes.set_facecolor("none")
    axes.set_title(visible(title), loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel(visible(x_label), color=_QUIET, parse_math=False)
    axes.set_ylabel(visible(y_label), color=_QUIET, parse_math=False)
    axes.tick_params(colors=_QUIET, length=0, labelsize=9)
    axes.grid(axis="y", color="#e0e0db", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    if len(series) > 1:
        for text in axes.legend(frameon=False, fontsize=9).get_texts():
            text.set_parse_math(False)
    figure.tight_layout()
    figure.savefig(path)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=f"#{bytes(LIGHT.paper).hex()}")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
