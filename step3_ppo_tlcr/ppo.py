"""PPO with a reward on every token (paper 4.3; Schulman et al., 2017)."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from step3_ppo_tlcr.averages import Averages
from step3_ppo_tlcr.experience import Experience
from step3_ppo_tlcr.objectives import gae, kl_penalised, policy_loss, value_loss, whiten
from step3_ppo_tlcr.scores import state_values
from step3_ppo_tlcr.trainer import Loss, Trainer


class PPO(Trainer):
    """Clipped surrogate for the policy, clipped squared error for the critic, GAE over dense rewards."""

    def losses(self, batch: Experience) -> Iterator[Loss]:
        batch, logprobs, entropies = self.policy(batch)
        if batch.advantages is None:
            advantages, returns = self._advantages(batch)
            batch = replace(batch, advantages=advantages, returns=returns)
        mask, clip = batch.rollout.action_mask, self.options.cliprange
        advantages, corrected = self.corrected(batch, batch.advantages)
        loss = policy_loss(logprobs, batch.old_logprobs, advantages, mask, clip)
        clipped = ((logprobs.detach() - batch.old_logprobs).exp() - 1).abs() > clip
        yield self.actor_loss(loss, batch, logprobs, entropies, {"policy/clip_fraction": clipped.float(), **corrected})
        yield self._critic_loss(batch)

    def _critic_loss(self, batch: Experience) -> Loss:
        mask = batch.rollout.action_mask
        values = state_values(self.models.critic, batch.rollout) / self.reward_scale
        old_values = batch.old_values / self.reward_scale
        loss = value_loss(values, old_values, batch.returns, mask, self.options.cliprange_value)
        return Loss(
            "critic",
            loss,
            {
                "value/loss": loss.detach().expand_as(mask),
                "value/mean": values.detach(),
                "value/return": batch.returns,
                "value/squared_error": (values.detach() - batch.returns) ** 2,
                "value/squared_return": batch.returns**2,
                "value/advantage": batch.advantages,
            },
        )

    def prepared(self, batches: list[Experience]) -> list[Experience]:
        """With ``--whiten_advantages``: advantages scaled together over all tokens of all ranks."""
        if not self.options.whiten_advantages:
            return batches
        moments = Averages(self.device)
        estimated = [self._advantages(batch) for batch in batches]
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

    def _advantages(self, batch: Experience) -> tuple[torch.Tensor, torch.Tensor]:
        """GAE over rewards with the KL penalty; ``(B, A)`` advantages and returns.

        The critic speaks in units of reward, so that its values are divided by what rewards are divided by.
        """
        mask, gamma, lam = batch.rollout.action_mask, self.options.gamma, self.options.lam
        rewards, values = (scores / self.reward_scale for scores in (batch.rewards, batch.old_values))
        divergence = self.divergence(batch)
        if self.options.penalty.endswith("onestep"):
            advantages, returns = gae(rewards, values, mask, gamma, lam)
            return kl_penalised(advantages, divergence, mask, self.beta), returns
        return gae(kl_penalised(rewards, divergence, mask, self.beta), values, mask, gamma, lam)
