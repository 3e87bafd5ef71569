"""PPO with a reward on every token (paper 4.3; Schulman et al., 2017)."""

import math
from dataclasses import replace

import torch

from step3_ppo_tlcr.averages import Averages
from step3_ppo_tlcr.engines import action_logits, state_values
from step3_ppo_tlcr.logprobs import entropy
from step3_ppo_tlcr.objectives import gae, kl_penalised, masked_mean, policy_loss, value_loss, whiten
from step3_ppo_tlcr.records import Experience
from step3_ppo_tlcr.trainer import Losses, Trainer


class PPO(Trainer):
    """Clipped surrogate for the policy, clipped squared error for the critic, GAE over dense rewards."""

    def losses(self, batch: Experience) -> Losses:
        options, rollout, mask = self.options, batch.rollout, batch.rollout.action_mask
        logits = action_logits(self.models.actor, rollout)
        logprobs = self.logprobs(logits, rollout)
        values = state_values(self.models.critic, rollout)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        old_values = values.detach() if batch.old_values is None else batch.old_values
        if batch.advantages is None:
            advantages, returns = self._advantages(batch, old_logprobs, old_values)
        else:
            advantages, returns = batch.advantages, batch.returns

        entropies = entropy(logits if options.entropy_coef else logits.detach())
        actor_loss = policy_loss(logprobs, old_logprobs, advantages, mask, options.cliprange)
        critic_loss = value_loss(values, old_values, returns, mask, options.cliprange_value)
        bonus = options.entropy_coef * masked_mean(entropies, mask) if options.entropy_coef else 0.0

        log_ratio = ((logprobs - old_logprobs) * mask).detach()
        ratio = log_ratio.exp()
        return Losses(
            {"actor": actor_loss - bonus, "critic": critic_loss},
            log_ratio,
            {
                "policy/perplexity": -logprobs.detach(),
                "policy/kl_per_token": old_logprobs - batch.ref_logprobs,
                "policy/entropy": entropies.detach(),
                "policy/approx_kl": ratio - 1 - log_ratio,
                "policy/clip_fraction": ((ratio - 1).abs() > options.cliprange).float(),
                "policy/loss": actor_loss.detach().expand_as(mask),
                "value/loss": critic_loss.detach().expand_as(mask),
                "value/mean": values.detach(),
                "value/return": returns,
                "value/squared_error": (values.detach() - returns) ** 2,
                "value/squared_return": returns**2,
                "value/advantage": advantages,
            },
            {"policy/kl": ((old_logprobs - batch.ref_logprobs) * mask).sum(1)},
        )

    def prepared(self, batches: list[Experience]) -> list[Experience]:
        """With ``--whiten_advantages``: advantages scaled together over all tokens of all ranks."""
        if not self.options.whiten_advantages:
            return batches
        moments = Averages(self.device)
        estimated = [self._advantages(batch, batch.old_logprobs, batch.old_values) for batch in batches]
        for batch, (advantages, _) in zip(batches, estimated, strict=True):
            moments.add("mean", advantages, batch.rollout.action_mask)
            moments.add("square", advantages.double() ** 2, batch.rollout.action_mask)
        measured = moments.reduce()
        std = math.sqrt(max(0.0, measured["square"] - measured["mean"] ** 2))
        return [
            replace(
                batch,
                advantages=whiten(advantages, batch.rollout.action_mask, measured["mean"], std),
                returns=returns,
            )
            for batch, (advantages, returns) in zip(batches, estimated, strict=True)
        ]

    def _advantages(
        self, batch: Experience, old_logprobs: torch.Tensor, old_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """GAE over rewards with the KL penalty; ``(B, A)`` advantages and returns."""
        mask, gamma, lam = batch.rollout.action_mask, self.options.gamma, self.options.lam
        divergence = self.divergence(batch, old_logprobs)
        if self.options.penalty.endswith("onestep"):
            advantages, returns = gae(batch.rewards, old_values, mask, gamma, lam)
            return kl_penalised(advantages, divergence, mask, self.beta), returns
        rewards = kl_penalised(batch.rewards, divergence, mask, self.beta)
        return gae(rewards, old_values, mask, gamma, lam)
