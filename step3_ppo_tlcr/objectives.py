"""The arithmetic of PPO (Schulman et al., 2017), as functions of ``(B, A)`` tensors; no models, engines or ranks.

``action_mask`` is 1 on the actions a response took, EOS included, and 0 behind its end.
"""

import torch


def counted(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``values`` where the mask counts and 0 elsewhere, whatever stands there, NaN included."""
    return values.masked_fill(mask == 0, 0) * mask


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the entries the mask counts; 0 where it counts none."""
    return counted(values, mask).sum() / mask.sum().clamp(min=1)


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log pi(a_t) - log pi_ref(a_t): the plain, unbiased estimate of each action's KL (section 4.3); ``(B, A)``."""
    return logprobs - ref_logprobs


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """q - 1 - log q with q = pi_ref / pi: also unbiased, never negative, less variance; ``(B, A)``."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def correction(
    logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, action_mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """min(pi(a_t) / mu(a_t), cap) of tokens that mu wrote: truncated importance weights, no gradient; ``(B, A)``.

    mu is a server's policy, which differs from pi by rounding, or by an update with ``--rollout_ahead``. 0 where the
    mask is 0.
    """
    return counted(counted(logprobs - sampled_logprobs, action_mask).exp().clamp(max=cap), action_mask).detach()


def kl_penalised(
    rewards: torch.Tensor, divergence: torch.Tensor, action_mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """r_t - beta KL_t on every action (section 4.3), for any per-action estimate of the KL. All ``(B, A)``."""
    return counted(rewards - beta * divergence, action_mask)


def adapted_beta(beta: float, kl: float, target: float, sequences: int, horizon: int) -> float:
    """The KL coefficient after a batch whose KL per response was ``kl`` (Ziegler et al., 2019, section 2.2).

    It grows or shrinks in proportion to the relative error, at most 20 % of it, over about ``horizon`` sequences; by
    no batch, however large beside the horizon, below a half: it must never turn negative.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * max(0.5, 1 + error * sequences / horizon)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, action_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over dense rewards.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where V and A behind the last action are
    0: nothing past the end leaks in. ``values[b, a]`` is V of the state in which action ``a`` was chosen. Returns
    (advantages, returns = advantages + values), both ``(B, A)`` and 0 where the mask is 0.
    """
    rewards, values = counted(rewards, action_mask), counted(values, action_mask)
    advantages = torch.zeros_like(values)
    following_value = following_advantage = torch.zeros_like(values[:, 0])
    for action in range(values.size(1) - 1, -1, -1):
        delta = rewards[:, action] + gamma * following_value - values[:, action]
        # Masked again, so that padding stays exactly 0 and each row's scan starts at its own last action.
        following_advantage = (delta + gamma * lam * following_advantage) * action_mask[:, action]
        following_value = values[:, action]
        advantages[:, action] = following_advantage
    return advantages, advantages + values


def whiten(
    advantages: torch.Tensor, action_mask: torch.Tensor, mean: torch.Tensor | float, std: torch.Tensor | float
) -> torch.Tensor:
    """(A - mean) / std where the mask counts; the moments may come from all ranks."""
    return (advantages - mean) / (std + 1e-8) * action_mask


def remax_weights(
    rewards: torch.Tensor, baseline: torch.Tensor, action_mask: torch.Tensor, gamma: float, clip: float
) -> torch.Tensor:
    """ReMax's weight of each action without the KL term: the clipped difference from the greedy response's reward,
    discounted back from the end (Li et al., 2023, as released: gamma applies once at the last action already).

    ``rewards`` ``(B, A)`` of the sampled responses, ``baseline`` ``(B,)`` sums of the greedy ones; returns ``(B, A)``.
    """
    difference = ((rewards * action_mask).sum(1) - baseline).clamp(-clip, clip)
    steps_to_end = action_mask.flip(1).cumsum(1).flip(1)  # 1 at the last action
    return difference.unsqueeze(1) * gamma**steps_to_end * action_mask


def remax_loss(logprobs: torch.Tensor, returns: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """-return_t log pi(a_t), mean over counted tokens: REINFORCE, no ratio, no clipping, no critic."""
    return masked_mean(-returns * torch.where(action_mask > 0, logprobs, 0.0), action_mask)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    action_mask: torch.Tensor,
    clip_range: float,
) -> torch.Tensor:
    """Clipped surrogate: -min(rho A, clip(rho, 1 +- clip_range) A), rho = pi / pi_old, mean over counted tokens."""
    # Selected before exp: what stands in the padding, infinities included, must not become a NaN gradient.
    ratio = torch.exp(torch.where(action_mask > 0, logprobs - old_logprobs, 0.0))
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(-torch.minimum(ratio * advantages, clipped * advantages), action_mask)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    action_mask: torch.Tensor,
    clip_range: float,
) -> torch.Tensor:
    """Half the larger of the squared errors of V and of V clipped to old V +- clip_range; mean over counted tokens."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    worse = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(worse, action_mask)
