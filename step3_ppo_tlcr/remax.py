"""ReMax (Li et al., 2023): REINFORCE whose baseline is the reward of the policy's own greedy answer; no critic."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from step3_ppo_tlcr.averages import Averages
from step3_ppo_tlcr.experience import Experience, Rollout
from step3_ppo_tlcr.objectives import kl_penalised, remax_loss, remax_weights
from step3_ppo_tlcr.trainer import Loss, Trainer


class ReMax(Trainer):
    """return_t = gamma^(steps to the end) (R(x, y) - R(x, y_greedy)) - beta KL_t, of that token only."""

    def rollout(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """A sampled response to each prompt; the greedy ones are kept as the baseline."""
        self.greedy = self.generate(prompts, temperature=0.0)
        return self.generate(prompts, self.options.temperature)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], averages: Averages) -> list[Experience]:
        """Experiences with ReMax's weights, before the KL term, as their advantages."""
        experiences = super().score(rollouts, averages)
        if len(experiences) < len(rollouts):
            return experiences
        weighed = []
        for experience, greedy in zip(experiences, self.greedy, strict=True):
            mask = experience.rollout.action_mask
            baseline = (self.models.reward(greedy)[0] * greedy.action_mask).sum(1)
            if self.faults.found(greedy, baseline):
                continue
            rewards, scaled_baseline = experience.rewards / self.reward_scale, baseline / self.reward_scale
            weights = remax_weights(rewards, scaled_baseline, mask, self.options.gamma, self.options.clip_reward_value)
            averages.add("reward/greedy_per_sequence", baseline)
            weighed.append(replace(experience, advantages=weights))
        return weighed

    def losses(self, batch: Experience) -> Iterator[Loss]:
        batch, logprobs, entropies = self.policy(batch)
        mask = batch.rollout.action_mask
        returns = kl_penalised(batch.advantages, self.divergence(batch), mask, self.beta)
        weighed, corrected = self.corrected(batch, returns)
        loss = remax_loss(logprobs, weighed, mask)
        yield self.actor_loss(loss, batch, logprobs, entropies, {"policy/return": returns, **corrected})
