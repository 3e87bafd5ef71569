"""Undo invisible differences between a response and its revision, which would otherwise become labels.

A model that revises a text returns it with LF for CRLF, without spaces at line ends, with composed accents, straight
quotes or single spaces. ``in_convention_of`` restores the original's form.
"""

import unicodedata
from functools import lru_cache
from typing import Literal

import regex
from rapidfuzz.distance import LCSseq

_UNIT = regex.compile(
    r"[ \t\xa0]*(?:\r\n|\n|\r)"  # a line end with the spaces in front of it
    r"|(?<=\S)[ \xa0\u2009\u202f]+(?=\S)"  # the space between two words
    r"|\.\.\."
    r"|\X[\xad\u200b\u2060\ufeff]*"  # a character with combining marks and zero-width characters behind it
)
_ODD = ("\r", "  ", " \n", "\t\n", "...")
_PLAIN = {"\xa0": " ", "\u2009": " ", "\u202f": " ", "\u2010": "-", "\u2011": "-", "\u2026": "..."}
_PLAIN |= dict.fromkeys("\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
_PLAIN |= dict.fromkeys("\xad\u200b\u2060\ufeff", "")
_MOST_CELLS = 4 * 10**8  # of the alignment's table, one bit each: 50 MB


def in_convention_of(rejected: str, modified: str) -> str:
    """``modified``, with whatever looks the same in ``rejected`` written as it is there.

    New text gets the line ends and composition of ``rejected``, and plain quotes, spaces and hyphens instead of special
    ones that ``rejected`` never uses. Two texts of more than 20,000 characters each get only the latter.

    >>> in_convention_of("It\\u2019s  bad.\\r\\nBye.", "It's good.\\nBye.")
    'It’s  good.\\r\\nBye.'
    """
    if _is_plain(rejected) and _is_plain(modified):
        return modified
    before, after = _UNIT.findall(rejected), _UNIT.findall(modified)
    seen_before, seen_after = list(map(_seen, before)), list(map(_seen, after))
    line_end = "\r\n" if rejected.count("\r\n") * 2 > rejected.count("\n") else "\n"
    form: Literal["NFC", "NFD"] = "NFC" if unicodedata.is_normalized("NFC", rejected) else "NFD"
    plain = str.maketrans({odd: usual for odd, usual in _PLAIN.items() if odd not in rejected})

    def adapted(unit: str) -> str:
        return line_end if _seen(unit) == "\n" else unicodedata.normalize(form, unit).translate(plain)

    if len(before) * len(after) > _MOST_CELLS:
        return "".join(map(adapted, after))
    written: list[str] = []
    for step in LCSseq.opcodes(seen_before, seen_after):
        if step.tag == "equal":
            written += before[step.src_start : step.src_end]
        else:
            written += map(adapted, after[step.dest_start : step.dest_end])
    return "".join(written)


def _is_plain(text: str) -> bool:
    """Whether a text has nothing that could be written in another way, as most have: then no alignment is needed."""
    return text.isascii() and not any(odd in text for odd in _ODD)


@lru_cache(maxsize=4096)
def _seen(unit: str) -> str:
    """A unit's appearance: the same text for all units that look alike."""
    if unit[-1] in "\r\n":
        return "\n"
    plain = unicodedata.normalize("NFC", unit).translate(_TABLE)
    return plain if plain.strip() else plain[:1]


_TABLE = str.maketrans(_PLAIN)
