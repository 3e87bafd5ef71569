"""The same requests through OpenAI's Batch API: half the price, an answer within a day, restart-safe at every point.

    batches.jsonl            a line for each step of each batch: planned, uploaded, creating, created, merged
    batches/0001.jsonl       the requests of batch 1, batches/0001.output.jsonl its answers as downloaded

A batch that was created but whose id never reached the disk is found again by the metadata it was created with, so it
is not paid twice. Every answer is noted with its place in its batch, so a merge that was interrupted goes on behind it.
"""

import asyncio
import json
import math
import uuid
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.asking.dialect import LIMIT_FIELDS
from deepspeed_chat_tlcr.asking.dispatch import DOUBTFUL, REFUSED, Asker, Dispatcher, Limits, on_stop_signals
from deepspeed_chat_tlcr.asking.endpoint import (
    ChatAnswer,
    ChatRequest,
    Endpoint,
    EndpointRefused,
    Fault,
    Outage,
    RequestRefused,
)
from deepspeed_chat_tlcr.asking.journal import ACCEPTED, RunFolder, State, replace_file, write_synced
from deepspeed_chat_tlcr.asking.money import Account
from deepspeed_chat_tlcr.asking.pace import back_off
from deepspeed_chat_tlcr.records import parse_json, read_jsonl

MOST_BYTES = 190_000_000  # OpenAI takes files of 200 MB
WAVE = 50_000  # requests held in memory at a time
UPLOAD_PATIENCE = 5  # times --timeout: the endpoint looks through a file before it answers
FAILED_IN_A_ROW = 5
OVER = ("completed", "expired", "cancelled", "failed")
ON_ITS_WAY = ("validating", "in_progress", "finalizing", "cancelling")
EXPIRED = "batch_expired"
NOTHING = "nothing"  # a batch that is over and brought no outcome: the next one can wait


@dataclass
class Chunk:
    """One batch: its number, what it may cost, how far it has come."""

    number: int
    usd: float
    step: str = "planned"
    file: str = ""
    batch: str = ""
    alone: bool = False  # no other batch was on its way when this one was created
    ids: list[str] = field(default_factory=list)  # of its requests, in order
    done: set[str] = field(default_factory=set)  # custom ids whose answers are written down
    settled: set[str] = field(default_factory=set)  # its ids that have their outcome
    limits: dict[str, int] | None = None  # tokens of output by custom id, once its file was read for them
    body: dict | None = None  # of its first request, likewise

    @cached_property
    def members(self) -> set[str]:
        return set(self.ids)


