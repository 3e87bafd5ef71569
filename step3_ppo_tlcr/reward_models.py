"""The models that score rollouts, each in its own tokens, and the weighted sum of the rewards made of what they say."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError, RunError, describe_error
from deepspeed_chat_tlcr.models import head_of, load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.optim import without_adapters
from deepspeed_chat_tlcr.rewriting import rewriting_prompt
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.spans import Marks, places
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenizers_differ
from step3_ppo_tlcr.averages import RunningScale
from step3_ppo_tlcr.engines import freeze, frozen_config, lora_alone
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.objectives import counted
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.rewards import REWARDS, Reward, RewardSpec, last_action, load_function, names_of
from step3_ppo_tlcr.scores import (
    ATTENTION,
    last_attention,
    positive_probs,
    rewriting_probs,
    sequence_score,
    token_scores,
)
from step3_ppo_tlcr.texts import Answer, answers_of, project, read_by

if TYPE_CHECKING:
    from step3_ppo_tlcr.span_critic import SpanCritic

References = Mapping[tuple[int, ...], str]
"""Good answers, by the tokens of their prompts."""

SCORES = {
    "positive_probs": positive_probs,
    "token_scores": token_scores,
    "sequence_score": sequence_score,
    "last_attention": last_attention,
    "rewriting_probs": rewriting_probs,
}


class RewardModel:
    """A frozen model that scores rollouts, and the tokenizer it reads them by where that is not the policy's."""

    def __init__(
        self,
        model: DeepSpeedEngine | PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast | None = None,
        head: nn.Linear | None = None,
    ):
        self.model, self.tokenizer, self.head = model, tokenizer, head
        self.module: PreTrainedModel = model.module if isinstance(model, DeepSpeedEngine) else model
        self.positions = getattr(self.module.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def scores(self, name: str, rollout: Rollout, answers: Callable[[], list[Answer]]) -> torch.Tensor:
        """What ``SCORES`` names, ``(B, A)`` for the policy's actions, or ``(B, 1)``."""
        if self.tokenizer is None:
            return self._scores(name, rollout)
        read, spans = read_by(self.tokenizer, answers(), self.positions, rollout.input_ids.device)
        scores = self._scores(name, read)
        if name == "sequence_score":
            return scores
        projected = torch.zeros(rollout.action_mask.shape)
        for row, (values, answer) in enumerate(zip(scores.tolist(), answers(), strict=True)):
            own = project(values[: len(spans[row])], spans[row], answer.spans, share=name == "last_attention")
            projected[row, : len(own)] = torch.tensor(own)
        return projected.to(scores.device)

    def _scores(self, name: str, rollout: Rollout) -> torch.Tensor:
        if self.head is None:
            return SCORES[name](self.model, rollout)
        self.model.eval()
        with without_adapters(self.module), _answering(self.module, self.head):
            return SCORES[name](self.model, rollout)


class RewardSum:
    """The weighted sum of ``--reward``'s terms, each with its own model; a model named twice is loaded once.

    Of the one that a critic of LoRA layers alone began as, only the head is kept: the rest stands in the critic.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        tokenizer: PreTrainedTokenizerFast,
        options: Options,
        runtime: Runtime,
        critic: DeepSpeedEngine | None,
        span_critic: "SpanCritic | None" = None,
        references: References | None = None,
        sets: int = 1,
    ):
        """``sets``: of rollouts in the whole run, over which weights change."""
        self.specs, self.tokenizer, self.options = specs, tokenizer, options
        self.span_critic, self.references, self.sets = span_critic, references or {}, sets
        self.progress = 0.0
        self.names = names_of(specs)
        self.settings = settings(options)
        self.functions = {spec.path: load_function(spec.path) for spec in specs if spec.name == "python"}
        self.scales = [RunningScale(sample=True) for _ in specs]
        self.measured: dict[str, torch.Tensor] = {}  # (B,) by metric, of the newest call
        self.models: dict[str, RewardModel] = {}
        rewards = [(spec.model, REWARDS[spec.name]) for spec in specs if spec.model]
        if any(reward.rewrites for _, reward in rewards) and options.rlmec_judge != "number":
            rewards.append((options.rlmec_judge_model, REWARDS["sequence"]))
        for path in dict.fromkeys(path for path, _ in rewards):
            self.models[path] = self._load(path, [reward for one, reward in rewards if one == path], runtime, critic)

    def _load(
        self, path: str, rewards: Sequence[Reward], runtime: Runtime, critic: DeepSpeedEngine | None
    ) -> RewardModel:
        options = self.options
        labels = {reward.labels for reward in rewards}
        if len(labels) > 1:
            raise InputError(f"--reward: {path!r} cannot be both a discriminator and a sequence reward model")
        config = frozen_config(options, runtime, options.reward_zero_stage, options.offload_reward_model)
        own = load_tokenizer(path, options.new_eos)
        if rewards[0].rewrites:
            model = load_causal_lm(path, runtime.torch_dtype, config, 0.0, options.attn_implementation)
            return RewardModel(freeze(model, config, runtime), own)  # what it reads is another prompt, so text
        looks = any("last_attention" in reward.needs for reward in rewards)
        attention = ATTENTION if looks else options.attn_implementation
        model = load_token_classifier(path, labels.pop(), runtime.torch_dtype, config, 0.0, attention=attention)
        other = options.reward_tokenizer == "own" and tokenizers_differ(self.tokenizer, own)
        if other:
            runtime.say(f"reward: {path} reads answers by its own tokenizer")
        in_critic = critic and lora_alone(options, "critic") and path == options.critic_model_name_or_path
        if in_critic and not looks and not other:
            runtime.say(f"reward: {path}'s own head on the critic without its LoRA layers")
            return RewardModel(critic, head=_plain_copy(head_of(model)[1], runtime))
        return RewardModel(freeze(model, config, runtime), own if other else None)

    def begin(self, done: int | None = None) -> None:
        """A set of rollouts follows; ``done``: how many the run has learnt from, where it is to learn from this one."""
        if done is not None:
            self.progress = min(1.0, done / max(1, self.sets - 1))
        if self.span_critic:
            self.span_critic.begin()

    @torch.no_grad()
    def __call__(self, rollout: Rollout, learn: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``(B, A)`` rewards before the KL penalty, and each term's unweighted ``(B, A)`` by ``names_of`` it.

        ``learn``: these answers count among those whose sums ``--normalise_rewards`` divides by; then a collective.
        """
        mask = rollout.action_mask
        answers = functools.cache(lambda: answers_of(rollout, self.tokenizer))
        scored: dict[tuple[str, str], torch.Tensor] = {}
        total = torch.zeros(mask.shape, device=mask.device)
        terms = {}
        for name, spec, scale in zip(self.names, self.specs, self.scales, strict=True):
            term = self._term(spec, rollout, scored, answers)
            if self.options.normalise_rewards != "off":
                if learn:
                    scale.update((term * mask).sum(1))
                term = normalised(
                    term, mask, scale, self.options.normalise_rewards == "whiten", self.options.clip_normalised_reward
                )
            terms[name] = term
            weight = spec.weight_at(self.progress)
            total = total + weight * term
            if spec.end is not None:
                self.measured[f"reward/weight_{name}"] = torch.full((1,), weight)
        return total, terms

    def state(self) -> list[list[float]]:
        """Moments of each term's sums, for checkpoints."""
        return [scale.state() for scale in self.scales]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        self.scales = [RunningScale(*moments, sample=True) for moments in state]

    def _term(
        self,
        spec: RewardSpec,
        rollout: Rollout,
        scored: dict[tuple[str, str], torch.Tensor],
        answers: Callable[[], list[Answer]],
    ) -> torch.Tensor:
        mask = rollout.action_mask
        if spec.name == "python":
            try:
                term = self.functions[spec.path](rollout, self.tokenizer)
            except Exception as error:  # whatever a stranger's function raises
                raise RunError(f"--reward python:{spec.path}: {describe_error(error)}") from error
            if not isinstance(term, torch.Tensor) or term.shape != mask.shape:
                found = tuple(term.shape) if isinstance(term, torch.Tensor) else type(term).__name__
                raise InputError(f"--reward python:{spec.path} returned {found}, expected a tensor {tuple(mask.shape)}")
            return counted(term.to(mask.device, torch.float32), mask)
        reward = REWARDS[spec.name]
        read: list = []
        for need in reward.needs:
            if need == "answers":
                read.append(answers())
            elif need == "marks":
                read.append(self._marks(rollout, scored, answers))
            elif need == "right":
                read.append(self._right(rollout, scored, answers))
            elif need == "rewriting_probs":
                read.append(self.models[spec.path].scores(need, rollout, lambda: self._to_rewrite(rollout, answers())))
            else:
                read.append(self._scored(need, spec.path, rollout, scored, answers))
        return reward.function(*read, mask, **self.settings.get(spec.name, {}))

    def _scored(self, need: str, path: str, rollout: Rollout, scored: dict, answers: Callable) -> torch.Tensor:
        if (need, path) not in scored:
            scored[need, path] = self.models[path].scores(need, rollout, answers)
        return scored[need, path]

    def _references(self, rollout: Rollout) -> list[str]:
        """The good answer to each row's prompt."""
        ids, mask = rollout.input_ids.cpu(), rollout.attention_mask.cpu() > 0
        start = ids.size(1) - rollout.actions
        return [
            self.references[tuple(row[real].tolist())]
            for row, real in zip(ids[:, :start], mask[:, :start], strict=True)
        ]

    def _to_rewrite(self, rollout: Rollout, answers: Sequence[Answer]) -> list[Answer]:
        """The same answers behind the question to rewrite them."""
        return [
            replace(answer, prompt=rewriting_prompt(answer.prompt, reference, answer.text))
            for answer, reference in zip(answers, self._references(rollout), strict=True)
        ]

    def _right(self, rollout: Rollout, scored: dict, answers: Callable[[], list[Answer]]) -> torch.Tensor:
        """Whether each answer is right, ``(B, 1)``: by its last number, or by a sequence reward model's score."""
        if self.options.rlmec_judge != "number":
            judge = self.options.rlmec_judge_model
            right = self._scored("sequence_score", judge, rollout, scored, answers) > self.options.rlmec_threshold
        else:
            wanted = map(last_number, self._references(rollout))
            found = [last_number(answer.text) for answer in answers()]
            equal = [one is not None and one == other for one, other in zip(found, wanted, strict=True)]
            right = torch.tensor(equal, device=rollout.action_mask.device).unsqueeze(1)
        self.measured["reward/right"] = right.float().flatten()
        return right

    def _marks(self, rollout: Rollout, scored: dict, answers: Callable[[], list[Answer]]) -> list[Marks | None]:
        """A chat model's marks, of the answers whose score is at most ``--span_threshold`` where that is given."""
        critic, threshold = self.span_critic, self.options.span_threshold
        wanted = torch.tensor([bool(answer.text.strip()) for answer in answers()])
        if threshold is not None:
            judge = next(spec.path for spec in self.specs if scores_sequences(spec))
            scores = self._scored("sequence_score", judge, rollout, scored, answers)
            wanted &= (scores <= threshold).flatten().cpu()
        marks = critic.marks(answers(), wanted.tolist())
        unmatched = [
            sum(places(answer.text, spans)[1] for spans in (marked.positive, marked.negative)) if marked else 0
            for marked, answer in zip(marks, answers(), strict=True)
        ]
        self.measured |= {
            "spans/asked": wanted.float(),
            "spans/unanswered": wanted.float() - torch.tensor([float(marked is not None) for marked in marks]),
            "spans/unmatched": torch.tensor(unmatched, dtype=torch.float32),
            "spans/usd": torch.full((1,), critic.usd * critic.world_size),
        }
        return marks


def last_number(text: str) -> float | None:
    """The last number of a text; None where it has none.

    >>> last_number("It is 3, so in all 1,200.")
    1200.0
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def scores_sequences(spec: RewardSpec) -> bool:
    """Whether a term of ``--reward`` has a model that scores whole responses."""
    return spec.model is not None and "sequence_score" in REWARDS[spec.name].needs


def settings(options: Options) -> dict[str, dict[str, float]]:
    """What the options say of single rewards: further arguments of their functions, by name."""
    # ReMax clips the difference of two scores, which clipped ones would often make 0.
    clip = math.inf if options.algo == "remax" else options.clip_reward_value
    score = {"clip": clip, "mean": options.score_mean, "std": options.score_std}
    return {
        "tlcr_fixed": options.fixed_values,
        "sequence": score,
        "uniform": score,
        "abc": score | {"beta": options.abc_beta},
        "token_scores": {"baseline": options.token_score_baseline},
        "critic": {"positive": options.span_positive, "negative": options.span_negative},
    }


def normalised(
    term: torch.Tensor, mask: torch.Tensor, scale: RunningScale, whiten: bool, clip: float | None
) -> torch.Tensor:
    """A term divided by the standard deviation of its sums per response so far; ``(B, A)`` to ``(B, A)``.

    ``whiten``: their mean is taken off too, on the last action, so that the sums have mean 0 and no token's share of
    them changes. ``clip`` bounds each reward after that (PPO-max, Zheng et al., 2023).
    """
    if whiten:
        term = term - scale.mean * last_action(mask)
    term = term / scale.std
    return term if clip is None else term.clamp(-clip, clip)


def _plain_copy(head: nn.Linear, runtime: Runtime) -> nn.Linear:
    """A frozen head that outlives its model, whole on the device also where ZeRO-3 has partitioned that."""
    with deepspeed.zero.GatheredParameters(list(head.parameters())):
        copy = nn.Linear(head.in_features, head.out_features, head.bias is not None, runtime.device, head.weight.dtype)
        copy.load_state_dict(head.state_dict())
    return copy.requires_grad_(False)


@contextmanager
def _answering(model: PreTrainedModel, head: nn.Linear) -> Iterator[None]:
    """Within it a token classifier's logits are those of another head on the same hidden states."""
    hook = head_of(model)[1].register_forward_hook(lambda module, inputs, logits: head(*inputs))
    try:
        yield
    finally:
        hook.remove()
