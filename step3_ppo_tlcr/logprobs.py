"""Log-probabilities of the distribution that was sampled from, without a float copy of ``(B, A, V)``."""

import torch

from deepspeed_chat_tlcr.generation import Decoding, warp


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
    return _ChosenLogprobs.apply(warp(logits, decoding, eos_id, tokens), tokens)


@torch.no_grad()
def full_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) over the whole vocabulary, in nats: two ``(B, A, V)`` to ``(B, A)``, row by row."""
    rows = []
    for row, ref_row in zip(logits, ref_logits, strict=True):
        logprobs, ref_logprobs = row.float().log_softmax(-1), ref_row.float().log_softmax(-1)
        rows.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    return torch.stack(rows)


class _Entropy(torch.autograd.Function):
    """Entropy of softmax(logits), row by row, keeping only the logits and one number per action."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor) -> torch.Tensor:
        entropies = torch.stack([_row_entropy(row.float().log_softmax(-1)) for row in logits])
        ctx.save_for_backward(logits, entropies)
        return entropies

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        logits, entropies = ctx.saved_tensors
        result = torch.empty_like(logits)
        for row in range(len(logits)):
            # d H / d logits = -p (log p + H)
            logprobs = logits[row].float().log_softmax(-1)
            slope = -logprobs.exp() * (logprobs.clamp(min=_LOWEST) + entropies[row].unsqueeze(-1))
            result[row] = (slope * gradient[row].unsqueeze(-1)).to(result.dtype)
        return result


_LOWEST = -1e4  # a token that sampling excludes (log 0) adds nothing, rather than 0 x infinity


def _row_entropy(logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs.clamp(min=_LOWEST)).sum(-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each distribution, ``(B, A, V)`` to ``(B, A)``; differentiable."""
    return _Entropy.apply(logits)
