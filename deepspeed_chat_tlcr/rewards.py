"""A trained discriminator as a reward function for other libraries' trainers, such as TRL's GRPOTrainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from deepspeed_chat_tlcr.models import POSITIVE, load_token_classifier
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from deepspeed_chat_tlcr.turns import render

Prompt = str | list[dict[str, Any]]


def discriminator_reward(
    path: str | Path,
    reduce: str = "sum",
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[..., list[float]]:
    """Load a discriminator of step 2 and return a function that rewards whole responses.

    ``reward(prompts, completions, completion_ids, **_)`` returns one float per completion: the sum over its tokens of
    r_t = 2 D(a_t | x, a_<t) - 1 (Eq. 7), which is what PPO maximises at gamma 1, or with ``reduce="mean"`` their mean,
    which does not depend on the length. ``prompts`` are texts, or lists of chat messages for the chat template.
    ``completion_ids``, which TRL passes, are the policy's tokens, EOS included where there is one: policy and
    discriminator need the same tokenizer. Raises ``InputError`` for a model that is no discriminator.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce={reduce!r}: known are sum and mean")
    tokenizer = load_tokenizer(path)
    model = load_token_classifier(str(path), 2, dtype).to(device).eval()  # type: ignore[arg-type]

    @torch.no_grad()
    def tlcr_reward(
        prompts: Sequence[Prompt], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        starts = [
            tokenize_prompt(tokenizer, x if isinstance(x, str) else render(tokenizer, x, generation=True))
            for x in prompts
        ]
        rewards: list[float] = []
        for begin in range(0, len(starts), batch_size):
            chosen = slice(begin, begin + batch_size)
            pairs = [(start, list(ids)) for start, ids in zip(starts[chosen], completion_ids[chosen], strict=True)]
            rows = [torch.tensor(start + response) for start, response in pairs]
            ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
            probs = model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1)[..., POSITIVE]
            for row, (start, response) in zip(2 * probs - 1, pairs, strict=True):  # (T,)
                total = row[len(start) : len(start) + len(response)].sum().item()
                rewards.append(total / max(1, len(response)) if reduce == "mean" else total)
        return rewards

    return tlcr_reward