class BatchRunner(Asker):
    """Has the interface of ``Dispatcher``: ``run`` returns why it stopped early, or None."""

    def __init__(self, endpoint: Endpoint, folder: RunFolder, account: Account, limits: Limits, state: State):
        super().__init__(endpoint, folder, account, limits, state)
        self.steps, self.files = folder.path / "batches.jsonl", folder.path / "batches"
        self.size = limits.batch_size
        self.failed_in_a_row = 0
        self.most_live = math.inf  # batches on their way at a time; fewer once the endpoint enqueues no more
        self.ended: Exception | None = None  # what a line of a batch says of the whole run: no credit, no such model
        self.learning = False  # does the first batch ask alone
        self.retries: Counter = Counter()
        self.waiting: dict[str, list[ChatRequest]] = {}  # requests of this wave without an outcome, by id

    async def run(self, requests: Iterable[ChatRequest], on_outcome=lambda runner: None) -> str | None:
        """Raises ``EndpointRefused`` for what only the user can mend, and what the system raises (a full disk)."""
        self.on_outcome = on_outcome
        source = iter(requests)
        self.run_id, self.live = self._restore()
        if not self.live and not await self._learn(source):
            return self.stop_reason
        try:
            with on_stop_signals(self.stop):
                while not self.stopping.is_set():
                    for request in islice(source, WAVE):
                        self.waiting.setdefault(request.id, []).append(request)
                    if not self.waiting and not self._ours():
                        return None
                    await self._finish_wave()
        except Outage as outage:
            self.stop(str(outage))
        return self.stop_reason

    async def _learn(self, source: Iterator[ChatRequest]) -> bool:
        """Ask plainly until one request is answered: a field that is not taken would cost a whole file of them.

        Whether to go on. Azure's deployments for batches answer no plain calls: there the first batch has one request.
        """
        if self.endpoint.azure_api_version:
            self.size = self.most_live = 1
            self.learning = True
            return True
        plain = Dispatcher(self.endpoint, self.folder, self.account, replace(self.limits, concurrency=1), self.state)

        def until_answered() -> Iterator[ChatRequest]:
            for request in islice(source, DOUBTFUL):
                yield request
                if plain.answered:
                    return

        discount, self.account.discount = self.account.discount, 1.0
        try:
            self.stop_reason = await plain.run(until_answered(), self.on_outcome)
        finally:
            self.account.discount = discount
        self.accepted, self.failed = self.accepted + plain.accepted, self.failed + plain.failed
        return self.stop_reason is None

    # ---- what is on disk ----

    def _restore(self) -> tuple[str, list[Chunk]]:
        """This folder's name in the batches' metadata, and the batches of earlier runs that are not merged yet."""
        self.files.mkdir(exist_ok=True)
        self.folder.repair(self.steps)
        run_id, chunks = "", dict[int, Chunk]()
        for _, line in read_jsonl(self.steps) if self.steps.exists() else ():
            if "run" in line:
                run_id = line["run"]
                continue
            chunk = chunks.setdefault(line["chunk"], Chunk(line["chunk"], line.get("usd", 0.0)))
            chunk.step = line["step"]
            chunk.file, chunk.batch = line.get("file", chunk.file), line.get("batch", chunk.batch)
        if not run_id:
            run_id = uuid.uuid4().hex
            write_synced(self.steps, {"run": run_id})
        self.last_number = max(chunks, default=0)
        live = [chunk for chunk in chunks.values() if chunk.step != "merged"]
        by_number = {chunk.number: chunk for chunk in live}
        for chunk in live:
            chunk.ids = [_id(line["custom_id"]) for _, line in read_jsonl(self._input(chunk))]
            chunk.settled = self._settled_before(chunk.ids)
            self.account.held += chunk.usd
        if live:
            for _, line in read_jsonl(self.folder.calls) if self.folder.calls.exists() else ():
                if line.get("batch") in by_number:
                    by_number[line["batch"]].done.add(line["custom_id"])
        return run_id, live

    def _settled_before(self, ids: list[str]) -> set[str]:
        found = np.array(ids, "S")
        settled = np.isin(found, self.state.results) | np.isin(found, self.state.failures)
        return {id.decode() for id in found[settled]}

    def _note(self, chunk: Chunk, step: str, **more):
        chunk.step = step
        write_synced(self.steps, {"chunk": chunk.number, "step": step, **more}, self.folder.redact)

    def _input(self, chunk: Chunk) -> Path:
        return self.files / f"{chunk.number:04d}.jsonl"

    # ---- one wave ----

    def _ours(self) -> list[Chunk]:
        """The batches on their way that can be merged: all their requests are in this wave, or settled already.

        Others can be there after a run with another --limit; their turn comes with their requests.
        """
        return [chunk for chunk in self.live if chunk.members <= self.waiting.keys() | chunk.settled]

    async def _finish_wave(self):
        while not self.stopping.is_set():
            self._plan()
            for chunk in self.live:
                if chunk.step != "created":
                    await self._submit(chunk)
            ours = self._ours()
            if not self.waiting and not ours:
                return
            over = [status for chunk in ours if (status := await self._look_at(chunk))]
            if not ours:
                self.stop("cost cap")  # requests wait, and not one fits under the cap
            elif not over or "failed" in over or NOTHING in over:
                await self._pause(self.limits.batch_poll)

    def _plan(self):
        """New batches for the requests that are in none."""
        in_batches = Counter(id for chunk in self.live for id in chunk.ids)
        todo = [
            request
            for id, requests in self.waiting.items()
            for request in requests[: max(len(requests) - in_batches[id], 0)]
        ]
        while todo and len(self.live) < self.most_live:
            usd, size, lines = 0.0, 0, []
            for request in todo[: self.size]:
                most = self.account.most(request.messages, self.endpoint.limit(request))
                custom_id = f"{request.id}-{len(lines)}"
                line = json.dumps(
                    {
                        "custom_id": custom_id,
                        "method": "POST",
                        "url": self.endpoint.batch_url,
                        "body": self.endpoint.body(request, self.state.attempts.get(request.id, 0)),
                    }
                )
                if (lines and size + len(line) + 1 > MOST_BYTES) or not self.account.fits(usd + most):
                    break
                lines.append(line + "\n")
                usd, size = usd + most, size + len(line) + 1
            if not lines:
                return
            self.last_number += 1
            chunk = Chunk(self.last_number, usd, ids=[request.id for request in todo[: len(lines)]])
            replace_file(self._input(chunk), map(self.folder.redact, lines))
            self._note(chunk, "planned", usd=usd)
            self.account.held += usd
            todo = todo[len(lines) :]
            self.live.append(chunk)

    async def _submit(self, chunk: Chunk):
        if not chunk.file:
            files, path = self.endpoint.client.files, self._input(chunk)
            patience = UPLOAD_PATIENCE * self.endpoint.timeout
            uploaded = await self._call(lambda: described(files.create(file=path, purpose="batch", timeout=patience)))
            chunk.file = uploaded.id
            self._note(chunk, "uploaded", file=chunk.file)
        batches = self.endpoint.client.batches

        async def create():
            # Of an earlier try it is not known whether it reached the endpoint: look before paying again.
            known = await self._find(chunk) if chunk.step == "creating" else None
            if chunk.step != "creating":
                self._note(chunk, "creating")
            return known or await described(
                batches.create(
                    input_file_id=chunk.file,
                    endpoint=self.endpoint.batch_url,
                    completion_window="24h",
                    metadata={"tlcr_run": self.run_id, "chunk": str(chunk.number)},
                )
            )

        chunk.alone = len(self.live) == 1
        chunk.batch = (await self._call(create)).id
        self._note(chunk, "created", batch=chunk.batch)

    async def _find(self, chunk: Chunk):
        async for batch in self.endpoint.client.batches.list(limit=100):
            metadata = batch.metadata or {}
            if metadata.get("tlcr_run") == self.run_id and metadata.get("chunk") == str(chunk.number):
                return batch
        return None

    async def _look_at(self, chunk: Chunk) -> str | None:
        """Merge a batch that is over; its status, or None where it is on its way."""
        batch = await self._call(lambda: with_status(self.endpoint.client.batches.retrieve(chunk.batch)))
        if batch.status not in OVER:
            return None
        outcomes = self.accepted + self.failed + sum(self.state.unusable.values())
        for kind, file in (("output", batch.output_file_id), ("errors", batch.error_file_id)):
            if file:
                await self._merge(chunk, await self._download(chunk, kind, file))
        if batch.status != "failed":
            await self._take_missing(chunk, paid=batch.status == "completed")
        self.live.remove(chunk)
        self.account.settle(chunk.usd)
        self._note(chunk, "merged", status=batch.status)
        if self.learning and self.answered:
            self.size, self.most_live, self.learning = self.limits.batch_size, math.inf, False
        if batch.status == "failed":
            self._on_failed(chunk, batch)
        else:
            self.failed_in_a_row = 0
        if self.ended is not None:
            raise self.ended
        brought = self.accepted + self.failed + sum(self.state.unusable.values()) > outcomes
        return batch.status if brought else NOTHING

    async def _take_missing(self, chunk: Chunk, paid: bool):
        """Requests of a batch that is over of which no file says anything: sent again, but not without end.

        ``paid``: each may have been billed like an answer.
        """
        for _, line in read_jsonl(self._input(chunk)):
            custom_id = line["custom_id"]
            waiting = self.waiting.get(_id(custom_id))
            if custom_id not in chunk.done and waiting:
                lost = self._most_of(chunk, waiting[-1], custom_id) if paid else 0.0
                await self._no_answer(chunk, waiting[-1], custom_id, "missing_in_batch", "", lost)

    def _most_of(self, chunk: Chunk, request: ChatRequest, custom_id: str) -> float:
        return self.account.most(request.messages, self._limit_of(chunk, custom_id))

    def _on_failed(self, chunk: Chunk, batch):
        """A batch the endpoint did not even start. Raises where trying again would not help."""
        errors = getattr(batch.errors, "data", None)
        errors = errors if isinstance(errors, list) else []
        codes, texts = ([getattr(error, name, None) for error in errors] for name in ("code", "message"))
        code = self.endpoint.told(str(next(filter(None, codes), "unknown")))
        text = self.endpoint.told(str(next(filter(None, texts), "no reason given")))
        self.state.faults[f"batch_{code}"] += 1
        self.failed_in_a_row += 1
        if code == "token_limit_exceeded":
            if chunk.alone and len(chunk.ids) == 1:
                raise EndpointRefused(f"{self.endpoint.shown_url} enqueues not even one request: {text}")
            if chunk.alone:
                self.size = len(chunk.ids) // 2
            else:
                self.most_live = max(1, min(self.most_live, len(self.live) + 1) - 1)
            return
        if self.failed_in_a_row >= FAILED_IN_A_ROW:
            raise Outage(f"{self.failed_in_a_row} batches in a row failed ({code}: {text})")
        if code not in ("unknown", "server_error", "internal_error"):
            raise EndpointRefused(f"{self.endpoint.shown_url} refuses the batch ({code}): {text}")

    async def _download(self, chunk: Chunk, kind: str, file: str) -> Path:
        path = self.files / f"{chunk.number:04d}.{kind}.jsonl"
        unfinished = path.with_suffix(".unfinished")

        async def download():
            async with self.endpoint.client.files.with_streaming_response.content(file) as response:
                await response.stream_to_file(unfinished)

        await self._call(download)
        with unfinished.open(encoding="utf-8", errors="replace") as lines:
            replace_file(path, map(self.folder.redact, lines))
        unfinished.unlink()
        return path

    # ---- answers ----

    async def _merge(self, chunk: Chunk, path: Path):
        """Write down every answer that is not yet: duplicates and those of an interrupted merge are passed over."""
        with path.open("rb") as lines:
            while group := list(islice(lines, 256)):
                outcomes = await asyncio.gather(*(self._take(chunk, line) for line in group), return_exceptions=True)
                for error in outcomes:
                    if error is not None:
                        raise error
                self.on_outcome(self)

    async def _take(self, chunk: Chunk, text: bytes):
        try:
            line = parse_json(text)
            custom_id = line["custom_id"]
            error, response = line.get("error"), line.get("response")
            if not isinstance(custom_id, str) or not isinstance(response, dict | None):
                raise TypeError("not the line of a request")
            status = 0 if error or not response else int(response["status_code"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self.state.faults["malformed_body"] += 1  # its request stays without an outcome, and is sent again
            return
        if custom_id in chunk.done or _id(custom_id) not in chunk.members:
            return
        waiting = self.waiting.get(_id(custom_id))
        if not waiting:  # an interrupted merge has written its outcome down, but not what it cost
            self._count_only(chunk, custom_id, response)
            return
        request = waiting[-1]
        where = {"batch": chunk.number, "custom_id": custom_id}
        try:
            if status != 200:
                code, message = _error_of(line)
                code, message = self.endpoint.told(code), self.endpoint.told(message)
                if status == 0:
                    raise Fault(code or EXPIRED, message)
                self.endpoint.raise_for(status, code, message, param=_param_of(line))
            answer = self.endpoint.read(response["body"])
        except (KeyError, TypeError) as error:
            lost = self._most_of(chunk, request, custom_id)
            await self._no_answer(chunk, request, custom_id, "malformed_body", str(error), lost)
            return
        except Fault as fault:
            lost = self._lost_by(request, fault, self._limit_of(chunk, custom_id))
            await self._no_answer(chunk, request, custom_id, fault.kind, str(fault), lost)
            return
        except (Outage, EndpointRefused) as error:
            # The run ends by it, once the batch is merged: the next run asks about this line's pair anew.
            self.ended = self.ended or error
            chunk.done.add(custom_id)
            self.state.faults["refused"] += 1
            self.folder.note(id=request.id, outcome="refused", **where)
            return
        except RequestRefused as refused:
            sent = self._sent(chunk)
            if self.endpoint.learn(refused, sent) or self._differs(request, sent):
                await self._no_answer(chunk, request, custom_id, "asked_otherwise", str(refused))
                return
            chunk.done.add(custom_id)
            self._settled(request)
            await self._fail(request, REFUSED, str(refused))
            self.folder.note(id=request.id, outcome="refused", **where)
            return
        chunk.done.add(custom_id)
        self.answered = True
        attempts = self.state.attempts.pop(request.id, 0)
        self._settled(request)
        limit = self._limit_of(chunk, custom_id)
        usage, usd, book = self._count(request, answer, limit)
        self.account.settle(0.0, spent=usd)
        attempts = await self._record(request, answer, usage, usd, attempts, limit, **where, **book)
        if attempts > 0:
            self.state.attempts[request.id] = attempts
            self.waiting.setdefault(request.id, []).append(request)

    def _sent(self, chunk: Chunk) -> dict:
        """A body as a batch's file has them: all have the same fields."""
        if chunk.body is None:
            chunk.body = next(line["body"] for _, line in read_jsonl(self._input(chunk)))
        return chunk.body

    def _limit_of(self, chunk: Chunk, custom_id: str) -> int:
        """The most tokens that a request of a batch asked for."""
        if chunk.limits is None:
            chunk.limits = {
                line["custom_id"]: next((line["body"][name] for name in LIMIT_FIELDS if name in line["body"]), 0)
                for _, line in read_jsonl(self._input(chunk))
            }
        return chunk.limits.get(custom_id) or self.endpoint.sampling.max_tokens

    def _differs(self, request: ChatRequest, sent: dict) -> bool:
        """Whether the fields that are sent by now are others than a batch's were."""
        return self.endpoint.body(request).keys() != sent.keys()

    def _count_only(self, chunk: Chunk, custom_id: str, response: dict | None):
        chunk.done.add(custom_id)
        try:
            answer = self.endpoint.read(response["body"])
        except (KeyError, TypeError, Fault, RequestRefused, EndpointRefused, Outage):
            return
        sent = next(line["body"] for _, line in read_jsonl(self._input(chunk)) if line["custom_id"] == custom_id)
        messages, limit = sent["messages"], self._limit_of(chunk, custom_id)
        usage, usd, book = self._count(ChatRequest(_id(custom_id), messages, _never), answer, limit)
        self.account.settle(0.0, spent=usd)
        where = {"batch": chunk.number, "custom_id": custom_id, **book}
        self.folder.note(id=_id(custom_id), outcome=ACCEPTED, usage=usage.as_dict(), usd=usd, **where)

    async def _no_answer(
        self, chunk: Chunk, request: ChatRequest, custom_id: str, kind: str, detail: str, lost: float = 0.0
    ):
        """Sent again with the next batch, unless that was tried too often. ``lost``: US$ it may have cost at most."""
        chunk.done.add(custom_id)
        self.state.faults[kind] += 1
        self.account.settle(0.0, lost=lost)
        self.folder.note(id=request.id, outcome=kind, batch=chunk.number, custom_id=custom_id, lost=lost)
        self.retries[request.id] += 1
        if self.retries[request.id] > self.limits.max_retries:
            self._settled(request)
            await self._fail(request, kind, detail)

    def _settled(self, request: ChatRequest):
        rest = self.waiting[request.id]
        rest.remove(request)
        if not rest:
            del self.waiting[request.id]

    # ---- calls ----

    async def _call(self, call):
        """``await call()`` until it brings something. Raises ``Outage`` when retries are used up."""
        for retry in range(self.limits.max_retries + 1):
            try:
                with self.endpoint.errors_told_apart():
                    return await call()
            except Fault as fault:
                last = fault
                self.state.faults[fault.kind] += 1
                await self._pause(back_off(retry, fault.wait))
                if self.stopping.is_set():
                    raise Outage(self.stop_reason) from None
            except RequestRefused as refused:
                raise EndpointRefused(f"{self.endpoint.shown_url} does not take batches: {refused}") from None
        raise Outage(f"the endpoint's Batch API gives no answer ({last})")


async def described(call: Awaitable):
    """The file or the batch that a call describes. Raises ``Fault`` where what came back describes none."""
    found = await call
    if not isinstance(getattr(found, "id", None), str):
        raise Fault("malformed_body", f"no id in {str(found)[:100]!r}")
    return found


async def with_status(call: Awaitable):
    """As ``described``, for a batch. Raises ``Fault`` where its status is none that a batch has."""
    batch = await described(call)
    if batch.status not in (*OVER, *ON_ITS_WAY):
        raise Fault("malformed_body", f"a batch with the status {str(batch.status)[:40]!r}")
    return batch


def _never(answer: ChatAnswer, usage: dict) -> str:
    raise AssertionError("its outcome is written down already")


def _id(custom_id: str) -> str:
    return custom_id.rpartition("-")[0]


def _error_of(line: dict) -> tuple[str, str]:
    """The code and the text of a batch line's error, wherever it stands."""
    body = (line.get("response") or {}).get("body")
    found = line.get("error") or (body.get("error") if isinstance(body, dict) else body) or {}
    if not isinstance(found, dict):
        return "", str(found)
    return str(found.get("code") or ""), str(found.get("message") or "")


def _param_of(line: dict) -> str:
    body = (line.get("response") or {}).get("body")
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("param") or "") if isinstance(error, dict) else ""
