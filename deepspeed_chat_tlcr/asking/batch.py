"""The same requests through OpenAI's Batch API: half the price, an answer within a day, can be killed at any moment.

    batches.jsonl            a line for each step of each batch: planned, uploaded, creating, created, merged
    batches/0001.jsonl       the requests of batch 1, batches/0001.output.jsonl its answers as downloaded

A batch whose id never reached the disk is recognised by its metadata, so it is not paid twice. Every answer is noted
with its place in its batch, so an interrupted merge continues behind it.
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
from deepspeed_chat_tlcr.asking.endpoint import ChatRequest, Endpoint, EndpointRefused, Fault, Outage, RequestRefused
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
NOTHING = "nothing"  # a finished batch that settled no request: the next one can wait


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
    settled: set[str] = field(default_factory=set)  # its ids that an earlier run has settled
    fields: dict[str, dict] | None = None  # by custom id: the request without its messages, once the file was read

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
        self.ended: Exception | None = None  # an error in a batch that ends the run: no credit, no such model
        self.learning = False  # whether the first batch has one request only
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
        """Send single calls until one is answered: with a field that is not taken, a whole file would be refused.

        Returns whether to go on. Azure's batch deployments take no single calls: there the first batch has one request.
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
            ids = np.array(chunk.ids, "S")
            settled = np.isin(ids, self.state.results) | np.isin(ids, self.state.failures)
            chunk.settled = {id.decode() for id in ids[settled]}
            self.account.held += chunk.usd
        if live:
            for _, line in read_jsonl(self.folder.calls) if self.folder.calls.exists() else ():
                if line.get("batch") in by_number:
                    by_number[line["batch"]].done.add(line["custom_id"])
        return run_id, live

    def _note(self, chunk: Chunk, step: str, **more):
        chunk.step = step
        write_synced(self.steps, {"chunk": chunk.number, "step": step, **more}, self.folder.redact)

    def _input(self, chunk: Chunk) -> Path:
        return self.files / f"{chunk.number:04d}.jsonl"

    # ---- one wave ----

    def _ours(self) -> list[Chunk]:
        """The batches that can be merged: all their requests are in this wave, or settled already.

        After a run with another --limit there can be others; they wait for their requests.
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
        """Make batches of the requests that are in none."""
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

        metadata = {"tlcr_run": self.run_id, "chunk": str(chunk.number)}
        wanted = {"endpoint": self.endpoint.batch_url, "completion_window": "24h", "metadata": metadata}

        async def create():
            if chunk.step == "creating":  # an earlier try may have reached the endpoint: look before paying again
                async for batch in batches.list(limit=100):
                    if metadata.items() <= (batch.metadata or {}).items():
                        return batch
            else:
                self._note(chunk, "creating")
            return await described(batches.create(input_file_id=chunk.file, **wanted))

        chunk.alone = len(self.live) == 1
        chunk.batch = (await self._call(create)).id
        self._note(chunk, "created", batch=chunk.batch)

    async def _look_at(self, chunk: Chunk) -> str | None:
        """Merge a batch that is over and return its status; None while it is on its way."""
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
        """Send requests again that no file of their finished batch mentions. ``paid``: they may have been billed."""
        for _, line in read_jsonl(self._input(chunk)):
            custom_id = line["custom_id"]
            waiting = self.waiting.get(_id(custom_id))
            if custom_id not in chunk.done and waiting:
                lost = self.account.most(waiting[-1].messages, self._limit_of(chunk, custom_id)) if paid else 0.0
                await self._no_answer(chunk, waiting[-1], custom_id, "missing_in_batch", "", lost)

    def _on_failed(self, chunk: Chunk, batch):
        """Handle a batch that the endpoint did not even start. Raises if trying again would not help."""
        errors = getattr(batch.errors, "data", None)
        errors = errors if isinstance(errors, list) else []
        codes, texts = ([getattr(error, name, None) for error in errors] for name in ("code", "message"))
        code = self.endpoint.cleaned(str(next(filter(None, codes), "unknown")))
        text = self.endpoint.cleaned(str(next(filter(None, texts), "no reason given")))
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
        """Write down every answer that is not on disk yet. Duplicates are skipped."""
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
            self.state.faults["malformed_body"] += 1  # its request will be missing, and is sent again
            return
        if custom_id in chunk.done or _id(custom_id) not in chunk.members:
            return
        waiting = self.waiting.get(_id(custom_id))
        if not waiting:  # an interrupted merge has written the result down, but not its cost
            self._count_only(chunk, custom_id, response)
            return
        request = waiting[-1]
        where = {"batch": chunk.number, "custom_id": custom_id}
        try:
            if status != 200:
                code, message, param = map(self.endpoint.cleaned, _error_of(line))
                if status == 0:
                    raise Fault(code or EXPIRED, message)
                self.endpoint.raise_for(status, code, message, param=param)
            answer = self.endpoint.read(response["body"])
        except (KeyError, TypeError) as error:
            lost = self.account.most(request.messages, self._limit_of(chunk, custom_id))
            await self._no_answer(chunk, request, custom_id, "malformed_body", str(error), lost)
            return
        except Fault as fault:
            lost = self._lost_by(request, fault, self._limit_of(chunk, custom_id))
            await self._no_answer(chunk, request, custom_id, fault.kind, str(fault), lost)
            return
        except (Outage, EndpointRefused) as error:
            # It ends the run, after this batch is merged. The next run asks about this pair again.
            self.ended = self.ended or error
            chunk.done.add(custom_id)
            self.state.faults["refused"] += 1
            self.folder.note(id=request.id, outcome="refused", **where)
            return
        except RequestRefused as refused:
            sent, now = self._fields(chunk, custom_id), self.endpoint.body(request).keys() - {"messages"}
            if self.endpoint.learn(refused, sent) or now != sent.keys():
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

    def _fields(self, chunk: Chunk, custom_id: str) -> dict:
        """A request as the batch's file has it, without its messages."""
        if chunk.fields is None:
            chunk.fields = {}
            for _, line in read_jsonl(self._input(chunk)):
                line["body"].pop("messages")
                chunk.fields[line["custom_id"]] = line["body"]
        return chunk.fields.get(custom_id, {})

    def _limit_of(self, chunk: Chunk, custom_id: str) -> int:
        """The most tokens that a request of a batch asked for."""
        sent = self._fields(chunk, custom_id)
        return next((sent[name] for name in LIMIT_FIELDS if name in sent), self.endpoint.sampling.max_tokens)

    def _count_only(self, chunk: Chunk, custom_id: str, response: dict | None):
        """Count the cost of an answer that is written down already."""
        chunk.done.add(custom_id)
        try:
            answer = self.endpoint.read(response["body"])
        except (KeyError, TypeError, Fault, RequestRefused, EndpointRefused, Outage):
            return
        sent = next(line["body"] for _, line in read_jsonl(self._input(chunk)) if line["custom_id"] == custom_id)
        messages, limit = sent["messages"], self._limit_of(chunk, custom_id)
        request = ChatRequest(_id(custom_id), messages, accept=lambda answer, usage: "")
        usage, usd, book = self._count(request, answer, limit)
        self.account.settle(0.0, spent=usd)
        where = {"batch": chunk.number, "custom_id": custom_id, **book}
        self.folder.note(id=_id(custom_id), outcome=ACCEPTED, usage=usage.as_dict(), usd=usd, **where)

    async def _no_answer(
        self, chunk: Chunk, request: ChatRequest, custom_id: str, kind: str, detail: str, lost: float = 0.0
    ):
        """Send a request again in the next batch, unless tried too often. ``lost``: the most it may have cost."""
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
        """``await call()``, with retries. Raises ``Outage`` when they are used up."""
        for retry in range(self.limits.max_retries + 1):
            try:
                with self.endpoint.classify_errors():
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
    """The file or batch that a call returns. Raises ``Fault`` for a reply that describes neither."""
    reply = await call
    if not isinstance(getattr(reply, "id", None), str):
        raise Fault("malformed_body", f"no id in {str(reply)[:100]!r}")
    return reply


async def with_status(call: Awaitable):
    """As ``described``, for a batch. Raises ``Fault`` for an unknown status."""
    batch = await described(call)
    if batch.status not in (*OVER, *ON_ITS_WAY):
        raise Fault("malformed_body", f"a batch with the status {str(batch.status)[:40]!r}")
    return batch


def _id(custom_id: str) -> str:
    return custom_id.rpartition("-")[0]


def _error_of(line: dict) -> tuple[str, str, str]:
    """Code, message and parameter of a batch line's error, wherever it stands."""
    body = (line.get("response") or {}).get("body")
    error = line.get("error") or (body.get("error") if isinstance(body, dict) else body) or {}
    if not isinstance(error, dict):
        return "", str(error), ""
    code, message, param = (str(error.get(key) or "") for key in ("code", "message", "param"))
    return code, message, param
