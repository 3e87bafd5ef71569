"""Model-written text made safe to look at: nothing in it is executed or hidden."""

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pictures are drawn where nothing is trained, too: importing this stays quick
    from transformers import PreTrainedTokenizerBase

# Controls, lone surrogates, invisible and bidirectional format characters, line separators, noncharacters (which XML
# forbids). Not newline, tab, and the two joiners of emoji, Persian and Indic scripts.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e01ef]"
)


class Html(str):
    """A string that already is HTML; every other string is escaped by the functions of this package."""

    __slots__ = ()


def visible(text: str) -> str:
    """Spell control and invisible characters out as Python does: ESC is ``\\x1b``. Newlines and tabs stay.

    The result can be encoded in UTF-8 and is legal in HTML, XML and on a terminal.
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def escape(content: object) -> Html:
    """HTML for any value: ``Html`` as it is, everything else as escaped text."""
    if isinstance(content, Html):
        return content
    return Html(html.escape(visible(str(content)), quote=True))


def join(parts: Sequence[object], separator: str = "") -> Html:
    """Concatenate values as HTML, escaping those that are not ``Html``."""
    return Html(separator.join(escape(part) for part in parts))


def shorten(text: str, limit: int) -> str:
    """At most about ``limit`` characters: the beginning, a note of how much was left out, and the end."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail]} … {len(text) - limit:,} more characters … {text[-tail:]}"


def long_text(text: str, limit: int = 1200) -> Html:
    """Text in a block that keeps its line breaks; beyond ``limit`` characters it is folded, and a click shows all."""
    if len(text) <= limit:
        return Html(f'<div class="text" dir="auto">{escape(text)}</div>')
    summary = f"<summary>{escape(shorten(text, limit))}</summary>"
    return Html(f'<details class="text" dir="auto">{summary}{escape(text)}</details>')


def token_strings(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; joined, the strings are the whole text.

    A token that ends inside a character (byte-level BPE, byte fallback) adds ``""``; the token that completes the
    character adds it. Bytes that never become a character add ``�``. SentencePiece drops the space of a text's first
    token, so give the ids of prompt *and* response and slice: ``token_strings(tokenizer, ids)[response_start:]``.
    """
    strings: list[str] = []
    start, shown, complete = 0, "", -1  # decode(ids[start:]) begins with `shown`; no character is open after `complete`
    for position, token in enumerate(ids):
        if tokenizer.convert_ids_to_tokens(token) is None:
            strings.append(f"<id {token}>")  # a model's vocabulary may be padded beyond its tokenizer's
            continue
        text = _decode(tokenizer, ids[start : position + 1])
        # A character has at most four bytes, so what is open for longer is broken and shown as such.
        stable = text if position - complete >= 4 else text.rstrip("\ufffd")
        strings.append(stable[len(shown) :])
        shown = max(shown, stable, key=len)
        if stable == text:
            complete = position
            alone = _decode(tokenizer, [token])
            if "\ufffd" not in alone:  # the window can start anew here, with this token as the next one's context
                start, shown = position, alone
    if complete < len(ids) - 1:
        strings[-1] += _decode(tokenizer, ids[start:])[len(shown) :]
    return strings


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
