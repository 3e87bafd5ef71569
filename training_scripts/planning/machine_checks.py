"""What the machine must have for a run: packages, a compiler, accelerators, memory, reachable nodes, a free port.

Starts with the standard library alone, because missing packages are one of the things it looks for.
"""

import importlib
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from training_scripts.planning.memory import GIB, Need, stage_needs
from training_scripts.planning.model_shapes import ModelShape, shape_of
from training_scripts.planning.recipe import ALONE, Recipe

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Problem:
    """What was found, and what to do about it."""

    found: str
    remedy: str


Check = Callable[[Recipe], Iterator[Problem]]


# ---- the machine's software ------------------------------------------------------------------------------------------


def package_problems(requirements: Path, also: Sequence[str] = ()) -> Iterator[Problem]:
    """Packages of a requirements.txt (lines of ``name>=version``), and ``also``, that are missing or too old."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    remedy = "bash training_scripts/setup.sh, with no other environment active (it makes .venv)"
    for line in [*filter(None, lines), *also]:
        name, _, least = line.partition(">=")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Problem(f"the Python package {name} is not installed", remedy)
            continue
        if least and _numbers(version) < _numbers(least):
            yield Problem(f"{name} {version} is installed, {least} or newer is needed", remedy)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def check_packages(recipe: Recipe) -> Iterator[Problem]:
    """Installed, and importable: a package for another CUDA or Python is installed but does not load."""
    missing = list(package_problems(ROOT / "requirements.txt"))
    yield from missing
    for name in ("torch", "deepspeed", "transformers", "datasets", "peft", "openai"):
        if any(name in problem.found for problem in missing):
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            yield Problem(f"import {name} fails: {error}", f"pip install --force-reinstall {name}, for this Python")
    if shutil.which("deepspeed") is None:
        yield Problem("the command deepspeed is not on PATH", "activate the environment that DeepSpeed is installed in")


def check_compiler(recipe: Recipe) -> Iterator[Problem]:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        yield Problem(
            f"no C++ compiler ({compiler}); DeepSpeed compiles operators at their first use",
            "install g++ (Debian, Ubuntu: apt install build-essential) or set CXX",
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        yield Problem(
            f"Python's C headers are missing ({header})",
            f"install them (Debian, Ubuntu: apt install python3.{sys.version_info.minor}-dev) or use another Python",
        )


# ---- accelerators ----------------------------------------------------------------------------------------------------


def check_accelerators(recipe: Recipe) -> Iterator[Problem]:
    """Count, precision and memory of this node's devices. (Of other nodes only the login is tried: ``check_nodes``.)"""
    try:
        from deepspeed.accelerator import get_accelerator

        from deepspeed_chat_tlcr.runtime import resolve_dtype
    except (ImportError, OSError):
        return  # check_packages reports it
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    wanted = next(iter(recipe.hosts().values()))
    if on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        yield Problem(
            f"no GPU was found, but NUM_GPUS={recipe.num_gpus}",
            "run nvidia-smi to see why (driver? container without --gpus?); to train on CPU on purpose: "
            "DS_ACCELERATOR=cpu; for a first try without a GPU: bash training_scripts/run_tiny.sh",
        )
        return
    try:
        resolve_dtype(recipe.dtype)
    except InputError as error:
        yield Problem(f"DTYPE={recipe.dtype}: {error}", "set DTYPE to a precision that this machine has")
    if on_cpu:
        yield from _host_memory(recipe)
        return
    if wanted > accelerator.device_count():
        yield Problem(
            f"NUM_GPUS={wanted}, but {accelerator.device_count()} GPU(s) are visible",
            "lower NUM_GPUS (and look at PLAN=1: fewer GPUs need more memory each), or check CUDA_VISIBLE_DEVICES",
        )
    free = {device: accelerator.available_memory(device) for device in range(min(wanted, accelerator.device_count()))}
    for stage, need in _needs(recipe).items():
        short = [device for device, memory in free.items() if memory < need.gpu_total]
        if short:
            yield Problem(
                f"{stage} needs about {need.gpu_total / GIB:.0f} GiB on each GPU; GPU {short[0]} has "
                f"{free[short[0]] / GIB:.0f} GiB free"
                + (f", and {len(short) - 1} more have too little" if len(short) > 1 else ""),
                "end other programs on it, or use a smaller batch, a higher ZeRO stage, offload or more GPUs "
                "(PLAN=1 shows what each saves)",
            )
    stages = recipe.folders()
    offloads = [recipe.trainings[stage].offload for stage in stages if stage in ALONE]
    if any(offloads) or (recipe.ppo_offload is not False and "step3" in stages):
        yield from _host_memory(recipe)


def _needs(recipe: Recipe) -> dict[str, Need]:
    """Memory of the stages that are not complete yet; none where the model's sizes are not known."""
    shape = known_shape(recipe)
    needs = stage_needs(recipe, shape) if shape else {}
    return {stage: need for stage, need in needs.items() if not recipe.is_complete(stage)}


def _host_memory(recipe: Recipe) -> Iterator[Problem]:
    import psutil
    from deepspeed.accelerator import get_accelerator

    ranks = next(iter(recipe.hosts().values())) if get_accelerator().device_name() == "cpu" else 0
    available = psutil.virtual_memory().available
    for stage, need in _needs(recipe).items():
        # On a CPU a Python process's own size takes the place of a GPU's reserve: a tenth of it.
        total = need.host_total + ranks * (need.gpu_total - 0.9 * need.gpu["reserve"])
        if total > available:
            yield Problem(
                f"{stage} needs about {total / GIB:.0f} GiB of this machine's memory, {available / GIB:.0f} are free",
                "use fewer ranks, a smaller model or batch, or switch offload off where GPUs have room",
            )


def check_nodes(recipe: Recipe) -> Iterator[Problem]:
    hosts = recipe.hosts()
    if not recipe.hostfile or len(hosts) < 2:
        return
    if shutil.which("pdsh") is None:
        yield Problem("several nodes are started with pdsh, which is missing", "install pdsh (apt install pdsh)")
    for host in hosts:
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "--", host, "true"]
        try:
            reached = subprocess.run(command, capture_output=True, timeout=30).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            reached = False
        if not reached:
            yield Problem(f"HOSTFILE: no ssh login without a password to {host}", f"make `ssh {host} true` work")


def check_port(recipe: Recipe) -> Iterator[Problem]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", recipe.master_port))
        except (OSError, OverflowError) as error:
            yield Problem(
                f"MASTER_PORT={recipe.master_port} cannot be used ({error})", "set MASTER_PORT to a free port"
            )


MACHINE: tuple[Check, ...] = (check_packages, check_compiler, check_accelerators, check_nodes, check_port)


def known_shape(recipe: Recipe) -> ModelShape | None:
    """Sizes of the model, or None where they are not known: then memory and disk are not checked."""
    try:
        return shape_of(recipe.model, recipe.model_config)
    except InputError:
        return None
