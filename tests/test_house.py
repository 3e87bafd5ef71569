"""Imports run down only: from a room to rooms of its own floor or a lower one, and never in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = {
    "deepspeed_chat_tlcr": 1,
    "labeling": 2,
    "step1_sft": 2,
    "step3_ppo_tlcr": 2,
    "step2_discriminator": 3,
    "step2_grm": 3,
    "baselines": 3,
    "evaluation": 4,
    "benchmarks": 5,  # their model of time is the plan's
    "testbed": 5,
    "training_scripts": 5,
    "docs": 5,
}
BESIDE = {  # rooms of one floor that do not know of each other
    "labeling": {"step1_sft", "step3_ppo_tlcr"},
    "step1_sft": {"labeling", "step3_ppo_tlcr"},
    "step3_ppo_tlcr": {"labeling", "step1_sft"},
}


def modules() -> dict[str, Path]:
    found = (path for room in FLOORS for path in (ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in found}


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """This project's modules that a file names in its imports, those for type checking and in functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names if {name, node.module} & known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(path, set(known))) - {name} for name, path in known.items()}


def test_no_import_runs_up(imports):
    up = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if FLOORS[other.split(".")[0]] > FLOORS[name.split(".")[0]]
        or other.split(".")[0] in BESIDE.get(name.split(".")[0], ())
    ]
    assert not up


def test_no_imports_run_in_a_circle(imports):
    assert len(list(TopologicalSorter(imports).static_order())) == len(imports)  # else CycleError, which shows it


def test_asking_and_judging_know_nothing_of_labelling(imports):
    asking = {
        other for name, others in imports.items() if name.startswith("deepspeed_chat_tlcr.asking") for other in others
    }
    assert all(other.startswith("deepspeed_chat_tlcr") for other in asking)
    judging = {other for name in ("evaluation.judging", "evaluation.verdicts") for other in imports[name]}
    assert not any(other.startswith("labeling") for other in judging)
