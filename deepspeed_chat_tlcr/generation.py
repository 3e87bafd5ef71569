"""Answers of a causal language model: from padded prompts to tokens and an exact response mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from deepspeed_chat_tlcr.turns import end_ids

Ends = int | Sequence[int]
"""The token that ends a response, or all that do (``turns.end_ids``)."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. ``temperature`` 0: the likeliest token; ``top_k`` 0, ``top_p`` 1: no cut.

    ``min_new_tokens``: the length before which a response cannot end.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """One generated response. ``ended``: whether the model ended it, not the length limit."""

    prompt_ids: list[int]
    response_ids: list[int]  # the token that ends it included
    text: str
    ended: bool


def left_pad(prompts: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of several lengths as ``(B, P)`` ids and mask, padded on the left to the longest of them."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def response_mask(response_ids: torch.Tensor, eos_id: Ends) -> torch.Tensor:
    """1 up to and including each row's first end; all ones for a row cut at the limit. ``(B, A)`` to ``(B, A)``.

    Everything behind the first end is padding, whatever its id: pad = EOS is harmless.
    """
    is_eos = torch.isin(response_ids, torch.tensor(eos_id, device=response_ids.device)).long()
    ended_before = is_eos.cumsum(1) - is_eos
    return (ended_before == 0).long()


def warp(
    logits: torch.Tensor, decoding: Decoding, eos_id: Ends, tokens: torch.Tensor | None = None, first_action: int = 0
) -> torch.Tensor:
    """Minimum length, temperature, top-k and top-p applied to ``(B, A, V)`` logits, in transformers' order.

    Sampler and log-probs both use it, so log-probs always belong to the distribution that was sampled from. ``tokens``
    ``(B, A)`` are never cut: a later policy's cut could give a chosen token probability 0 and an infinite loss.
    ``first_action``: the place of the first of the A actions in the response.
    """
    barred = min(decoding.min_new_tokens - first_action, logits.size(1))
    if barred > 0:
        no_end = torch.zeros_like(logits[0], dtype=torch.bool)
        no_end[:barred, eos_id] = True
        logits = logits.masked_fill(no_end, -torch.inf)
    if decoding.temperature not in (0.0, 1.0):
        logits = logits / decoding.temperature
    if decoding.top_k <= 0 and decoding.top_p >= 1.0:
        return logits
    with torch.no_grad():
        dropped = torch.zeros_like(logits, dtype=torch.bool)
        if 0 < decoding.top_k < logits.size(-1):
            dropped |= logits < logits.topk(decoding.top_k, dim=-1).values[..., -1:]
        if decoding.top_p < 1.0:
            ascending, order = logits.masked_fill(dropped, -torch.inf).float().sort(dim=-1)
            below = ascending.softmax(-1).cumsum(-1) <= 1 - decoding.top_p
            below[..., -1] = False
            dropped |= torch.zeros_like(dropped).scatter(-1, order, below)
        if tokens is not None:
            dropped.scatter_(-1, tokens.unsqueeze(-1), False)
    return logits.masked_fill(dropped, -torch.inf)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    mask: torch.Tensor,
    decoding: Decoding,
    synced_gpus: bool = False,
) -> torch.Tensor:
    """Continue left-padded prompts ``(B, P)``; returns ``(B, P + A)`` token ids, A as long as the longest response.

    Leaves the model in evaluation mode. ``synced_gpus``: all ranks go on until the last is done (ZeRO-3).
    """
    model.eval()
    greedy = decoding.temperature == 0
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        do_sample=not greedy,
        temperature=1.0 if greedy else decoding.temperature,
        top_p=1.0 if greedy else decoding.top_p,
        top_k=0 if greedy else max(0, decoding.top_k),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(end_ids(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    # transformers fills gaps from the model's own config: without this, a checkpoint's top_p would apply.
    model.generation_config = config
    return model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=synced_gpus)  # type: ignore[operator]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    batch_size: int,
) -> Iterator[Answer]:
    """One answer for each prompt (token ids), in the order of the prompts."""
    ends = end_ids(tokenizer)
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        ids, mask = left_pad(batch, tokenizer.pad_token_id)
        output = generate(model, tokenizer, ids.to(model.device), mask.to(model.device), decoding)[:, ids.size(1) :]
        lengths = response_mask(output, ends).sum(1).tolist()
        for prompt, row, length in zip(batch, output.tolist(), lengths, strict=True):
            response = row[:length]
            ended = response[-1:] != [] and response[-1] in ends
            # Decoded behind the prompt, because SentencePiece drops the space before a text's first word.
            content = response[:-1] if ended else response
            whole = tokenizer.decode([*prompt, *content], clean_up_tokenization_spaces=False)
            text = whole[len(tokenizer.decode(prompt, clean_up_tokenization_spaces=False)) :]
            yield Answer(prompt, response, str(text), ended)


def seeded_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    batch_size: int,
    seed: int,
    shown: str | None = None,
) -> list[Answer]:
    """All ``answers``, from a random state of their own. ``shown``: the title of a progress bar."""
    set_seed(seed)
    written = answers(model, tokenizer, prompts, decoding, batch_size)
    return list(tqdm(written, total=len(prompts), desc=shown, dynamic_ncols=True, disable=shown is None))
