"""What every algorithm of step 3 shares: rollouts, scores, guarded updates, metrics."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.finite import align_overflow
from deepspeed_chat_tlcr.generation import Decoding
from deepspeed_chat_tlcr.turns import end_ids
from step3_ppo_tlcr.averages import Averages, RunningScale
from step3_ppo_tlcr.ema import WeightAverage
from step3_ppo_tlcr.experience import Experience, Rollout
from step3_ppo_tlcr.faults import Faults
from step3_ppo_tlcr.logprobs import entropy, full_kl, token_logprobs
from step3_ppo_tlcr.measures import finished, measure_rollout, peak_memory, throughputs
from step3_ppo_tlcr.models import Models
from step3_ppo_tlcr.objectives import adapted_beta, correction, k1, k3, masked_mean
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.pretraining import Pretraining
from step3_ppo_tlcr.rollout import request, to_rollout
from step3_ppo_tlcr.scores import action_logits, state_values
from step3_ppo_tlcr.servers import TOLERANCE, Flight, ServerError, VllmRollout

_CHECKED = (4, 16)  # prompts of each rank and tokens that servers write to be compared


@dataclass(frozen=True)
class Loss:
    """One model's loss on a micro-batch, and what to report of it if it is finite."""

    role: str
    value: torch.Tensor  # scalar, mean over the micro-batch's tokens
    measured: dict[str, torch.Tensor]  # (B, A) by metric; the actor's have policy/approx_kl
    per_sequence: dict[str, torch.Tensor] = field(default_factory=dict)  # (B,) by metric


