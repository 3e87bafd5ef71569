"""Send many chat requests, each until it has a usable answer or is given up, and write every outcome down.

Nothing that was paid for is lost: an answer counts once it is on disk, attempts and money survive a kill, and a stop
waits for the calls in flight.
"""

import asyncio
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from deepspeed_chat_tlcr.asking.endpoint import (
    CUT,
    ChatAnswer,
    ChatRequest,
    Endpoint,
    EndpointRefused,
    Fault,
    Outage,
    RequestRefused,
    Unusable,
)
from deepspeed_chat_tlcr.asking.journal import ACCEPTED, FAILED, RunFolder, State
from deepspeed_chat_tlcr.asking.money import BYTES_PER_TOKEN, Account, CapReached, Usage, counted_usage, question_size
from deepspeed_chat_tlcr.asking.pace import AdaptiveLimit, RateLimit, back_off

LONGEST_WAIT = 900.0  # seconds; a server that asks for more is asked again by the next run
TRIES_TO_CONNECT = 3  # before the first answer: a wrong address should not take minutes to tell
GIVEN_UP_IN_A_ROW = 20  # requests without any answer in between: the endpoint is down, not the requests
DOUBTFUL = 5  # requests refused alike before any was answered: the settings are wrong, not the requests
REFUSED = "refused_by_endpoint"
LONE_FAULTS = 3  # calls without an answer after which the others no longer wait for the first request
GRACE = 20.0  # seconds that a stop waits for calls in flight


@dataclass(frozen=True)
class Limits:
    """The options of these names in ``client.EndpointOptions``."""

    concurrency: int = 32
    attempts: int = 3
    max_retries: int = 10
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    batch_size: int = 50_000
    batch_poll: float = 60.0


class Asker:
    """What single calls and batches share: counting money and tokens, writing answers down, stopping."""

    def __init__(self, endpoint: Endpoint, folder: RunFolder, account: Account, limits: Limits, state: State):
        self.endpoint, self.folder, self.account, self.limits, self.state = endpoint, folder, account, limits, state
        self.accepted = self.failed = 0
        self.answered = False  # whether the endpoint has answered anything in this run
        self.stopping = asyncio.Event()
        self.stop_reason: str | None = None

    def stop(self, reason: str):
        """Start no further call; those in flight may end."""
        self.stop_reason = self.stop_reason or reason
        self.stopping.set()

    async def _pause(self, seconds: float):
        """Sleep, but not beyond a stop."""
        if seconds > 0 and not self.stopping.is_set():
            try:
                await asyncio.wait_for(self.stopping.wait(), seconds)
            except asyncio.TimeoutError:
                return

    async def _fail(self, request: ChatRequest, kind: str, detail: str):
        """Write down that a request is given up."""
        await self.folder.add_failure(request.id, kind, detail)
        self.failed += 1

    def _count(self, request: ChatRequest, answer: ChatAnswer, limit: int) -> tuple[Usage, float, dict]:
        """Tokens and US$ of an answer, and further entries for the account book."""
        shown = answer.text + answer.thinking
        usage = counted_usage(answer.usage, request.messages, shown, limit, self.endpoint.thinks)
        usd = self.account.usd(usage)
        overrun = self.account.watch(usd, request.messages, limit)
        return usage, usd, ({"overrun": round(overrun, 3)} if overrun > 1 else {})

    def _lost_by(self, request: ChatRequest, fault: Fault, limit: int) -> float:
        """The most that a call without an answer may have cost, US$, by its limit or its own report."""
        if not fault.maybe_billed:
            return 0.0
        usage = counted_usage(fault.usage, request.messages, "", limit)
        if usage.estimated:
            return self.account.most(request.messages, limit)
        usd = self.account.usd(usage)
        self.account.watch(usd, request.messages, limit)
        return usd

    async def _record(
        self, request: ChatRequest, answer: ChatAnswer, usage: Usage, usd: float, attempts: int, limit: int, **where
    ) -> int:
        """Write an answer down, with ``where`` in the account book.

        Returns -1 if the request is settled by it, else the number of unusable answers so far.
        """
        book = {"id": request.id, "usage": usage.as_dict(), "usd": usd, **where}
        self.state.prompt_tokens += usage.prompt_tokens
        self.state.completion_tokens += usage.completion_tokens
        self.state.reasoning_tokens += usage.reasoning_tokens
        cut = self.endpoint.observe(request, answer, limit)
        try:
            if cut and not answer.text.strip():
                raise Unusable(CUT)
            line = request.accept(answer, {**usage.as_dict(), "usd": round(usd, 8)})
        except Unusable as unusable:
            self.state.unusable[unusable.reason] += 1
            if attempts + 1 < self.limits.attempts:
                self.folder.note(**book, outcome="unusable", unusable=unusable.reason)
                return attempts + 1
            await self._fail(request, unusable.reason, answer.text)
            self.folder.note(**book, outcome=FAILED, unusable=unusable.reason)
            return -1
        await self.folder.add_result(line)
        self.folder.note(**book, outcome=ACCEPTED)
        self.accepted += 1
        return -1


