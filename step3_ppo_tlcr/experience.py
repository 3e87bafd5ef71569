"""The records of step 3, and the one place where token positions become actions.

A batch is ``[left-padded prompts | right-padded responses]``: T = P + A token positions, the last A of which are the
actions' tokens. Every per-action tensor is ``(B, A)`` and speaks about the token chosen at that action.
"""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Rollout:
    """What the policy wrote."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T), 1 on real tokens
    action_mask: torch.Tensor  # (B, A), 1 on response tokens, EOS included
    sampled_logprobs: torch.Tensor | None = None  # (B, A), of the vLLM servers that wrote it
    tokens_at_once: int = 0  # of a forward pass that packs rows without padding; 0: the rows as they stand here

    @property
    def actions(self) -> int:
        """A."""
        return self.action_mask.size(1)

    @property
    def action_ids(self) -> torch.Tensor:
        """The token chosen at each action, ``(B, A)``."""
        return at_actions(self.input_ids, self.actions)

    @property
    def position_ids(self) -> torch.Tensor:
        """``(B, T)``, counted from each prompt's first real token."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    def rows(self, begin: int, end: int) -> "Rollout":
        """Rows ``begin`` to ``end``, columns cut to the longest prompt and response that are left."""
        mask = self.action_mask[begin:end]
        padding = int(self.attention_mask[begin:end].argmax(1).min())
        behind = self.actions - max(1, int(mask.sum(1).max()))
        tokens = slice(padding, self.input_ids.size(1) - behind)
        return Rollout(
            self.input_ids[begin:end, tokens],
            self.attention_mask[begin:end, tokens],
            mask[:, : self.actions - behind],
            None if self.sampled_logprobs is None else self.sampled_logprobs[begin:end, : self.actions - behind],
            self.tokens_at_once,
        )


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that was frozen when it was written; PPO learns from these."""

    rollout: Rollout
    rewards: torch.Tensor  # (B, A), before the KL penalty and --scale_rewards
    ref_logprobs: torch.Tensor  # (B, A)
    # None while the policy that wrote the rollout is the one being trained: then the training forward has them.
    old_logprobs: torch.Tensor | None = None  # (B, A)
    old_values: torch.Tensor | None = None  # (B, A), in the unit of rewards; None without a critic
    # Only where sampling cuts the distribution: log pi of the whole one, as the reference's is.
    whole_logprobs: torch.Tensor | None = None  # (B, A)
    # Only where the KL is taken over the whole vocabulary, which needs both models' logits.
    divergence: torch.Tensor | None = None  # (B, A)
    # Only where they are known before the first update: whitened together, or ReMax's weights.
    advantages: torch.Tensor | None = None  # (B, A)
    returns: torch.Tensor | None = None  # (B, A)

    @property
    def kl_logprobs(self) -> torch.Tensor:
        """log pi whose difference from the reference's is the KL, ``(B, A)``."""
        return self.old_logprobs if self.whole_logprobs is None else self.whole_logprobs

    def rows(self, begin: int, end: int) -> "Experience":
        """A micro-batch: rows ``begin`` to ``end`` of every tensor, columns cut to the longest that is left."""
        rollout = self.rollout.rows(begin, end)
        actions = slice(0, rollout.actions)
        per_action = {
            entry.name: None if getattr(self, entry.name) is None else getattr(self, entry.name)[begin:end, actions]
            for entry in fields(self)
            if entry.name != "rollout"
        }
        return replace(self, rollout=rollout, **per_action)


def before_actions(per_token: torch.Tensor, actions: int) -> torch.Tensor:
    """What a model said just before each action was chosen: logits of the choice, value of the state.

    ``(B, T, …)`` to ``(B, A, …)``: the output at token position t is about token t + 1, so the entry for the action
    whose token stands at position p is the output at p - 1. The only place with this shift.
    """
    length = per_token.size(1)
    return per_token[:, length - actions - 1 : length - 1]


def at_actions(per_token: torch.Tensor, actions: int) -> torch.Tensor:
    """What a model says about the chosen tokens themselves, having read them: the discriminator's D, a score.

    ``(B, T, …)`` to ``(B, A, …)``; no shift.
    """
    return per_token[:, per_token.size(1) - actions :]
