"""Log-probabilities of the distribution that was sampled from, without a float copy of ``(B, A, V)``."""

from dataclasses import replace

import torch

from deepspeed_chat_tlcr.generation import Decoding, Ends, warp


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(logits)[token] in fp32, row by row, keeping only the logits and one number per action.

    ``eos_id``, what ends a response, counts as impossible in the first ``barred`` actions.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor, eos_id: Ends, barred: int) -> torch.Tensor:
        rows = (_barred_row(row, eos_id, barred) for row in logits)
        chosen, sums = [], []
        for row, its_tokens in zip(rows, tokens, strict=True):
            chosen.append(row.gather(-1, its_tokens.unsqueeze(-1)).squeeze(-1))
            sums.append(torch.logsumexp(row, dim=-1))
        normaliser = torch.stack(sums)
        ctx.save_for_backward(logits, tokens, normaliser)
        ctx.eos_id, ctx.barred = eos_id, barred
        return torch.stack(chosen) - normaliser

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, tokens, normaliser = ctx.saved_tensors
        result = torch.empty_like(logits)
        for row in range(len(logits)):
            # d log p(token) / d logits = onehot(token) - softmax(logits)
            slope = -torch.exp(_barred_row(logits[row], ctx.eos_id, ctx.barred) - normaliser[row].unsqueeze(-1))
            slope.scatter_add_(-1, tokens[row].unsqueeze(-1), torch.ones_like(slope[:, :1]))
            result[row] = (slope * gradient[row].unsqueeze(-1)).to(result.dtype)
        return result, None, None, None


def _barred_row(logits: torch.Tensor, eos_id: Ends, barred: int) -> torch.Tensor:
    """One row's ``(A, V)`` logits in fp32, a copy if its end is barred."""
    row = logits.to(torch.float32, copy=barred > 0)
    if barred:
        row[:barred, eos_id] = -torch.inf
    return row


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, decoding: Decoding, eos_id: Ends) -> torch.Tensor:
    """log pi(token) under the distribution that ``decoding`` draws from.

    ``logits`` ``(B, A, V)`` as the model gives them, ``tokens`` ``(B, A)``; returns ``(B, A)`` in fp32.
    """
    warped, barred = _warped(logits, tokens, decoding, eos_id)
    return _ChosenLogprobs.apply(warped, tokens, eos_id, barred)


def _warped(logits: torch.Tensor, tokens: torch.Tensor, decoding: Decoding, eos_id: Ends) -> tuple[torch.Tensor, int]:
    """``warp``'s logits, and in how many first actions the end has still to be barred."""
    barred = 0
    if decoding.top_k <= 0 and decoding.top_p >= 1.0:
        # Without a cut, which depends on whether the end is barred, this is left to the rows: no copy of all logits.
        barred, decoding = decoding.min_new_tokens, replace(decoding, min_new_tokens=0)
    return warp(logits, decoding, eos_id, tokens), barred


@torch.no_grad()
def full_kl(logits: torch.Tensor, ref_logits: torch.Tensor, decoding: Decoding, eos_id: Ends) -> torch.Tensor:
    """KL(pi || pi_ref) over the whole vocabulary, in nats: two ``(B, A, V)`` to ``(B, A)``, row by row.

    Both at the temperature and with the minimum length of ``decoding``, whose top-p and top-k do not count.
    """

    def logprobs_of(row: torch.Tensor) -> torch.Tensor:
        barred = _barred_row(row, eos_id, decoding.min_new_tokens)
        return (barred / decoding.temperature).log_softmax(-1).clamp(min=_LOWEST)

    rows = []
    for pair in zip(logits, ref_logits, strict=True):
        logprobs, ref_logprobs = map(logprobs_of, pair)
        rows.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    return torch.stack(rows)


class _Entropy(torch.autograd.Function):
    """Entropy of softmax(logits), row by row, keeping only the logits and one number per action.

    ``eos_id``, what ends a response, counts as impossible in the first ``barred`` actions.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, eos_id: Ends, barred: int) -> torch.Tensor:
        rows = (_barred_row(row, eos_id, barred) for row in logits)
        entropies = torch.stack([_row_entropy(row.log_softmax(-1)) for row in rows])
        ctx.save_for_backward(logits, entropies)
        ctx.eos_id, ctx.barred = eos_id, barred
        return entropies

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, entropies = ctx.saved_tensors
        result = torch.empty_like(logits)
        for row in range(len(logits)):
            # d H / d logits = -p (log p + H)
            logprobs = _barred_row(logits[row], ctx.eos_id, ctx.barred).log_softmax(-1)
            slope = -logprobs.exp() * (logprobs.clamp(min=_LOWEST) + entropies[row].unsqueeze(-1))
            result[row] = (slope * gradient[row].unsqueeze(-1)).to(result.dtype)
        return result, None, None


_LOWEST = -1e4  # a token that sampling excludes (log 0) adds nothing, rather than 0 x infinity


def _row_entropy(logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs.clamp(min=_LOWEST)).sum(-1)


def entropy(logits: torch.Tensor, tokens: torch.Tensor, decoding: Decoding, eos_id: Ends) -> torch.Tensor:
    """Entropy in nats of the distributions that ``decoding`` draws from, ``(B, A, V)`` to ``(B, A)``; differentiable.

    ``tokens`` ``(B, A)``, the chosen ones, are in them whatever the cut.
    """
    warped, barred = _warped(logits, tokens, decoding, eos_id)
    return _Entropy.apply(warped, eos_id, barred)
