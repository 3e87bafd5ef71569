"""The options of step 2, and those of every stage that learns from revisions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from deepspeed_chat_tlcr.arguments import DataOptions, PackingOptions, RunOptions, TrainOptions, option, parse
from deepspeed_chat_tlcr.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RevisionOptions(DataOptions):
    """revisions"""

    revisions: list[str] = option(
        [],
        "revisions.jsonl files of labeling/main.py",
        flags=("--modification_train_data_path",),
        better="text, so that one labelling serves every tokenizer; no pickles",
    )
    eval_revisions: list[str] = option(
        [],
        "held-out revisions; unset: --eval_share of the prompts is held out",
        flags=("--modification_eval_data_path",),
        better="may be left out",
    )
    eval_share: float = option(0.05, "share of prompts held out for evaluation, chosen by hash", below=1)
    allow_foreign_revisions: bool = option(False, "accept revisions of prompts from the SFT or RL part of the data")


@dataclass(frozen=True, kw_only=True)
class ForkOptions:
    """flags of the RLHF-TLCR fork's step 2"""

    discriminate_reward: bool = option(False, "the fork's spelling of --objective token", compatibility=True)
    uni_discriminator_head: bool = option(False, "one head", "the discriminator has one head, as with this flag")
    holistic_reward: bool = option(
        False, "a sequence reward too", "train it alone and use --reward tlcr:PATH sequence:PATH in step 3"
    )
    token_level_reward: bool = option(False, "sums of token scores", "the fork's trial, not in the paper")
    reward_aggregate_top_k: float = option(
        1.0, "share of tokens in it", "the fork's trial, not in the paper", least=-1e9
    )
    bidirectional_reward: bool = option(False, "no causal mask on top", "the fork's trial, not in the paper")
    bidirectional_layer_num: int = option(1, "layers of it", "the fork's trial, not in the paper", least=0)
    custom_template: bool = option(False, "data with a template", "masks come from lengths, whatever the template")


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, PackingOptions, RevisionOptions, DataOptions, RunOptions, ForkOptions):
    """Step 2: the token discriminator (--objective token), or a reward model that learns from whole pairs."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5}

    objective: Literal["auto", "token", "sequence", "token_pairs"] = option(
        "auto",
        "token: D per token (Eq. 6); sequence: Bradley-Terry; token_pairs: Bradley-Terry of what --aggregate makes of "
        "token rewards; auto: token with --revisions, --spans or --discriminate_reward, else sequence, which is what "
        "DeepSpeed-Chat's command line means",
    )
    spans: list[str] = option(
        [], "spans.jsonl files in place of revisions: tokens in spans called good 1, bad 0, all others 0.5 (DRLC)"
    )
    aggregate: Literal["avg", "sum", "max", "min"] = option(
        "avg", "token_pairs: what a response is worth, from its tokens' rewards; max and min are soft"
    )
    neutral_weight: float = option(1.0, "weight of unedited tokens in the token loss")
    pairs: Literal["preferences", "modified"] = option(
        "preferences",
        "pairs of the objectives sequence and token_pairs: chosen or modified (PPO_synthetic) over rejected",
    )
    score_positions: Literal["end", "all"] = option(
        "end", "sequence loss at the last token, or averaged from the first difference on as DeepSpeed-Chat does"
    )
    eval_interval: int = option(0, "optimiser steps between evaluations; 0: at the end of each epoch")
    eval_iters: int = option(100, "batches per evaluation when --eval_interval is set")
    do_eval: bool = option(False, "evaluate --model_name_or_path on the held-out data and train nothing")
    num_padding_at_beginning: int = option(1, "OPT's padding", "masks come from lengths, padding never counts", least=0)

    @property
    def token_level(self) -> bool:
        """Whether the objective is the token discriminator's."""
        if self.objective == "auto":
            labelled = bool(self.revisions or self.spans)
            return self.discriminate_reward or (labelled and self.pairs == "preferences")
        return self.objective == "token"


def check(options: Options) -> None:
    """Raise ``InputError`` for options that do not go together, such as those of the other objective."""
    if options.do_eval and options.push_to_hub:
        raise InputError("--push_to_hub: --do_eval saves no model that could be uploaded; leave one of them out")
    if options.score_positions == "all" and options.tokens_per_micro_batch:
        raise InputError(
            "--score_positions all: averages over padding too, as DeepSpeed-Chat does, and --tokens_per_micro_batch "
            "leaves none; keep one of them"
        )
    if options.spans and (options.revisions or options.eval_revisions or not options.token_level):
        raise InputError("--spans: are labels of the objective token, in place of --revisions; leave the others out")
    if options.token_level and options.save_format == "deepspeed_chat":
        raise InputError("--save_format deepspeed_chat: DeepSpeed-Chat has no token discriminators")
    if options.objective == "token_pairs":
        if options.save_format == "deepspeed_chat":
            raise InputError("--save_format deepspeed_chat: would take a token reward model for one of sequences")
        if options.score_positions != "end":
            raise InputError("--score_positions is the sequence objective's; --aggregate is token_pairs'")
    elif options.aggregate != "avg":
        raise InputError("--aggregate is the objective token_pairs'; give --objective token_pairs")
    if options.token_level:
        if options.pairs != "preferences" or options.score_positions != "end":
            raise InputError("--pairs and --score_positions are the sequence objective's; give --objective sequence")
        return
    if options.pairs == "preferences" and (options.revisions or options.eval_revisions):
        raise InputError(
            f"--revisions: --objective {options.objective} learns from chosen and rejected responses; --pairs modified "
            "makes it learn from revisions (PPO_synthetic), --objective token is the discriminator"
        )
    if options.neutral_weight != 1.0:
        raise InputError("--neutral_weight is the token objective's; no other one weighs tokens by their labels")


def parse_args(argv: Sequence[str] | None = None) -> Options:
    options = parse(Options, argv)
    check(options)
    return options
