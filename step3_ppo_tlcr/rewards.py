"""Rewards, as functions from scored tokens to a reward per action.

Everything is ``(B, A)``: entry ``[b, a]`` speaks about the token that the policy chose at action ``a``.
"""

import functools
import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepspeed_chat_tlcr.errors import InputError, describe_error
from deepspeed_chat_tlcr.metrics import NEUTRAL_ZONE
from deepspeed_chat_tlcr.models import squash
from deepspeed_chat_tlcr.spans import Marks, places
from step3_ppo_tlcr.objectives import counted
from step3_ppo_tlcr.segments import clauses, sentences
from step3_ppo_tlcr.texts import Answer


def continuous_reward(positive_probs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """TLCR: r_t = 2 D(a_t | x, a_<t) - 1 on every generated token, EOS included (Eq. 7).

    ``positive_probs`` is D, ``(B, A)`` in [0, 1]; returns ``(B, A)`` in [-1, 1], zero where the mask is 0.
    """
    return counted(2 * positive_probs - 1, action_mask)


def fixed_reward(
    positive_probs: torch.Tensor,
    action_mask: torch.Tensor,
    threshold: float = NEUTRAL_ZONE,
    positive: float = 1.0,
    negative: float = -1.0,
) -> torch.Tensor:
    """TLCR_fixed: ``positive`` or ``negative``, and 0 where max(D, 1 - D) < ``threshold`` (Eq. 2).

    Shapes as ``continuous_reward``.
    """
    confident = torch.maximum(positive_probs, 1 - positive_probs) >= threshold
    signed = (positive_probs > 0.5) * positive + (positive_probs < 0.5) * negative
    return signed * confident * action_mask


def positive_only_reward(positive_probs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """max(r, 0) of the continuous reward (ablation, section 7.3)."""
    return continuous_reward(positive_probs, action_mask).clamp(min=0)


def negative_only_reward(positive_probs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """min(r, 0) of the continuous reward (ablation, section 7.3)."""
    return continuous_reward(positive_probs, action_mask).clamp(max=0)


def released_code_reward(positive_probs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """What the released code computes, to measure what its departures from the paper do.

    The second soft-max makes r = tanh((2D - 1) / 2); each reward lands one action late: the first action gets 0,
    the last action its predecessor's, and the EOS's own is lost.
    """
    twice = counted(torch.tanh((2 * positive_probs - 1) / 2), action_mask)
    late = torch.zeros_like(twice)
    late[:, 1:] = twice[:, :-1]
    return late * action_mask


def redistributed_reward(positive_probs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """Every token of a response gets the mean of its continuous rewards: the same sums, without saying which token.

    A control: what is left of TLCR without its credit assignment. Shapes as ``continuous_reward``.
    """
    total = continuous_reward(positive_probs, action_mask).sum(1, keepdim=True)
    return total / action_mask.sum(1, keepdim=True).clamp(min=1) * action_mask


def segment_reward(
    positive_probs: torch.Tensor, answers: Sequence[Answer], action_mask: torch.Tensor, split: Callable = clauses
) -> torch.Tensor:
    """Fine-Grained RLHF (Wu et al., 2023): +1 or -1 on each segment's last token, by the mean of D over the segment.

    ``split`` gives the ends of an answer's segments, in characters. A segment's last token is the last one that spells
    a character of it; the token that ends the response is of no segment. Shapes as ``continuous_reward``.
    """
    rewards = torch.zeros_like(positive_probs)
    for row, answer in enumerate(answers):
        probs = positive_probs[row].tolist()
        begin = 0
        for end in split(answer.text):
            last = max(
                (at for at, (first, past) in enumerate(answer.spans) if first < end and first < past), default=-1
            )
            if last >= begin:
                rewards[row, last] = 1.0 if sum(probs[begin : last + 1]) / (last + 1 - begin) >= 0.5 else -1.0
                begin = last + 1
    return counted(rewards, action_mask)


def sequence_reward(
    scores: torch.Tensor, action_mask: torch.Tensor, clip: float = 5.0, mean: float = 0.0, std: float = 1.0
) -> torch.Tensor:
    """PPO_seq: the reward model's score of the whole response, on its last action (Eq. 1).

    ``scores`` ``(B, A)`` or ``(B, 1)``: the score at each response's last token, at least; (score - ``mean``) /
    ``std`` is clamped to +-``clip`` as DeepSpeed-Chat does. Returns ``(B, A)``; rows without an action stay 0.
    """
    last = last_action(action_mask)
    return counted(((scores - mean) / std).clamp(-clip, clip).expand_as(last), last)


def sum_at_the_end(positive_probs: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """The sum of all r_t on the last action: what the discriminator says, without saying where (a control).

    Shapes as ``continuous_reward``.
    """
    return continuous_reward(positive_probs, action_mask).sum(1, keepdim=True) * last_action(action_mask)


def uniform_reward(scores: torch.Tensor, action_mask: torch.Tensor, **scale: float) -> torch.Tensor:
    """The score of the whole response in equal parts on all of its actions: a control. Arguments of the last one."""
    total = sequence_reward(scores, action_mask, **scale).sum(1, keepdim=True)
    return total / action_mask.sum(1, keepdim=True).clamp(min=1) * action_mask


def attention_reward(
    scores: torch.Tensor, attention: torch.Tensor, action_mask: torch.Tensor, beta: float = 0.8, **scale: float
) -> torch.Tensor:
    """ABC (Chan et al., 2024): a share ``beta`` of the score goes where the reward model looked, the rest to the end.

    r_t = beta R alpha_t + (1 - beta) R [t last], alpha the attention of the last token to the response's tokens,
    ``(B, A)``, scaled to sum to 1. The sum stays R, so the best policy stays the best. ``scores`` and ``scale`` as in
    ``sequence_reward``.
    """
    score = sequence_reward(scores, action_mask, **scale)
    attention = counted(attention, action_mask)
    shares = attention / attention.sum(1, keepdim=True).clamp(min=1e-8)
    return beta * score.sum(1, keepdim=True) * shares + (1 - beta) * score


def token_score_reward(scores: torch.Tensor, action_mask: torch.Tensor, baseline: float = 0.5) -> torch.Tensor:
    """Preference-grounded guidance (Yang et al., 2023): the token reward model's own number, less ``baseline``.

    ``scores`` ``(B, A)`` of a model trained with ``--objective token_pairs``, squashed to about (0, 1) as it was then.
    All are positive: without a baseline near their mean, longer answers are better ones.
    """
    return counted(squash(scores) - baseline, action_mask)


def span_reward(
    marks: Sequence[Marks | None],
    answers: Sequence[Answer],
    action_mask: torch.Tensor,
    positive: float = 0.8,
    negative: float = -0.8,
) -> torch.Tensor:
    """DRLC's intrinsic reward (Cao et al., 2024): ``positive`` in spans that a chat model calls good, or ``negative``.

    A token that spells a character of a span is in it; one in spans of both kinds gets the sum. ``marks``: None for a
    response that was not judged, which gets 0. Returns ``(B, A)``.
    """
    rewards = torch.zeros(action_mask.shape)
    for row, (marked, answer) in enumerate(zip(marks, answers, strict=True)):
        for value, spans in ((positive, marked.positive), (negative, marked.negative)) if marked else ():
            found, _ = places(answer.text, spans)
            for at, (first, past) in enumerate(answer.spans):
                if any(first < end and begin < past for begin, end in found):
                    rewards[row, at] += value
    return rewards.to(action_mask.device) * action_mask


def rewriting_reward(probs: torch.Tensor, right: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """RLMEC (Chen et al., 2024): does a model that rewrites answers write this token too, at this place?

    ``probs`` ``(B, A)``: q_t, its probability of the policy's own token, behind its own tokens. ``right`` ``(B, 1)``:
    whether the answer is right: clip(q_t - 0.5, 0, 0.5), else clip(q_t - 0.5, -0.1, 0).
    """
    margin = probs - 0.5
    return counted(torch.where(right, margin.clamp(0, 0.5), margin.clamp(-0.1, 0)), action_mask)


def random_reward(action_mask: torch.Tensor) -> torch.Tensor:
    """Uniform in [-1, 1], whatever the text: the control that must not help."""
    return (2 * torch.rand_like(action_mask, dtype=torch.float32) - 1) * action_mask


def last_action(action_mask: torch.Tensor) -> torch.Tensor:
    """1 at each row's last counted action, else 0; ``(B, A)`` to ``(B, A)``."""
    following = torch.zeros_like(action_mask)
    following[:, :-1] = action_mask[:, 1:]
    return action_mask * (1 - following)


@dataclass(frozen=True)
class Reward:
    """A named reward: a function of what ``needs`` names, and of the action mask.

    ``labels`` of the model behind it: 2 a discriminator, 1 a sequence reward model, 0 none. ``needs``: scores of that
    model (``reward_models.SCORES``), ``answers``, the ``marks`` of a chat model, or whether answers are ``right``.
    """

    function: Callable[..., torch.Tensor]
    labels: int
    needs: tuple[str, ...]
    of_tokens: bool = False  # its model was trained by ``--objective token_pairs``

    @property
    def asks(self) -> bool:
        """Whether a chat model is behind it, not one that is loaded."""
        return "marks" in self.needs

    @property
    def rewrites(self) -> bool:
        """Whether a language model that rewrites answers is behind it."""
        return "rewriting_probs" in self.needs


_D, _SCORE = ("positive_probs",), ("sequence_score",)
REWARDS = {
    "tlcr": Reward(continuous_reward, 2, _D),
    "tlcr_fixed": Reward(fixed_reward, 2, _D),
    "tlcr_positive_only": Reward(positive_only_reward, 2, _D),
    "tlcr_negative_only": Reward(negative_only_reward, 2, _D),
    "tlcr_released_code": Reward(released_code_reward, 2, _D),
    "tlcr_sum": Reward(sum_at_the_end, 2, _D),
    "tlcr_redistributed": Reward(redistributed_reward, 2, _D),
    "segments": Reward(segment_reward, 2, ("positive_probs", "answers")),
    "sentences": Reward(functools.partial(segment_reward, split=sentences), 2, ("positive_probs", "answers")),
    "sequence": Reward(sequence_reward, 1, _SCORE),
    "uniform": Reward(uniform_reward, 1, _SCORE),
    "abc": Reward(attention_reward, 1, ("sequence_score", "last_attention")),
    "token_scores": Reward(token_score_reward, 1, ("token_scores",), of_tokens=True),
    "rlmec": Reward(rewriting_reward, 0, ("rewriting_probs", "right")),
    "critic": Reward(span_reward, 0, ("marks", "answers")),
    "random": Reward(random_reward, 0, ()),
}


SUM_TO_THE_SCORE = ("sequence", "uniform", "abc")


@dataclass(frozen=True)
class RewardSpec:
    """One term of ``--reward``: ``NAME[:PATH][@WEIGHT]`` or ``python:package.module:function[@WEIGHT]``.

    WEIGHT may be START..END: linear from the first to the last set of rollouts of the run.
    """

    name: str
    path: str | None
    weight: float
    end: float | None = None

    def weight_at(self, progress: float) -> float:
        """The weight when this share of the run is over, 0 in the first set and 1 in the last."""
        return self.weight if self.end is None else self.weight + (self.end - self.weight) * progress

    @property
    def model(self) -> str | None:
        """The folder or hub name of the model that it loads, if it loads one."""
        return self.path if self.name in REWARDS and not REWARDS[self.name].asks else None


def parse_reward(text: str, default_path: str | None) -> RewardSpec:
    """Read one ``--reward`` term; ``default_path`` is the model used where none is named.

    Raises ``InputError`` for an unknown name (listing the known), a bad weight or a missing path.
    """
    body, at, weight_text = text.rpartition("@")
    weights = [1.0]
    if at:
        try:
            weights = [float(word) for word in weight_text.split("..", 1)]
        except ValueError:
            weights = [math.nan]
        if not all(map(math.isfinite, weights)):
            raise InputError(f"--reward {text}: {weight_text!r} after @ is not a finite number, nor START..END")
    name, _, path = (body if at else text).partition(":")
    if name == "python":
        if path.count(":") != 1 or not all(path.split(":")):
            raise InputError(f"--reward {text}: expected python:package.module:function")
        return RewardSpec(name, path, *weights)
    if name not in REWARDS:
        raise InputError(f"--reward {text}: unknown reward {name!r}; known: {', '.join([*REWARDS, 'python'])}")
    if REWARDS[name].asks:
        if not path:
            raise InputError(f"--reward {text}: name the chat model that marks spans, as in {name}:gpt-6-luna")
        return RewardSpec(name, path, *weights)
    if REWARDS[name].rewrites:
        default_path = None
    elif REWARDS[name].labels == 0:
        return RewardSpec(name, None, *weights)
    if not (path or default_path):
        raise InputError(f"--reward {text}: name its model, as in {name}:PATH")
    return RewardSpec(name, path or default_path, *weights)


def parse_rewards(texts: Sequence[str], default_path: str | None) -> list[RewardSpec]:
    """All terms of ``--reward``; see ``parse_reward``."""
    if not texts:
        raise InputError(f"--reward is empty; known rewards: {', '.join([*REWARDS, 'python'])}")
    return [parse_reward(text, default_path) for text in texts]


def names_of(specs: Sequence[RewardSpec]) -> list[str]:
    """What each term is called in the metrics: its name, numbered from its second use on (sequence, sequence_2)."""
    seen: Counter[str] = Counter()
    names = []
    for spec in specs:
        seen[spec.name] += 1
        names.append(spec.name if seen[spec.name] == 1 else f"{spec.name}_{seen[spec.name]}")
    return names


def load_function(path: str) -> Callable:
    """Import a user's ``package.module:function``, from the working directory too, as ``python -m`` would.

    Raises ``InputError`` if it cannot be had.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a stranger's module raises
        raise InputError(f"--reward python:{path}: {describe_error(error)}") from error
    if not callable(function):
        raise InputError(f"--reward python:{path}: is not a function")
    return function
