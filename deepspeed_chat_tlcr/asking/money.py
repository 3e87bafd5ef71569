"""What calls cost: an estimate before the first call, the account while they run. models.py has the prices."""

import asyncio
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deepspeed_chat_tlcr.asking.models import Price

BYTES_PER_TOKEN = 4.0  # of English text, for estimates
MOST_BYTES_PER_TOKEN = 16.0  # of any text a person would read, in any language: a report of fewer tokens is wrong
USUAL_BYTES_PER_TOKEN = 5.0  # above this, text is longer than the tokens that are said to hold it
MOST_TOKENS = 10_000_000  # of one call: no model takes or gives more, so a report of more is a mistake
EXPLANATION_TOKENS = 120  # the reasoning that a typical revision writes, for estimates
TAG_TOKENS = 40
SECONDS_PER_CALL, SECONDS_PER_OUTPUT_TOKEN = 1.0, 0.025  # latency of a large hosted model, for estimates
HIDDEN_TOKENS = {"none": 0, "minimal": 100, "low": 300, "medium": 1000, "high": 3000, "xhigh": 8000, "max": 16000}
"""Hidden reasoning of a typical answer by effort, tokens, for estimates: rough, and by far the largest unknown."""
OVERRUN_MARGIN = 1.5  # once an answer cost more than its limit allows, the next may cost more still


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
        if self.usd == 0 and self.calls:
            usd = "at no price (a machine of your own; --price IN,OUT where it passes questions on to a paid model)"
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
    effort: str | None = None,
) -> Estimate:
    """From the text itself: ``question_bytes`` of all messages and ``rejected_bytes`` of all responses to revise.

    An answer is taken to be some reasoning and a modified response as long as the rejected one, behind as much hidden
    reasoning as the ``effort`` makes usual. The hours are the
    longest of what latency and concurrency, requests per minute and tokens per minute ask for.
    """
    per_call = EXPLANATION_TOKENS + TAG_TOKENS + HIDDEN_TOKENS.get(effort or "none", 0)
    completion = round(rejected_bytes / BYTES_PER_TOKEN + calls * per_call)
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
    """Tokens of one answer as they are counted; hidden reasoning is among the completion's.

    ``estimated``: the report was missing or cannot be true. ``billed``: US$ where the endpoint says what it charged.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    estimated: bool = False
    billed: float = 0.0

    def as_dict(self) -> dict:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        more = {"reasoning_tokens": self.reasoning_tokens, "estimated": self.estimated, "billed": self.billed}
        return counts | {name: value for name, value in more.items() if value}


def most_prompt_tokens(messages: list[dict]) -> int:
    """No tokenizer makes more tokens than bytes; the chat template around them is allowed for."""
    return question_size(messages) + 64 + 16 * len(messages)


def counted_usage(reported: dict, messages: list[dict], text: str, limit: int, thinks: bool = False) -> Usage:
    """The usage to count for an answer: the larger of all that its report says, and never less than the text has.

    Reports differ. Hidden reasoning may stand within ``completion_tokens``, beside it (then ``total_tokens`` has it, or
    what is left for the text is too little), or the counts have other names. A count is left aside where it is no whole
    number, more than any model gives, or fewer tokens than a text of that size has; then an estimate on the high side
    takes its place: ``limit``, the most that was asked for, where the model ``thinks`` unseen.
    """

    def count(*path: str) -> int:
        value: Any = reported
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value if whole and 0 <= value <= MOST_TOKENS else 0

    size = len(text.encode())
    prompt = max(count("prompt_tokens"), count("input_tokens"))
    completion = max(count("completion_tokens"), count("output_tokens"))
    reasoning = max(
        count("completion_tokens_details", "reasoning_tokens"),
        count("output_tokens_details", "reasoning_tokens"),
        count("reasoning_tokens"),
    )
    if reasoning and completion - reasoning < size / USUAL_BYTES_PER_TOKEN:
        completion += reasoning
    prompt_ok = prompt >= math.ceil(question_size(messages) / MOST_BYTES_PER_TOKEN)
    completion_ok = completion >= min(math.ceil(size / MOST_BYTES_PER_TOKEN), limit) and completion > 0
    if not prompt_ok:
        prompt = max(prompt, round(question_size(messages) / 3) + 16)
    if not completion_ok:
        completion = max(completion, limit if thinks else min(limit, round(size / 3) + 1))
    completion = max(completion, count("total_tokens") - prompt)
    try:
        billed = float(reported.get("cost") or 0)
    except (TypeError, ValueError, OverflowError):
        billed = 0.0
    billed = billed if 0 < billed < 1000 else 0.0
    return Usage(prompt, completion, reasoning, not (prompt_ok and completion_ok), billed)


class CapReached(Exception):
    """The next call could pass the cost cap, and no call in flight can give anything back."""


class Account:
    """Money spent, and money held back for calls in flight at the most they can cost, under a cap.

    ``spent`` is what answers cost by their usage. ``lost`` is what calls without an answer may have cost at most: those
    that timed out, and those in flight when a run was killed. ``discount``: the share of the price that is charged (the
    Batch API's half). ``overrun``: how many times the limit's cost an answer may cost; above 1 once one did.
    """

    def __init__(
        self,
        price: Price | None,
        cap: float | None = None,
        spent: float = 0.0,
        lost: float = 0.0,
        discount: float = 1.0,
        overrun: float = 1.0,
    ):
        self.price, self.cap, self.discount, self.overrun = price, cap, discount, overrun
        self.spent, self.lost, self.held = spent, lost, 0.0
        self.changed = asyncio.Event()

    def most(self, messages: list[dict], limit: int) -> float:
        """The most one call can cost, US$ (0 where no price is known: then there is no cap either)."""
        return self.overrun * self._usd(most_prompt_tokens(messages), limit)

    def usd(self, usage: Usage) -> float:
        return max(self._usd(usage.prompt_tokens, usage.completion_tokens), usage.billed)

    def _usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        return 0.0 if self.price is None else self.discount * self.price.usd(prompt_tokens, completion_tokens)

    def watch(self, usd: float, messages: list[dict], limit: int) -> float:
        """Note what an answer cost: an endpoint that bills beyond its limit is expected to do so again.

        The factor that follows calls are held at, as the account book keeps it; 1.0 where this answer kept its limit.
        """
        allowed = self._usd(most_prompt_tokens(messages), limit)
        if not usd > allowed > 0:
            return 1.0
        self.overrun = max(self.overrun, OVERRUN_MARGIN * usd / allowed)
        return self.overrun

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
