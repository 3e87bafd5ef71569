"""Reads a judge's verdict from its text: the last one of its own, not one that it quotes from a judged answer."""

import re
from collections.abc import Sequence
from typing import TypeVar

from deepspeed_chat_tlcr.asking.endpoint import Unusable

_NUMBER = r"(\d{1,3}(?:\.\d+)?)(?![.,]?\d)"
_OF_TEN = r"\s*(?:/|out\s+of)\s*10\b(?![.,]?\d)"
_GAP = r"(?:\s*\([^()\n]{0,30}\))?(?:\s+(?:is|of))?(?:\s+[-–—]\s+|[\s:=*_`\"'|\[(]{0,10})"
_OTHER_SCALE = r"(?!\s*(?:/|-|–|to\b|(?:out\s+)?of\b)\s*\d)"  # "4/5", "from 1 to 10"
_SPELLINGS = (
    rf"\[\[\s*{_NUMBER}(?:{_OF_TEN})?\s*\]\]",
    rf"\b(?:rating|score){_GAP}{_NUMBER}(?:{_OF_TEN})?{_OTHER_SCALE}",
    rf"(?<![\w./]){_NUMBER}{_OF_TEN}",
)
_QUOTABLE_RATING = re.compile("|".join(_SPELLINGS), re.IGNORECASE)
# A bare "8/10" only on the judge's last line: elsewhere it may be any fraction.
_RATING = re.compile("|".join(_SPELLINGS) + r"(?=[^\n]*\s*\Z)", re.IGNORECASE)
_PREFERENCE = re.compile(
    r"\[\[\s*([ABC])\s*\]\]|\bverdict(?:\s+is)?[\s:=*_`\"'\[(]{0,10}([ABC])(?=[\s*_`\"'\]).]*(?:\n|\Z))", re.IGNORECASE
)
PLACES = {"A": "first", "B": "second", "C": "tie"}
Verdict = TypeVar("Verdict")

_BEFORE = re.compile(r"[\s*_`#]*(?:(?:my|the|final|overall|rating|score|verdict|is)\b[\s:*_`]*)*", re.IGNORECASE)
_BEHIND = re.compile(r"[\s*_`.!)\]]*")


def read_rating(text: str, answers: Sequence[str] = ()) -> dict:
    """``[[8]]``, ``[[ 8/10 ]]``, ``Rating: 8``, ``**Score:** [8]`` or ``8/10``: ``{"score": 1 to 10}``.

    ``answers``: what is judged. Raises ``Unusable`` where the judge has no rating of its own, or one outside 1 to 10.
    """
    quotable = {_rating(found) for answer in answers for found in _QUOTABLE_RATING.finditer(answer)}
    rating = last_own(text, [(found, _rating(found)) for found in _RATING.finditer(text)], quotable)
    if rating is None:
        raise Unusable("no_rating")
    if not 1 <= rating <= 10:
        raise Unusable("rating_out_of_range")
    return {"score": rating}


def read_preference(text: str, answers: Sequence[str] = ()) -> dict:
    """``[[A]]``, ``[[ b ]]``, or ``Verdict: C`` at the end of a line: ``{"verdict": "first", "second" or "tie"}``.

    ``answers``: what is judged. Raises ``Unusable`` where the judge has no verdict of its own.
    """
    quotable = {_place(found) for answer in answers for found in _PREFERENCE.finditer(answer)}
    verdict = last_own(text, [(found, _place(found)) for found in _PREFERENCE.finditer(text)], quotable)
    if verdict is None:
        raise Unusable("no_verdict")
    return {"verdict": verdict}


def last_own(text: str, found: Sequence[tuple[re.Match, Verdict]], quotable: set[Verdict]) -> Verdict | None:
    """The judge's own last verdict, of those ``found`` in its ``text``; None where there is none.

    A verdict that an answer states too (``quotable``) may be a quotation, with which a policy could plant its own
    score. Any other verdict is preferred to it, and without another it counts only if it fills the last line.
    """
    own = [verdict for _, verdict in found if verdict not in quotable]
    if not own and found and _closes(text, found[-1][0]):
        own = [found[-1][1]]
    return own[-1] if own else None


def _rating(found: re.Match) -> float:
    return float(next(filter(None, found.groups())))


def _place(found: re.Match) -> str:
    return PLACES[next(filter(None, found.groups())).upper()]


def _closes(text: str, found: re.Match) -> bool:
    """Whether a verdict fills the last line."""
    line = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
    return _BEFORE.fullmatch(line) is not None and _BEHIND.fullmatch(text, found.end()) is not None
