"""The options of DPO."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed_chat_tlcr.arguments import DataOptions, RunOptions, TrainOptions, option, parse


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, DataOptions, RunOptions):
    """DPO: the policy learns from preference pairs without a reward model; start from the SFT model."""

    beta: float = option(0.1, "strength of the pull towards the reference, --model_name_or_path before training")
    label_smoothing: float = option(
        0.0, "share of pairs assumed to be labelled the wrong way round; below 0.5", below=0.5
    )
    offload_reference_model: bool = option(
        False,
        "compute the reference's log-probs once, before training, so that it takes no memory",
        better="the reference is not kept in host memory either, and its forward pass runs once",
    )
    num_padding_at_beginning: int = option(1, "in DeepSpeed-Chat's sweep script", "masks come from lengths", least=0)


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)
