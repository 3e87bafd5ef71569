"""The study's command line, and the choices in it that are not a matter of any one method."""

import gzip
import hashlib
import inspect
import json
import math
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from deepspeed_chat_tlcr.arguments import option, seed_option
from deepspeed_chat_tlcr.data.preferences import load_preferences
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import load_config
from deepspeed_chat_tlcr.records import read_revisions
from testbed.study.methods import METHODS, QUICK, Condition, Scale, Setting, World
from testbed.study.parts import read_prompts
from testbed.study.truth import TESTBED, Scorer, checked, load_scorer

PAPER = Setting()
"""The study's settings before any grid: the paper's KL coefficient, rewards as they are."""

NOISE = "reviser noise"
"""The question that only the testbed's own reviser can be asked."""

SENSITIVITY: dict[str, dict[str, tuple[Condition, Setting, str]]] = {
    NOISE: {f"{noise:.0%}": (Condition(noise=noise), PAPER, "tlcr") for noise in (0.0, 0.03, 0.1, 0.25)},
    "labelled pairs": {f"1/{n}" if n > 1 else "all": (Condition(one_of=n), PAPER, "tlcr") for n in (1, 4, 16)},
    "KL coefficient": {f"{kl:g}": (Condition(), Setting(kl=kl), "tlcr") for kl in (0.01, 0.1, 1.0)},
    "neutral weight": {f"{w:g}": (Condition(neutral_weight=w), PAPER, "tlcr") for w in (0.0, 0.25, 1.0)},
    "discriminator from": {start: (Condition(judge_from=start), PAPER, "tlcr") for start in ("base", "sft")},
    "reward": {
        "paper": (Condition(), PAPER, "tlcr"),
        "released code": (Condition(), PAPER, "tlcr_released_code"),
    },
    "budget": {
        f"{method}, {n} x": (Condition(budget=n), PAPER, method) for method in ("tlcr", "tlcr_fixed") for n in (1, 4)
    },
}
"""By question: what is varied, one thing at a time, all else as in the study."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run methods x seeds on worlds whose truth is known; write results.json and study.html."""

    output_dir: str = option(MISSING, "folder for artefacts/, results.json and study.html; what is there is reused")
    stage: Literal["study", "grid", "sensitivity", "report"] = option(
        "study", "grid: choose settings; study: the table; sensitivity: one thing varied at a time; report: only write"
    )
    methods: list[str] = option([], f"methods to run; unset: all of {', '.join(METHODS)}")
    seeds: list[int] = seed_option([1, 2, 3, 4, 5], "seeds of worlds, data, models and sampling alike")
    jobs: int = option(2, "commands side by side, one core each")
    quick: bool = option(False, f"one seed and {', '.join(QUICK)}, unless --seeds or --methods say otherwise")
    plan: bool = option(False, "print what would run, in order, and stop")
    scale: list[str] = option([], "sizes other than the study's, as in pairs=3200 updates=20 (see methods.Scale)")

    known: list[str] = option(
        [], "known.json[.gz] of other outputs, whose runs and trials are taken from there, not made"
    )
    grid_seed: int = seed_option(0, "the world that settings are chosen on; none of --seeds")
    learning_rates: list[float] = option(
        [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], "the grid's learning rates, the same for every method", above=0
    )
    kls: list[float] = option([0.03, 0.3, 1.0], "the grid's KL coefficients (DPO: beta) besides 0.1", least=0)
    reward_scales: list[float] = option(
        [],
        "the grid's reward scales besides 1; a KL coefficient of 1 is a scale of 0.1 at 0.1, so none by default",
        above=0,
    )

    preferences: str | None = option(None, "another world: its pairs, JSON lines of prompt, chosen, rejected")
    revisions: str | None = option(None, "another world: revisions.jsonl of its pairs")
    scorer: str = option(TESTBED, "another world: its truth, python:module:function(prompt, response, ended)")
    prompts: str | None = option(None, "another world: prompts to test on; unset: those of its held-out pairs")
    base_model: str | None = option(None, "another world: its base model; unset: one is trained on the pairs' texts")


