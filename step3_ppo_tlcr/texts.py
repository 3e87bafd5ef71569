"""Rollouts as text, and the way from another tokenizer's tokens to the policy's."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.generation import left_pad
from deepspeed_chat_tlcr.pictures import token_strings
from deepspeed_chat_tlcr.tokenization import tokenize_with_offsets
from deepspeed_chat_tlcr.turns import end_after, end_ids
from step3_ppo_tlcr.experience import Rollout

Span = tuple[int, int]
"""Characters of an answer: from the first of them to the one behind the last. Empty for the token that ends it."""


@dataclass(frozen=True)
class Answer:
    """What a row of a rollout says. ``spans``: one for each of its n actions."""

    prompt: str
    text: str  # without the token that ended it
    spans: list[Span]
    ended: bool


def answers_of(rollout: Rollout, tokenizer: PreTrainedTokenizerFast) -> list[Answer]:
    """Each row of a rollout as text. A token that is a part of a character only spans that character."""
    answers = []
    for row, length in enumerate(rollout.action_mask.sum(1).long().tolist()):
        ids = rollout.input_ids[row][rollout.attention_mask[row] > 0].tolist()
        strings = token_strings(tokenizer, ids)
        start = len(ids) - length
        ended = length > 0 and ids[-1] in end_ids(tokenizer)
        if ended:
            strings[-1] = ""
        skipped = int(start > 0 and ids[0] == tokenizer.bos_token_id)
        begins = np.cumsum([0, *map(len, strings[start:])]).tolist()
        # What completes no character yet spans the next one; behind all characters there is none.
        spans = [(at, max(following, min(at + 1, begins[-1]))) for at, following in pairwise(begins)]
        if ended:
            spans[-1] = (begins[-1], begins[-1])
        answers.append(Answer("".join(strings[skipped:start]), "".join(strings[start:]), spans, ended))
    return answers


def read_by(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], positions: int, device: torch.device
) -> tuple[Rollout, list[list[Span]]]:
    """The same answers as another model reads them: ``(B, T')`` tokens with A' actions, and the span of each action.

    Where prompt and answer have more than ``positions`` tokens, the prompt loses its beginning, and an answer that
    alone has more its end.
    """
    prompts, responses, spans = [], [], []
    for answer in answers:
        ids, offsets, start = tokenize_with_offsets(tokenizer, answer.prompt, answer.text)
        base = len(answer.prompt)
        own = [(max(0, begin - base), max(0, end - base)) for begin, end in offsets[start:]]
        response = ids[start:]
        if answer.ended:
            response = [*response, end_after(tokenizer, answer.prompt)]
            own.append((len(answer.text), len(answer.text)))
        response, own = response[: positions - 1], own[: positions - 1]
        kept = min(start, positions - len(response))
        prompts.append(ids[start - kept : start] or [end_after(tokenizer, "")])  # an empty prompt has no token
        responses.append(response)
        spans.append(own)
    prompt_ids, prompt_mask = left_pad(prompts, tokenizer.pad_token_id)
    longest = max(1, *map(len, responses))
    response_ids = torch.full((len(answers), longest), tokenizer.pad_token_id)
    mask = torch.zeros(len(answers), longest, dtype=prompt_mask.dtype)
    for row, response in enumerate(responses):
        response_ids[row, : len(response)] = torch.tensor(response, dtype=torch.long)
        mask[row, : len(response)] = 1
    tokens = torch.cat([prompt_ids, response_ids], 1).to(device)
    return Rollout(tokens, torch.cat([prompt_mask, mask], 1).to(device), mask.to(device)), spans


def project(values: Sequence[float], spans: Sequence[Span], onto: Sequence[Span], share: bool = False) -> list[float]:
    """Numbers of one tokenizer's tokens as numbers of another's, by the characters that both spell.

    A character has the mean over the tokens that span it, and a token of ``onto`` the mean over its characters that
    have any. One without such a character takes the nearest earlier one's, or else the nearest later one's. The empty
    span, of the token that ends the answer, goes to the empty span, or where there is none is left out; where the
    answer ended for ``onto`` alone, its end counts as such a token without a character.
    ``share``: the numbers are parts of a whole (attention) and keep their sum: they are spread over characters first,
    and each token of ``onto`` gets what its characters have.
    """
    length = max((end for _, end in (*spans, *onto)), default=0)
    total, count, owners = np.zeros(length), np.zeros(length), np.zeros(length)
    for value, (begin, end) in zip(values, spans, strict=True):
        total[begin:end] += value / max(1, end - begin) if share else value
        count[begin:end] += 1
    for begin, end in onto:
        owners[begin:end] += 1
    covered = np.flatnonzero(count)
    each = total / np.maximum(1, owners if share else count)
    sums, counted = (np.concatenate([[0.0], np.cumsum(array)]) for array in (each, count > 0))
    ends = [value for value, (begin, end) in zip(values, spans, strict=True) if begin == end]
    projected: list[float] = []
    for begin, end in onto:
        within = counted[end] - counted[begin]
        if begin == end and ends:
            projected.append(ends[-1])
        elif share:
            projected.append(sums[end] - sums[begin])
        elif within:
            projected.append((sums[end] - sums[begin]) / within)
        elif len(covered):
            projected.append(float(each[covered[max(0, int(np.searchsorted(covered, begin)) - 1)]]))
        else:
            projected.append(sum(values) / len(values) if values else 0.0)
    return [float(value) for value in projected]
