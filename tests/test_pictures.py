"""Pictures: hostile text stays text, colours and charts say what the numbers say, and the entry points work."""

import base64
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import patience
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.pictures import (
    DARK,
    LIGHT,
    Html,
    Sample,
    Series,
    TokenScores,
    bar_chart,
    columns,
    escape,
    heatmap_html,
    heatmap_terminal,
    histogram,
    legend_html,
    line_chart,
    long_text,
    page,
    point_chart,
    radar_chart,
    sample_html,
    shorten,
    smooth,
    table_html,
    token_color,
    token_strings,
    visible,
)
from deepspeed_chat_tlcr.pictures.charts import MOST_POINTS, thin, ticks
from deepspeed_chat_tlcr.pictures.png import heatmap_png, line_chart_png
from deepspeed_chat_tlcr.records import Preference, Revision
from evaluation.published import PUBLISHED
from labeling import show
from testbed.report import duration, verdict, write_report

ROOT = Path(__file__).parents[1]
VOID = {"meta", "br", "img", "path", "rect", "circle", "polygon", "input", "link"}

HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></title></div></body></html>",
    '" onmouseover="alert(2)" x="',
    "' onfocus='alert(3)",
    "<img src=x onerror=alert(4)>",
    "<!--",
    "]]>",
    "&lt;b&gt;&amp;&#60;",
    "javascript:alert(5)",
    "${alert(6)}{{7*7}}%s",
    "\u202egnp.exe",  # right-to-left override
    "\u2066\u2069\u200f\u061c",
    "\x1b[31mred\x1b]0;title\x07",
    "\x00\x08\r\x7f\x85\x9b",
    "\ud800",  # lone surrogate
    "\ufffe\uffff\u2028\U000e0041",
    "zero\u200bwidth\ufeff",
    "مرحبا 字 👩\u200d💻",
    "a\n\tb  c ",
]


