"""The variables of training_scripts/recipe.sh as a record, for the preflight and the plan.

Defaults stand in recipe.sh and nowhere else: a variable that is not set is an error here.
"""

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from training_scripts.planning.duration import CARDS


@dataclass(frozen=True)
class Training:
    """How a stage trains its one model; ``batch_size`` counts records per device and micro-batch."""

    batch_size: int
    accumulation_steps: int
    epochs: int
    zero_stage: int
    offload: bool
    gradient_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. Each field is the variable of the same name in capitals; recipe.sh says what it means."""

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
    sft_batch_size: int
    sft_accumulation_steps: int
    sft_epochs: int
    sft_zero_stage: int
    sft_offload: bool
    sft_gradient_checkpointing: bool
    discriminator_batch_size: int
    discriminator_accumulation_steps: int
    discriminator_epochs: int
    discriminator_zero_stage: int
    discriminator_offload: bool
    discriminator_gradient_checkpointing: bool
    discriminator_tokens_per_micro_batch: int
    sequence_batch_size: int
    sequence_accumulation_steps: int
    sequence_epochs: int
    sequence_zero_stage: int
    sequence_offload: bool
    sequence_gradient_checkpointing: bool
    sequence_tokens_per_micro_batch: int
    dpo_batch_size: int
    dpo_accumulation_steps: int
    dpo_epochs: int
    dpo_zero_stage: int
    dpo_offload: bool
    dpo_gradient_checkpointing: bool
    figa_batch_size: int
    figa_accumulation_steps: int
    figa_epochs: int
    figa_zero_stage: int
    figa_offload: bool
    figa_gradient_checkpointing: bool
    algo: str
    generation_batch_size: int
    generation_batches: int
    decode_batch_size: int
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

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Recipe":
        """Read every field. Raises ``InputError`` that lists all variables that are missing or malformed, at once."""
        values, problems = {}, []
        for name, kind in typing.get_type_hints(cls).items():
            variable = name.upper()
            text = environment.get(variable)
            if text is None:
                problems.append(f"{variable} is not set")
                continue
            try:
                values[name] = _READERS[kind](text)
            except ValueError:
                problems.append(f"{variable}={text}: expected {_EXPECTED[kind]}")
                continue
            if name.endswith("zero_stage") and values[name] not in (0, 1, 2, 3):
                problems.append(f"{variable}={text}: expected 0, 1, 2 or 3")
            if name == "gpu_card" and text not in CARDS:
                problems.append(f"{variable}={text}: known are {', '.join(CARDS)}")
            if name == "algo" and text not in ("ppo", "remax"):
                problems.append(f"{variable}={text}: expected ppo or remax")
            if kind is int and not name.endswith("zero_stage") and values[name] < (name not in _MAY_BE_ZERO):
                problems.append(f"{variable}={text}: must be at least {int(name not in _MAY_BE_ZERO)}")
        if len(problems) == len(fields(cls)):
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

    def training(self, prefix: str) -> "Training":
        """The variables PREFIX_BATCH_SIZE and so on of a stage that trains one model."""
        return Training(*(getattr(self, f"{prefix}_{field.name}") for field in fields(Training)))

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


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def _switch_or_auto(text: str) -> bool | None:
    return None if text == "auto" else _switch(text)


_READERS = {str: str, int: int, float: float, bool: _switch, bool | None: _switch_or_auto}
_MAY_BE_ZERO = ("decode_batch_size", "ppo_save_interval", "ppo_tokens_per_micro_batch")
_MAY_BE_ZERO += ("discriminator_tokens_per_micro_batch", "sequence_tokens_per_micro_batch")
_EXPECTED = {int: "a whole number", float: "a number", bool: "1 (on) or 0 (off)"}
_EXPECTED[bool | None] = "1 (on), 0 (off) or auto"
