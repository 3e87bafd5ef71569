"""What a study has committed itself to before it runs: methods, settings, seeds, comparisons, rules.

``registration.json`` beside this file is the study's; nothing of it can be changed on the command line. A study records
the file's hash when it freezes its settings and refuses to go on with another.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import parse_json

REGISTRATION = Path(__file__).with_name("registration.json")
Judge = Literal["", "truth", "discriminator", "reward_model", "synthetic_reward_model"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes that all methods share. RL reads every RL prompt ``rl_epochs`` times, which with ``rl_batch`` makes as many
    optimiser steps, on as many answers, as DPO and FIGA make in one epoch of the reward part."""

    pairs: int = 10240
    eval_pairs: int = 1024
    documents: int = 24000
    validation: int = 96
    test: int = 192
    answers: int = 8
    hidden_size: int = 192
    layers: int = 2
    sft_batch: int = 32
    sft_learning_rate: float = 1e-3
    sft_epochs: int = 2
    judge_batch: int = 16
    judge_learning_rate: float = 1e-3
    judge_epochs: int = 2
    judge_weight_decay: float = 0.1
    rl_batch: int = 64
    rl_epochs: int = 2
    max_prompt: int = 64
    max_answer: int = 96
    critic_learning_rate: float = 1e-3
    preference_batch: int = 32


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """One way to train the sequence reward model."""

    learning_rate: float = 1e-3
    epochs: int = 2
    positions: Literal["end", "all"] = "end"
    start: Literal["base", "sft"] = "base"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: an algorithm, its reward, and in what it differs from the method that it is ``like``."""

    title: str
    algo: Literal["sft", "dpo", "figa", "ppo", "remax"]
    reward: str = ""  # a name of --reward
    judge: Judge = ""  # the model behind it
    like: str | None = None  # whose settings it takes; None: the grid's own for it
    epochs: float = 1  # times the RL epochs
    kl: float = 1.0  # times the KL coefficient
    rate: float = 1.0  # times the learning rate
    sharpness: float | Literal["fit"] = 1.0  # of D: what its logits are multiplied by; fit: as held-out labels say
    noise: float = 0.0  # beside it on every token, uniform in [-noise, noise], before both are scaled
    rounds: int = 0  # of own answers that the reviser edits and the discriminator learns from
    options: Mapping[str, float] = field(default_factory=dict)  # further flags of step 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the grid chooses. ``kl``: of a reward whose total has deviation 1 over SFT's answers; DPO: its beta."""

    learning_rate: float = 3e-4
    kl: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Grid:
    learning_rates: Sequence[float]
    kls: Sequence[float]
    finalists: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    methods: Sequence[str]
    seeds: int  # the first of the results' seeds


@dataclass(frozen=True, kw_only=True)
class Family:
    """Comparisons that are corrected together."""

    rule: Literal["helps", "differences"]
    methods: Sequence[str] = ()
    pairs: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Registration:
    path: Path
    digest: str
    title: str
    world: int
    grid_seeds: Sequence[int]
    seeds: Sequence[int]
    hours: float
    scale: Scale
    reward_models: Sequence[RewardModel]
    grid: Grid
    methods: Mapping[str, Method]
    stages: Mapping[str, Stage]
    families: Mapping[str, Family]
    rules: Mapping[str, str | float]

    @property
    def tuned(self) -> list[str]:
        """Methods that the grid chooses settings for."""
        return [name for name, method in self.methods.items() if method.like is None and method.algo != "sft"]


def made(kind: type, told: dict, where: str):
    """A record of ``kind``. Raises ``InputError`` for an unknown or missing field or a word that is not allowed."""
    try:
        found = kind(**told)
    except TypeError as error:
        raise InputError(f"{where}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None
    for one in fields(kind):
        words, value = [word for word in get_args(one.type) if isinstance(word, str)], getattr(found, one.name)
        if words and isinstance(value, str) and value not in words and one.type is not str:
            raise InputError(f"{where}.{one.name}: {value!r}; known are {', '.join(words)}")
    return found


def read(path: str | Path = REGISTRATION) -> Registration:
    """Raises ``InputError`` that names what is wrong: a field, a method that is nowhere, seeds that meet."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        told = parse_json(text)
        seeds = told["seeds"]
        found = Registration(
            Path(path),
            hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16],
            told["title"],
            told["world"],
            seeds["grid"],
            seeds["results"],
            told["hours"],
            made(Scale, told["scale"], f"{path}: scale"),
            [made(RewardModel, one, f"{path}: reward_models") for one in told["reward_models"]],
            made(Grid, told["grid"], f"{path}: grid"),
            {name: made(Method, one, f"{path}: methods.{name}") for name, one in told["methods"].items()},
            {name: made(Stage, one, f"{path}: stages.{name}") for name, one in told["stages"].items()},
            {name: made(Family, one, f"{path}: families.{name}") for name, one in told["families"].items()},
            told["rules"],
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a registration: {error!r}") from None
    check(found)
    return found


def check(registration: Registration) -> None:
    where, methods = registration.path, registration.methods
    named = [method.like for method in methods.values() if method.like]
    named += [name for stage in registration.stages.values() for name in stage.methods]
    for family in registration.families.values():
        named += [*family.methods, *(name for pair in family.pairs for name in pair)]
    if unknown := sorted(set(named) - set(methods)):
        raise InputError(f"{where}: no method is called {', '.join(unknown)}")
    if untuned := [name for name, method in methods.items() if method.like and methods[method.like].like]:
        raise InputError(f"{where}: {', '.join(untuned)} is like a method that has no settings of its own")
    if "sft" not in methods:
        raise InputError(f"{where}: methods must have sft, which everything is measured from")
    both = set(registration.grid_seeds) & set(registration.seeds)
    if both or len(set(registration.seeds)) != len(registration.seeds):
        raise InputError(
            f"{where}: seeds: a world that settings are chosen on, or twice the same, is no result: {both}"
        )
