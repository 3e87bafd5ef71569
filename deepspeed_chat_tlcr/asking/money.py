"""What calls cost: prices, an estimate before the first call, the account while they run.

Prices are US$ per million tokens, in ``deepspeed_chat_tlcr/asking/prices.json`` or a file of the user's own.
"""

import asyncio
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError

PRICES = Path(__file__).parent / "prices.json"

BYTES_PER_TOKEN = 4.0  # of English text, for estimates
MOST_BYTES_PER_TOKEN = 16.0  # of any text a person would read, in any language: a report of fewer tokens is wrong
REASONING_TOKENS = 120  # of a typical answer, for estimates
TAG_TOKENS = 40
BATCH_DISCOUNT = 0.5
SECONDS_PER_CALL, SECONDS_PER_OUTPUT_TOKEN = 1.0, 0.025  # latency of a large hosted model, for estimates


@dataclass(frozen=True)
class Price:
    """US$ per million tokens."""

    input: float
    output: float

    def usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6

    def discounted(self, factor: float) -> "Price":
        return Price(self.input * factor, self.output * factor)


def price_of(model: str, base_url: str | None = None, path: str | Path = PRICES) -> Price | None:
    """The model's price; 0 for an unlisted model on the user's own machine; None where it is unknown.

    Raises ``InputError`` where the table is not as it should be.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        entry = table.get(model)
        if entry is not None:
            price = Price(float(entry["input"]), float(entry["output"]))
            if min(price.input, price.output) < 0:
                raise ValueError("a price is negative")
            return price
    except OSError as error:
        raise InputError(f"--prices {path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        form = '{"MODEL": {"input": US$ per million tokens, "output": US$ per million tokens}}'
        raise InputError(f"--prices {path}: expected {form} ({type(error).__name__}: {error})") from None
    local = base_url is not None and any(name in base_url for name in ("//127.", "//localhost", "//[::1]", "//0.0.0.0"))
    return Price(0.0, 0.0) if local else None


# ---- before the first call -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a labelling will take. ``usd`` is None where the model's price is unknown."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    hours: float

    def __str__(self) -> str:
        usd = "US$ unknown (no price for this model)" if self.usd is None else f"US$ {self.usd:,.2f}"
        return (
            f"{self.calls:,} calls, about {self.prompt_tokens:,} tokens in and {self.completion_tokens:,} out, "
            f"{usd}, {self.hours:.2f} hours"
        )


def estimate(
    calls: int,
    question_bytes: int,
    rejected_bytes: int,
    price: Price | None,
    concurrency: int,
    requests_per_minute: float = 0.0,
    tokens_per_minute: float = 0.0,
) -> Estimate:
    """From the text itself: ``question_bytes`` of all messages and ``rejected_bytes`` of all responses to revise.

    An answer is taken to be some reasoning and a modified response as long as the rejected one. The hours are the
    longest of what latency and concurrency, requests per minute and tokens per minute ask for.
    """
    completion = round(rejected_bytes / BYTES_PER_TOKEN + calls * (REASONING_TOKENS + TAG_TOKENS))
    return estimate_tokens(
        calls, question_bytes, completion, price, concurrency, requests_per_minute, tokens_per_minute
    )


def estimate_tokens(
    calls: int,
    question_bytes: int,
    completion: int,
    price: Price | None,
    concurrency: int,
    requests_per_minute: float = 0.0,
    tokens_per_minute: float = 0.0,
) -> Estimate:
    """As ``estimate``, where ``completion`` is how many tokens all answers together are taken to have."""
    prompt = round(question_bytes / BYTES_PER_TOKEN)
    seconds = (calls * SECONDS_PER_CALL + completion * SECONDS_PER_OUTPUT_TOKEN) / max(concurrency, 1)
    if requests_per_minute:
        seconds = max(seconds, 60 * calls / requests_per_minute)
    if tokens_per_minute:
        seconds = max(seconds, 60 * (prompt + completion) / tokens_per_minute)
    usd = None if price is None else price.usd(prompt, completion)
    return Estimate(calls, prompt, completion, usd, seconds / 3600)


def question_size(messages: Iterable[dict]) -> int:
    """UTF-8 bytes of the messages' text."""
    return sum(len(message["content"].encode()) for message in messages)


# ---- while they run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer as they are counted. ``estimated``: the report was missing or cannot be true."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False

    def as_dict(self) -> dict:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "estimated": True} if self.estimated else counts


def most_prompt_tokens(messages: list[dict]) -> int:
    """No tokenizer makes more tokens than bytes; the chat template around them is allowed for."""
    return question_size(messages) + 64 + 16 * len(messages)


def counted_usage(reported: dict, messages: list[dict], text: str, max_tokens: int) -> Usage:
    """The usage to count for an answer: as reported, where that can be true; else an estimate on the high side.

    It cannot be true where it is missing, not a whole number, more tokens than bytes in, more out than asked for, or
    fewer tokens than a text of that size has: a cap on the cost would not hold.
    """

    def believable(value, most: int, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    def least(size: int) -> int:
        return math.ceil(size / MOST_BYTES_PER_TOKEN)

    prompt, completion = reported.get("prompt_tokens"), reported.get("completion_tokens")
    prompt_ok = believable(prompt, most_prompt_tokens(messages), least(question_size(messages)))
    completion_ok = believable(completion, max_tokens, min(least(len(text.encode())), max_tokens))
    if not prompt_ok:
        prompt = round(question_size(messages) / 3) + 16
    if not completion_ok:
        completion = min(max_tokens, round(len(text.encode()) / 3) + 1)
    return Usage(prompt, completion, estimated=not (prompt_ok and completion_ok))


class CapReached(Exception):
    """The next call could pass the cost cap, and no call in flight can give anything back."""


class Account:
    """Money spent, and money held back for calls in flight at the most they can cost, under a cap.

    ``spent`` is what answers cost by their usage. ``lost`` is what calls without an answer may have cost at most: those
    that timed out, and those in flight when a run was killed.
    """

    def __init__(self, price: Price | None, cap: float | None = None, spent: float = 0.0, lost: float = 0.0):
        self.price, self.cap = price, cap
        self.spent, self.lost, self.held = spent, lost, 0.0
        self.changed = asyncio.Event()

    def most(self, messages: list[dict], max_tokens: int) -> float:
        """The most one call can cost, US$ (0 where no price is known: then there is no cap either)."""
        return 0.0 if self.price is None else self.price.usd(most_prompt_tokens(messages), max_tokens)

    def usd(self, usage: Usage) -> float:
        return 0.0 if self.price is None else self.price.usd(usage.prompt_tokens, usage.completion_tokens)

    def fits(self, usd: float) -> bool:
        return self.cap is None or self.spent + self.lost + self.held + usd <= self.cap

    async def hold(self, usd: float):
        """Hold ``usd`` back as soon as the cap allows it. Raises ``CapReached`` where it never will."""
        while not self.fits(usd):
            if self.held <= 0:
                raise CapReached
            self.changed.clear()
            await self.changed.wait()
        self.held += usd

    def settle(self, held: float, spent: float = 0.0, lost: float = 0.0):
        """A call ended: free what was held for it and count what it cost."""
        self.held = max(self.held - held, 0.0)
        if self.held < 1e-9:
            self.held = 0.0
        self.spent += spent
        self.lost += lost
        self.changed.set()
