"""Token heat-maps (paper Figure 8): green positive, red negative, intensity ``|2D - 1|``; in HTML and in a terminal."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.style import Style
from rich.text import Text

from deepspeed_chat_tlcr.pictures.colors import DARK, LIGHT, Theme, strength, token_color
from deepspeed_chat_tlcr.pictures.text import Html, escape, join, long_text, shorten, visible

NEUTRAL = 0.2  # |2D - 1| below this is the paper's neutral zone, max(D, 1 - D) < 0.6 (section 4.3)
LONG_TOKEN = 80


@dataclass(frozen=True)
class TokenScores:
    """The tokens of one text and a value for each.

    ``tokens``: display strings (``token_strings``). ``values``: one reward ``2D - 1`` in [-1, 1] per token, None for a
    prompt's tokens. ``kind``: "reward"; "label" for values ``2 target - 1``; "value" for rewards of another kind, whose
    strength is cut at 1.
    """

    tokens: Sequence[str]
    values: Sequence[float | None]
    caption: str = ""
    kind: Literal["reward", "label", "value"] = "reward"

    def __post_init__(self):
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.values)} values")

    @classmethod
    def from_probs(cls, tokens: Sequence[str], positive_probs: Sequence[float], caption: str = "") -> "TokenScores":
        """From the discriminator's ``D`` in [0, 1] (Eq. 7)."""
        return cls(tokens, [2 * float(prob) - 1 for prob in positive_probs], caption)

    @classmethod
    def from_targets(cls, tokens: Sequence[str], targets: Sequence[float], caption: str = "") -> "TokenScores":
        """From labels: 0.0 negative, 0.5 neutral, 1.0 positive (Eq. 4-5)."""
        return cls(tokens, [2 * float(target) - 1 for target in targets], caption, "label")

    def hover(self, index: int) -> str:
        """A token's tooltip: the token, then D and reward, or the label."""
        value, token = self.values[index], shorten(self.tokens[index], LONG_TOKEN)
        token = f"“{visible(token)}”" if token else "part of the next character"
        token = token.replace("\n", "↵").replace("\t", "⇥")
        if value is None or math.isnan(value):
            return f"{token}\nno score"
        if self.kind == "label":
            meaning = "positive" if value > 0 else "negative" if value < 0 else "neutral"
            return f"{token}\nlabel {(value + 1) / 2:g}, {meaning}"
        if self.kind == "value":
            return f"{token}\nreward {value:+.3f}".replace("-", "−")
        return f"{token}\nD = {(value + 1) / 2:.3f}\nreward 2D − 1 = {value:+.3f}".replace("-", "−")


@dataclass(frozen=True)
class Sample:
    """A prompt and the texts under it: answers of several policies, or a revision's labels beside its rewards."""

    prompt: str
    texts: Sequence[TokenScores]
    title: str = ""
    note: str = ""


def sample_html(sample: Sample) -> Html:
    """Title, prompt, then the texts as heat-maps, two beside each other where the screen is wide enough."""
    parts = [Html(f"<h3>{escape(sample.title)}</h3>")] if sample.title else []
    parts += [long_text(sample.prompt.strip("\n"))] if sample.prompt else []
    maps = Html(f'<div class="columns">{join([heatmap_html(text) for text in sample.texts])}</div>')
    note = Html(f'<p class="note">{escape(sample.note)}</p>') if sample.note else ""
    return join([Html('<div class="sample">'), *parts, maps, note, Html("</div>")])


def heatmap_html(scores: TokenScores) -> Html:
    """One text as coloured tokens; hovering or touching a token shows its value.

    The style sheet marks newlines and unusual spaces, so that copied text is unchanged. A token longer than
    ``LONG_TOKEN`` characters is folded; a click shows all of it.
    """
    caption = f"<figcaption>{escape(scores.caption)}</figcaption>" if scores.caption else ""
    tokens = join([_token_html(scores, index) for index in range(len(scores.tokens))])
    body = tokens or Html('<span class="quiet">(empty)</span>')
    return Html(f'<figure class="heatmap">{caption}<div class="tokens" dir="auto">{body}</div></figure>')


def _token_html(scores: TokenScores, index: int) -> Html:
    token, value = scores.tokens[index], scores.values[index]
    amount = strength(value)
    sign = "" if amount == 0 else " p" if value > 0 else " n"
    style = f' style="--v:{amount:.3f}"' if amount else ""
    opening = f'class="t{sign}{" u" if amount >= NEUTRAL else ""}"{style} title="{escape(scores.hover(index))}"'
    space, token = leading_space(token)
    if len(token) > LONG_TOKEN:
        summary = escape(shorten(token, LONG_TOKEN))
        return Html(f"{space}<details {opening}><summary>{summary}</summary>{_whitespace(token)}</details>")
    return Html(f"{space}<span {opening}>{_whitespace(token) or '<i class=part></i>'}</span>")


