"""Artefacts: folders that a command makes, named by what decides their content, so that nothing is made twice.

A ``Step`` is one command of an entry point that takes ``--output_dir``. Its arguments may point into folders of other
steps, which are then made first. Two studies, or two methods of one, that need the same step share its folder.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import parse_json


@dataclass(frozen=True)
class Output:
    """A path inside the folder that ``step`` makes."""

    step: "Step"
    path: str = ""


@dataclass(frozen=True)
class Inverse:
    """``factor`` over a number in the ``results.json`` that ``step`` writes: known only once the step is done."""

    step: "Step"
    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Joined:
    """One argument of several parts: ``tlcr:``, a folder, ``@0.5``."""

    parts: tuple["Argument", ...]


Argument = str | Output | Inverse | Joined


@dataclass(frozen=True)
class Step:
    """``name`` is for people; the rest decides what the step makes."""

    name: str
    program: str
    arguments: tuple[Argument, ...]
    content: str = ""  # hash of what stands in the user's own files that the arguments name
    variables: tuple[tuple[str, str], ...] = ()  # of its environment

    @cached_property
    def key(self) -> str:
        """A hash of the command, with the keys of other steps in the place of their folders."""
        beside = [part for part in (self.content, self.variables) if part]
        told = json.dumps([self.program, *map(_identity, self.arguments), *beside])
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    @cached_property
    def needs(self) -> tuple["Step", ...]:
        """The steps whose folders the arguments point into."""
        return tuple(dict.fromkeys(step for argument in self.arguments for step in _steps(argument)))


class Store:
    """The artefacts of a study, in ``root``."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def folder(self, step: Step) -> Path:
        return self.root / f"{step.name}-{step.key}"

    def is_done(self, step: Step) -> bool:
        return (self.folder(step) / "done.json").is_file()

    def mark_done(self, step: Step, seconds: float) -> None:
        text = json.dumps({"program": step.program, "arguments": self.arguments(step), "seconds": seconds}, indent=1)
        (self.folder(step) / "done.json").write_text(text + "\n")

    def seconds(self, step: Step) -> float:
        return parse_json((self.folder(step) / "done.json").read_text())["seconds"]

    def results(self, step: Step) -> dict:
        """The ``results.json`` of a finished step."""
        return parse_json((self.folder(step) / "results.json").read_text(encoding="utf-8"))

    def arguments(self, step: Step) -> list[str]:
        """The command line, with the folders of this store; the steps it needs must be done."""
        return [*map(self._text, step.arguments), "--output_dir", str(self.folder(step))]

    def _text(self, argument: Argument) -> str:
        match argument:
            case Output(step, path):
                return str(self.folder(step) / path)
            case Inverse(step, name, factor):
                value = self.results(step)[name]
                if not value:
                    raise InputError(f"{self.folder(step)}: its {name} is {value}, by which nothing can be divided")
                return f"{factor / value:.6g}"
            case Joined(parts):
                return "".join(map(self._text, parts))
        return argument


def in_order(wanted: Iterable[Step]) -> list[Step]:
    """All steps that are needed for ``wanted``, each behind those that it needs, none twice."""
    ordered: dict[Step, None] = {}
    for step in wanted:
        ordered |= dict.fromkeys([*in_order(step.needs), step])
    return list(ordered)


def flags(**options: object) -> tuple[Argument, ...]:
    """``learning_rate=1e-3`` as ``("--learning_rate", "0.001")``; True is a switch, False and None are left out."""
    words: list[Argument] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        values = value if isinstance(value, list | tuple) else () if value is True else (value,)
        words += [one if isinstance(one, Output | Inverse | Joined) else str(one) for one in values]
    return tuple(words)


def _identity(argument: Argument) -> object:
    match argument:
        case Output(step, path):
            return [step.key, path]
        case Inverse(step, name, factor):
            return [step.key, name, factor]
        case Joined(parts):
            return list(map(_identity, parts))
    return argument


def _steps(argument: Argument) -> Iterator[Step]:
    match argument:
        case Output(step, _) | Inverse(step, _, _):
            yield step
        case Joined(parts):
            for part in parts:
                yield from _steps(part)
