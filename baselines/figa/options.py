"""The options of FIGA."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deepspeed_chat_tlcr.arguments import DataOptions, RunOptions, TrainOptions, option, parse
from step2_discriminator.options import RevisionOptions


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, RevisionOptions, DataOptions, RunOptions):
    """FIGA: fine-tuning on what revisions added (likelier) and removed (less likely); start from the SFT model."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "num_train_epochs": 5}

    added_weight: float = option(1.0, "weight of added and substituted tokens of the modified response, and of its EOS")
    removed_weight: float = option(
        -0.5, "weight of deleted and substituted tokens of the rejected response", least=-1e9
    )
    removed_nll_limit: float = option(0.6, "removed tokens count only while their NLL is at most this, in nats")


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)
