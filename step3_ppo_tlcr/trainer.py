"""PPO with a reward on every token (paper 4.3): how experience is made, and how the policy learns from it."""

import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.rollout import SamplingConfig
from transformers import PreTrainedModel

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Decoding
from step3_ppo_tlcr.averages import Averages, RunningScale
from step3_ppo_tlcr.engines import RewardSum, action_logits, state_values
from step3_ppo_tlcr.logprobs import entropy, full_kl, token_logprobs
from step3_ppo_tlcr.objectives import adapted_beta, gae, k1, k3, kl_penalised, policy_loss, value_loss, whiten
from step3_ppo_tlcr.records import Experience, Rollout
from step3_ppo_tlcr.rollout import GenerateRollout, request, to_rollout

if TYPE_CHECKING:
    from step3_ppo_tlcr.main import Options


@dataclass(frozen=True)
class Models:
    """Everything that runs in step 3."""

    actor: DeepSpeedEngine
    critic: DeepSpeedEngine
    reference: DeepSpeedEngine | PreTrainedModel
    reward: RewardSum


class PPOTrainer:
    """One ``step`` per call: rollout, score, learn. Tensors are ``(B, A)`` after the rollout."""

    def __init__(self, options: "Options", models: Models, rollouts: GenerateRollout, decoding: Decoding):
        self.options, self.models, self.rollouts, self.decoding = options, models, rollouts, decoding
        self.tokenizer = rollouts.tokenizer
        self.beta = options.kl_ctl
        self.scale = RunningScale()
        self.shown_answer = ""
        self.world_size = torch.distributed.get_world_size()
        self.device = models.actor.device
        self.micro_batches = micro_batches(options)
        # With one optimiser step per rollout the policy that learns is the policy that wrote: the training forward's
        # own log-probs and values are the old ones, and need not be computed twice.
        one_update = options.ppo_epochs == 1 and self.micro_batches == options.gradient_accumulation_steps
        self.full_kl = options.penalty.startswith("full_kl")
        self.on_policy = (
            one_update
            and options.actor_dropout_rate == options.critic_dropout_rate == 0.0
            and not self.full_kl
            and not options.whiten_advantages
        )
        self.seconds: dict[str, float] = {}
        self.updates = 0  # optimiser steps of the current call

    def step(self, prompts: Sequence[Sequence[list[int]]]) -> dict[str, float]:
        """Learn from one set of rollouts: ``generation_batches`` lists of prompts. Returns metrics over all ranks."""
        averages = Averages(self.device)
        self.seconds, self.updates = {}, 0
        experiences = []
        for batch in prompts:
            with self._timed("rollout"):
                rollout = self.rollout(batch)
            with self._timed("score"):
                experiences.append(self.score(rollout, averages))
        with self._timed("train"):
            self.learn(experiences, averages)
        metrics = averages.reduce()
        for name in ("policy/perplexity", "rollout/ref_perplexity"):
            metrics[name] = math.exp(metrics[name])  # from nats per token
        squared_return = metrics.pop("value/squared_return")
        variance = squared_return - metrics["value/return"] ** 2
        error = metrics.pop("value/squared_error")
        metrics["value/explained_variance"] = 1 - error / variance if variance > 0 else math.nan
        metrics["policy/kl_coefficient"] = self.beta
        metrics["policy/updates"] = float(self.updates)
        if self.options.kl_target is not None:
            responses = sum(len(experience.rewards) for experience in experiences) * self.world_size
            self.beta = adapted_beta(
                self.beta, metrics["policy/kl"], self.options.kl_target, responses, self.options.kl_horizon
            )
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        tokens = sum(int(experience.rollout.action_mask.sum()) for experience in experiences)
        metrics["throughput/generated_tokens_per_second"] = tokens / self.seconds["rollout"]
        metrics["optimiser/actor_learning_rate"] = self.models.actor.get_lr()[0]
        metrics["optimiser/critic_learning_rate"] = self.models.critic.get_lr()[0]
        for role, engine in (("actor", self.models.actor), ("critic", self.models.critic)):
            norm = engine.get_global_grad_norm()
            metrics[f"optimiser/{role}_grad_norm"] = float(norm) if norm is not None else math.nan
        return metrics

    def rollout(self, prompts: Sequence[list[int]]) -> Rollout:
        """Sample one response to each prompt from the policy as it is."""
        padded = request(prompts, self.tokenizer.pad_token_id, self.device)
        decoding = self.decoding
        sampling = SamplingConfig(decoding.max_new_tokens, decoding.temperature, decoding.top_p, decoding.top_k)
        rollout = to_rollout(self.rollouts.generate(padded, sampling))
        if self.options.print_answers:
            self.shown_answer = self.tokenizer.decode(rollout.input_ids[0][rollout.attention_mask[0] > 0])
        return rollout

    @torch.no_grad()
    def score(self, rollout: Rollout, averages: Averages) -> Experience:
        """Rewards and reference log-probs; off the on-policy path also the old log-probs and values."""
        rewards, terms = self.models.reward(rollout)
        if self.options.scale_rewards:
            rewards = rewards / self.scale.update((rewards * rollout.action_mask).sum(1))
        ref_logits = action_logits(self.models.reference, rollout)
        experience = Experience(rollout, rewards, self._reference_logprobs(ref_logits, rollout))
        if not self.on_policy:
            self.models.actor.eval()
            self.models.critic.eval()
            logits = action_logits(self.models.actor, rollout)
            experience = replace(
                experience,
                old_logprobs=self._logprobs(logits, rollout),
                old_values=state_values(self.models.critic, rollout),
                divergence=full_kl(logits, ref_logits) if self.full_kl else None,
            )
        self._measure_rollout(experience, terms, averages)
        return experience

    def learn(self, experiences: Sequence[Experience], averages: Averages) -> None:
        """Clipped PPO on every micro-batch of the experience, ``ppo_epochs`` times."""
        self.models.actor.train()
        self.models.critic.train()
        size = self.options.per_device_training_batch_size
        batches = [
            experience.rows(begin, begin + size)
            for experience in experiences
            for begin in range(0, len(experience.rewards), size)
        ]
        if self.options.whiten_advantages:
            batches = self._whitened(batches)
        accumulated = self.options.gradient_accumulation_steps
        for _ in range(self.options.ppo_epochs):
            for begin in range(0, len(batches), accumulated):
                moved = self._optimiser_step(batches[begin : begin + accumulated], averages)
                if self.options.target_kl is not None and moved > self.options.target_kl:
                    return

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides engines and generators; plain JSON."""
        return {"beta": self.beta, "scale": self.scale.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.beta = state["beta"]
        self.scale = RunningScale(*state["scale"])

    def _optimiser_step(self, batches: Sequence[Experience], averages: Averages) -> float:
        """One update of actor and critic; a token weighs the same on whichever rank and micro-batch it stands.

        Returns how far the policy had moved from the one that wrote the rollouts, in nats per token (0 where
        ``--target_kl`` does not ask).
        """
        moved = Averages(self.device)
        tokens = torch.stack([batch.rollout.action_mask.sum() for batch in batches]).to(self.device, torch.float32)
        total = tokens.sum()
        torch.distributed.all_reduce(total)
        # Engines average over ranks and micro-batches; these shares turn those means into one over all tokens.
        shares = tokens / total.clamp(min=1) * self.world_size * len(batches)
        for batch, share in zip(batches, shares, strict=True):
            log_ratio = self._train_on(batch, share, averages)
            moved.add("kl", log_ratio.exp() - 1 - log_ratio, batch.rollout.action_mask)
        self.updates += 1
        return moved.reduce()["kl"] if self.options.target_kl is not None else 0.0

    def _advantages(
        self, batch: Experience, old_logprobs: torch.Tensor, old_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """GAE over rewards with the KL penalty; ``(B, A)`` advantages and returns."""
        mask = batch.rollout.action_mask
        divergence = batch.divergence
        if divergence is None:
            estimate = k3 if self.options.penalty == "k3" else k1
            divergence = estimate(old_logprobs, batch.ref_logprobs)
        if self.options.penalty.endswith("onestep"):
            advantages, returns = gae(batch.rewards, old_values, mask, self.options.gamma, self.options.lam)
            return kl_penalised(advantages, divergence, mask, self.beta), returns
        rewards = kl_penalised(batch.rewards, divergence, mask, self.beta)
        return gae(rewards, old_values, mask, self.options.gamma, self.options.lam)

    def _whitened(self, batches: Sequence[Experience]) -> list[Experience]:
        """All batches with their advantages, scaled together over all tokens of all ranks."""
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

    def _train_on(self, batch: Experience, share: torch.Tensor, averages: Averages) -> torch.Tensor:
        """Back-propagate one micro-batch; returns log pi - log pi_old, ``(B, A)``."""
        options, rollout, mask = self.options, batch.rollout, batch.rollout.action_mask
        logits = action_logits(self.models.actor, rollout)
        logprobs = self._logprobs(logits, rollout)
        values = state_values(self.models.critic, rollout)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        old_values = values.detach() if batch.old_values is None else batch.old_values

        if batch.advantages is None:
            advantages, returns = self._advantages(batch, old_logprobs, old_values)
        else:
            advantages, returns = batch.advantages, batch.returns
        actor_loss = policy_loss(logprobs, old_logprobs, advantages, mask, options.cliprange)
        critic_loss = value_loss(values, old_values, returns, mask, options.cliprange_value)
        for engine, loss in ((self.models.actor, actor_loss), (self.models.critic, critic_loss)):
            engine.backward(loss * share)
            engine.step()

        log_ratio = ((logprobs - old_logprobs) * mask).detach()
        averages.add("policy/entropy", entropy(logits.detach()), mask)
        averages.add("policy/perplexity", -logprobs, mask)
        averages.add("policy/kl_per_token", old_logprobs - batch.ref_logprobs, mask)
        averages.add("policy/kl", ((old_logprobs - batch.ref_logprobs) * mask).sum(1))
        averages.add("policy/approx_kl", log_ratio.exp() - 1 - log_ratio, mask)
        averages.add("policy/clip_fraction", ((log_ratio.exp() - 1).abs() > options.cliprange).float(), mask)
        averages.add("policy/loss", actor_loss.expand_as(mask), mask)
        averages.add("value/loss", critic_loss.expand_as(mask), mask)
        averages.add("value/mean", values, mask)
        averages.add("value/return", returns, mask)
        averages.add("value/squared_error", (values - returns) ** 2, mask)
        averages.add("value/squared_return", returns**2, mask)
        averages.add("value/advantage", advantages, mask)
        return log_ratio

    def _logprobs(self, logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        return token_logprobs(logits, rollout.action_ids, self.decoding, self.tokenizer.eos_token_id)

    def _reference_logprobs(self, logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        # The reference keeps its whole vocabulary: cut as the policy's is, a token outside its own nucleus would have
        # probability 0 and an infinite KL.
        uncut = replace(self.decoding, top_p=1.0, top_k=0)
        return token_logprobs(logits, rollout.action_ids, uncut, self.tokenizer.eos_token_id)

    def _measure_rollout(self, experience: Experience, terms: dict[str, torch.Tensor], averages: Averages) -> None:
        mask, rewards = experience.rollout.action_mask, experience.rewards
        lengths = mask.sum(1)
        last_ids = experience.rollout.action_ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        averages.add("reward/per_token", rewards, mask)
        averages.add("reward/per_sequence", (rewards * mask).sum(1))
        averages.add("reward/positive_share", (rewards > 0).float(), mask)
        averages.add("reward/negative_share", (rewards < 0).float(), mask)
        for name, term in terms.items() if len(terms) > 1 else ():
            averages.add(f"reward/{name}", (term * mask).sum(1))
        averages.add("rollout/response_length", lengths)
        averages.add("rollout/eos_rate", (last_ids == self.tokenizer.eos_token_id).float())
        averages.add("rollout/ref_perplexity", -experience.ref_logprobs, mask)

    @contextmanager
    def _timed(self, phase: str):
        accelerator = get_accelerator()
        accelerator.synchronize()
        begun = time.monotonic()
        yield
        accelerator.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun


def micro_batches(options: "Options") -> int:
    """Training micro-batches in one set of rollouts, per device. Raises ``InputError`` for sizes that do not divide."""
    generation, training = options.per_device_generation_batch_size, options.per_device_training_batch_size
    for name in (
        "per_device_generation_batch_size",
        "per_device_training_batch_size",
        "generation_batches",
        "gradient_accumulation_steps",
        "ppo_epochs",
    ):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least 1")
    if generation % training:
        raise InputError(
            f"--per_device_generation_batch_size {generation} is no multiple of --per_device_training_batch_size "
            f"{training}: some rollouts would be left over"
        )
    count = options.generation_batches * generation // training
    if count % options.gradient_accumulation_steps:
        raise InputError(
            f"{count} micro-batches in a set of rollouts (--generation_batches {options.generation_batches} x "
            f"--per_device_generation_batch_size {generation} / --per_device_training_batch_size {training}) are no "
            f"multiple of --gradient_accumulation_steps {options.gradient_accumulation_steps}"
        )
    return count
