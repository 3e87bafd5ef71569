"""Everything that could stop a run, looked for before it starts and told all at once, each with what to do.

training_scripts/run_7b.sh and run_tiny.sh run it with the variables of recipe.sh. Exits with 0, or with 2 after listing
the problems. Starts with the standard library alone, because missing packages are one of the things it looks for.
"""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deepspeed_chat_tlcr.errors import EXIT_INPUT, InputError, exits_cleanly
from deepspeed_chat_tlcr.memory import GIB
from deepspeed_chat_tlcr.model_shapes import ModelShape, shape_of
from deepspeed_chat_tlcr.plan import ALONE, disk_needs, most_disk, part_sizes, stage_needs
from deepspeed_chat_tlcr.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


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
    """Count, precision and memory of this node's devices. (Other nodes are only reached, see ``check_nodes``.)"""
    try:
        from deepspeed.accelerator import get_accelerator

        from deepspeed_chat_tlcr.runtime import resolve_dtype
    except (ImportError, OSError):
        return  # check_packages says it
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    wanted = next(iter(recipe.hosts().values()))
    if on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        yield Problem(
            f"no GPU was found, NUM_GPUS={recipe.num_gpus} are wanted",
            "run nvidia-smi to see why (driver? container without --gpus?); to train on CPU on purpose: "
            "DS_ACCELERATOR=cpu; for a first try without a GPU: bash training_scripts/run_tiny.sh",
        )
        return
    try:
        resolve_dtype(recipe.dtype)
    except InputError as error:
        yield Problem(f"DTYPE={recipe.dtype}: {error}", "set DTYPE as said")
    if on_cpu:
        yield from _host_memory(recipe)
        return
    if wanted > accelerator.device_count():
        yield Problem(
            f"NUM_GPUS={wanted}, but {accelerator.device_count()} GPU(s) are visible",
            "lower NUM_GPUS (and look at PLAN=1: fewer GPUs need more memory each), or check CUDA_VISIBLE_DEVICES",
        )
    shape = _known_shape(recipe)
    if shape is None:
        return
    free = {device: accelerator.available_memory(device) for device in range(min(wanted, accelerator.device_count()))}
    for stage, need in stage_needs(recipe, shape).items():
        if _is_complete(recipe, stage):
            continue
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
    offloads = [recipe.training(ALONE[stage]).offload for stage in stages if stage in ALONE]
    if any(offloads) or (recipe.ppo_offload and "step3" in stages):
        yield from _host_memory(recipe)


def _host_memory(recipe: Recipe) -> Iterator[Problem]:
    shape = _known_shape(recipe)
    if shape is None or not hasattr(os, "sysconf"):
        return
    import psutil
    from deepspeed.accelerator import get_accelerator

    ranks = next(iter(recipe.hosts().values())) if get_accelerator().device_name() == "cpu" else 0
    available = psutil.virtual_memory().available
    for stage, need in stage_needs(recipe, shape).items():
        # What would be the reserve of a GPU's driver is a Python process's own size on a CPU, a tenth of it.
        total = need.host_total + ranks * (need.gpu_total - 0.9 * need.gpu["reserve"])
        if not _is_complete(recipe, stage) and total > available:
            yield Problem(
                f"{stage} needs about {total / GIB:.0f} GiB of this machine's memory, {available / GIB:.0f} are free",
                "use fewer ranks, a smaller model or batch, or switch offload off where GPUs have room",
            )


def _known_shape(recipe: Recipe) -> ModelShape | None:
    """Sizes of the model, or None where nobody here knows them: then memory and disk go unchecked."""
    try:
        return shape_of(recipe.model, recipe.model_config)
    except InputError:
        return None


def check_nodes(recipe: Recipe) -> Iterator[Problem]:
    hosts = recipe.hosts()
    if not recipe.hostfile or len(hosts) < 2:
        return
    if shutil.which("pdsh") is None:
        yield Problem("several nodes are started with pdsh, which is missing", "install pdsh (apt install pdsh)")
    for host in hosts:
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, "true"]
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


# ---- labelling -------------------------------------------------------------------------------------------------------