def known_steps(files: Sequence[str]) -> dict[str, dict]:
    """What ``known.json[.gz]`` of other studies say, by key of the step. Raises ``InputError`` for another kind."""
    found: dict[str, dict] = {}
    for file in files:
        try:
            with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as opened:
                told = json.load(opened)
            found |= {key: {"seconds": one["seconds"], "results": one["results"]} for key, one in told.items()}
        except OSError as error:
            raise InputError(f"--known {file}: cannot be read ({error.strerror or error})") from None
        except (ValueError, TypeError, KeyError, AttributeError, EOFError, zlib.error):
            raise InputError(f"--known {file}: not a known.json, which testbed/study writes") from None
    return found


def chosen_methods(options: Options) -> list[str]:
    """Raises ``InputError`` for an unknown method, listing the known."""
    named = options.methods or (list(QUICK) if options.quick else list(METHODS))
    unknown = [name for name in named if name not in METHODS]
    if unknown:
        raise InputError(f"--methods {' '.join(unknown)}: unknown; known are {', '.join(METHODS)}")
    return named


def chosen_seeds(options: Options) -> list[int]:
    seeds = options.seeds[:1] if options.quick and options.seeds == [1, 2, 3, 4, 5] else options.seeds
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))}: give at least one, each once")
    if options.grid_seed in seeds:
        raise InputError(f"--grid_seed {options.grid_seed}: settings chosen on a world must not be reported on it")
    return list(seeds)


def chosen_scale(texts: Sequence[str]) -> Scale:
    """``Scale`` with some of its fields replaced. Raises ``InputError`` for an unknown field or a bad value."""
    kinds = {field.name: type(field.default) for field in fields(Scale)}
    changes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise InputError(f"--scale {text}: unknown; known are {', '.join(kinds)}")
        try:
            changes[name] = kinds[name](value)
        except ValueError:
            raise InputError(f"--scale {text}: {value!r} is not a number") from None
        if isinstance(changes[name], str):
            if changes[name] not in ("fp32", "bf16"):
                raise InputError(f"--scale {text}: must be fp32 or bf16")
        elif not 0 <= changes[name] < math.inf or (name not in ("judge_weight_decay",) and changes[name] == 0):
            raise InputError(f"--scale {text}: must be above 0")
    return replace(Scale(), **changes)


def chosen_world(options: Options) -> World:
    """Raises ``InputError`` for a world of which a part is missing or cannot be read, before anything is trained."""
    scorer = load_scorer(options.scorer)
    needed = {"--preferences": options.preferences, "--revisions": options.revisions}
    own_scorer = options.scorer != TESTBED
    if any(needed.values()) or own_scorer:
        missing = [name for name, value in needed.items() if value is None]
        missing += [] if own_scorer else ["--scorer"]
        if missing:
            raise InputError(f"another world than the testbed also needs {', '.join(missing)}")
        check_world(options, scorer)
    names = ("preferences", "revisions", "prompts", "base_model")
    paths = {name: getattr(options, name) for name in names}
    if options.preferences is None:
        return World(**paths, scorer=options.scorer)
    source = inspect.getsourcefile(scorer)
    return World(
        **paths,
        scorer=options.scorer,
        files=content_of(filter(None, paths.values())),
        truth=content_of([source] if source else []),
    )


def content_of(paths: Iterable[str]) -> str:
    """A hash of files and folders: of what is in them; of weights, which are large, their sizes."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
                if file.suffix not in (".safetensors", ".bin", ".pt"):
                    digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def check_world(options: Options, scorer: Scorer) -> None:
    """Raises ``InputError`` where another world's file is missing or malformed, or a chosen response has no score."""
    for name in ("preferences", "revisions", "prompts", "base_model"):
        path = getattr(options, name)
        if path and not Path(path).exists():
            raise InputError(f"--{name} {path}: no such file or folder")
    pairs = load_preferences([options.preferences], "all", "train")
    deque(read_revisions(options.revisions), maxlen=0)  # every line is looked at
    if options.prompts:
        read_prompts(options.prompts)
    if options.base_model:
        load_config(options.base_model)
    first = pairs[0]
    checked(scorer, options.scorer)(first.prompt, first.chosen, True)
