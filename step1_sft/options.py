"""The options of step 1."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_chat_tlcr.arguments import DataOptions, PackingOptions, RunOptions, TrainOptions, option, parse


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, PackingOptions, DataOptions, RunOptions):
    """Step 1: supervised fine-tuning on the SFT part of the data."""

    sft_only_data_path: list[str] = option([], "further data sets that have only chosen responses")
    loss_on_prompt: bool = option(False, "train on the prompt's tokens too, as DeepSpeed-Chat does")
    num_inner_step: int = option(1, "in RLHF-TLCR's step 1 script", "no program of that fork knows it either", least=0)


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)
