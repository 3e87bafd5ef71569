"""All models of a run of step 3."""

from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedModel

from deepspeed_chat_tlcr.optim import without_adapters
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.reward_models import RewardSum
from step3_ppo_tlcr.scores import action_logits


@dataclass(frozen=True)
class Models:
    """Everything that runs in step 3."""

    actor: DeepSpeedEngine
    critic: DeepSpeedEngine | None  # ReMax has none
    reference: DeepSpeedEngine | PreTrainedModel | None  # none where the actor without its LoRA layers serves
    reward: RewardSum

    @property
    def engines(self) -> dict[str, DeepSpeedEngine]:
        """Those that train."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})

    def reference_logits(self, rollout: Rollout) -> torch.Tensor:
        """As ``action_logits`` of the reference; the actor is in evaluation mode."""
        if self.reference is not None:
            return action_logits(self.reference, rollout)
        with without_adapters(self.actor.module):
            return action_logits(self.actor, rollout)
