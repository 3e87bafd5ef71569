"""The losses of step 2, as functions of tensors."""

import torch
import torch.nn.functional as F


def positive_logit(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of D: ``(..., 2)`` class logits to ``(...)``, in fp32. D = sigmoid of it = softmax(logits)[positive]."""
    logits = logits.float()
    return logits[..., 1] - logits[..., 0]


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, response_mask: torch.Tensor, neutral_weight: float = 1.0
) -> torch.Tensor:
    """Per-token binary cross-entropy with soft labels (Eq. 6), in fp32.

    ``logits`` ``(B, T, 2)``; ``targets`` ``(B, T)``: 1 positive, 0 negative, 0.5 neutral; ``response_mask`` ``(B, T)``.
    Each sequence's tokens are averaged (neutral ones with ``neutral_weight``), then the sequences: a batch with one
    rejected for each modified response gives both sides the same weight, however long they are.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(positive_logit(logits), targets, reduction="none")
    weights = response_mask * torch.where(targets == 0.5, neutral_weight, 1.0)
    # A sequence without weighted tokens (no edit and neutral_weight 0) has loss 0, not 0 / 0.
    return ((cross_entropy * weights).sum(1) / weights.sum(1).clamp(min=1e-8)).mean()


def end_scores(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """A sequence reward model's score ``(B,)``: its value at the response's last token, the EOS of a whole one.

    ``values`` and ``response_mask`` are ``(B, T)``.
    """
    positions = torch.arange(values.size(1), device=values.device)
    last = (positions * response_mask).argmax(1, keepdim=True)
    return values.float().gather(1, last).squeeze(1)


def aggregate(
    rewards: torch.Tensor, mask: torch.Tensor, how: str, length: torch.Tensor, sharpness: float = 2.0
) -> torch.Tensor:
    """A response's worth from its tokens' rewards, ``(B, T)`` and its mask to ``(B,)``.

    ``sum``; ``avg``, the mean; ``max`` and ``min``, soft ones: log-sum-exp at ``sharpness``. All but the sum are
    multiplied by ``length`` ``(B,)``, the mean length of the responses that are compared, so that none wins by its own.
    """
    if how == "sum":
        return (rewards * mask).sum(1)
    if how == "avg":
        return (rewards * mask).sum(1) / mask.sum(1).clamp(min=1) * length
    signed = sharpness if how == "max" else -sharpness
    exponents = (signed * rewards).masked_fill(mask == 0, -torch.inf)
    return torch.logsumexp(exponents, 1) / signed * length


def pair_loss(preferred: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: -log sigmoid(preferred - other), mean over pairs. Both ``(B,)``."""
    return -F.logsigmoid(preferred - other).mean()


def diverging_pair_loss(
    preferred: torch.Tensor,
    other: torch.Tensor,
    preferred_ids: torch.Tensor,
    other_ids: torch.Tensor,
    preferred_mask: torch.Tensor,
    other_mask: torch.Tensor,
) -> torch.Tensor:
    """DeepSpeed-Chat's pair loss: averaged over all positions from the first difference to the longer one's end.

    All arguments ``(B, T)``; the masks are 1 on real tokens of prompt and response. Pairs without a difference count 0.
    """
    longer = torch.maximum(preferred_mask, other_mask).bool()
    differs = (preferred_ids != other_ids) | (preferred_mask != other_mask)
    counted = ((differs & longer).cumsum(1) > 0) & longer
    loss = -F.logsigmoid(preferred.float() - other.float()) * counted
    return (loss.sum(1) / counted.sum(1).clamp(min=1)).mean()
