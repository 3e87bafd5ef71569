"""Log-probabilities of the distribution that was sampled from, without a float copy of ``(B, A, V)``."""

import torch

from deepspeed_chat_tlcr.generation import Decoding


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(logits)[token] in fp32, row by row, keeping only the logits and one number per action."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        normaliser = torch.stack([torch.logsumexp(row.float(), dim=-1) for row in logits])
        ctx.save_for_backward(logits, tokens, normaliser)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float() - normaliser

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, tokens, normaliser = ctx.saved_tensors
        result = torch.empty_like(logits)
        for row in range(len(logits)):
            # d log p(token) / d logits = onehot(token) - softmax(logits)
            slope = -torch.exp(logits[row].float() - normaliser[row].unsqueeze(-1))
            slope.scatter_add_(-1, tokens[row].unsqueeze(-1), torch.ones_like(slope[:, :1]))
            result[row] = (slope * gradient[row].unsqueeze(-1)).to(result.dtype)
        return result, None


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, decoding: Decoding, eos_id: int) -> torch.Tensor:
    """log pi(token) under the distribution that ``decoding`` draws from.

    ``logits`` ``(B, A, V)`` as the model gives them, ``tokens`` ``(B, A)``; returns ``(B, A)`` in fp32.
    """
    return _ChosenLogprobs.apply(warp(logits, tokens, decoding, eos_id), tokens)


def warp(logits: torch.Tensor, tokens: torch.Tensor, decoding: Decoding, eos_id: int) -> torch.Tensor:
    """Minimum length, temperature, top-k and top-p applied to ``(B, A, V)`` logits, in transformers' order.

    The chosen token always stays: a later policy's own cut could otherwise give it probability 0 and an infinite loss.
    """
    if decoding.min_new_tokens > 0:
        barred = torch.zeros_like(logits[0], dtype=torch.bool)
        barred[: decoding.min_new_tokens, eos_id] = True
        logits = logits.masked_fill(barred, -torch.inf)
    if decoding.temperature != 1.0:
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
        dropped.scatter_(-1, tokens.unsqueeze(-1), False)
    return logits.masked_fill(dropped, -torch.inf)


@torch.no_grad()
def full_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) over the whole vocabulary, in nats: two ``(B, A, V)`` to ``(B, A)``, row by row."""
    rows = []
    for row, ref_row in zip(logits, ref_logits, strict=True):
        logprobs, ref_logprobs = row.float().log_softmax(-1), ref_row.float().log_softmax(-1)
        rows.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    return torch.stack(rows)


@torch.no_grad()
def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each distribution, ``(B, A, V)`` to ``(B, A)``, row by row."""
    rows = []
    for row in logits:
        logprobs = row.float().log_softmax(-1)
        # xlogy-like: a token that sampling excludes (log 0) adds nothing.
        rows.append(-(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1))
    return torch.stack(rows)
