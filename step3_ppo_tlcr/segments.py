"""Where an answer's sentences and sub-sentences end (Fine-Grained RLHF, Wu et al., 2023), without a parser."""

import re

LEAST_WORDS = 5
_SENTENCE = re.compile(r"[.!?\u2026\u3002\uff01\uff1f]+[\"'\u201d\u2019)\]]*(?=\s|$)|\n+")
_INITIAL = re.compile(r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No)\.$")
_CLAUSE = re.compile(r"\S*[,;!?](?=\s)")


def sentences(text: str) -> list[int]:
    """The character behind each sentence, the last of them behind the last word.

    A sentence ends at a line's end or at . ! ? and what closes a quotation; not at an initial or a usual abbreviation.
    """
    last, ends = len(text.rstrip()), [0]
    for match in _SENTENCE.finditer(text, 0, last):
        if text[ends[-1] : match.end()].strip() and not _INITIAL.search(text[: match.end()]):
            ends.append(match.end())
    return [*ends[1:], last] if ends[-1] < last else ends[1:]


def clauses(text: str) -> list[int]:
    """The character behind each sub-sentence.

    Within a sentence one ends behind , ; ! ? if at least five words remain; a piece of fewer than five words goes with
    the one before it in the sentence, the first with the one behind it.
    """
    ends: list[int] = []
    begin = 0
    for end in sentences(text):
        places = [match.end() for match in _CLAUSE.finditer(text, begin, end)]
        pieces: list[int] = []
        start = begin
        for place in places:
            if len(text[start:place].split()) >= LEAST_WORDS and len(text[place:end].split()) >= LEAST_WORDS:
                pieces.append(place)
                start = place
        ends += [*pieces, end]
        begin = end
    return ends
