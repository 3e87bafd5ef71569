"""The variables of training_scripts/recipe.sh as a record, for the preflight and the plan.

recipe.sh alone has the defaults, so a variable that is not set is an error here.
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
    tokens_per_micro_batch: int = 0


ALONE = {"step1": "SFT", "step2": "DISCRIMINATOR", "step2_sequence": "SEQUENCE", "dpo": "DPO", "figa": "FIGA"}
ALONE |= {"step2_grm": "GRM"}
"""Stages that train one model, and the prefix of their variables."""
ONE_ANSWER = ("step1", "step2_grm")
"""Those whose records are one sequence each, not two."""
UNPACKED = ("dpo", "figa", "step2_grm")
"""Those that have no packs."""
CLASSIFIERS = {"step2": 2, "step2_sequence": 1}
"""Those of them that train a token classifier, and its number of labels."""


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
    grm_max_seq_len: int
    reward: str
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
            names = [name for name in _kinds(Training) if name != "tokens_per_micro_batch" or stage not in UNPACKED]
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
            "step2_grm": "step2_grm",
            "dpo": "dpo",
            "figa": "figa",
            "step3": self.ppo_folder,
        }
        unknown = [stage for stage in self.stages.split() if stage not in folders]
        if unknown:
            raise InputError(f"STAGES: there is no stage {unknown[0]!r}; known: {' '.join(folders)}")
        return {stage: folders[stage] for stage in self.stages.split()}

    def longest(self, stage: str) -> int:
        """Tokens of a record of a stage that trains one model."""
        return self.grm_max_seq_len if stage == "step2_grm" else self.max_seq_len

    @property
    def span_model(self) -> str:
        """The chat model that marks spans in step 3, if one does."""
        named = [term.removeprefix("critic:") for term in self.reward.split() if term.startswith("critic:")]
        return named[0].rpartition("@")[0] or named[0] if named and "step3" in self.folders() else ""

    @property
    def reward_models(self) -> int:
        """How many models step 3 scores answers with; RLMEC's has a second one that says which are right."""
        terms = [term.rpartition("@")[0] or term for term in self.reward.split() if not term.startswith("critic:")]
        models = {term.partition(":")[2] for term in terms}  # "": DISCRIMINATOR_MODEL
        return len(models | {""}) if self.reward.startswith("rlmec:") else len(models)

    def is_complete(self, folder: str) -> bool:
        """Whether the stage with this ``folder`` under OUTPUT has written its results, the last thing that it does."""
        return (Path(self.output) / folder / "results.json").is_file()

    @property
    def labels_here(self) -> bool:
        """Whether the run asks an external model, rather than using revisions that it was given."""
        own = Path(self.output) / "labeling" / "revisions.jsonl"
        return "label" in self.folders() and Path(self.revisions) == own

    @property
    def brings_revisions(self) -> bool:
        """Whether step 2 learns from revisions that the run was given."""
        return "step2" in self.folders() and Path(self.revisions) != Path(self.output) / "labeling" / "revisions.jsonl"

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
                raise InputError(f"HOSTFILE {path}:{number}: {words[0]!r} is not a host name")
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
    read, expected = _READERS[kind]
    try:
        value = read(text)
    except (ValueError, KeyError):
        problems.append(f"{variable}={text}: expected {expected}")
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


_SWITCH = {"0": False, "1": True}
_READERS = {
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (_SWITCH.__getitem__, "1 (on) or 0 (off)"),
    bool | None: ((_SWITCH | {"auto": None}).__getitem__, "1 (on), 0 (off) or auto"),
}
_MAY_BE_ZERO = ("decode_batch_size", "ppo_save_interval", "tokens_per_micro_batch")
