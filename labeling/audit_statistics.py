"""Statistics of a set of revisions, gathered in one streaming pass, for labeling/audit.py."""

import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.tokenization import TokenizedExample, tokenize_response
from labeling.convention import in_convention_of
from labeling.revising import MAX_EDIT_RATIO, edit_ratio
from labeling.token_labels import NEGATIVE, NEUTRAL, WHOLE, edit_targets, label_revision

POSITIONS = 10  # tenths of a response
SHOWN = 20  # random pairs, most edited pairs

Span = tuple[int, int]  # characters of a response, start and end


@dataclass
class SpanAgreement:
    """Deleted or replaced tokens of rejected responses against the error spans that people marked there.

    A token counts as marked where one of its visible characters lies in a span.
    """

    responses: int = 0
    both: int = 0
    edited: int = 0
    marked: int = 0
    tokens: int = 0

    def add(self, tokens: Sequence[Span], targets: Sequence[float], spans: Sequence[Span]):
        self.responses += 1
        for (start, end), target in zip(tokens, targets, strict=True):
            marked = is_marked((start, end), spans)
            self.edited += target == NEGATIVE
            self.marked += marked
            self.both += marked and target == NEGATIVE
            self.tokens += 1

    def summary(self) -> dict:
        """Token precision, recall and F1 of the labels, with people's spans as the truth; None: nothing to count."""
        precision, recall = _share(self.both, self.edited), _share(self.both, self.marked)
        f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
        counts = {"responses": self.responses, "tokens": self.tokens, "edited": self.edited, "marked": self.marked}
        return {"precision": precision, "recall": recall, "f1": f1, **counts}


def is_marked(token: Span, spans: Sequence[Span]) -> bool:
    """Whether one of a token's visible characters lies in a span."""
    return any(token[0] < span_end and token[1] > span_start for span_start, span_end in spans)


def visible_tokens(
    tokenizer: PreTrainedTokenizerFast, revision: Revision, rejected: TokenizedExample
) -> list[tuple[int, Span]]:
    """The visible tokens of a whole rejected response: not EOS, not white space.

    Each with its place among the response's tokens and its visible characters, counted from the response's first one.
    """
    text = revision.prompt + revision.rejected
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    offsets = offsets[rejected.response_start : len(rejected.input_ids) - 1]  # without EOS
    begin = len(revision.prompt) + len(revision.rejected) - len(revision.rejected.lstrip())
    tokens = []
    for place, (start, end) in enumerate(offsets):
        piece = text[start:end]
        if piece.strip():
            left, right = len(piece) - len(piece.lstrip()), len(piece.rstrip())
            tokens.append((place, (start + left - begin, start + right - begin)))
    return tokens


@dataclass
class Audit:
    """Feed revisions to ``add``; ``summary`` is the content of audit.json.

    ``spans_of``: error spans by the rejected response's text, without white space around it.
    """

    tokenizer: PreTrainedTokenizerFast
    max_edit_ratio: float = MAX_EDIT_RATIO
    spans_of: dict[str, list[Span]] = field(default_factory=dict)

    def __post_init__(self):
        self.ratios, self.growth = [], []
        self.rejected_labels, self.modified_labels = np.zeros((POSITIONS, 2), int), np.zeros((POSITIONS, 2), int)
        self.deleted, self.added = Counter(), Counter()
        self.rewrites: list[str] = []
        self.seen, self.lines = set(), set()
        self.unedited = self.copied = self.same_pair = self.same_line = self.unseen = 0
        self.draw = random.Random(0)
        self.random_ones: list[Revision] = []
        self.most_edited: list[tuple[float, int, Revision]] = []
        self.agreement = SpanAgreement()

    def add(self, revision: Revision):
        number = len(self.ratios)
        ratio = edit_ratio(revision.rejected, revision.modified)
        self.ratios.append(ratio)
        if ratio > self.max_edit_ratio:
            self.rewrites.append(revision.id)
        self.unedited += revision.modified == revision.rejected
        self.copied += revision.modified.strip() == revision.chosen.strip()
        self.unseen += in_convention_of(revision.rejected, revision.modified) != revision.modified
        pair, line = hash(revision.id), hash((revision.id, revision.modified))
        self.same_pair += pair in self.seen
        self.same_line += line in self.lines
        self.seen.add(pair)
        self.lines.add(line)
        self._count_tokens(revision)
        self._count_words(revision)
        if number < SHOWN:
            self.random_ones.append(revision)
        elif (place := self.draw.randrange(number + 1)) < SHOWN:
            self.random_ones[place] = revision
        keep = heapq.heappush if number < SHOWN else heapq.heappushpop
        keep(self.most_edited, (ratio, number, revision))
        spans = self.spans_of.get(revision.rejected.strip())
        if spans is not None:
            rejected, _ = label_revision(self.tokenizer, revision, WHOLE)
            visible = visible_tokens(self.tokenizer, revision, rejected)
            targets = [rejected.targets[place] for place, _ in visible]
            self.agreement.add([token for _, token in visible], targets, spans)

    def _count_tokens(self, revision: Revision):
        texts = (revision.rejected, revision.modified)
        examples = [tokenize_response(self.tokenizer, revision.prompt, text) for text in texts]
        sides = [example.response_ids[:-1] for example in examples]  # without EOS
        self.growth.append(len(sides[1]) - len(sides[0]))
        targets = edit_targets(*sides)
        for counts, labels in zip((self.rejected_labels, self.modified_labels), targets, strict=True):
            edited = np.array(labels) != NEUTRAL
            places = np.arange(len(labels)) * POSITIONS // max(len(labels), 1)
            np.add.at(counts, (places, edited.astype(int)), 1)

    def _count_words(self, revision: Revision):
        before, after = revision.rejected.split(), revision.modified.split()
        number = {word: index for index, word in enumerate({*before, *after})}
        targets = edit_targets([number[word] for word in before], [number[word] for word in after])
        for counter, words, labels in zip((self.deleted, self.added), (before, after), targets, strict=True):
            counter.update(word.lower() for word, label in zip(words, labels, strict=True) if label != NEUTRAL)

    def summary(self) -> dict:
        negative, positive = int(self.rejected_labels[:, 1].sum()), int(self.modified_labels[:, 1].sum())
        counts, edges = np.histogram(self.ratios, bins=20, range=(0, 1))
        rejected, modified = int(self.rejected_labels.sum()), int(self.modified_labels.sum())
        places = {"negative": self.rejected_labels.tolist(), "positive": self.modified_labels.tolist()}
        result = {
            "revisions": len(self.ratios),
            "unedited": self.unedited,
            "identical_to_chosen": self.copied,
            "unseen_differences": self.unseen,
            "repeated_pairs": self.same_pair,
            "repeated_revisions": self.same_line,
            "edit_ratio": {
                **_spread(self.ratios),
                "histogram": {"edges": edges.round(2).tolist(), "counts": counts.tolist()},
            },
            "suspected_rewrites": {
                "above": self.max_edit_ratio,
                "count": len(self.rewrites),
                "ids": self.rewrites[:1000],
            },
            "tokens": {
                "rejected": {"negative": negative, "neutral": rejected - negative},
                "modified": {"positive": positive, "neutral": modified - positive},
                "share_negative": _share(negative, rejected),
                "share_positive": _share(positive, modified),
            },
            "length_change_tokens": _spread(self.growth),
            "by_position": {
                name: [_share(edited, edited + kept) for kept, edited in labels] for name, labels in places.items()
            },
            "most_deleted_words": self.deleted.most_common(30),
            "most_added_words": self.added.most_common(30),
        }
        if self.spans_of:
            result["agreement_with_people"] = self.agreement.summary()
        return result


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _spread(values: Sequence[float]) -> dict:
    low, middle, high = np.percentile(values, [10, 50, 90]) if len(values) else (None, None, None)
    numbers = {"mean": float(np.mean(values)) if len(values) else None, "p10": low, "median": middle, "p90": high}
    return {name: None if value is None else round(float(value), 6) for name, value in numbers.items()}
