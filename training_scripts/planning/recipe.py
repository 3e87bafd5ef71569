"""The variables of training_scripts/recipe.sh as a record, for the preflight and the plan.

Defaults stand in recipe.sh and nowhere else: a variable that is not set is an error here.
"""

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from training_scripts.planning.duration import CARDS


@dataclass(frozen=True)
class Training:
    """How a stage trains its one model: the variables PREFIX_BATCH_SIZE and so on of its prefix.

    ``batch_size`` counts records per device and micro-batch.
    """

    batch_size: int
    accumulation_steps: int
    epochs: int
    zero_stage: int
    offload: bool
    gradient_checkpointing: bool
    tokens_per_micro_batch: int = 0  # DPO and FIGA have no packs


ALONE = {"step1": "SFT", "step2": "DISCRIMINATOR", "step2_sequence": "SEQUENCE", "dpo": "DPO", "figa": "FIGA"}
"""Stages that train one model, and the prefix of their variables."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. Each field is the variable of the same name in capitals; recipe.sh says what it means.

    ``trainings``: by stage, those of ``ALONE``.
    """

    model: str
    model_config: str
    data: str
    data_split: str
    output: str
    stages: str
    dtype: str
    num_gpus: str
    hostfile: str
    master_port: int
    gpu_memory_gb: float
    gpu_card: str
    gpu_hour_usd: str
    label_model: str
    label_base_url: str
    label_effort: str
    label_batch: bool
    label_price: str
    api_key_env: str
    max_seq_len: int
    algo: str
    generation_batch_size: int
    generation_batches: int
    decode_batch_size: int
    rollout: str
    rollout_hosts: str
    ppo_batch_size: int
    ppo_accumulation_steps: int
    ppo_tokens_per_micro_batch: int
    ppo_save_interval: int
    prompt_epochs: int
    max_prompt_len: int
    max_answer_len: int
    actor_zero_stage: int
    critic_zero_stage: int
    reference_zero_stage: int
    reward_zero_stage: int
    ppo_offload: bool | None  # None: auto, as the memory plan says
    ppo_gradient_checkpointing: bool
    ppo_ema: bool
    ppo_folder: str
    sequence_folder: str
    revisions: str
    made_here: str
    trainings: Mapping[str, Training]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Recipe":
        """Read every field. Raises ``InputError`` that lists all variables that are missing or malformed, at once."""
        problems: list[str] = []
        values = {name: _read(name, kind, environment, problems) for name, kind in _kinds(cls).items()}
        values["trainings"] = {}
        for stage, prefix in ALONE.items():
            names = [
                name for name in _kinds(Training) if name != "tokens_per_micro_batch" or stage not in ("dpo", "figa")
            ]
            found = {name: _read(f"{prefix}_{name}", _kinds(Training)[name], environment, problems) for name in names}
            values["trainings"][stage] = Training(**found)
        if not any(name.upper() in environment for name in values):
            raise InputError("run this through training_scripts/run_7b.sh (or source training_scripts/recipe.sh first)")
        if problems:
            raise InputError("; ".join(problems))
        return cls(**values)

    def folders(self) -> dict[str, str]:
        """The run's stages in order: name of the script without .sh, and the folder under OUTPUT it writes."""
        folders = {
            "step1": "step1_sft",
            "label": "labeling",
            "step2": "step2_discriminator",
            "step2_sequence": self.sequence_folder,
            "dpo": "dpo",
            "figa": "figa",
            "step3": self.ppo_folder,
        }
        unknown = [stage for stage in self.stages.split() if stage not in folders]
        if unknown:
            raise InputError(f"STAGES: there is no stage {unknown[0]!r}; known: {' '.join(folders)}")
        return {stage: folders[stage] for stage in self.stages.split()}

    def is_complete(self, stage: str) -> bool:
        """Whether a stage has written its results, the last thing that it does."""
        return (Path(self.output) / stage / "results.json").is_file()

    @property
    def labels_here(self) -> bool:
        """Whether the run asks an external model, rather than using revisions that it was given."""
        own = Path(self.output) / "labeling" / "revisions.jsonl"
        return "label" in self.folders() and Path(self.revisions) == own

    @property
    def with_critic(self) -> bool:
        """Whether step 3 trains a value function; ReMax's baseline is a greedy answer's score."""
        return self.algo == "ppo"

    @property
    def decoded_together(self) -> int:
        """Prompts that a device answers at a time in step 3: a set of rollouts unless DECODE_BATCH_SIZE is set."""
        prompts = self.generation_batch_size * self.generation_batches
        return min(prompts, self.decode_batch_size or prompts)

    def hosts(self) -> dict[str, int]:
        """Processes by node. Raises ``InputError`` for a missing, malformed or empty hostfile."""
        wanted = int(self.num_gpus) if self.num_gpus.isdigit() else 0
        if self.num_gpus and wanted < 1:
            raise InputError(f"NUM_GPUS={self.num_gpus}: expected a whole number, or nothing for all GPUs of a node")
        if not self.hostfile:
            return {"localhost": wanted or 1}
        path = Path(self.hostfile)
        if not path.is_file():
            raise InputError(f'HOSTFILE {path}: no such file; it has a line "name slots=8" for each node')
        hosts = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
            if not slots.isdigit():
                raise InputError(f'HOSTFILE {path}:{number}: expected "name slots=8", found {line!r}')
            if not re.fullmatch(r"(\w[\w.-]*@)?\w[\w.-]*", words[0]):  # ssh takes -oProxyCommand=… for an option
                raise InputError(f"HOSTFILE {path}:{number}: {words[0]!r} is no name of a host")
            if words[0] in hosts:
                raise InputError(f"HOSTFILE {path}:{number}: {words[0]} is named twice")
            hosts[words[0]] = wanted or int(slots)
        if not hosts:
            raise InputError(f"HOSTFILE {path}: names no node")
        return hosts

    @property
    def world_size(self) -> int:
        return sum(self.hosts().values())

    @property
    def bytes_per_parameter(self) -> int:
        return 4 if self.dtype == "fp32" else 2


