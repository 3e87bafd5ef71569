"""Command lines from dataclasses: each option is declared once, in a group, with its default, unit and meaning.

A stage's options are one frozen dataclass that inherits the groups it needs::

    @dataclass(frozen=True)
    class Options(RunOptions, DataOptions, TrainOptions):
        '''Supervised fine-tuning'''
        loss_on_prompt: bool = option(False, "…")

    options = parse(Options, argv)

Names and meanings are DeepSpeed-Chat's where it has the option. Its flags that can no longer have an effect are
accepted with a warning that says why.
"""

import argparse
import difflib
import json
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

from deepspeed_chat_tlcr.errors import InputError

Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Dtype = Literal["auto", "fp16", "bf16", "fp32"]
AttentionName = Literal["sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"]


def option(
    default: Any,
    help: str,
    no_effect: str | None = None,
    flags: Sequence[str] = (),
    better: str | None = None,
    least: float | None = None,
    most: float = 1e9,
    above: float | None = None,
    below: float | None = None,
    multiple: int = 1,
    compatibility: bool = False,
) -> Any:
    """A dataclass field that is a command-line option; ``default=MISSING`` makes it required.

    ``no_effect``: why the flag is accepted and does nothing; giving it warns. ``better``: how it improves on the flag
    of this name in DeepSpeed-Chat or its forks (docs/flags.md). ``flags``: further spellings. ``compatibility``: an
    older way to ask for what another option says. Numbers lie from ``least`` to ``most``, both allowed, and between
    ``above`` and ``below``, neither allowed. ``least`` is by default 1 for a whole number whose default is above 0,
    else 0. Whole numbers are multiples of ``multiple``.
    """
    metadata: dict[str, Any] = {"help": help, "no_effect": no_effect, "flags": tuple(flags), "better": better}
    metadata |= {"bounds": (least, most, above, below, multiple), "compatibility": compatibility or bool(no_effect)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def seed_option(default: Any, help: str) -> Any:
    """An option for a seed that every random generator takes."""
    return option(default, help, least=0, most=2**32 - 1)


def _out_of_bounds(entry: Field, value: float) -> str | None:
    """What is wrong with a number, or None."""
    least, most, above, below, multiple = entry.metadata["bounds"]
    if least is None:
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        first = (default or [0])[0] if isinstance(default, list) else default
        least = int(type(value) is int and first is not None and (first is MISSING or first > 0))
    large_enough = value > above if above is not None else value >= least
    small_enough = value < below if below is not None else value <= most
    if large_enough and small_enough:
        return None if multiple == 1 or value % multiple == 0 else f"must be a multiple of {multiple}"
    if above is None and below is None:
        return f"must be from {least:,.10g} to {most:,.10g}"
    low = f"above {above:g}" if above is not None else f"at least {least:,.10g}"
    high = f"below {below:g}" if below is not None else f"at most {most:,.10g}"
    return f"must be {low} and {high}"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """run"""

    DEFAULTS: ClassVar[dict[str, Any]] = {}

    output_dir: str = option("./output", "folder for the model, metrics.jsonl, checkpoints and results.json")
    seed: int = seed_option(1234, "seed of initialisation, shuffling and sampling; the split has its own, --data_seed")
    dtype: Dtype = option(
        "auto",
        "training precision; auto: bf16 where the accelerator has it, else fp16; fp32 on CPU",
        better="fp32 too, and by default what the accelerator does best",
    )
    bf16: bool = option(False, "the forks' spelling of --dtype bf16", compatibility=True)
    attn_implementation: AttentionName = option(
        "sdpa", "what computes attention in every model; sdpa: PyTorch's kernels, eager in a family that has none"
    )
    save_format: Literal["huggingface", "deepspeed_chat"] = option(
        "huggingface",
        "huggingface: safetensors, tokenizer, chat template, generation config; deepspeed_chat: pytorch_model.bin as "
        "DeepSpeed-Chat's chat.py and evaluation scripts read it",
    )
    push_to_hub: str = option(
        "",
        "Hugging Face Hub repository OWNER/NAME that gets the saved models with their cards; made before training, "
        "private where it is new; the token is read from HF_TOKEN",
    )
    save_interval: int = option(0, "steps between resumable checkpoints; 0: one at the end of each epoch")
    save_total_limit: int = option(1, "how many resumable checkpoints are kept")
    resume: Literal["auto", "never"] = option("auto", "auto: continue from output_dir's newest checkpoint if any")
    max_faults: int = option(5, "non-finite updates in a row after which the run stops with what caused them")
    report_to: list[str] = option([], "further trackers that get every number of metrics.jsonl, such as wandb")
    enable_tensorboard: bool = option(
        False, "write TensorBoard logs", better="all numbers of metrics.jsonl, not only the loss"
    )
    tensorboard_path: str = option(
        "", "folder for TensorBoard logs; empty: OUTPUT_DIR/tensorboard", better="has a default"
    )
    local_rank: int = option(-1, "set by the launcher", least=-1)
    deepspeed: bool = option(
        False,
        "accepted as in DeepSpeed-Chat; training always runs on DeepSpeed",
        compatibility=True,
        flags=("--deepscale",),
    )
    deepspeed_config: str | None = option(
        None,
        "JSON file that overrides entries of the DeepSpeed config built from flags",
        better="it is read; DeepSpeed-Chat parses it only",
        flags=("--deepscale_config",),
    )

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

    data_path: list[str] = option(
        ["Dahoas/rm-static"],
        "data-set names, local .json/.jsonl/.parquet files or folders",
        better="own files and folders need no name that it knows, chat messages included",
    )
    data_split: str = option("2,4,4", "shares of SFT, reward and RL data")
    data_seed: int = seed_option(1234, "seed of the split; the same in every stage, whatever --seed is")
    data_output_path: str | None = option(
        None,
        "folder where the data's text is kept, memory-mapped; unset: in HF_DATASETS_CACHE",
        better="named by content, so an edited file is read again; may be shared between runs and ranks",
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
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
    num_warmup_steps: int = option(0, "optimiser steps of linear warm-up", least=0)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    dropout: float | None = option(None, "every dropout probability of the model; unset: the checkpoint's own", most=1)
    disable_dropout: bool = option(False, "the forks' spelling of --dropout 0", compatibility=True)
    zero_stage: Literal[0, 1, 2, 3] = option(0, "ZeRO stage")
    offload: bool = option(False, "keep optimiser states (ZeRO-3: parameters too) in host memory")
    lora_dim: int = option(0, "LoRA rank; 0: train all parameters")
    lora_alpha: float = option(1.0, "LoRA's update is scaled by this / lora_dim; 1: as in DeepSpeed-Chat")
    lora_module_name: str = option(
        "auto",
        "LoRA goes on linear layers whose name contains this; auto: those of the model's blocks",
        better="auto fits every family, DeepSpeed-Chat's default OPT alone; a pattern that matches nothing is an error "
        "that lists the model's layers",
    )
    only_optimize_lora: bool = option(False, "freeze everything but LoRA and a new head")
    lora_learning_rate: float = option(5e-4, "peak learning rate of LoRA parameters")
    compute_fp32_loss: bool = option(False, "loss in fp32", "the loss is always computed in fp32")
    add_eot_token: bool = option(False, "end responses with --eot_token instead of the tokenizer's EOS")
    eot_token: str = option("<|endoftext|>", "the token that --add_eot_token adds")
    print_loss: bool = option(
        False,
        "print a line with the loss of every optimiser step",
        better="once for all ranks; the progress bar and metrics.jsonl show it anyway",
    )

    @property
    def dropout_rate(self) -> float | None:
        """Every dropout probability, by either of its two flags; None leaves the checkpoint's own."""
        return 0.0 if self.disable_dropout else self.dropout

    @property
    def new_eos(self) -> str | None:
        """The end-of-sequence token that --add_eot_token asks for, if it does."""
        return self.eot_token if self.add_eot_token else None


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """padding"""

    tokens_per_micro_batch: int = option(
        0,
        "compute without padding: a micro-batch's rows in packs of at most so many tokens, what both rows of a pair "
        "begin with once; 0: padded rows",
    )


def require_bounds(options: Any) -> None:
    """Raise ``InputError`` for the first number outside its option's bounds, and for missing text or an empty list."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        for one in value if isinstance(value, list) else [value]:
            if type(one) in (int, float) and (wrong := _out_of_bounds(entry, one)):
                raise InputError(f"--{entry.name} {one}: {wrong}")
        if isinstance(value, str | list) and not value and default_of(type(options), entry) not in ("", [], None):
            raise InputError(f"--{entry.name}: needs a value")


OptionsType = TypeVar("OptionsType")


def parse(
    options_class: type[OptionsType], argv: Sequence[str] | None = None, preset: Mapping[str, Any] | None = None
) -> OptionsType:
    """Parse a command line into ``options_class``; loads no model and touches no device.

    ``preset``: other defaults, by option. Warns on stderr of every given flag that has no effect. Raises
    ``InputError`` for unknown flags, with the nearest known one, and for impossible values.
    """
    parser = Parser(description=options_class.__doc__, formatter_class=_HelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(options_class)
    for group in groups_of(options_class):
        shown = parser.add_argument_group(group.title)
        for entry in group.entries:
            default = (preset or {}).get(entry.name, default_of(options_class, entry))
            kwargs = _argparse_kwargs(entry, hints[entry.name], default)
            shown.add_argument(f"--{entry.name}", *entry.metadata["flags"], **kwargs)
    options: Any = options_class(**vars(parser.parse(argv)))
    require_bounds(options)
    for entry in fields(options):
        reason = entry.metadata["no_effect"]
        if reason and getattr(options, entry.name) != default_of(options_class, entry):
            print(f"warning: --{entry.name} has no effect: {reason}", file=sys.stderr)
    return options


def run_command(
    commands: Mapping[str, Callable[[list[str]], None]], about: str | None, argv: Sequence[str] | None = None
) -> None:
    """Call the command that the first word names with the other words. Raises ``InputError`` for an unknown one."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    known = ", ".join(commands)
    if name in ("-h", "--help"):
        print(f"usage: {Path(sys.argv[0]).name} {{{known}}} … (each with --help)\n\n{about}")
        return
    if name not in commands:
        given = f"unknown command {name!r}" if name else "no command given"
        raise InputError(f"{given}; known are {known} (each with --help)")
    commands[name](rest)


@dataclass(frozen=True)
class OptionGroup:
    """The options that one class declares; the title is the first line of its docstring."""

    title: str
    entries: tuple[Field, ...]


def groups_of(options_class: type) -> list[OptionGroup]:
    """A stage's options by the class that declares them: its own first, then inherited ones.

    Options that exist only for other programs' scripts come last.
    """
    by_name = {entry.name: entry for entry in fields(options_class)}
    groups, last = [], []
    for owner in options_class.__mro__:
        own = [by_name.pop(name) for name in getattr(owner, "__annotations__", {}) if name in by_name]
        entries = tuple(entry for entry in own if not entry.metadata["compatibility"])
        last += [entry for entry in own if entry.metadata["compatibility"]]
        title = "this stage" if owner is options_class else (owner.__doc__ or "").strip().splitlines()[0]
        if entries:
            groups.append(OptionGroup(title, entries))
    return groups + ([OptionGroup("accepted, so that scripts for other programs run", tuple(last))] if last else [])


def default_of(options_class: type, entry: Field) -> Any:
    """An option's default in a stage, whose ``DEFAULTS`` override the declaration; ``MISSING`` for a required one."""
    declared = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    return getattr(options_class, "DEFAULTS", {}).get(entry.name, declared)


def _argparse_kwargs(entry, hint: Any, default: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"help": entry.metadata["help"].replace("%", "%%")}
    if entry.metadata["no_effect"]:
        kwargs["help"] += f" (no effect: {entry.metadata['no_effect'].replace('%', '%%')})"
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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (--help lists all options)")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """``parse_args``, but unknown flags are reported before missing ones, with the nearest known flag."""
        argv = sys.argv[1:] if argv is None else argv
        for word in argv:
            if word.encode("utf-8", "ignore").decode() != word:
                self.error(f"{word}: not UTF-8 text")
        for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
            if name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, 1)
                self.error(f"unknown argument {name}" + (f": did you mean {near[0]}?" if near else ""))
        return self.parse_args(argv)


class _HelpFormatter(argparse.HelpFormatter):
    """A line of usage, then each option with its default, unless that is empty."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=120)

    def add_usage(self, usage, actions, groups, prefix=None):
        required = [f"{action.option_strings[0]} {action.metavar}" for action in actions if action.required]
        super().add_usage(" ".join(["%(prog)s", *required, "[options]"]), actions, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        silent = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return action.help if silent else f"{action.help} (default: {default})"  # which no format sign is in


def announce(options: Any) -> None:
    """Print the resolved options (rank 0 calls this)."""
    shown = "options: " + " ".join(f"{key}={value}" for key, value in asdict(options).items())
    print(textwrap.fill(shown, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False), flush=True)


def record(options: Any, folder: str | Path) -> None:
    """Save the resolved options as ``run_options.json`` and delete the results of the command that this one replaces.

    Rank 0 calls this after all checks.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").unlink(missing_ok=True)
        (folder / "run_options.json").write_text(json.dumps(asdict(options), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
