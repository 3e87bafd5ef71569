"""The options of ``labeling/main.py``, and what is wrong with them."""

from dataclasses import MISSING, dataclass
from typing import Literal

from deepspeed_chat_tlcr.arguments import option
from deepspeed_chat_tlcr.errors import InputError
from labeling.money import PRICES
from labeling.revising import MAX_EDIT_RATIO


@dataclass(frozen=True, kw_only=True)
class Options:
    """Revise the rejected responses of preference pairs with an external model (paper 4.1)."""

    output_dir: str = option(MISSING, "folder for revisions.jsonl, failures.jsonl, run.json; an earlier run continues")
    data_path: list[str] = option([], "data-set names, local .json/.jsonl/.parquet files or folders")
    data_split: str = option("2,4,4", "shares of SFT, reward and RL data; the reward part is revised (0,10,0: all)")
    data_seed: int = option(1234, "seed of the split; the same in every stage")
    split: Literal["train", "eval"] = option("train", "which split of the data")
    limit: int = option(0, "stop after so many pairs, to look at them first; 0: all")
    shard: str = option("1/1", "i/n: revise only the i-th of n parts; labeling/merge.py joins them")

    reviser: Literal["openai", "chosen", "import"] = option(
        "openai", "openai: any OpenAI-compatible endpoint; chosen: no model, y_m = y_c; import: see --from"
    )
    import_file: str | None = option(
        None, "revisions made elsewhere: the released code's schema, QA-feedback or our own", flags=("--from",)
    )
    passages: int = option(0, "QA-feedback: how many of its passages stand before the question in the prompt")

    model: str | None = option(None, "the external model; the paper's is gpt-4-0125-preview")
    base_url: str | None = option(None, "address of the endpoint, such as http://127.0.0.1:8000/v1; unset: OpenAI")
    api_key_env: str = option("OPENAI_API_KEY", "name of the environment variable that holds the key")
    azure_api_version: str | None = option(None, "such as 2024-10-21: --base_url is an Azure OpenAI resource")
    prompt_file: str | None = option(None, "an instruction of your own, with {context}, {chosen} and {rejected}")
    n: int = option(1, "revisions sampled per pair, for soft labels")
    temperature: float | None = option(None, "sampling temperature; unset: the server's")
    top_p: float | None = option(None, "nucleus sampling; unset: the server's")
    seed: int | None = option(None, "sent with each request, another for each sample of a pair; unset: not sent")
    max_tokens: int = option(1024, "most tokens of an answer")

    attempts: int = option(3, "answers asked for until one is usable")
    max_edit_ratio: float = option(MAX_EDIT_RATIO, "share of edited words above which an answer is a rewrite")
    retry_failed: bool = option(False, "ask again for the pairs in failures.jsonl, and only those")
    concurrency: int = option(32, "most calls in flight")
    requests_per_minute: float = option(0.0, "most calls a minute; 0: no limit of our own")
    tokens_per_minute: float = option(0.0, "most tokens a minute, in and out; 0: no limit of our own")
    timeout: float = option(120.0, "seconds after which a call is given up and retried")
    max_retries: int = option(10, "retries of one call that brings no answer")
    batch: bool = option(False, "OpenAI's Batch API: half the price, up to a day")
    batch_size: int = option(50_000, "requests per batch; fewer where the endpoint enqueues few tokens at once")
    batch_poll: float = option(60.0, "seconds between two looks at the batches")

    prices: str = option(str(PRICES), "price table, US$ per million tokens")
    max_cost_usd: float | None = option(None, "stop before the cost, calls in flight included, could pass this")
    yes: bool = option(False, "do not ask before spending more than US$ 10")
    dry_run: bool = option(False, "print the estimate and stop; needs no key and writes nothing")


def check(options: Options):
    """Raises ``InputError`` for the first option that cannot be right by itself or beside another."""
    if options.import_file is not None and options.reviser == "chosen":
        raise InputError("--from imports revisions: it does not go with --reviser chosen")
    if options.reviser == "import" and options.import_file is None:
        raise InputError("--reviser import needs --from FILE")
    if options.import_file is None and not options.data_path:
        raise InputError("--data_path is missing: name data sets or files of preference pairs (or --from FILE)")
    if options.import_file is None and options.reviser == "openai" and not options.model:
        raise InputError("--model is missing: the name of the external model, such as gpt-4-0125-preview")
    at_least = {
        "concurrency": 1,
        "attempts": 1,
        "n": 1,
        "max_tokens": 1,
        "max_retries": 0,
        "limit": 0,
        "passages": 0,
        "batch_size": 1,
    }
    for name, least in at_least.items():
        if getattr(options, name) < least:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least {least}")
    for name in ("timeout", "batch_poll"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name} {getattr(options, name)}: must be above 0 seconds")
    for name in ("requests_per_minute", "tokens_per_minute", "max_cost_usd"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise InputError(f"--{name} {value}: must not be negative")
    if options.batch_size > 50_000:
        raise InputError(f"--batch_size {options.batch_size}: the Batch API takes at most 50000 requests in a batch")
    if not 0 < options.max_edit_ratio <= 1:
        raise InputError(f"--max_edit_ratio {options.max_edit_ratio}: a share of words, above 0 and at most 1")