def _kinds(record: type) -> dict[str, type]:
    return {name: kind for name, kind in typing.get_type_hints(record).items() if name != "trainings"}


def _read(name: str, kind: type, environment: Mapping[str, str], problems: list[str]):
    """The value of a variable; what is wrong with it joins ``problems``."""
    variable, field = name.upper(), name.lower()
    text = environment.get(variable)
    if text is None:
        problems.append(f"{variable} is not set")
        return None
    try:
        value = _READERS[kind](text)
    except ValueError:
        problems.append(f"{variable}={text}: expected {_EXPECTED[kind]}")
        return None
    least = int(not field.endswith(_MAY_BE_ZERO))
    if field.endswith("zero_stage"):
        if value not in (0, 1, 2, 3):
            problems.append(f"{variable}={text}: expected 0, 1, 2 or 3")
    elif kind is int and value < least:
        problems.append(f"{variable}={text}: must be at least {least}")
    if field == "gpu_card" and text not in CARDS:
        problems.append(f"{variable}={text}: known are {', '.join(CARDS)}")
    if field == "rollout" and text not in ("loop", "hf", "continuous", "hybrid", "vllm"):
        problems.append(f"{variable}={text}: expected loop, hf, continuous, hybrid or vllm")
    if field == "algo" and text not in ("ppo", "remax"):
        problems.append(f"{variable}={text}: expected ppo or remax")
    return value


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def _switch_or_auto(text: str) -> bool | None:
    return None if text == "auto" else _switch(text)


_READERS = {str: str, int: int, float: float, bool: _switch, bool | None: _switch_or_auto}
_MAY_BE_ZERO = ("decode_batch_size", "ppo_save_interval", "tokens_per_micro_batch")
_EXPECTED = {int: "a whole number", float: "a number", bool: "1 (on) or 0 (off)"}
_EXPECTED[bool | None] = "1 (on), 0 (off) or auto"
