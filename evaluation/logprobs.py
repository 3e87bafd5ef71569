"""What a policy says of answers that are already written."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from deepspeed_chat_tlcr.generation import Answer
from deepspeed_chat_tlcr.tokenization import TokenizedExample
from deepspeed_chat_tlcr.training import pad_examples

AT_ONCE = 64
"""Answers in one forward pass."""


def as_examples(answers: Sequence[Answer]) -> list[TokenizedExample]:
    return [TokenizedExample([*a.prompt_ids, *a.response_ids], len(a.prompt_ids)) for a in answers]


@torch.no_grad()
def response_logprobs(
    model: PreTrainedModel, answers: Sequence[Answer], pad_id: int, temperature: float = 1.0
) -> torch.Tensor:
    """log pi(response | prompt) of each answer at ``temperature`` > 0, EOS included, in nats, ``(N,)`` on the CPU."""
    examples, totals = as_examples(answers), []
    for begin in range(0, len(examples), AT_ONCE):
        batch = pad_examples(examples[begin : begin + AT_ONCE], pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        chosen = (logits.float() / temperature).log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        totals.append((chosen * batch["response_mask"][:, 1:]).sum(1).cpu())
    return torch.cat(totals)
