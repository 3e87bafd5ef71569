"""A chat model asked which spans of a response are good or bad (DRLC, Cao et al., 2024), and how its answer is read."""

import json
import re
from collections.abc import Iterator

from deepspeed_chat_tlcr.asking.endpoint import CUT, ChatAnswer, ChatRequest, Unusable
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import require_file
from deepspeed_chat_tlcr.spans import Marks, content_id

MOST_SPANS = 8
MAX_TOKENS = 512
"""Of an answer, without hidden reasoning."""

TEMPLATE = """\
You judge pieces of an assistant's response. Copy, letter by letter, short pieces of it that make it better (true, \
helpful, kind, to the point) and short pieces that make it worse (false, useless, harmful, beside the point). Leave \
out what does neither. A piece stays within one line. At most {most} pieces of each kind, the weightiest first.

Answer in exactly this form, and write None under a heading that has no pieces:
Positive:
1. "a piece"
Negative:
1. "a piece"

An example. To the question "How far is the moon, and can I walk there?" the response is: It is about 384,000 km away, \
you fool. With good shoes a week is enough.
Positive:
1. "about 384,000 km away"
Negative:
1. "you fool"
2. "a week is enough"

The conversation:
<|Start of Conversation|>
{prompt}
<|End of Conversation|>

The response to judge:
<|Start of Response|>
{response}
<|End of Response|>
"""

_HEADING = re.compile(
    r"^[ \t#*_>-]*(positive|negative)(?: (?:spans?|pieces?))?[ \t*_]*(?::[ \t*_]*|$)", re.IGNORECASE | re.MULTILINE
)
_BULLET = re.compile(r"^(?:\d+[.)]|[-*•])\s+")
_NONE = re.compile(r"\(?none\b.{0,20}", re.IGNORECASE)
_QUOTES = ('""', "“”", "''", "‘’", "``", "«»")


def load_template(path: str | None, flag: str) -> str:
    """A user's own question, or the one that stands here. Raises ``InputError`` where a placeholder is missing."""
    if path is None:
        return TEMPLATE
    try:
        template = require_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path}: not UTF-8 text ({error.reason})") from None
    for name in ("{prompt}", "{response}"):
        if name not in template:
            raise InputError(f"{flag} {path}: the placeholder {name} is missing")
    return template


def question(
    prompt: str, response: str, model: str, template: str = TEMPLATE, most: int = MOST_SPANS, seed: int | None = None
) -> ChatRequest:
    """The request that asks for a response's spans; its answer becomes a line of spans.jsonl."""
    id = content_id(prompt, response)
    parts = {"prompt": prompt.strip(), "response": response.strip(), "most": str(most)}
    # One pass over the template: braces in the texts themselves stay as they are.
    text = re.sub(r"\{(prompt|response|most)\}", lambda match: parts[match[1]], template)

    def accept(answer: ChatAnswer, usage: dict) -> str:
        marks = read_marks(answer, most)
        line = {"id": id, "prompt": prompt, "response": response, "positive": marks.positive}
        return json.dumps(line | {"negative": marks.negative, "model": model, "usage": usage}, ensure_ascii=False)

    return ChatRequest(id, [{"role": "user", "content": text}], accept, seed)


def read_marks(answer: ChatAnswer, most: int = MOST_SPANS) -> Marks:
    """The spans that an answer lists, at most so many of each kind.

    Raises ``Unusable``: a refusal by a filter, an empty text, one that its limit cut, or one without both headings.
    """
    if answer.finish_reason == "content_filter":
        raise Unusable("refusal")
    if not answer.text.strip():
        raise Unusable("empty")
    if answer.finish_reason == "length":
        raise Unusable(CUT)
    found: dict[str, tuple[str, ...]] = {}
    headings = list(_HEADING.finditer(answer.text))
    ends = [heading.start() for heading in headings[1:]] + [len(answer.text)]
    for heading, end in zip(headings, ends, strict=False):  # without a heading there is one end
        listed = tuple(_listed(answer.text[heading.end() : end]))
        found.setdefault(heading[1].lower(), listed[:most])
    if len(found) < 2:
        raise Unusable("headings_missing")
    return Marks(found["positive"], found["negative"])


def _listed(section: str) -> Iterator[str]:
    for line in section.splitlines():
        item = _BULLET.sub("", line.strip())
        quoted = any(len(item) > 1 and item[0] == pair[0] and item[-1] == pair[1] for pair in _QUOTES)
        if quoted:
            item = item[1:-1]
        if item.strip() and (quoted or not _NONE.fullmatch(item)):
            yield item.strip()
