"""Asking a chat model many questions: the options, the price, and one run from start to end."""

import datetime
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from deepspeed_chat_tlcr.arguments import option
from deepspeed_chat_tlcr.asking.batch import BatchRunner
from deepspeed_chat_tlcr.asking.dialect import LOWEST
from deepspeed_chat_tlcr.asking.dispatch import Dispatcher, Limits
from deepspeed_chat_tlcr.asking.endpoint import ChatRequest, Endpoint, Sampling
from deepspeed_chat_tlcr.asking.journal import RunFolder, State
from deepspeed_chat_tlcr.asking.models import (
    EFFORTS,
    PRICES,
    KnownModel,
    Price,
    ask_listing,
    check_base_url,
    known_model,
    price_of,
    reason_not_to_start,
    served_models,
)
from deepspeed_chat_tlcr.asking.money import Account, Estimate
from deepspeed_chat_tlcr.asking.progress import Progress
from deepspeed_chat_tlcr.asking.redaction import printable, read_key, without_secrets
from deepspeed_chat_tlcr.errors import InputError

ASK_ABOVE_USD = 10.0
BATCH_HOURS = 24.0  # the Batch API's window


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """external model"""

    base_url: str | None = option(
        None, "the endpoint, such as http://127.0.0.1:8000/v1; unset: OPENAI_BASE_URL, else OpenAI"
    )
    api_key_env: str = option("OPENAI_API_KEY", "name of the environment variable that holds the key")
    azure_api_version: str | None = option(None, "such as 2024-10-21: --base_url is an Azure OpenAI resource")
    reasoning_effort: str | None = option(
        None,
        f"hidden reasoning before an answer: {', '.join(EFFORTS)}, or lowest: the least the model has; unset: its own",
    )
    attempts: int = option(3, "answers asked for until one is usable", most=100)
    retry_failed: bool = option(False, "ask again for what is in failures.jsonl, and only that")
    concurrency: int = option(32, "most calls in flight", most=4096)
    requests_per_minute: float = option(0.0, "most calls a minute; 0: no limit of our own", most=1e12)
    tokens_per_minute: float = option(0.0, "most tokens a minute, in and out; 0: no limit of our own", most=1e12)
    timeout: float = option(120.0, "seconds after which a call is given up and retried", least=0.001, most=86_400)
    max_retries: int = option(10, "retries of one call that brings no answer", least=0, most=1000)
    batch: bool = option(False, "OpenAI's Batch API: half the price, up to a day")
    batch_size: int = option(50_000, "requests per batch; fewer if the endpoint enqueues few tokens", most=50_000)
    batch_poll: float = option(60.0, "seconds between two looks at the batches", least=0.001, most=86_400)
    prices: str = option(str(PRICES), "table of models: US$ per million tokens, efforts, last days")
    price: str | None = option(None, "IN,OUT: US$ per million tokens, such as 0.1,0.5, of a model that --prices lacks")
    max_cost_usd: float | None = option(None, "stop before the cost, calls in flight included, could pass this")
    yes: bool = option(False, "do not ask before spending more than US$ 10")

    @property
    def address(self) -> str | None:
        """The endpoint's address, without a final slash; None: OpenAI. OPENAI_BASE_URL counts as for its client."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/") or None


def check_endpoint(options: EndpointOptions) -> None:
    """Raise ``InputError`` for the first impossible option."""
    for name in ("requests_per_minute", "tokens_per_minute"):
        if 0 < getattr(options, name) < 0.1:
            raise InputError(f"--{name} {getattr(options, name):g}: must be 0, for no limit, or at least 0.1")
    if options.reasoning_effort not in (None, LOWEST, *EFFORTS):
        known = ", ".join((LOWEST, *EFFORTS))
        raise InputError(f"--reasoning_effort {options.reasoning_effort}: known are {known}")
    if options.price is not None:
        Price.parse(options.price)
    if options.address:
        check_base_url(options.address, "--base_url" if options.base_url else "OPENAI_BASE_URL")


def make_endpoint(options: EndpointOptions, model: str, sampling: Sampling) -> Endpoint:
    known = known_model(model, options.prices)
    where = (options.address, options.api_key_env, options.azure_api_version)
    return Endpoint(model, *where, sampling, options.timeout, known)


def listed_price(options: EndpointOptions, model: str) -> Price | None:
    """The price by ``--price`` or the table; 0 on a machine of the user's own; None: not known."""
    return Price.parse(options.price) if options.price else price_of(model, options.address, options.prices)


