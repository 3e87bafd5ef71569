"""The options of ``labeling/main.py`` and their checks."""

from dataclasses import MISSING, dataclass
from typing import Literal

from deepspeed_chat_tlcr.arguments import option, seed_option
from deepspeed_chat_tlcr.asking.client import EndpointOptions, check_endpoint
from deepspeed_chat_tlcr.asking.endpoint import MOST_LIMIT
from deepspeed_chat_tlcr.asking.models import EFFORTS
from deepspeed_chat_tlcr.errors import InputError
from labeling.revising import MAX_EDIT_RATIO


@dataclass(frozen=True, kw_only=True)
class Options(EndpointOptions):
    """Revise the rejected responses of preference pairs with an external model (paper 4.1)."""

    output_dir: str = option(MISSING, "folder for revisions.jsonl, failures.jsonl, run.json; an earlier run continues")
    data_path: list[str] = option([], "data-set names, local .json/.jsonl/.parquet files or folders")
    data_split: str = option("2,4,4", "shares of SFT, reward and RL data; the reward part is revised (0,10,0: all)")
    data_seed: int = seed_option(1234, "seed of the split; the same in every stage")
    split: Literal["train", "eval"] = option("train", "which split of the data")
    tokenizer: str | None = option(None, "the model to be trained, whose chat template renders chat messages")
    limit: int = option(0, "stop after so many pairs, to look at them first; 0: all")
    shard: str = option("1/1", "i/n: revise only the i-th of n parts; labeling/merge.py joins them")

    reviser: Literal["openai", "chosen", "import"] = option(
        "openai", "openai: any OpenAI-compatible endpoint; chosen: no model, y_m = y_c; import: see --from"
    )
    import_file: str | None = option(
        None, "revisions in the released code's schema, QA-feedback's or our own", flags=("--from",)
    )
    passages: int = option(0, "QA-feedback: how many of its passages stand before the question in the prompt")

    model: str | None = option(
        None, "the external model, such as gpt-6-luna; may be unset if --base_url serves one model"
    )
    reasoning_effort: str | None = option(
        "lowest", f"hidden reasoning before an answer: {', '.join(EFFORTS)}, or lowest, the least that the model has"
    )
    prompt_file: str | None = option(None, "an instruction of your own, with {context}, {chosen} and {rejected}")
    n: int = option(1, "revisions sampled per pair, for soft labels")
    temperature: float | None = option(None, "sampling temperature; unset: the server's", most=2)
    top_p: float | None = option(None, "nucleus sampling; unset: the server's", above=0, most=1)
    seed: int | None = seed_option(None, "sent with each request, another for each sample of a pair; unset: not sent")
    max_tokens: int = option(1024, "most tokens of an answer; hidden reasoning gets more", most=MOST_LIMIT)

    max_edit_ratio: float = option(
        MAX_EDIT_RATIO, "share of edited words that makes an answer a rewrite", above=0, most=1
    )
    max_failure_share: float = option(
        0.2, "share of failed pairs above which labelling is not complete and nothing trains on it", most=1
    )
    dry_run: bool = option(False, "print the estimate and stop; needs no key and writes nothing")


def check(options: Options):
    """Raise ``InputError`` for the first impossible option or combination."""
    if options.import_file is not None and options.reviser == "chosen":
        raise InputError("--from imports revisions: it does not go with --reviser chosen")
    if options.reviser == "import" and options.import_file is None:
        raise InputError("--reviser import needs --from FILE")
    if options.import_file is None and not options.data_path:
        raise InputError("--data_path is missing: name data sets or files of preference pairs (or --from FILE)")
    check_endpoint(options)
