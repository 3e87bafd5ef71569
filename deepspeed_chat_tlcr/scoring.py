"""What models say of answers that are already written: log-probs of a policy, D of a discriminator, a reward."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from deepspeed_chat_tlcr.generation import Answer
from deepspeed_chat_tlcr.models import POSITIVE
from deepspeed_chat_tlcr.tokenization import TokenizedExample
from deepspeed_chat_tlcr.training import pad_examples

AT_ONCE = 64
"""Answers in one forward pass."""


def as_examples(answers: Sequence[Answer]) -> list[TokenizedExample]:
    return [TokenizedExample([*a.prompt_ids, *a.response_ids], len(a.prompt_ids)) for a in answers]


def _batches(answers: Sequence[Answer], pad_id: int) -> Iterator[dict[str, torch.Tensor]]:
    examples = as_examples(answers)
    for begin in range(0, len(examples), AT_ONCE):
        yield pad_examples(examples[begin : begin + AT_ONCE], pad_id)


@torch.no_grad()
def response_logprobs(model: PreTrainedModel, answers: Sequence[Answer], pad_id: int) -> torch.Tensor:
    """log pi(response | prompt) of each answer at temperature 1, EOS included, in nats, ``(N,)``."""
    totals = []
    for batch in _batches(answers, pad_id):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        chosen = logits.float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        totals.append((chosen * batch["response_mask"][:, 1:]).sum(1))
    return torch.cat(totals)


@torch.no_grad()
def positive_probs(discriminator: PreTrainedModel, answers: Sequence[Answer], pad_id: int) -> list[torch.Tensor]:
    """D of each answer's tokens, EOS included: a tensor ``(A,)`` for each answer, in [0, 1]."""
    found = []
    for batch in _batches(answers, pad_id):
        logits = discriminator(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        probs = logits.float().softmax(-1)[..., POSITIVE]
        found += [row[mask == 1] for row, mask in zip(probs, batch["response_mask"], strict=True)]
    return found


@torch.no_grad()
def end_values(reward_model: PreTrainedModel, answers: Sequence[Answer], pad_id: int) -> torch.Tensor:
    """A sequence reward model's score of each answer, read at its last token, ``(N,)``."""
    found = []
    for batch in _batches(answers, pad_id):
        values = reward_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        found.append(values.float().gather(1, last).squeeze(1))
    return torch.cat(found)
