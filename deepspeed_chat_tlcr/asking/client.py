"""Asking a chat model many questions, for whatever purpose: the options of it, its price, and one run to its end."""

import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deepspeed_chat_tlcr.arguments import option
from deepspeed_chat_tlcr.asking.batch import BatchRunner
from deepspeed_chat_tlcr.asking.dispatch import Dispatcher, Limits
from deepspeed_chat_tlcr.asking.endpoint import ChatRequest, Endpoint, Sampling
from deepspeed_chat_tlcr.asking.journal import RunFolder, State
from deepspeed_chat_tlcr.asking.money import BATCH_DISCOUNT, PRICES, Account, Estimate, Price, price_of
from deepspeed_chat_tlcr.asking.progress import Progress
from deepspeed_chat_tlcr.errors import InputError

ASK_ABOVE_USD = 10.0


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """external model"""

    base_url: str | None = option(None, "address of the endpoint, such as http://127.0.0.1:8000/v1; unset: OpenAI")
    api_key_env: str = option("OPENAI_API_KEY", "name of the environment variable that holds the key")
    azure_api_version: str | None = option(None, "such as 2024-10-21: --base_url is an Azure OpenAI resource")
    attempts: int = option(3, "answers asked for until one is usable")
    retry_failed: bool = option(False, "ask again for what is in failures.jsonl, and only that")
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


def check_endpoint(options: EndpointOptions) -> None:
    """Raises ``InputError`` for the first option that cannot be right."""
    for name, least in {"concurrency": 1, "attempts": 1, "max_retries": 0, "batch_size": 1}.items():
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


def make_endpoint(options: EndpointOptions, model: str, sampling: Sampling) -> Endpoint:
    return Endpoint(model, options.base_url, options.api_key_env, options.azure_api_version, sampling, options.timeout)


def known_price(options: EndpointOptions, model: str) -> Price | None:
    """Raises ``InputError`` where a cost cap is asked for and the price is unknown."""
    price = price_of(model, options.base_url, options.prices)
    if price is None and options.max_cost_usd is not None:
        raise InputError(
            f"--max_cost_usd needs the price of {model!r}: add it to {options.prices}, or to a copy (--prices)"
        )
    return price.discounted(BATCH_DISCOUNT) if price is not None and options.batch else price


def agreed(options: EndpointOptions, expected: Estimate) -> bool:
    """Ask before spending much, where someone is there to answer."""
    cheap = expected.usd is not None and expected.usd <= ASK_ABOVE_USD
    if options.yes or cheap or not sys.stdin.isatty():
        return True
    print("Go on? --yes answers in advance. [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


async def run_all(
    options: EndpointOptions,
    endpoint: Endpoint,
    folder: RunFolder,
    account: Account,
    state: State,
    requests: Iterable[ChatRequest],
    progress: Progress,
) -> str | None:
    """Ask for everything, one call at a time per slot or in batches; why it stopped early, if it did."""
    limits = Limits(
        options.concurrency,
        options.attempts,
        options.max_retries,
        options.requests_per_minute,
        options.tokens_per_minute,
        batch_size=options.batch_size,
        batch_poll=options.batch_poll,
    )
    kind = BatchRunner if options.batch else Dispatcher
    runner = kind(endpoint, folder, account, limits, state)
    folder.open_files()
    try:
        stopped = await runner.run(requests, progress.show)
    finally:
        await folder.close_files()
        await endpoint.close()
        progress.close()
    return stopped


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM as SIGINT: outside the event loop, which handles both itself, they raise KeyboardInterrupt."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
