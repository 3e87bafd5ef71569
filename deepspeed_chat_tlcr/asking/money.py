"""What calls cost: an estimate before the first call, an account while they run. models.py has the prices."""

import asyncio
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deepspeed_chat_tlcr.asking.models import Price

BYTES_PER_TOKEN = 4.0  # of English text, for estimates
MOST_BYTES_PER_TOKEN = 16.0  # of readable text in any language: a report of fewer tokens is wrong
USUAL_BYTES_PER_TOKEN = 5.0  # with more, a report has left some tokens of the text out
MOST_TOKENS = 10_000_000  # of one call: a report of more is a mistake
EXPLANATION_TOKENS = 120  # of the reasoning in a typical revision, for estimates
TAG_TOKENS = 40
SECONDS_PER_CALL, SECONDS_PER_OUTPUT_TOKEN = 1.0, 0.025  # latency of a large hosted model, for estimates
HIDDEN_TOKENS = {"none": 0, "minimal": 100, "low": 300, "medium": 1000, "high": 3000, "xhigh": 8000, "max": 16000}
"""Hidden reasoning of a typical answer by effort, tokens, for estimates: rough, and by far the largest unknown."""
OVERRUN_MARGIN = 1.5  # once an answer cost more than its limit allows, the next may cost more still


# ---- before the first call -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a run will take. ``usd`` is None if the model's price is unknown."""

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
    """From the sizes of all messages and of all responses to revise.

    An answer is assumed to be some reasoning and a modified response as long as the rejected one, after the hidden
    reasoning that is usual for the ``effort``.
    """
    per_call = EXPLANATION_TOKENS + TAG_TOKENS + HIDDEN_TOKENS.get(effort or "none", 0)
    completion = round(rejected_bytes / BYTES_PER_TOKEN + calls * per_call)
    limits = (concurrency, requests_per_minute, tokens_per_minute)
    return estimate_tokens(calls, question_bytes, completion, price, *limits)


def estimate_tokens(
    calls: int,
    question_bytes: int,
    completion: int,
    price: Price | None,
    concurrency: int,
    requests_per_minute: float = 0.0,
    tokens_per_minute: float = 0.0,
) -> Estimate:
    """From the size of all messages and the tokens of all answers.

    The hours are the longest of those by latency and concurrency, by requests per minute and by tokens per minute.
    """
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
    """Tokens of one answer as counted here; hidden reasoning is among the completion's.

    ``estimated``: the report was missing or impossible. ``billed``: the US$ that the endpoint says it charged.
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
    """An upper bound: one token for each byte, and some for the chat template."""
    return question_size(messages) + 64 + 16 * len(messages)


def counted_usage(reported: dict, messages: list[dict], text: str, limit: int, thinks: bool = False) -> Usage:
    """The tokens to count for an answer: the largest of the reported figures, and never fewer than the text has.

    Reports differ: hidden reasoning may be within ``completion_tokens`` or beside it (then ``total_tokens`` has it, or
    too little is left for the text), and the counts may have other names. A count that is not a whole number, or too
    large or too small to be true, is replaced by a high estimate: if the model ``thinks``, by ``limit``, the most that
    was asked for.
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

    ``spent``: the cost of answers by their usage. ``lost``: the most that calls without an answer may have cost (timed
    out, or in flight at a kill). ``discount``: the share of the price that is charged, half with the Batch API.
    ``overrun``: how many times the cost of its limit an answer may cost; above 1 once one did.
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
        """The most one call can cost, US$; 0 if no price is known, and then there is no cap either."""
        return self.overrun * self._usd(most_prompt_tokens(messages), limit)

    def usd(self, usage: Usage) -> float:
        return max(self._usd(usage.prompt_tokens, usage.completion_tokens), usage.billed)

    def _usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        return 0.0 if self.price is None else self.discount * self.price.usd(prompt_tokens, completion_tokens)

    def watch(self, usd: float, messages: list[dict], limit: int) -> float:
        """Raise ``overrun`` if an answer cost more than its limit allows: the endpoint may do that again.

        Returns the new ``overrun``, or 1.0 if the answer kept its limit.
        """
        allowed = self._usd(most_prompt_tokens(messages), limit)
        if not usd > allowed > 0:
            return 1.0
        self.overrun = max(self.overrun, OVERRUN_MARGIN * usd / allowed)
        return self.overrun

    def fits(self, usd: float) -> bool:
        return self.cap is None or self.spent + self.lost + self.held + usd <= self.cap

    async def hold(self, usd: float):
        """Hold ``usd`` back as soon as the cap allows it. Raises ``CapReached`` if it never will."""
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