class Dispatcher(Asker):
    """Runs requests once; ``run`` returns why it stopped early, or None when every request has its outcome."""

    def __init__(self, endpoint: Endpoint, folder: RunFolder, account: Account, limits: Limits, state: State):
        super().__init__(endpoint, folder, account, limits, state)
        self.slots = AdaptiveLimit(limits.concurrency)
        self.requests = RateLimit(limits.requests_per_minute)
        self.tokens = RateLimit(limits.tokens_per_minute)
        self.given_up_in_a_row = 0
        self.doubtful: dict[str, list[tuple[ChatRequest, str]]] = {}  # refused before any answer, by like words
        self.lone_faults = self.lone_refusals = 0
        self.let_loose = asyncio.Event()  # set once the first request has shown what the endpoint takes
        self.error: BaseException | None = None

    async def run(
        self, requests: Iterable[ChatRequest], on_outcome=lambda dispatcher: None, seconds: float | None = None
    ) -> str | None:
        """Raises ``EndpointRefused`` for what only the user can mend, and what the system raises (a full disk).

        ``seconds``: when they are over, it stops ("late") and gives up the calls in flight. Then SIGINT and SIGTERM are
        left to the caller, who waits no longer than that; without a limit they stop it.
        """
        self.on_outcome = on_outcome
        source = iter(requests)
        loop = asyncio.get_running_loop()
        # More workers than slots: one that waits for its retry leaves its slot to another.
        spare = max(8, self.limits.concurrency // 4)
        count = self.limits.concurrency + spare
        workers = [loop.create_task(self._work(source, alone=number == 0)) for number in range(count)]
        late = loop.call_later(seconds, self.stop, "late") if seconds is not None else None
        with nullcontext() if late else on_stop_signals(lambda name: self._on_signal(workers, name)):
            stopped = loop.create_task(self.stopping.wait())
            everything: asyncio.Future = asyncio.gather(*workers)
            await asyncio.wait([stopped, everything], return_when=asyncio.FIRST_COMPLETED)
            if self.stopping.is_set():
                await asyncio.wait(workers, timeout=0 if late else GRACE)
                for worker in workers:
                    worker.cancel()
            if late:
                late.cancel()
            stopped.cancel()
            await asyncio.gather(stopped, everything, return_exceptions=True)
        if self.error is not None:
            raise self.error
        if self.stop_reason is None:
            await self._settle_doubtful()
        return self.stop_reason

    def stop(self, reason: str):
        super().stop(reason)
        self.let_loose.set()

    def _on_signal(self, workers: list[asyncio.Task], name: str):
        if self.stopping.is_set():  # asked twice: do not wait for the calls in flight
            for worker in workers:
                worker.cancel()
        self.stop(name)

    async def _work(self, source, alone: bool):
        try:
            if not alone:
                await self.let_loose.wait()
                if self.stopping.is_set():
                    return
            for request in source:
                await self._settle(request)
                if self.stopping.is_set():
                    return
        except CapReached:
            self.stop("cost cap")
        except Outage as outage:
            self.stop(str(outage))
        except Exception as error:
            # One worker's error ends the run: run() raises it after the calls in flight have been written down.
            self.error = self.error or error
            self.stop(type(error).__name__)
        finally:
            self.let_loose.set()

    async def _settle(self, request: ChatRequest):
        """Ask until there is an outcome, or until the run stops."""
        attempts = self.state.attempts.pop(request.id, 0)
        retry = 0
        while not self.stopping.is_set():
            try:
                attempts = await self._attempt(request, attempts)
                retry = 0
            except Fault as fault:
                self.state.faults[fault.kind] += 1
                self.lone_faults += 1
                if self.lone_faults >= LONE_FAULTS:
                    self.let_loose.set()
                if self._is_hopeless(fault, retry):
                    await self._fail(request, fault.kind, str(fault))
                    attempts = -1
                else:
                    await self._pause(back_off(retry, fault.wait))
                    retry += 1
            except RequestRefused as refused:
                await self._refuse(request, refused)
                attempts = -1
            if attempts < 0:
                self.on_outcome(self)
                return

    async def _attempt(self, request: ChatRequest, attempts: int) -> int:
        """One call and its outcome on disk. Returns as ``_record`` does."""
        expected = question_size(request.messages) / BYTES_PER_TOKEN + 300
        await self.slots.acquire()
        rate_limited = answered = False
        try:
            await self._pause(max(self.requests.wait_for(1), self.tokens.wait_for(expected)))
            limit = self.endpoint.limit(request)
            most = self.account.most(request.messages, limit)
            await self.account.hold(most)
            if self.stopping.is_set():
                self.account.settle(most)
                return attempts
            self.folder.note(sent=request.id, usd=most)
            try:
                answer = await self.endpoint.ask(request, attempts, limit)
            except (Fault, RequestRefused, EndpointRefused, Outage) as error:
                rate_limited = isinstance(error, Fault) and error.kind == "rate_limited"
                lost = self._lost_by(request, error, limit) if isinstance(error, Fault) else 0.0
                self.account.settle(most, lost=lost)
                kind = error.kind if isinstance(error, Fault) else "refused"
                self.folder.note(id=request.id, outcome=kind, lost=lost)
                raise
            answered = self.answered = True
            self.let_loose.set()
            self.given_up_in_a_row = 0
            usage, usd, book = self._count(request, answer, limit)
            self.tokens.correct(usage.prompt_tokens + usage.completion_tokens - expected)
            self.account.settle(most, spent=usd)
            return await self._record(request, answer, usage, usd, attempts, limit, **book)
        finally:
            self.slots.release(rate_limited, answered)

    def _is_hopeless(self, fault: Fault, retry: int) -> bool:
        """Whether to give up after ``retry`` retries. Raises where the endpoint is at fault, not the request."""
        if fault.wait is not None and fault.wait > LONGEST_WAIT:
            raise Outage(f"the endpoint asks to come back in {fault.wait / 60:.0f} minutes")
        if fault.kind == "unreachable":
            if not self.answered and retry + 1 >= TRIES_TO_CONNECT:
                raise EndpointRefused(f"nothing answers at {self.endpoint.shown_url}: {fault}; check --base_url")
            if retry >= self.limits.max_retries:
                raise Outage(f"nothing answers at {self.endpoint.shown_url} any more")
        patience = 3 if fault.kind == "rate_limited" else 1  # too fast is our fault, and passes
        if retry < self.limits.max_retries * patience:
            return False
        self.given_up_in_a_row += 1
        if self.given_up_in_a_row >= GIVEN_UP_IN_A_ROW:
            raise Outage(f"{self.given_up_in_a_row} requests in a row got no answer ({fault})")
        return True

    async def _refuse(self, request: ChatRequest, refused: RequestRefused):
        """Write a refusal down as a failure of its pair.

        Refusals before the first answer are kept back: if all are alike, the settings are wrong, and the mended
        command asks again.
        """
        if self.answered or self.state.results.size or refused.is_of_one_request:
            await self._fail(request, REFUSED, str(refused))
            self.lone_refusals += 1
            if self.lone_refusals >= DOUBTFUL:
                self.let_loose.set()
            return
        alike = self.doubtful.setdefault(re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", refused.message), [])
        alike.append((request, str(refused)))
        if len(alike) >= DOUBTFUL:
            raise EndpointRefused(f"{self.endpoint.shown_url} refuses every request: {refused}")
        if len(self.doubtful) >= DOUBTFUL:
            self.let_loose.set()

    async def _settle_doubtful(self):
        for alike in self.doubtful.values():
            for request, message in alike:
                await self._fail(request, REFUSED, message)


@contextmanager
def on_stop_signals(call: Callable[[str], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``call("signal SIGINT")`` inside the running event loop; afterwards all is as before."""
    loop, before = asyncio.get_running_loop(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        loop.add_signal_handler(number, call, f"signal {number.name}")
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
