"""Command lines from dataclasses: each option is declared once, in a group, with its default, unit and meaning.

A stage's options are one frozen dataclass that inherits the groups it needs::

    @dataclass(frozen=True)
    class Options(RunOptions, DataOptions, TrainOptions):
        '''Supervised fine-tuning'''
        loss_on_prompt: bool = option(False, "…")

    options = parse(Options, argv)

Names and meanings are DeepSpeed-Chat's where it has the option. Where it also has a flag that can no longer do anything
here, the flag parses and one warning says why.
"""

import argparse
import json
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from deepspeed_chat_tlcr.errors import InputError

Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Dtype = Literal["auto", "fp16", "bf16", "fp32"]


def option(default: Any, help: str, no_effect: str | None = None, flags: Sequence[str] = ()) -> Any:
    """A dataclass field that is a command-line option; ``default=MISSING`` makes it required.

    ``no_effect`` says why an accepted flag does nothing (then giving it warns); ``flags`` are further spellings.
    """
    metadata = {"help": help, "no_effect": no_effect, "flags": tuple(flags)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """run"""

    DEFAULTS: ClassVar[dict[str, Any]] = {}

    output_dir: str = option("./output", "folder for the model, metrics.jsonl, checkpoints and results.json")
    seed: int = option(1234, "seed of initialisation, shuffling and sampling (the data split has its own: --data_seed)")
    dtype: Dtype = option("auto", "training precision; auto: bf16 where the accelerator has it, else fp16; fp32 on CPU")
    bf16: bool = option(False, "the RLHF-TLCR fork's spelling of --dtype bf16")
    save_interval: int = option(0, "optimiser steps between resumable checkpoints; 0: one at the end of each epoch")
    save_total_limit: int = option(1, "how many resumable checkpoints are kept")
    resume: Literal["auto", "never"] = option("auto", "auto: continue from output_dir's newest checkpoint if any")
    save_format: Literal["huggingface", "deepspeed_chat"] = option(
        "huggingface", "how models are written; deepspeed_chat: pytorch_model.bin with the names its programs read"
    )
    report_to: list[str] = option([], "further trackers of transformers' Trainer, such as wandb")
    enable_tensorboard: bool = option(False, "write TensorBoard logs")
    tensorboard_path: str = option("", "folder for TensorBoard logs; empty: output_dir")
    local_rank: int = option(-1, "set by the launcher")
    deepspeed: bool = option(False, "accepted as in DeepSpeed-Chat; training always runs on DeepSpeed")
    deepspeed_config: str | None = option(
        None, "JSON file that overrides entries of the DeepSpeed config built from flags"
    )
    deepscale: bool = option(False, "deprecated spelling of --deepspeed", "DeepSpeed is always on")
    deepscale_config: str | None = option(None, "deprecated", "use --deepspeed_config")

    @property
    def precision(self) -> str:
        """The dtype asked for, by either of its two flags."""
        return "bf16" if self.bf16 else self.dtype

    @property
    def tensorboard_folder(self) -> str | None:
        """Where TensorBoard logs go, if anywhere."""
        return (self.tensorboard_path or f"{self.output_dir}/tensorboard") if self.enable_tensorboard else None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """data"""

    data_path: list[str] = option(["Dahoas/rm-static"], "data-set names, local .json/.jsonl/.parquet files or folders")
    data_split: str = option("2,4,4", "shares of SFT, reward and RL data")
    data_seed: int = option(1234, "seed of the split; the same in every stage, whatever --seed is")
    data_output_path: str = option("/tmp/data_files/", "DeepSpeed-Chat's cache", "data is memory-mapped, not copied")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """model and optimiser"""

    model_name_or_path: str = option(MISSING, "model to start from: a local folder or a hub name")
    per_device_train_batch_size: int = option(16, "examples per device and micro-batch")
    per_device_eval_batch_size: int = option(16, "examples per device in evaluation")
    max_seq_len: int = option(512, "longest prompt plus response, tokens")
    learning_rate: float = option(1e-3, "peak learning rate of Adam (betas 0.9, 0.95)")
    weight_decay: float = option(0.0, "decoupled weight decay; none on biases and norms")
    num_train_epochs: int = option(1, "passes over the data")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimiser step")
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down")
    lr_scheduler_type: Schedule = option("cosine", "learning-rate schedule")
    num_warmup_steps: int = option(0, "optimiser steps of linear warm-up")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    dropout: float | None = option(None, "every dropout probability of the model; unset: the checkpoint's own")
    zero_stage: Literal[0, 1, 2, 3] = option(0, "ZeRO stage")
    offload: bool = option(False, "keep optimiser states (ZeRO-3: parameters too) in host memory")
    lora_dim: int = option(0, "LoRA rank; 0: train all parameters")
    lora_module_name: str = option("decoder.layers.", "LoRA goes on linear layers whose name contains this")
    only_optimize_lora: bool = option(False, "freeze everything but LoRA and a new head")
    lora_learning_rate: float = option(5e-4, "peak learning rate of LoRA parameters")
    compute_fp32_loss: bool = option(False, "loss in fp32", "the loss is always computed in fp32")
    add_eot_token: bool = option(False, "end responses with --eot_token instead of the tokenizer's EOS")
    eot_token: str = option("<|endoftext|>", "the token that --add_eot_token adds")


OptionsType = TypeVar("OptionsType")


def parse(options_class: type[OptionsType], argv: Sequence[str] | None = None) -> OptionsType:
    """Parse a command line into ``options_class``; loads no model and touches no device.

    Warns once, on stderr, for every given flag that has no effect here. Argparse exits with code 2 on unknown flags.
    """
    defaults = getattr(options_class, "DEFAULTS", {})
    parser = argparse.ArgumentParser(
        description=options_class.__doc__, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    owners = _groups(options_class)
    hints = typing.get_type_hints(options_class)
    groups = {owner: parser.add_argument_group(title) for owner, title in dict.fromkeys(owners.values())}
    for entry in fields(options_class):
        group = groups[owners[entry.name][0]]
        default = defaults.get(entry.name, _default(entry))
        group.add_argument(
            f"--{entry.name}", *entry.metadata["flags"], **_argparse_kwargs(entry, hints[entry.name], default)
        )
    given = parser.parse_args(argv)
    for entry in fields(options_class):
        reason, value = entry.metadata["no_effect"], getattr(given, entry.name)
        if reason and value != defaults.get(entry.name, _default(entry)):
            print(f"warning: --{entry.name} has no effect: {reason}", file=sys.stderr)
    return options_class(**vars(given))


def _groups(options_class: type) -> dict[str, tuple[type, str]]:
    """Map each field's name to the class that declares it and that class's one-word title."""
    owners = {}
    for owner in reversed(options_class.__mro__):
        for name in getattr(owner, "__annotations__", {}):
            title = (owner.__doc__ or "").strip().splitlines()[0] if owner is not options_class else "this stage"
            owners[name] = (owner, title)
    return owners


def _default(entry) -> Any:
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def _argparse_kwargs(entry, hint: Any, default: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"help": entry.metadata["help"].replace("%", "%%")}
    if entry.metadata["no_effect"]:
        kwargs["help"] += f" (no effect: {entry.metadata['no_effect']})"
    if default is MISSING:
        kwargs["required"] = True
    else:
        kwargs["default"] = default
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return kwargs | {"action": "store_true"}
    if origin is list:
        return kwargs | {"nargs": "*", "type": arguments[0], "metavar": arguments[0].__name__.upper()}
    if origin is Literal:
        return kwargs | {"choices": list(arguments), "type": type(arguments[0])}
    return kwargs | {"type": hint, "metavar": hint.__name__.upper()}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=120)


def announce(options: Any, folder: str | Path) -> None:
    """Print the resolved options and save them as ``run_options.json`` before a model loads (rank 0 calls this)."""
    settings = asdict(options)
    print("options: " + " ".join(f"{key}={value}" for key, value in settings.items()), flush=True)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run_options.json").write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