class Trainer(ABC):
    """One ``step`` per call: rollout, score, learn. Tensors are ``(B, A)`` after the rollout."""

    def __init__(
        self,
        options: Options,
        models: Models,
        rollouts: RolloutEngine,
        tokenizer: PreTrainedTokenizerFast,
        pretraining: Pretraining | None = None,
    ):
        self.options, self.models, self.rollouts, self.tokenizer = options, models, rollouts, tokenizer
        self.decoding = Decoding(
            options.max_answer_seq_len, options.temperature, options.top_p, options.top_k, options.min_answer_seq_len
        )
        self.on_policy = options.on_policy
        # The KL is between whole distributions: cut as the policy's is, a token outside the reference's own nucleus
        # would have an infinite KL; and cut on one side only, the KL of an unchanged policy would not be 0.
        self.whole = replace(self.decoding, top_p=1.0, top_k=0)
        self.full_kl = options.penalty.startswith("full_kl")
        self.pretraining = pretraining
        self.average = WeightAverage(models.actor, options.ema_decay) if options.enable_ema else None
        self.beta = options.kl_ctl
        self.scale = RunningScale()
        self.device = models.actor.device
        self.world_size = torch.distributed.get_world_size()
        self.faults = Faults(options.max_faults, self.device)
        self.experiences: list[Experience] = []  # of the newest step
        self.seconds: dict[str, float] = {}
        self.sets = 0  # of rollouts that were learnt from
        self.updates = 0  # optimiser steps of the newest step
        self.gradient_norms: dict[str, float] = {}  # by role, of the newest optimiser step
        self.moved = True  # the actor has other weights than what writes rollouts, as far as is known
        self.ahead: list[Flight] = []  # the next set, which servers write meanwhile (--rollout_ahead)

    @abstractmethod
    def losses(self, batch: Experience) -> Iterator[Loss]:
        """Forward passes of one micro-batch and the algorithm's losses, the actor's first.

        Each is back-propagated before the next is asked for, so that two models' activations never share the memory.
        """

    def step(self, prompts: Sequence[list[int]], upcoming: Sequence[list[int]] | None = None) -> dict[str, float]:
        """Learn from one set of rollouts, an answer to each prompt. Returns metrics over all ranks.

        ``upcoming``: the next set's prompts, where servers are to answer them meanwhile. Raises ``ServerError`` before
        anything is learned, where a server failed.
        Raises ``TooManyFaults`` after ``--max_faults`` calls in a row whose numbers were not finite.
        """
        averages = Averages(self.device)
        self.seconds, self.updates, self.gradient_norms = {}, 0, {}
        flights, self.ahead = self.ahead, []
        if not flights:
            self.sync(prompts)
        with self._timed("rollout"):
            rollouts = self._cut([flight.batch() for flight in flights]) if flights else self.rollout(prompts)
        if upcoming is not None:
            self.sync(upcoming)
            self.ahead = [self.rollouts.start(*asked) for asked in self._requests(upcoming, self.options.temperature)]
        if isinstance(self.rollouts, VllmRollout):
            averages.add("rollout/updates_behind", torch.tensor([float(bool(flights))], device=self.device))
        with self._timed("score"):
            self.experiences = self.score(rollouts, averages)
        if len(self.experiences) == len(rollouts):
            with self._timed("train"):
                self.learn(self.experiences, averages)
                self.sets += 1
        metrics = self._metrics(averages, rollouts)
        self.faults.count(skipped=self.updates == 0)
        return metrics

    def rollout(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """Sample one response to each prompt from the policy as it is; one rollout per generation batch."""
        return self.generate(prompts, self.options.temperature)

    def generate(self, prompts: Sequence[list[int]], temperature: float) -> list[Rollout]:
        """Answers to prompts, in batches of ``--per_device_generation_batch_size``; temperature 0 is greedy."""
        self.sync(prompts)
        return self._cut([self.rollouts.generate(*asked) for asked in self._requests(prompts, temperature)])

    def _requests(
        self, prompts: Sequence[list[int]], temperature: float
    ) -> Iterator[tuple[RolloutRequest, SamplingConfig]]:
        options = self.options
        sampling = SamplingConfig(options.max_answer_seq_len, temperature, options.top_p, options.top_k)
        together = options.decode_batch_size or len(prompts)
        for begin in range(0, len(prompts), together):
            yield request(prompts[begin : begin + together], self.tokenizer.pad_token_id, self.device), sampling

    def _cut(self, decoded: Sequence[RolloutBatch]) -> list[Rollout]:
        batches, size = [], self.options.per_device_generation_batch_size
        for batch in decoded:
            rollout = replace(to_rollout(batch), tokens_at_once=self.options.tokens_per_micro_batch)
            batches += [rollout.rows(at, at + size) for at in range(0, len(rollout.input_ids), size)]
        return batches

    def sync(self, prompts: Sequence[list[int]]) -> None:
        """Give servers the weights as they are, if they moved; now and then look that they have them.

        Other engines write with the weights that train.
        """
        if not self.moved or not isinstance(self.rollouts, VllmRollout):
            return
        with self._timed("sync"):
            self.rollouts.sync_weights(self.updates)
            self.moved = False
            if self.rollouts.check_due:
                self._compare(prompts[: _CHECKED[0]])

    @torch.no_grad()
    def _compare(self, prompts: Sequence[list[int]]) -> None:
        """Raise ``ServerError`` where the servers' log-probs of some tokens are not the actor's own."""
        options = self.options
        sampling = SamplingConfig(
            min(_CHECKED[1], options.max_answer_seq_len), options.temperature, options.top_p, options.top_k
        )
        asked = request(prompts, self.tokenizer.pad_token_id, self.device)
        rollout = to_rollout(self.rollouts.generate(asked, sampling))
        self.models.actor.eval()
        own = self.logprobs(action_logits(self.models.actor, rollout), rollout)
        difference = masked_mean((own - rollout.sampled_logprobs).abs(), rollout.action_mask)
        torch.distributed.all_reduce(difference, torch.distributed.ReduceOp.MAX)
        if not float(difference) <= TOLERANCE[options.precision if options.precision != "auto" else "bf16"]:
            raise ServerError(
                f"the --vllm_server log-probs differ from the policy's own by {float(difference):.4f} nats a token: "
                "another rope, precision or kernel; the run would learn from another policy's answers"
            )

    def corrected(self, batch: Experience, advantages: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Advantages ``(B, A)`` times ``--rollout_correction``'s weights, and what is reported of these."""
        rollout, sampled = batch.rollout, batch.rollout.sampled_logprobs
        if sampled is None:
            return advantages, {}
        weights = correction(batch.old_logprobs, sampled, rollout.action_mask, self.options.rollout_correction_cap)
        measured = {
            "correction/weight": weights,
            "correction/clipped_share": (weights >= self.options.rollout_correction_cap).float(),
            "correction/k3": k3(sampled, batch.old_logprobs),
            "correction/difference": (batch.old_logprobs - sampled).abs(),
        }
        return advantages * weights if self.options.corrects_rollouts else advantages, measured

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], averages: Averages) -> list[Experience]:
        """Rewards and log-probs of every rollout; fewer experiences than rollouts where one is not finite."""
        self.models.reward.begin(self.sets)
        return [experience for rollout in rollouts if (experience := self.experience(rollout, averages)) is not None]

    def experience(self, rollout: Rollout, averages: Averages) -> Experience | None:
        """Rewards, reference log-probs and values; off the on-policy path also the old log-probs."""
        mask = rollout.action_mask
        rewards, terms = self.models.reward(rollout, learn=True)
        for name, values in self.models.reward.measured.items():
            averages.add(name, values)
        if self.faults.found(rollout, rewards):
            return None
        if self.options.scale_rewards:
            scale = self.scale.update((rewards * mask).sum(1))
            averages.add("reward/scale", torch.tensor([scale], device=self.device))
        for engine in self.models.engines.values():
            engine.eval()
        values = state_values(self.models.critic, rollout) if self.models.critic else None
        ref_logits = self.models.reference_logits(rollout)
        experience = Experience(rollout, rewards, self.whole_logprobs(ref_logits, rollout), old_values=values)
        if not self.on_policy:
            logits = action_logits(self.models.actor, rollout)
            experience = replace(
                experience,
                old_logprobs=self.logprobs(logits, rollout),
                whole_logprobs=self.whole_logprobs(logits, rollout) if self.whole != self.decoding else None,
                divergence=full_kl(logits, ref_logits, self.whole, end_ids(self.tokenizer)) if self.full_kl else None,
            )
        frozen = (experience.ref_logprobs, experience.old_logprobs, experience.old_values, experience.divergence)
        if self.faults.found(experience, *(tensor * mask for tensor in frozen if tensor is not None)):
            return None
        measure_rollout(experience, terms, end_ids(self.tokenizer), averages)
        return experience

    def learn(self, experiences: Sequence[Experience], averages: Averages) -> None:
        """Update on every micro-batch of the experience, ``ppo_epochs`` times."""
        for engine in self.models.engines.values():
            engine.train()
        size = self.options.per_device_training_batch_size
        batches = [
            experience.rows(begin, begin + size)
            for experience in experiences
            for begin in range(0, len(experience.rewards), size)
        ]
        batches = self.prepared(batches)
        accumulated = self.options.gradient_accumulation_steps
        for epoch in range(self.options.ppo_epochs):
            if epoch:
                batches = [batches[index] for index in torch.randperm(len(batches)).tolist()]
            for begin in range(0, len(batches), accumulated):
                moved = self._optimiser_step(batches[begin : begin + accumulated], averages)
                if self.options.algo == "ppo" and self.options.target_kl is not None and moved > self.options.target_kl:
                    return

    def prepared(self, batches: list[Experience]) -> list[Experience]:
        """What must be computed over all micro-batches before the first update; nothing, unless an algorithm says."""
        return batches

    @property
    def reward_scale(self) -> float:
        """What rewards are divided by: ``--scale_rewards``' running standard deviation, this set's answers included."""
        return self.scale.std if self.options.scale_rewards else 1.0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides engines and generators; plain JSON."""
        return {
            "beta": self.beta,
            "kl_ctl": self.options.kl_ctl,
            "scale": self.scale.state(),
            "reward_scales": self.models.reward.state(),
            "sets": self.sets,
            "faults_in_a_row": self.faults.in_a_row,
            "pretraining_position": self.pretraining.position if self.pretraining else 0,
        }

    def restore(self, state: dict[str, Any], averages: dict[str, torch.Tensor]) -> None:
        if self.options.kl_target is not None and state.get("kl_ctl", self.options.kl_ctl) == self.options.kl_ctl:
            self.beta = state["beta"]
        self.scale = RunningScale(*state["scale"])
        if "reward_scales" in state:  # not in checkpoints of before --normalise_rewards
            self.models.reward.restore(state["reward_scales"])
        self.sets = state.get("sets", self.options.critic_warmup_steps)
        self.faults.in_a_row = state["faults_in_a_row"]
        if self.pretraining is not None:
            self.pretraining.position = state["pretraining_position"]
        if self.average is not None:
            self.average.restore(averages)

    def logprobs(self, logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """log pi of the chosen tokens, ``(B, A, V)`` to ``(B, A)``, under the distribution sampled from."""
        return token_logprobs(logits, rollout.action_ids, self.decoding, end_ids(self.tokenizer))

    def whole_logprobs(self, logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """Log-probs ``(B, A)`` of the chosen tokens without top-p and top-k: the policy's and the reference's KL."""
        return token_logprobs(logits, rollout.action_ids, self.whole, end_ids(self.tokenizer))

    def entropy(self, logits: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """Entropy ``(B, A)`` of the distribution sampled from."""
        return entropy(logits, rollout.action_ids, self.decoding, end_ids(self.tokenizer))

    def policy(self, batch: Experience) -> tuple[Experience, torch.Tensor, torch.Tensor]:
        """The actor's forward pass: the experience, with old log-probs now, and log-probs and entropies ``(B, A)``."""
        logits = action_logits(self.models.actor, batch.rollout)
        logprobs = self.logprobs(logits, batch.rollout)
        if batch.old_logprobs is None:
            frozen: dict[str, Any] = {"old_logprobs": logprobs.detach()}
            if self.whole != self.decoding:
                frozen["whole_logprobs"] = self.whole_logprobs(logits.detach(), batch.rollout)
            batch = replace(batch, **frozen)
        return batch, logprobs, self.entropy(logits if self.options.entropy_coef else logits.detach(), batch.rollout)

    def actor_loss(
        self,
        loss: torch.Tensor,
        batch: Experience,
        logprobs: torch.Tensor,
        entropies: torch.Tensor,
        measured: dict[str, torch.Tensor],
    ) -> Loss:
        """An algorithm's loss less the entropy bonus, with what is reported whichever algorithm it is."""
        mask = batch.rollout.action_mask
        bonus = self.options.entropy_coef * masked_mean(entropies, mask) if self.options.entropy_coef else 0.0
        log_ratio = ((logprobs - batch.old_logprobs) * mask).detach()
        divergence = k1(batch.kl_logprobs, batch.ref_logprobs)
        measured = measured | {
            "policy/perplexity": -logprobs.detach(),
            "policy/kl_per_token": divergence,
            "policy/entropy": entropies.detach(),
            "policy/approx_kl": log_ratio.exp() - 1 - log_ratio,
            "policy/loss": loss.detach().expand_as(mask),
        }
        return Loss("actor", loss - bonus, measured, {"policy/kl": (divergence * mask).sum(1)})

    def divergence(self, batch: Experience) -> torch.Tensor:
        """The KL of each action as ``--penalty`` estimates it, ``(B, A)``."""
        if batch.divergence is not None:
            return batch.divergence
        estimate = k3 if self.options.penalty == "k3" else k1
        return estimate(batch.kl_logprobs, batch.ref_logprobs)

    def _optimiser_step(self, batches: Sequence[Experience], averages: Averages) -> float:
        """One update; a token weighs the same on whichever rank and micro-batch it stands.

        Losses that are not finite are left out; if all of a model's are, so is its update. Returns how far the policy
        had moved from the one that wrote the rollouts, in nats per token (0 where ``--target_kl`` does not ask).
        """
        moved = Averages(self.device)
        tokens = torch.stack([batch.rollout.action_mask.sum() for batch in batches]).to(self.device, torch.float32)
        total = tokens.sum()
        torch.distributed.all_reduce(total)
        # Engines average over ranks and micro-batches; these shares turn those means into one over all tokens.
        shares = tokens / total.clamp(min=1) * self.world_size * len(batches)
        good: dict[str, Experience] = {}  # by role, one whose loss was finite
        left_out = dict.fromkeys(self.models.engines, 0)
        ready: list[str] = []  # roles whose accumulation is complete
        for batch, share in zip(batches, shares, strict=True):
            for loss in self.losses(batch):
                if self.faults.found(batch, loss.value):
                    left_out[loss.role] += 1
                    continue
                if loss.role != "actor" or self.sets >= self.options.critic_warmup_steps:
                    ready += self._backward(loss, share, averages)
                self._record(loss, batch.rollout.action_mask, averages)
                if loss.role == "actor":
                    moved.add("kl", loss.measured["policy/approx_kl"], batch.rollout.action_mask)
                good[loss.role] = batch
        averages.add("faults/left_out", torch.full((len(batches),), max(left_out.values()) / len(batches)))
        for role, batch in good.items():
            for _ in range(left_out[role]):
                # Engines count backward passes: the places of what was left out are filled with gradients of zero.
                loss = next(loss for loss in self.losses(batch) if loss.role == role)
                ready += self._backward(loss, torch.zeros_like(shares[0]), averages)
        self._update(ready)
        # While fp16 looks for its loss scale it overflows by design; in other precisions it is a fault.
        finite = all(math.isfinite(norm) for norm in self.gradient_norms.values())
        complete = len(good) == len(self.models.engines)
        moved_on = complete and (finite or self.models.actor.fp16_enabled())
        self.updates += int(moved_on)
        if moved_on and self.average is not None:
            self.average.update()
        return moved.reduce()["kl"] if self.options.target_kl is not None and "actor" in good else 0.0

    def _backward(self, loss: Loss, share: torch.Tensor, averages: Averages) -> list[str]:
        """Back-propagate a loss. Returns its role where that completes an accumulation, for ``_update``."""
        engine = self.models.engines[loss.role]
        mixed = self.pretraining is not None and loss.role == "actor"
        passes = 2 if mixed else 1
        engine.backward(loss.value * share * passes)
        if mixed:
            engine.step()  # the first of two passes: no boundary, so it does not move yet
            text_loss = self.pretraining.loss(engine)
            # Engines divide by the number of passes; the share makes no difference here, every batch is full.
            engine.backward(text_loss * self.options.unsup_coef * passes)
            averages.add("policy/pretraining_loss", text_loss.detach())
        if engine.is_gradient_accumulation_boundary():
            return [loss.role]
        engine.step()  # only counts
        return []

    def _update(self, roles: Sequence[str]) -> None:
        """Move the models whose gradients are complete."""
        engines = {role: self.models.engines[role] for role in roles}
        if self.options.align_overflow:
            align_overflow(list(engines.values()))
        self.moved = True
        for role, engine in engines.items():
            engine.step()
            norm = engine.get_global_grad_norm()  # None where --deepspeed_config switches it off
            self.gradient_norms[role] = float(norm) if norm is not None else math.nan

    def _record(self, loss: Loss, mask: torch.Tensor, averages: Averages) -> None:
        for name, values in loss.measured.items():
            averages.add(name, values, mask)
        for name, values in loss.per_sequence.items():
            averages.add(name, values)

    def _metrics(self, averages: Averages, rollouts: Sequence[Rollout]) -> dict[str, float]:
        metrics = finished(averages.reduce() if averages.sums else {})
        metrics["policy/kl_coefficient"] = self.beta
        metrics["policy/updates"] = float(self.updates)
        metrics["faults/skipped"] = float(self.updates == 0)
        if self.options.kl_target is not None and self.updates:
            responses = sum(len(rollout.input_ids) for rollout in rollouts) * self.world_size
            self.beta = adapted_beta(
                self.beta, metrics["policy/kl"], self.options.kl_target, responses, self.options.kl_horizon
            )
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        read = sum(int(rollout.attention_mask.sum()) for rollout in rollouts)
        written = sum(int(rollout.action_mask.sum()) for rollout in rollouts)
        metrics |= throughputs({"rollout": written, "score": read, "train": read}, self.seconds, self.device)
        metrics["throughput/generated_tokens_per_second"] = metrics["throughput/rollout_tokens_per_second"]
        metrics["memory/peak_gib"] = peak_memory()
        for role, engine in self.models.engines.items():
            metrics[f"optimiser/{role}_learning_rate"] = engine.get_lr()[0]
            metrics[f"optimiser/{role}_grad_norm"] = self.gradient_norms.get(role, math.nan)
            metrics[f"faults/{role}_overflows"] = float(engine.skipped_steps)
        return metrics

    @contextmanager
    def _timed(self, phase: str):
        accelerator = get_accelerator()
        accelerator.synchronize()
        begun = time.monotonic()
        yield
        accelerator.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun
