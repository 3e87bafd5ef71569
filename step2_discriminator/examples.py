"""Pairs of tokenised responses: of revisions, with token labels, and of preferences."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import torch

from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.spans import MarkedResponse, Marks, places
from deepspeed_chat_tlcr.tokenization import TokenizedExample, tokenize_response, tokenize_with_offsets, truncate
from deepspeed_chat_tlcr.training import pad_examples
from deepspeed_chat_tlcr.turns import end_ids
from labeling.token_labels import label_revisions

Pair = tuple[TokenizedExample, TokenizedExample]
"""(better, worse): modified and rejected, or chosen and rejected."""


def token_pairs(
    revisions: Iterable[Revision], tokenizer, max_length: int, what: str, soft: bool = True
) -> tuple[list[Pair], str]:
    """Labelled (modified, rejected) pairs, and a summary of what was dropped, cut or unedited.

    Several revisions of one rejected response (labeling's ``--n``) give it soft labels; with ``soft`` false, each gives
    hard labels by itself.
    """
    pairs: list[Pair] = []
    dropped = identical = cut = 0
    samples: dict[str | int, list[Revision]] = {}
    for number, revision in enumerate(revisions):
        samples.setdefault(revision.id if soft else number, []).append(revision)
        identical += revision.modified == revision.rejected
    for group in samples.values():
        rejected, modified = label_revisions(tokenizer, group, max_length)
        kept = [(side, rejected) for side in modified if side is not None and rejected is not None]
        dropped += len(group) - len(kept)
        cut += sum(side.input_ids[-1] not in end_ids(tokenizer) for pair in kept for side in pair)
        pairs += kept
    if not pairs:
        raise InputError(f"no {what} revision has a prompt shorter than --max_seq_len {max_length} tokens")
    return pairs, (
        f"{what}: {len(pairs)} revisions, {dropped} dropped (prompt too long), {cut} responses cut, "
        f"{identical} unedited (all neutral)"
    )


def span_targets(example: TokenizedExample, offsets: Sequence[tuple[int, int]], marks: Marks, text: str) -> list[float]:
    """Targets of a response's tokens: 1 where one spells a character of a span called good, 0 of one called bad.

    0.5 in neither, in both, and for the token that ends the response. ``offsets``: the characters of ``text``, the
    response, that each token stands for.
    """
    targets = []
    found = [places(text, spans)[0] for spans in (marks.positive, marks.negative)]
    for first, past in offsets:
        good, bad = (any(first < end and begin < past for begin, end in one) for one in found)
        targets.append(0.5 + (good - bad) / 2)
    return targets + [0.5] * (len(example.response_ids) - len(targets))


def marked_examples(
    marked: Iterable[MarkedResponse], tokenizer, max_length: int, what: str
) -> tuple[list[TokenizedExample], str]:
    """Responses with targets by spans (DRLC, offline), and one sentence on what was dropped or not found."""
    examples, dropped, spans, missing = [], 0, 0, 0
    for one in marked:
        whole = tokenize_response(tokenizer, one.prompt, one.response)
        _, offsets, start = tokenize_with_offsets(tokenizer, one.prompt, one.response)
        base = len(one.prompt)
        own = [(max(0, begin - base), end - base) for begin, end in offsets[start:]]
        targets = span_targets(whole, own, one.marks, one.response)
        example = truncate(replace(whole, targets=targets), max_length)
        if example is None:
            dropped += 1
            continue
        examples.append(example)
        for listed in (one.marks.positive, one.marks.negative):
            spans, missing = spans + len(listed), missing + places(one.response, listed)[1]
    if not examples:
        raise InputError(f"no {what} prompt is shorter than --max_seq_len {max_length} tokens")
    return examples, (
        f"{what}: {len(examples)} responses, {dropped} dropped (prompt too long), {spans} spans, of which {missing} do "
        "not stand in their response"
    )


def text_pairs(texts: Iterable[tuple[str, str, str]], tokenizer, max_length: int, what: str) -> tuple[list[Pair], str]:
    """(prompt, better, worse) texts as pairs for the sequence objective."""
    pairs: list[Pair] = []
    dropped = cut = 0
    for prompt, *responses in texts:
        whole = [tokenize_response(tokenizer, prompt, response) for response in responses]
        better, worse = (truncate(example, max_length) for example in whole)
        if better is None or worse is None:
            dropped += 1
            continue
        cut += sum(len(example.input_ids) > max_length for example in whole)
        pairs.append((better, worse))
    if not pairs:
        raise InputError(f"no {what} prompt is shorter than --max_seq_len {max_length} tokens")
    return pairs, f"{what}: {len(pairs)} pairs, {dropped} dropped (prompt too long), {cut} responses cut"


def preference_pairs(options, tokenizer, split: str) -> tuple[list[Pair], str]:
    """The reward part's (chosen, rejected) pairs, by a stage's data options, and a summary."""
    preferences = load_part(options, "reward", split, tokenizer)
    texts = ((p.prompt, p.chosen, p.rejected) for p in preferences)
    return text_pairs(texts, tokenizer, options.max_seq_len, split)


def collate(tokenizer):
    """Batches of pairs (rows alternate better, worse) or of single examples."""

    def collated(items: list[Pair] | list[TokenizedExample]) -> dict[str, torch.Tensor]:
        examples = chain.from_iterable(items) if isinstance(items[0], tuple) else items
        return pad_examples(list(examples), tokenizer.pad_token_id)

    return collated
