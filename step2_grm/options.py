"""The options of the generative reward model's training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deepspeed_chat_tlcr.arguments import DataOptions, PackingOptions, RunOptions, TrainOptions, option, parse
from step2_discriminator.options import RevisionOptions


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, PackingOptions, RevisionOptions, DataOptions, RunOptions):
    """Step 2 of RLMEC: a language model that rewrites a rejected response into the modified one."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"learning_rate": 2e-5, "num_train_epochs": 3, "max_seq_len": 1024}

    copy_share: float = option(
        1.0, "share of the revisions of which the modified response, too, is shown and to be left as it is", most=1
    )


def parse_args(argv: Sequence[str] | None = None) -> Options:
    return parse(Options, argv)
