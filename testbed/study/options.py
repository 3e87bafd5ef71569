"""The study's command line: where it writes, what it takes from elsewhere, and another world than the testbed."""

import hashlib
import inspect
from collections import deque
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from deepspeed_chat_tlcr.arguments import option
from deepspeed_chat_tlcr.data.preferences import load_preferences
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import load_config
from deepspeed_chat_tlcr.records import read_revisions
from testbed.measures import Scorer
from testbed.study.methods import World
from testbed.study.parts import read_prompts
from testbed.study.registration import REGISTRATION
from testbed.study.truth import TESTBED, checked, load_scorer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run what is registered, stage after stage, on worlds whose truth is known; write results.json and study.html."""

    output_dir: str = option(MISSING, "folder for artefacts/, results.json and study.html; what is there is reused")
    registration: str = option(str(REGISTRATION), "methods, settings, seeds, comparisons and rules, fixed beforehand")
    until: Literal["grid", "main", "controls", "long"] = option("long", "the last stage to run")
    hours: float | None = option(
        None, "begin nothing after so long, and end; the same command continues; unset: as registered", above=0
    )
    report: bool = option(False, "run nothing; write tables and page of what is there")
    plan: bool = option(False, "print what would run, in order, and stop")
    jobs: int = option(2, "commands side by side, one core each")
    preferences: str | None = option(None, "another world: its pairs, JSON lines of prompt, chosen, rejected")
    revisions: str | None = option(None, "another world: revisions.jsonl of its pairs")
    scorer: str = option(TESTBED, "another world: its truth, python:module:function(prompt, response, ended)")
    prompts: str | None = option(None, "another world: prompts to test on; unset: those of its held-out pairs")
    base_model: str | None = option(None, "another world: its base model; unset: one is trained on the pairs' texts")


def chosen_world(options: Options, version: int) -> World:
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
    # As they are seen from everywhere: a step's arguments decide its key.
    paths = {name: path and str(Path(path).resolve()) for name in names for path in [getattr(options, name)]}
    if options.preferences is None:
        return World(version=version, **paths, scorer=options.scorer)
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
