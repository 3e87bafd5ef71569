"""Spans of a response that are marked as good or bad, as text, and the characters where they stand."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_jsonl


@dataclass(frozen=True, slots=True)
class Marks:
    """The spans of a response, as they are spelt there: at best; a model may misspell them."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MarkedResponse:
    """A line of spans.jsonl."""

    id: str
    prompt: str
    response: str
    marks: Marks


def content_id(prompt: str, response: str) -> str:
    """The same for the same two texts in every run."""
    return hashlib.sha256(json.dumps([prompt, response]).encode()).hexdigest()[:24]


def places(text: str, spans: Sequence[str]) -> tuple[list[tuple[int, int]], int]:
    """Characters of each span's first occurrence in ``text`` that no earlier span of the list has; how many have none.

    >>> places("so so good", ["so", "so", "bad"])
    ([(0, 2), (3, 5)], 1)
    """
    taken: list[tuple[int, int]] = []
    for span in spans:
        at = text.find(span)
        while at >= 0 and any(at < end and begin < at + len(span) for begin, end in taken):
            at = text.find(span, at + 1)
        if at >= 0:
            taken.append((at, at + len(span)))
    return taken, len(spans) - len(taken)


def read_marked(path: str | Path) -> Iterator[MarkedResponse]:
    """Stream a spans.jsonl. Raises ``InputError`` naming file, line and key where one is not as it should be."""
    for number, line in read_jsonl(path):
        for key in ("id", "prompt", "response"):
            if not isinstance(line.get(key), str):
                raise InputError(f"{path}:{number}: {key!r} is missing or no text; labeling/spans.py writes this file")
        for key in ("positive", "negative"):
            spans = line.get(key)
            if not isinstance(spans, list) or not all(isinstance(span, str) and span for span in spans):
                raise InputError(f"{path}:{number}: {key!r} is missing or no list of spans")
        marks = Marks(tuple(line["positive"]), tuple(line["negative"]))
        yield MarkedResponse(line["id"], line["prompt"], line["response"], marks)