def known_price(options: EndpointOptions, model: str) -> Price:
    """The price, before any discount of ``--batch``. An unlisted price is asked for on the terminal.

    Raises ``InputError`` without a terminal: nothing is spent at an unknown price.
    """
    price = listed_price(options, model)
    if price is not None:
        return price
    remedy = f"give it with --price IN,OUT (0,0: it costs nothing), or add it to {options.prices} or a copy (--prices)"
    if not sys.stdin.isatty():
        raise InputError(f"the price of {model!r} is not known, so neither is what this would cost: {remedy}")
    print(f"The price of {model} is not known. US$ per million tokens IN,OUT, such as 0.1,0.5: ", end="", flush=True)
    return Price.parse(sys.stdin.readline().strip(), "the price")


def discount(options: EndpointOptions, model: str) -> float:
    """The share of the price that is charged; below 1 with ``--batch``."""
    known = known_model(model, options.prices)
    return 1.0 if not options.batch else known.batch if known else 0.5


def expected_effort(options: EndpointOptions, model: str) -> str | None:
    """The reasoning effort that estimates assume."""
    known = known_model(model, options.prices)
    if options.reasoning_effort == LOWEST:
        return (known.efforts or ("none",))[0] if known else "none"
    return options.reasoning_effort or (known.default_effort if known else None)


def resolve_model(options: EndpointOptions, model: str | None, flag: str) -> str:
    """The model's name. Without one, the only model that the user's own server has; else ``InputError``."""
    if model:
        return model
    if not options.address:
        raise InputError(f"{flag} is missing: the name of the model to ask, such as gpt-6-luna")
    shown = without_secrets(options.address)
    names = list(served_models(options.address, read_key(options.api_key_env, needed=False)))
    if len(names) != 1:
        listed = ", ".join(printable(name)[:80] for name in names[:10]) or "it lists none, or does not answer"
        raise InputError(f"{flag} is missing: name one of the models at {shown} ({listed})")
    return names[0]


def warn_of_end(known: KnownModel | None, address: str | None) -> None:
    """Print a model's last day, from the table. At other addresses than OpenAI's the name may mean another model."""
    if known and address is None and (end := known.end(datetime.date.today())):
        print(f"warning: {end}", file=sys.stderr, flush=True)


def ask_about_model(options: EndpointOptions, model: str, hours: float, variable: str) -> int | None:
    """Look the model up at the endpoint before any question. Returns its context length in tokens, if that is listed.

    Raises ``InputError`` if the endpoint does not have the model, or will not have it for so many hours.
    """
    if options.azure_api_version:  # its deployments are not listed like models
        return None
    key, timeout = read_key(options.api_key_env, needed=options.address is None), min(10.0, options.timeout)
    listing = ask_listing(model, options.address, key, timeout)
    hours = max(hours, BATCH_HOURS) if options.batch else hours
    if reason := reason_not_to_start(model, listing, hours, variable, known_model(model, options.prices)):
        raise InputError(reason)
    if listing.context is None and options.address:
        return served_models(options.address, key, timeout).get(model)
    return listing.context


def agreed(options: EndpointOptions, expected: Estimate) -> bool:
    """Whether the run may start; asks on a terminal before it costs much."""
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
    """Send all requests, as single calls or in batches. Returns why the run stopped early, or None."""
    limits = Limits(**{entry.name: getattr(options, entry.name) for entry in fields(Limits)})
    runner = (BatchRunner if options.batch else Dispatcher)(endpoint, folder, account, limits, state)
    folder.open_files()
    try:
        stopped = await runner.run(requests, progress.show)
    finally:
        await folder.close_files()
        await endpoint.close()
        progress.close()
        progress.about["learnt"] = endpoint.dialect.as_dict()
    return stopped


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt as SIGINT does. The event loop handles both itself."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
