"""The models that score rollouts, each in its own tokens, and the weighted sum of the rewards made of what they say."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError, RunError, describe_error
from deepspeed_chat_tlcr.models import head_of, load_token_classifier
from deepspeed_chat_tlcr.optim import without_adapters
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenizers_differ
from step3_ppo_tlcr.averages import RunningScale
from step3_ppo_tlcr.engines import freeze, frozen_config, lora_alone
from step3_ppo_tlcr.experience import Rollout
from step3_ppo_tlcr.objectives import counted
from step3_ppo_tlcr.options import Options
from step3_ppo_tlcr.rewards import REWARDS, RewardSpec, last_action, load_function, names_of
from step3_ppo_tlcr.scores import ATTENTION, last_attention, positive_probs, sequence_score, token_scores
from step3_ppo_tlcr.texts import Answer, answers_of, project, read_by

SCORES = {
    "positive_probs": positive_probs,
    "token_scores": token_scores,
    "sequence_score": sequence_score,
    "last_attention": last_attention,
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
    ):
        self.specs, self.tokenizer, self.options = specs, tokenizer, options
        self.names = names_of(specs)
        self.settings = settings(options)
        self.functions = {spec.path: load_function(spec.path) for spec in specs if spec.name == "python"}
        self.scales = [RunningScale(sample=True) for _ in specs]
        self.models: dict[str, RewardModel] = {}
        in_critic = options.critic_model_name_or_path if critic and lora_alone(options, "critic") else None
        for path in dict.fromkeys(spec.path for spec in specs if spec.name in REWARDS and spec.path):
            rewards = [REWARDS[spec.name] for spec in specs if spec.path == path]
            labels = {reward.labels for reward in rewards}
            if len(labels) > 1:
                raise InputError(f"--reward: {path!r} cannot be both a discriminator and a sequence reward model")
            looks = any("last_attention" in reward.needs for reward in rewards)
            config = frozen_config(options, runtime, options.reward_zero_stage, options.offload_reward_model)
            attention = ATTENTION if looks else options.attn_implementation
            model = load_token_classifier(path, labels.pop(), runtime.torch_dtype, config, 0.0, attention=attention)
            own = load_tokenizer(path, options.new_eos)
            own = own if options.reward_tokenizer == "own" and tokenizers_differ(tokenizer, own) else None
            if own is not None:
                runtime.say(f"reward: {path} reads answers by its own tokenizer")
            if path == in_critic and not looks and own is None:
                runtime.say(f"reward: {path}'s own head on the critic without its LoRA layers")
                self.models[path] = RewardModel(critic, head=_plain_copy(head_of(model)[1], runtime))
            else:
                self.models[path] = RewardModel(freeze(model, config, runtime), own)

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
            total = total + spec.weight * term
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
                continue
            if (need, spec.path) not in scored:
                scored[need, spec.path] = self.models[spec.path].scores(need, rollout, answers)
            read.append(scored[need, spec.path])
        return reward.function(*read, mask, **self.settings.get(spec.name, {}))


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