def check_labelling(recipe: Recipe) -> Iterator[Problem]:
    """The key is set (its value is never shown), and an endpoint on this machine answers."""
    if "label" not in recipe.folders():
        return
    own = Path(recipe.output) / "labeling"
    if Path(recipe.revisions).parent != own:
        if not Path(recipe.revisions).is_file():
            yield Problem(f"REVISIONS={recipe.revisions}: no such file", "name a revisions.jsonl of labeling/main.py")
        return
    if labelling_is_complete(own):
        return
    if not recipe.label_base_url:
        if not os.environ.get(recipe.api_key_env, "").strip():
            yield Problem(
                f"{recipe.api_key_env}, the variable with the API key for {recipe.label_model}, is not set",
                f"export {recipe.api_key_env}=...; or name another variable with API_KEY_ENV, another endpoint with "
                "LABEL_BASE_URL, or revisions you already have with REVISIONS",
            )
        return
    address = urlsplit(recipe.label_base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        yield Problem("LABEL_BASE_URL is not an http address", "give it like http://127.0.0.1:8000/v1")
    elif address.hostname in ("localhost", "127.0.0.1", "::1") and not _answers(recipe.label_base_url):
        shown = f"{address.scheme}://{address.hostname}:{address.port or ''}{address.path}"
        yield Problem(f"LABEL_BASE_URL {shown}: nothing answers there", "start the server before the run")


def labelling_is_complete(folder: Path) -> bool:
    """Whether labeling/main.py finished there."""
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("complete"))
    except (OSError, ValueError, AttributeError):
        return False


def _answers(base_url: str) -> bool:
    try:
        urllib.request.urlopen(base_url.rstrip("/") + "/models", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it wants a key or has no such page, but it is there
    except (OSError, ValueError):
        return False
    return True


# ---- data, model, disk -----------------------------------------------------------------------------------------------


def check_model(recipe: Recipe) -> Iterator[Problem]:
    """Config, weights and tokenizer can be had, and the tokenizer can end a response."""
    try:
        from deepspeed_chat_tlcr.models import load_config
        from deepspeed_chat_tlcr.tokenization import load_tokenizer
    except (ImportError, OSError):
        return
    remedy = (
        "MODEL is a folder saved by save_pretrained or a Hugging Face name; a gated model (Llama) needs its licence "
        "accepted on its page and `hf auth login`; without network, copy the model and name its folder"
    )
    try:
        load_config(recipe.model)
    except InputError as error:
        yield Problem(f"MODEL={recipe.model}: {error}", remedy)
        return
    try:
        load_tokenizer(recipe.model)
    except InputError as error:
        yield Problem(f"MODEL={recipe.model}: {error}", "put a fast tokenizer with an EOS token beside the model")
    if not _has_weights(recipe.model):
        yield Problem(f"MODEL={recipe.model}: its weights are neither here nor to be had from the hub", remedy)


def _has_weights(model: str) -> bool:
    if Path(model).is_dir():
        return any(file.suffix in (".safetensors", ".bin") for file in Path(model).iterdir())
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(model, name), str) for name in names):
        return True
    try:
        huggingface_hub.auth_check(model)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return False
    return True


def check_data(recipe: Recipe) -> Iterator[Problem]:
    """The data can be read, whole, and every part of it fills a batch."""
    try:
        from deepspeed_chat_tlcr.preference_data import load_preferences
        from deepspeed_chat_tlcr.tokenization import load_tokenizer
    except (ImportError, OSError):
        return
    try:
        tokenizer = load_tokenizer(recipe.model)
    except InputError:
        tokenizer = None  # check_model says it; only chat messages need one to be read
    print("preflight: reading the data (downloads it once, if it is on the hub)", flush=True)
    try:
        records = len(load_preferences(recipe.data.split(), "all", "train", recipe.data_split, tokenizer=tokenizer))
        sft, reward, rl = part_sizes(records, recipe.data_split)
    except InputError as error:
        yield Problem(f"DATA={recipe.data}: {error}", "name local files or folders, or a data set that can be had")
        return
    ranks = recipe.world_size
    batches = []
    for stage in recipe.folders():
        if stage in ALONE:
            training = recipe.training(ALONE[stage])
            batch = training.batch_size * training.accumulation_steps * ranks
            batches.append(("SFT", sft, batch) if stage == "step1" else ("reward", reward, batch))
        elif stage == "step3":
            batches.append(("RL", rl, recipe.generation_batch_size * recipe.generation_batches * ranks))
    for part, size, batch in batches:
        if size < batch:
            yield Problem(
                f"the {part} part of the data ({size} of {records} records at {recipe.data_split}) does not fill one "
                f"batch of {batch}",
                "lower the batch size or NUM_GPUS, use more data, or change DATA_SPLIT",
            )