def leading_space(token: str) -> tuple[str, str]:
    """A single space before a word, which stays uncoloured so that lines break cleanly, and the rest of the token."""
    return (" ", token[1:]) if re.match(r" [^ \n\t]", token) else ("", token)


def _whitespace(token: str) -> Html:
    """Mark newlines, tabs, and all spaces but single ones between words."""
    text = re.sub(r"(?<=[^ \n\t]) (?=[^ \n\t])", "\0", escape(token))  # hides the ordinary spaces
    text = re.sub(r"[\n\t ]", lambda mark: f'<i class="{_MARKS[mark[0]]}">{mark[0]}</i>', text)
    return Html(text.replace("\0", " "))


_MARKS = {"\n": "nl", "\t": "tab", " ": "sp"}


def legend_html(kind: Literal["reward", "label"] = "reward") -> Html:
    """The colour scale in one line."""
    if kind == "label":
        words = (("n", 1, "negative: deleted or replaced"), ("", 0, "neutral"), ("p", 1, "positive: added or replaced"))
        swatches = [f'<span class="t {sign} u" style="--v:{amount}">{word}</span>' for sign, amount, word in words]
        return Html(f'<p class="legend scale">{" ".join(swatches)}</p>')
    steps = [step / 5 for step in range(-5, 6)]
    cells = [f'<i class="t {"n" if v < 0 else "p"}" style="--v:{abs(v)}"></i>' for v in steps]
    return Html(
        '<p class="legend scale"><span>reward 2D − 1:</span> '
        f'<span>negative −1<span class="ramp">{"".join(cells)}</span>+1 positive</span></p>'
    )


def explained(*kinds: Literal["reward", "label"]) -> Html:
    """The legends above heat-maps, and how to read them."""
    hint = (
        "Hover over a token, or touch it, for its values. Tokens outside the neutral zone, max(D, 1 − D) ≥ 0.6, are "
        "underlined: straight where positive, in waves where negative."
    )
    return join([*map(legend_html, kinds), Html(f'<p class="note">{escape(hint)}</p>')])


def heatmap_terminal(scores: TokenScores, console: Console, theme: Theme | None = None) -> Text:
    """Coloured tokens to print on ``console``; negative ones are also underlined.

    ``theme``: LIGHT or DARK; None: as the terminal says its background is (``COLORFGBG``), else DARK. Without colours
    (a pipe, ``NO_COLOR``), tokens outside the neutral zone are bracketed as in wdiff: ``[-negative-]``,
    ``{+positive+}``. Control characters are spelled out.
    """
    background = os.environ.get("COLORFGBG", "").split(";")[-1]
    theme = theme or (LIGHT if background in ("7", "15") else DARK)
    plain = console.color_system is None or console.no_color
    line = Text(overflow="fold")
    for token, value in zip(scores.tokens, scores.values, strict=True):
        text = visible(shorten(token, LONG_TOKEN)).replace("\t", "⇥") or "‥"
        amount = strength(value)
        space, text = leading_space(text)
        line.append(space)
        if plain and amount >= NEUTRAL:
            shown = text.replace("\n", "↵")
            line.append("{+" + shown + "+}" if value > 0 else "[-" + shown + "-]")
            line.append("\n" * text.count("\n"))
            continue
        for part in re.split("(\n)", text):
            line.append("↵" if part == "\n" else part, _terminal_style(value, amount, console, theme))
            line.append("\n" if part == "\n" else "")
    return line


def _terminal_style(value: float | None, amount: float, console: Console, theme: Theme) -> Style:
    if amount < 0.02:
        return Style.null()
    if console.color_system == "standard":  # sixteen colours have no shades, so the neutral zone stays uncoloured
        color = "green" if value > 0 else "red"
        return Style(color="black", bgcolor=color, underline=value < 0) if amount >= NEUTRAL else Style.null()
    background, ink = token_color(value, theme), theme.ink
    return Style(
        color=f"rgb({ink[0]},{ink[1]},{ink[2]})",
        bgcolor=f"rgb({background[0]},{background[1]},{background[2]})",
        underline=value < 0 and amount >= NEUTRAL,
    )