class Parsed(HTMLParser):
    """Elements, attributes, and the text by element class, as a browser's parser would see them."""

    def __init__(self, document: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.stack, self.texts = [], [], [], []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.stack.append((tag, dict(attributes).get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.stack, f"stray </{tag}>"
        assert self.stack.pop()[0] == tag, f"misplaced </{tag}>"

    def handle_data(self, data):
        self.texts.append((tuple(self.stack), data))

    def text(self, tag: str, kind: str) -> str:
        return "".join(data for stack, data in self.texts if (tag, kind) in stack)


def assert_harmless(parsed: Parsed, scripts: int = 0) -> None:
    assert parsed.tags.count("script") == scripts
    assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & set(parsed.tags)
    for tag, name, value in parsed.attributes:
        assert not name.startswith("on"), (tag, name, value)
        assert name not in ("src", "srcset", "action", "formaction"), (tag, name, value)
        assert name != "href" or value.startswith("#"), (tag, name, value)
    assert not parsed.stack


def safe(character: str) -> bool:
    """An independent list of what may be shown: no controls, surrogates, formats except joiners, separators."""
    kind = unicodedata.category(character)
    return character in "\n\t\u200c\u200d" or (
        kind not in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\ufffe\uffff"
    )


# --- radar ---


def test_a_radar_lists_every_models_value_at_each_corner_and_leaves_gaps():
    drawn = radar_chart(["math", "<b>", "stem"], {"sft": [5.0, None, 10.0], "tlcr": [7.5, 2.0, 1.0]}, "R", 10)
    parsed = Parsed(drawn)
    assert_harmless(parsed)
    titles = [data for stack, data in parsed.texts if stack and stack[-1][0] == "title"]
    assert titles == ["math\nsft: 5\ntlcr: 7.5", "<b>\nsft: —\ntlcr: 2", "stem\nsft: 10\ntlcr: 1"]
    lines = re.findall(r'<polygon class="series"[^>]*points="([^"]*)"', drawn)
    assert [len(points.split()) for points in lines] == [2, 3]
    # math stands straight above the middle (190, 150), half of the radius of 104 away.
    assert lines[0].split()[0] == "190.0,98.0"
    assert "three categories" in radar_chart(["a", "b"], {"x": [1, 2]}, "R", 10)
    assert "nothing recorded" in radar_chart(["a", "b", "c"], {"x": [None] * 3}, "R", 10)


# --- text ---


def test_visible_spells_out_everything_that_acts_and_keeps_the_rest():
    assert visible("\x1b[1m \u202e \ud800 \x00 \r") == r"\x1b[1m \u202e \ud800 \x00 \r"
    kept = "a\n\tb ß 字 👩\u200d💻 é … \ufffd مرحبا"
    assert visible(kept) == kept
    everything = "".join(map(chr, range(0x110000)))
    shown = visible(everything)
    shown.encode("utf-8")
    assert [hex(ord(c)) for c in shown if not safe(c) and ord(c) < 0xE0000] == [
        # Cf beyond the basic plane that draw or only annotate music and shorthand, hieroglyphs and Kaithi numbers
        hex(code)
        for code in [0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440), *range(0x1BCA0, 0x1BCA4)]
        + [*range(0x1D173, 0x1D17B)]
        if unicodedata.category(chr(code)) == "Cf"
    ]


def test_escape_takes_only_html_as_html():
    assert escape("<b>\"'&") == "&lt;b&gt;&quot;&#x27;&amp;"
    assert escape(Html("<b>")) == "<b>"
    assert columns("<i>") == '<div class="columns">&lt;i&gt;</div>'


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_survives_as_text_in_every_builder(text):
    scores = TokenScores([text, "ok"], [0.5, -0.5], caption=text)
    document = page(
        text,
        [(text, sample_html(Sample(text, [scores], text, text))), ("plain", text)],
        lead=text,
    )
    parsed = Parsed(document)
    assert_harmless(parsed, scripts=1)
    assert parsed.text("div", "tokens") == visible(text) + "ok"
    assert parsed.text("h1", "") == visible(text)
    assert all(safe(character) for character in document)
    fragment = Parsed(
        table_html([text, "n"], [[text, 1.5]], text)
        + line_chart([Series(text, [1, 2], [3, 4]), Series("b", [1, 2], [3, 5])], text, text, text)
        + bar_chart([text], {text: [1.0], "b": [2.0]}, text, text)
    )
    assert_harmless(fragment)
    assert fragment.text("th", "").count(visible(text)) == 2


def test_a_token_of_100_kb_is_folded_with_the_whole_in_reach():
    token = "<b>" + "x" * 100_000
    markup = heatmap_html(TokenScores(["a", token], [0.0, 1.0]))
    parsed = Parsed(markup)
    summary = parsed.text("summary", "")
    assert len(summary) < 130
    assert "99,923 more characters" in summary
    assert parsed.text("div", "tokens") == "a" + summary + token
    titles = [value for _, name, value in parsed.attributes if name == "title"]
    assert max(map(len, titles)) < 200
    folded = Parsed(long_text("y" * 5000, 1000))
    assert folded.text("details", "text").endswith("y" * 5000)
    assert shorten("abc", 3) == "abc"


def test_whitespace_is_marked_without_changing_the_text():
    markup = heatmap_html(TokenScores([" word", "\n", "  ", "\t", " ", "", " a b"], [1.0] * 7))
    parsed = Parsed(markup)
    assert parsed.text("div", "tokens") == " word\n  \t  a b"
    marks = [value for tag, name, value in parsed.attributes if tag == "i" and name == "class"]
    assert marks == ["nl", "sp", "sp", "tab", "sp", "part"]
    # The space before a word stays uncoloured: it stands before the token's element.
    assert markup.count('"> <span') + markup.count("</span> <span") == 2


# --- values ---


def test_hover_says_token_d_and_reward_or_the_label():
    assert TokenScores.from_probs([" yes"], [0.9]).hover(0) == "“ yes”\nD = 0.900\nreward 2D − 1 = +0.800"
    assert TokenScores.from_targets(["no\n"], [0.0]).hover(0) == "“no↵”\nlabel 0, negative"
    assert TokenScores.from_targets(["no"], [0.5]).hover(0) == "“no”\nlabel 0.5, neutral"
    assert TokenScores(["p"], [None]).hover(0) == "“p”\nno score"
    with pytest.raises(ValueError, match="2 tokens but 1 values"):
        TokenScores(["a", "b"], [0.0])


def test_html_strength_is_the_absolute_reward_and_the_class_its_sign():
    markup = heatmap_html(TokenScores(list("abcdef"), [1.0, -0.5, 0.0, None, math.nan, -7.0]))
    spans = re.findall(r'<span class="([^"]*)"(?: style="--v:([\d.]+)")?', markup)
    assert spans == [
        ("t p u", "1.000"),
        ("t n u", "0.500"),
        ("t", ""),
        ("t", ""),
        ("t", ""),
        ("t n u", "1.000"),
    ]
    # Underlined outside the paper's neutral zone only: max(D, 1 - D) >= 0.6 is |2D - 1| >= 0.2.
    assert 'class="t p"' in heatmap_html(TokenScores(["a"], [0.19]))
    assert 'class="t p u"' in heatmap_html(TokenScores(["a"], [0.2]))


def linear(color):
    channel = np.array(color) / 255
    return np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    light, dark = sorted((linear(color) @ [0.2126, 0.7152, 0.0722] for color in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_grow_with_the_reward_and_stay_readable(theme):
    for sign in (1, -1):
        colors = [np.array(token_color(sign * step / 20, theme)) for step in range(21)]
        distances = [np.linalg.norm(color - np.array(theme.paper)) for color in colors]
        assert distances[0] == 0
        assert all(b > a for a, b in pairwise(distances))
        assert all(contrast(color, theme.ink) >= 4.5 for color in colors)
    assert token_color(None, theme) == token_color(math.nan, theme) == theme.paper
    assert token_color(9.0, theme) == theme.positive
    assert all(contrast([int(hue[i : i + 2], 16) for i in (1, 3, 5)], theme.paper) >= 3 for hue in theme.series)


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "full": np.eye(3).tolist(),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(rgb):
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("kind", VISION)
def test_everyone_can_tell_positive_from_negative(theme, kind):
    seen = [oklab(np.array(VISION[kind]) @ linear(color)) for color in (theme.positive, theme.negative)]
    # A just noticeable difference is about 0.02.
    assert np.linalg.norm(seen[0] - seen[1]) > (0.2 if kind == "full" else 0.1)


def test_the_page_draws_the_same_colours_as_everything_else():
    style = page("t", [("s", legend_html())])
    for theme in (LIGHT, DARK):
        for name, color in (("paper", theme.paper), ("pos", theme.positive), ("neg", theme.negative)):
            assert f"--{name}: {color[0]} {color[1]} {color[2]};" in style


def test_the_page_lets_only_its_own_script_run_and_loads_nothing():
    document = page("t", [("a", "b")])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', document)[1]
    script = re.search(r"<script>(.*?)</script>", document, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.replace("style-src 'unsafe-inline'", "")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", document)


# --- tokens of a tokenizer ---


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and that was that"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def byte_fallback():
    """As Llama's: words with ▁ for the space, everything else as <0xNN>."""
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{code:02X}>": code + 2 for code in range(256)}}
    for piece in ["▁", "t", "h", "e", "c", "a", "th", "the", "▁the", "ca", "cat", "▁cat", "t"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TEXTS = ["the cat", "the cat  the\n\ncat", "字字 the 👩\u200d💻cat é", "café 東京 мир", "\ufffd the", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_token_strings_join_to_the_text(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    strings = token_strings(tokenizer, ids)
    assert len(strings) == len(ids)
    assert "".join(strings) == text + "</s>"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_belongs_to_the_token_that_completes_it(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer("字the", add_special_tokens=False)["input_ids"]
    strings = token_strings(tokenizer, ids)
    first = strings.index("字")
    assert strings[first - 2 : first] == ["", ""]  # its first two bytes
    broken = [*ids[first - 2 : first], *tokenizer(" the", add_special_tokens=False)["input_ids"]]
    assert "�" in "".join(token_strings(tokenizer, broken))
    assert "the" in "".join(token_strings(tokenizer, broken))
    assert token_strings(tokenizer, ids[first - 2 : first])[-1].startswith("�")  # it ends inside a character
    assert token_strings(tokenizer, [999_999]) == ["<id 999999>"]
    assert token_strings(tokenizer, []) == []


def test_sentencepiece_keeps_the_space_before_a_response(byte_fallback):
    ids = byte_fallback("the cat", add_special_tokens=False)["input_ids"]
    assert token_strings(byte_fallback, ids) == ["the", " cat"]


# --- terminal ---


def printed(scores, **options) -> str:
    console = Console(file=io.StringIO(), **{"width": 60, "legacy_windows": False, **options})
    console.print(heatmap_terminal(scores, console, DARK))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [1, 12, 80])
def test_piped_terminal_output_is_plain_text_with_marks(width):
    scores = TokenScores(["Ok", " good", " bad", " so", "\n", " ?"], [0.1, 0.9, -0.9, -0.19, 1.0, None])
    text = printed(scores, width=width)
    assert "".join(text.split()) == "Ok{+good+}[-bad-]so{+↵+}?"
    assert max(map(len, text.splitlines())) <= width


def test_no_color_gives_marks_on_a_terminal_too(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(TokenScores([" good", " bad"], [0.9, -0.9]), force_terminal=True, color_system="truecolor")
    assert text.strip("\n") == " {+good+} [-bad-]"


def test_colours_in_a_terminal_are_the_theme_and_negative_is_underlined():
    text = printed(TokenScores(["up", "down", "flat"], [1.0, -1.0, 0.0]), force_terminal=True, color_system="truecolor")
    r, g, b = DARK.positive
    assert f"48;2;{r};{g};{b}mup\x1b[0m" in text
    r, g, b = DARK.negative
    assert re.search(rf"\x1b\[4;[^m]*48;2;{r};{g};{b}mdown\x1b\[0mflat", text)
    sixteen = printed(TokenScores(["up", "down"], [1.0, -0.1]), force_terminal=True, color_system="standard")
    assert sixteen == "\x1b[30;42mup\x1b[0mdown\n"


@pytest.mark.parametrize("color_system", [None, "standard", "truecolor"])
@pytest.mark.parametrize("text", HOSTILE)
def test_no_control_character_reaches_the_terminal(text, color_system):
    shown = printed(
        TokenScores([text], [-1.0]), width=200, force_terminal=color_system is not None, color_system=color_system
    )
    without_styles = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert all(safe(character) for character in without_styles)
    if not re.search(r"\s", text):
        assert visible(text) in without_styles


# --- charts ---


def svg_of(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup).findall(".//{*}svg")[-1]


@pytest.mark.parametrize("text", HOSTILE)
def test_charts_are_well_formed_xml(text):
    series = [Series(text, [0, 1, 2], [0.0, math.nan, 2.0], [0, 0, 1], [1, 1, 3]), Series("b", [0, 1, 2], [1, 2, 3])]
    svg = svg_of(line_chart(series, text, text, text, smoothing=0.5))
    titles = ["".join(title.itertext()) for title in svg.findall(".//{*}title")]
    # A line ends where its values do; the middle one of the other is their mean, (1/2 + 2 + 3/2) / 2.
    assert titles[-1] == f"{visible(text)} 2\n{visible(text)}: 2 (smoothed 2)\nb: 3 (smoothed 3)"
    svg_of(bar_chart([text, "x"], {text: [1.0, None], "b": [-2.0, math.nan]}, text, text, {text: [(0.5, 1.5), None]}))
    svg_of(histogram([1.0, 2.0], text, text))


def points_of(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair]


def test_a_line_goes_through_its_values():
    svg = svg_of(line_chart([Series("a", [0, 5, 10], [0.0, 1.0, 0.5])], "t"))
    points = points_of(svg.find(".//{*}path[@class='series']").get("d"))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0  # down is larger in SVG
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_gap_splits_the_line_and_a_lone_point_is_a_dot():
    xs = list(range(20))
    ys = [1.0, math.nan, *[2.0] * 18]
    svg = svg_of(line_chart([Series("a", xs, ys)], "t"))
    assert svg.find(".//{*}path[@class='series']").get("d").count("M") == 1
    assert len(svg.findall(".//{*}circle")) == 1
    assert "nothing recorded" in line_chart([Series("a", [1], [math.nan])], "t")
    assert "nothing recorded" in line_chart([], "t")


def test_bars_stand_on_zero_with_heights_in_proportion():
    svg = svg_of(bar_chart(["g", "h"], {"a": [1.0, 2.0], "b": [-1.0, None]}, "t"))
    bars = [(float(bar.get("y")), float(bar.get("height"))) for bar in svg.findall(".//{*}rect[@class='bar']")]
    assert len(bars) == 3
    (top1, high1), (top_b, high_b), (_, high2) = bars
    assert high2 == pytest.approx(2 * high1, abs=0.2)
    assert high_b == pytest.approx(high1, abs=0.2)
    assert top_b == pytest.approx(top1 + high1, abs=0.2)


def test_points_stand_where_their_numbers_say_and_their_names_do_not_cover_each_other():
    points = [("a", 0.0, 1.0), ("b", 10.0, 5.0), ("c", 10.0, 5.0), ("d", math.nan, 2.0)]
    svg = svg_of(point_chart(points, "t", intervals=[None, (4.0, 6.0), None, None]))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.findall(".//{*}circle")]
    assert len(dots) == 3, "d has no place"
    assert dots[0] == dots[1], "highest first: b and c are the same"
    assert dots[0][0] > dots[2][0]
    assert dots[0][1] < dots[2][1], "down is less"
    names = {text.text: float(text.get("y")) for text in svg.findall(".//{*}text") if text.text in ("a", "b", "c")}
    assert names["c"] == names["b"] + 12

    many = str(point_chart([(f"m{at}", at, at) for at in range(6)], "t"))
    assert [many.count(f">m{at}</text>") for at in range(6)] == [0] * 6, "names would cover each other"
    assert all(f"</svg>m{at}</span>" in many for at in range(6)), "so they stand in the legend"


def test_names_under_bars_are_turned_all_alike_or_not_at_all():
    def turns(groups: list[str]) -> set[str]:
        svg = svg_of(bar_chart(groups, {"a": [1.0] * len(groups)}, "t"))
        found = [text.get("transform", "") for text in svg.findall(".//{*}text") if text.text in groups]
        assert len(found) == len(groups)
        return {word.partition("rotate")[2] for word in found}

    assert turns(["SFT", "TLCR"]) == {""}
    assert turns(["SFT", "PPO_synthetic", "x", "y", "z", "w"]) == {"(-28)"}
    assert turns([f"name {number}" for number in range(20)]) == {"(-50)"}


def test_histogram_counts():
    svg = svg_of(histogram([0.0, 0.1, 0.6, 1.0, 5.0], "t", bins=2, x_range=(0, 1)))
    assert ["".join(title.itertext()) for title in svg.findall(".//{*}title")] == [
        "0 to 0.5\n2 of 5 (40.0%)",
        "0.5 to 1\n3 of 5 (60.0%)",
    ]


def test_smoothing_weighs_both_sides():
    # Weights 1 and 1/2 by distance, as far to the left as to the right: (0/2 + 0 + 4/2) / 2; the ends stay.
    assert smooth([0, 0, 4], 0.5) == pytest.approx([0, 1, 4])
    assert smooth([0, 1, 2, 3, 4], 0.8) == pytest.approx([0, 1, 2, 3, 4])
    assert smooth([3, math.nan, 3], 0.5)[0] == 3
    assert math.isnan(smooth([3, math.nan, 3], 0.5)[1])


def test_no_axis_or_band_goes_beyond_what_a_measure_can_be():
    assert ticks(1, 1, limits=(0, 1))[-1] == 1
    assert ticks(0, 0, limits=(0, None))[0] == 0
    chart = line_chart([Series("kl", [1, 2], [0.5, 1], [-0.5, 0], [1.5, 2])], "KL", limits=(0, None))
    numbers = [text.text for text in svg_of(chart).findall(".//{*}text")]
    assert "−0.5" not in numbers
    assert "2" in numbers


def test_a_series_keeps_its_own_colour():
    chart = line_chart([Series("TLCR", [1, 2], [0, 1], color=1)], "t")
    assert "--k:var(--s1)" in chart
    assert "--k:var(--s0)" not in chart


def test_ticks_are_round_and_enclose():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 17) == [-5, 0, 5, 10, 15, 20]
    assert ticks(0.031, 0.078) == [0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    assert ticks(2, 2)[0] < 2 < ticks(2, 2)[-1]


def test_thinning_keeps_spikes():
    ys = [0.0] * 20_000
    ys[12_345] = 9.0
    kept = thin(range(20_000), ys)
    assert len(kept) <= 2 * MOST_POINTS
    assert (12_345, 9.0) in kept


def test_table_aligns_numbers_and_names_what_is_missing():
    parsed = Parsed(table_html(["policy", "score", "n"], [["SFT", 3.456, 1200], ["x", None, math.nan]]))
    cells = [data for stack, data in parsed.texts if stack[-1][0] in ("td", "th")]
    assert cells == ["policy", "score", "n", "SFT", "3.46", "1,200", "x", "—", "—"]


def test_png_pictures_show_the_colours(tmp_path):
    from PIL import Image

    def pixels(value: float, color) -> int:
        texts = [TokenScores([" $bad_", "\n", "\x1b", ""], [value, 0.0, 0.1, None], "caption")]
        heatmap_png(tmp_path / "h.png", texts)
        image = np.asarray(Image.open(tmp_path / "h.png").convert("RGB")).astype(int)
        return int((np.abs(image - color).max(-1) <= 2).sum())

    assert pixels(1.0, LIGHT.positive) > 500
    assert pixels(1.0, LIGHT.negative) == 0
    assert pixels(-1.0, LIGHT.negative) > 500
    assert pixels(-1.0, LIGHT.positive) == 0
    underline = (178, 52, 10)
    assert pixels(-0.3, underline) > 5
    assert pixels(-0.1, underline) == 0
    assert pixels(1.0, underline) == 0
    line_chart_png(tmp_path / "l.png", [Series("$a_", [1, 2], [3, 4], [2, 3], [4, 5])], "t", smoothing=0.5)
    assert (tmp_path / "l.png").stat().st_size > 1000


# --- report ---


def test_report_shows_results_curves_and_samples(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "reward/per_token": step / 100, "policy/kl": None} for step in range(1, 61)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "sft": {"true_score": 3.71, "response_length": 33.2},
        "tlcr": {"true_score": 6.42, "response_length": 30.1, "kl": 4.31},
        "discriminator": {"edited_accuracy": 0.883, "majority_accuracy": 0.552},
        "seconds": {"base": 98.0, "step1_sft": 41.5},
    }
    sample = Sample("the prompt", [TokenScores([" a"], [0.5], "SFT answer"), TokenScores([" b"], [0.9], "TLCR answer")])
    path = write_report(
        tmp_path / "sub" / "report.html",
        results,
        answers=[sample],
        revisions=[sample],
        metrics={"ppo": log, "sft": tmp_path / "nowhere.jsonl"},
        about="A <tiny> run",
        scores={1: [2.0, 4.0], 2: [5.0, 7.0]},
        world="Right facts.",
        made={"command": "bash run_tiny.sh", "code": "0123"},
    )
    parsed = Parsed(path.read_text(encoding="utf-8"))
    assert_harmless(parsed, scripts=1)
    text = " ".join(data for _, data in parsed.texts)
    for piece in ("3.71", "6.42", "0.883", "0.552", "4.31", "33.20", "1 min 38 s", "41.5 s", "A <tiny> run"):
        assert piece in text, piece
    for piece in ("the prompt", "SFT answer", "TLCR answer", "Reward per token"):
        assert piece in text, piece
    assert "step 60\nTLCR: 0.6" in text
    assert text.count("No metrics.jsonl of this stage was found.") == 2  # SFT and discriminator
    assert "step 2\nTLCR: 6" in text  # the mean true score of the second step's answers
    for piece in ("Right facts.", "bash run_tiny.sh", "0123"):
        assert piece in text, piece
    charts = re.findall(r'<figure class="chart">.*?</figure>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(charts) == 7
    assert sum("not recorded" in chart for chart in charts) == 4
    for chart in charts:
        ElementTree.fromstring(chart)


def test_report_compares_both_policies_at_their_best_temperature(tmp_path):
    results = {
        "sft": {"true_score": 3.75, "response_length": 27.0, "kl": 0.0, "repeats": 0.09, "temperature": 1.0},
        "tlcr": {"true_score": 7.0, "response_length": 26.0, "kl": 8.0, "repeats": 0.48, "temperature": 1.0},
        "sft_best": {
            "true_score": 8.0,
            "true_score_standard_error": 0.06,
            "response_length": 27.0,
            "kl": 9.0,
            "repeats": 0.25,
            "temperature": 0.1,
        },
        "tlcr_best": {"true_score": 7.5, "response_length": 26.0, "kl": 12.0, "repeats": 0.5, "temperature": 0.0},
    }
    gap = {"mean": -0.5, "low": -0.7, "high": -0.3}
    results |= {"tlcr_over_frontier": {"kl": gap, "entropy": gap}, "tlcr_over_sft": {"best": {"mean": -0.5}}}
    page = write_report(tmp_path / "report.html", results).read_text(encoding="utf-8")
    text = " ".join(data for _, data in Parsed(page).texts)
    for piece in (
        "8.00 ± 0.06",
        "SFT, best T (0.1)",
        "TLCR, best T (0)",
        "SFT, T = 1",
        "48.00",
        "25.00",
    ):
        assert piece in text, piece
    assert "TLCR scores lower than SFT sampled colder: −0.50 [−0.70, −0.30] at its KL, −0.50" in text
    assert "with both at their best temperature the difference is −0.50." in text
    assert "SFT was not measured at several temperatures." in text


def test_report_draws_what_colder_sampling_reaches(tmp_path):
    row = {"true_score": 5.0, "kl": 1.0, "entropy": 7.0, "response_length": 9.0}
    swept = [row, row | {"true_score": 6.0, "kl": 2.0, "entropy": 3.0}]
    best = [{"n": 1, "kl": 0.0, "true_score": 5.0}, {"n": 2, "kl": 0.19, "true_score": 5.5}]
    tlcr = row | {"temperature": 0.5, "by_kind": {"prompts": 7.25, "facts": 4.5}}
    results = {"sft": row, "tlcr": row, "tlcr_best": tlcr, "sft_sweep": swept, "sft_best_of_n": best}
    page = write_report(tmp_path / "report.html", results).read_text(encoding="utf-8")
    for piece in ("True score against KL to SFT", "True score against Entropy", "best of n by the", ">7.25<", ">4.50<"):
        assert piece in page, piece


@pytest.mark.parametrize(
    ("kl", "entropy", "said"),
    [
        ((0.1, 0.5), (0.2, 0.3), "scores higher"),
        ((0.1, 0.5), (-0.2, 0.3), "does not differ measurably"),
        ((-0.5, -0.1), (-0.3, -0.2), "scores lower"),
    ],
)
def test_verdict_needs_both_intervals_beside_zero(kl, entropy, said):
    gaps = {
        name: {"mean": sum(ends) / 2, "low": ends[0], "high": ends[1]}
        for name, ends in (("kl", kl), ("entropy", entropy))
    }
    assert f"TLCR {said}" in verdict({"tlcr_over_frontier": gaps})


def test_report_of_nothing_names_everything_as_missing(tmp_path):
    text = write_report(tmp_path / "report.html", {}).read_text(encoding="utf-8")
    for piece in ("No answers", "No held-out revisions", "Time by stage: not recorded"):
        assert piece in text, piece
    assert text.count("No metrics.jsonl of this stage was found.") == 3
    assert text.count("—</td>") == 12  # five numbers of each policy, two of the discriminator


def test_published_overall_is_the_mean_of_both_turns():
    for method, row in PUBLISHED.items():
        assert row["overall"] == pytest.approx((row["turn 1"] + row["turn 2"]) / 2, abs=0.0151), method


def test_durations():
    assert [duration(x) for x in (0.04, 59.94, 61, 3599, 7380)] == [
        "0.0 s",
        "59.9 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 03 min",
    ]


# --- labeling/show.py ---


@pytest.fixture(scope="module")
def revisions(tmp_path_factory, byte_level):
    folder = tmp_path_factory.mktemp("show")
    byte_level.save_pretrained(folder / "tokenizer")
    pairs = [
        ("the cat sat", " that cat", " that mat"),
        ("<script>alert(1)</script>", " the \x1b[31mcat \u202e<b>", " the cat"),
        ("unchanged", " the mat", " the mat"),
    ]
    with (folder / "revisions.jsonl").open("w", encoding="utf-8") as file:
        for prompt, rejected, modified in pairs:
            key = Preference(prompt, " x", rejected).id
            why = "because <b>"
            file.write(Revision(key, prompt, " x", rejected, modified, why, "someone", {}).to_json() + "\n")
    return folder


def test_show_prints_marked_tokens_and_writes_the_page(revisions):
    page_path = revisions / "pages" / "show.html"
    command = [sys.executable, ROOT / "labeling" / "show.py", revisions / "revisions.jsonl"]
    done = subprocess.run(
        [*command, "--tokenizer", revisions / "tokenizer", "--html", page_path],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "70"},
        timeout=patience(120),
    )
    assert done.returncode == 0, done.stderr
    assert all(safe(character) for character in done.stdout)
    rejected, modified = re.findall(r"replaced\n(.*)", done.stdout)[:2]
    assert re.sub(r"\[-|-\]", "", rejected) == " that cat</s>"
    assert re.sub(r"\{\+|\+\}", "", modified) == " that mat</s>"
    assert "[-" in rejected
    assert "{+" in modified
    assert "Nothing was edited" in done.stdout
    assert re.search(r"3 revisions, \d+ tokens: \d+ negative, \d+ positive", done.stdout)
    parsed = Parsed(page_path.read_text(encoding="utf-8"))
    assert_harmless(parsed, scripts=1)
    assert " the \\x1b[31mcat \\u202e<b></s>" in parsed.text("div", "tokens")
    assert "Reviser: because <b>" in parsed.text("p", "note")


def test_show_stops_at_the_limit_and_cuts_as_training_does(revisions, capsys):
    source = [str(revisions / "revisions.jsonl"), "--tokenizer", str(revisions / "tokenizer")]
    show.main([*source, "--limit", "1"])
    assert "1 revision," in capsys.readouterr().out
    show.main([*source, "--max_length", "2"])
    assert "Left out of training: the prompt alone fills 2 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "input.jsonl: cannot be read (no such file)"),
        ("", [], "input.jsonl: no revisions in it"),
        ('{"id": 1}\n', [], "input.jsonl:1: 'id' is of type int"),
        ("", ["--limit", "-1"], "--limit -1: must be 0 or more"),
        ("", ["--tokenizer", "."], "tokenizer"),
    ],
)
def test_show_refuses_bad_input_in_one_line(revisions, tmp_path, monkeypatch, capsys, content, flags, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("input.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        show.main(["input.jsonl", "--tokenizer", str(revisions / "tokenizer"), *flags])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