def check_batches(recipe: Recipe) -> Iterator[Problem]:
    prompts = recipe.generation_batches * recipe.generation_batch_size
    if recipe.decode_batch_size % recipe.generation_batch_size:
        yield Problem(
            f"DECODE_BATCH_SIZE={recipe.decode_batch_size} is no multiple of "
            f"GENERATION_BATCH_SIZE={recipe.generation_batch_size}",
            "make it one, or 0 to decode the whole set of rollouts together",
        )
    if recipe.generation_batch_size % recipe.ppo_batch_size:
        yield Problem(
            f"GENERATION_BATCH_SIZE={recipe.generation_batch_size} is no multiple of "
            f"PPO_BATCH_SIZE={recipe.ppo_batch_size}: some rollouts would be left over",
            "make it one",
        )
    elif (micro_batches := prompts // recipe.ppo_batch_size) % recipe.ppo_accumulation_steps:
        yield Problem(
            f"GENERATION_BATCHES x GENERATION_BATCH_SIZE / PPO_BATCH_SIZE = {micro_batches} "
            f"is no multiple of PPO_ACCUMULATION_STEPS={recipe.ppo_accumulation_steps}",
            "make it one",
        )


def check_output(recipe: Recipe) -> Iterator[Problem]:
    """OUTPUT can be written and its disk holds what the unfinished stages will write."""
    output = Path(recipe.output).absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Problem(f"OUTPUT={recipe.output}: {existing} is no folder that can be written", "choose another OUTPUT")
        return
    shape = _known_shape(recipe)
    if shape is None:
        return
    needed = most_disk(need for stage, need in disk_needs(recipe, shape).items() if not _is_complete(recipe, stage))
    free = shutil.disk_usage(existing).free
    if free < needed:
        yield Problem(
            f"OUTPUT={recipe.output} has {free / GIB:.0f} GiB free, the run writes up to {needed / GIB:.0f} GiB",
            "free some, or put OUTPUT on a larger disk (PLAN=1 lists what is written)",
        )


def _is_complete(recipe: Recipe, stage: str) -> bool:
    return (Path(recipe.output) / stage / "results.json").is_file()


def go_offline_if_need_be(recipe: Recipe) -> None:
    """Without an answer from the hub, look only at what is cached, rather than retry for a minute and a half.

    To be called before anything imports the hub's client, which reads the variable once.
    """
    named = [path for path in [recipe.model, *recipe.data.split()] if not Path(path).expanduser().exists()]
    if not named or os.environ.get("HF_HUB_OFFLINE"):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        print(f"preflight: {hub} does not answer ({error}); only what is cached counts", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"


CHECKS: tuple[Check, ...] = (
    check_packages,
    check_compiler,
    check_accelerators,
    check_nodes,
    check_port,
    check_batches,
    check_output,
    check_labelling,
    check_model,
    check_data,
)
MADE_BY_RUN: tuple[Check, ...] = (check_labelling, check_model, check_data)
"""Checks of what run_tiny.sh makes itself: model, data and reviser."""


def find_problems(recipe: Recipe, checks: Sequence[Check]) -> list[Problem]:
    """Run every check, whatever the others found."""
    return [problem for check in checks for problem in check(recipe)]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--packages_only"]:
        problems = list(package_problems(ROOT / "requirements.txt", argv[1:]))
        checked = 1
    elif argv not in ([], ["--without_inputs"]):
        raise InputError("usage: preflight [--without_inputs | --packages_only [PACKAGE ...]]")
    else:
        recipe = Recipe.from_environment()
        recipe.hosts()
        checks = [check for check in CHECKS if not (argv and check in MADE_BY_RUN)]
        if not argv:
            go_offline_if_need_be(recipe)
        problems, checked = find_problems(recipe, checks), len(checks)
    if not problems:
        print(f"preflight: {checked} checks, nothing stands in the way")
        return
    print(f"preflight: {len(problems)} problem(s)", file=sys.stderr)
    for number, problem in enumerate(problems, 1):
        print(f"  {number}. {problem.found}\n     -> {problem.remedy}", file=sys.stderr)
    sys.exit(EXIT_INPUT)


if __name__ == "__main__":
    main()
