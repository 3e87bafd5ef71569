"""How fast to ask: rate limits, a concurrency that adapts, and waiting times between retries."""

import asyncio
import random
import time
from collections import deque


class RateLimit:
    """At most ``per_minute`` units a minute, spread evenly; ``per_minute=0`` is no limit."""

    def __init__(self, per_minute: float):
        self.seconds_per_unit = 60.0 / per_minute if per_minute else 0.0
        self.free_at = 0.0

    def wait_for(self, units: float) -> float:
        """Book ``units`` and return the seconds to wait before using them."""
        if not self.seconds_per_unit:
            return 0.0
        now = time.monotonic()
        start = max(now, self.free_at)
        self.free_at = start + units * self.seconds_per_unit
        return start - now

    def correct(self, units: float):
        """Book what a call used beyond its booking, or give back what it did not use (negative)."""
        self.free_at += units * self.seconds_per_unit


class AdaptiveLimit:
    """Calls in flight: additive increase, multiplicative decrease, between 1 and ``most``.

    A rate-limit answer takes a quarter off the limit, but calls that were already in flight then count only once. Each
    round of answers adds ``GROWTH``.
    """

    SHRINK, GROWTH = 0.75, 4.0

    def __init__(self, most: int):
        self.most, self.limit = most, float(most)
        self.in_flight = 0
        self.deaf_for = 0  # calls that started before the last decrease
        self.waiting: deque[asyncio.Future] = deque()

    async def acquire(self):
        while self.in_flight >= int(self.limit):
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            await turn
        self.in_flight += 1

    def release(self, rate_limited: bool = False, answered: bool = False):
        self.in_flight -= 1
        if self.deaf_for:
            self.deaf_for -= 1
        elif rate_limited:
            self.limit = max(1.0, self.limit * self.SHRINK)
            self.deaf_for = self.in_flight
        if answered:
            self.limit = min(float(self.most), self.limit + self.GROWTH / self.limit)
        for _ in range(int(self.limit) - self.in_flight):
            while self.waiting and self.waiting[0].done():
                self.waiting.popleft()
            if self.waiting:
                self.waiting.popleft().set_result(None)


def back_off(retry: int, asked_for: float | None) -> float:
    """Seconds before retry number ``retry`` (0 first): what the server asked for, else exponential, up to a minute.

    Some jitter spreads the calls that failed together.
    """
    if asked_for is None:
        return min(60.0, 0.5 * 2**retry) * random.uniform(0.5, 1.0)
    return asked_for + random.uniform(0.0, 0.1) * max(asked_for, 0.5)
