"""Pairs of tokenised responses: of revisions, with token labels, and of preferences."""

from collections.abc import Iterable
from itertools import chain

import torch

from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.tokenization import TokenizedExample, tokenize_response, truncate
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
