"""The output folder of a long series of paid calls. What is written there survives a kill at any moment.

    revisions.jsonl   accepted results, one line each, on disk before they count (the name is the caller's)
    failures.jsonl    id, reason and raw text of requests given up
    calls.jsonl       the account book: a line when a call starts, a line when it ends
    run.json          settings, counts, tokens, US$, seconds

A lock lets one process write at a time.
"""

import asyncio
import itertools
import json
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.errors import InputError, reading
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.records import parse_json, read_json, read_jsonl, replace_file, sync_folder

OTHER_FOLDER = "choose another --output_dir, or mend it: it counts what was paid"
ACCEPTED, FAILED, LOST = "accepted", "failed", "lost"


class DurableFile:
    """Appends lines; ``append`` returns when the line is on disk. Lines that arrive meanwhile share the next sync."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        sync_folder(path.parent)
        self.pending: list[tuple[str, asyncio.Future]] = []
        self.writer: asyncio.Task | None = None

    async def append(self, line: str):
        done = asyncio.get_running_loop().create_future()
        self.pending.append((line, done))
        if self.writer is None or self.writer.done():
            self.writer = asyncio.create_task(self._write_pending())
        await asyncio.shield(done)

    async def _write_pending(self):
        while self.pending:
            batch, self.pending = self.pending, []
            try:
                await asyncio.to_thread(self._write, "".join(line for line, _ in batch).encode("utf-8", "replace"))
            except Exception as error:  # of any kind: each of these lines has a caller that waits
                for _, done in batch:
                    if not done.cancelled():
                        done.set_exception(error)
            else:
                for _, done in batch:
                    if not done.cancelled():
                        done.set_result(None)

    def _write(self, data: bytes):
        size = os.fstat(self.fd).st_size
        try:
            write_all(self.fd, data)
            os.fdatasync(self.fd)
        except OSError:
            os.ftruncate(self.fd, size)  # a full disk leaves no half line behind
            raise

    async def close(self):
        if self.writer is not None:
            await self.writer
        os.close(self.fd)


@dataclass
class State:
    """What earlier runs in this folder have done."""

    results: np.ndarray  # ids of accepted results, one entry per line
    failures: np.ndarray  # ids given up, one entry per line
    attempts: dict[str, int] = field(default_factory=dict)  # unusable answers so far, of requests in neither file
    unusable: Counter = field(default_factory=Counter)  # answers that could not be used, by reason
    faults: Counter = field(default_factory=Counter)  # calls without an answer, by kind
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # among the completion's
    overrun: float = 1.0  # see money.Account
    usd: float = 0.0
    usd_lost: float = 0.0  # the most that calls without an answer may have cost
    seconds: float = 0.0


class RunFolder:
    """Use it in a ``with`` statement, which takes the lock and repairs the files; ``repairs`` lists what was mended."""

    def __init__(self, path: str | Path, results: str = "revisions.jsonl", redact=str):
        self.path = Path(path)
        self.results, self.failures = self.path / results, self.path / "failures.jsonl"
        self.calls, self.summary = self.path / "calls.jsonl", self.path / "run.json"
        self.redact = redact
        self.repairs: list[str] = []

    def __enter__(self) -> "RunFolder":
        self.lock = lock(self.path)
        for path in (self.results, self.failures, self.calls):
            self.repair(path)
        return self

    def __exit__(self, *_):
        self.lock.close()

    def repair(self, path: Path):
        if size := cut_torn_line(path):
            self.repairs.append(f"{path}: removed a torn last line of {size} bytes")

    # ---- settings ----

    def saved_summary(self) -> dict:
        if not self.summary.exists():
            return {}
        try:
            saved = read_json(self.summary)
            if isinstance(saved, dict) and isinstance(saved.get("settings"), dict):
                return saved
        except ValueError:
            pass
        raise InputError(f"{self.summary}: not a summary that this program wrote; choose another --output_dir")

    def bind(self, settings: dict):
        """Tie the folder to these settings. Raises ``InputError`` that lists how they differ from earlier ones."""
        saved = self.saved_summary()
        if not saved:
            if self.results.exists() and self.results.stat().st_size:
                raise InputError(f"{self.results} is there, but no {self.summary.name}: choose another --output_dir")
            self.write_summary({"settings": settings, "complete": False})
            return
        before = saved["settings"]
        # A setting that an earlier version lacked must not stop a paid run from continuing.
        names = [name for name in before if before[name] != settings.get(name)]
        if names:
            changes = "; ".join(f"{name}: {_difference(before.get(name), settings.get(name))}" for name in names)
            raise InputError(
                f"--output_dir {self.path} holds a run with other settings, which must not be mixed ({changes}); "
                "use the earlier settings to continue it, or another --output_dir"
            )

    def write_summary(self, summary: dict):
        text = json.dumps(summary, indent=1, ensure_ascii=False).encode("utf-8", "replace").decode()
        replace_file(self.summary, [self.redact(text) + "\n"])

    # ---- what was done ----

    def read_state(self, samples: int = 1) -> State:
        """Read what earlier runs did; keep the failures that still have no result, at most ``samples`` lines per id."""
        state = State(line_ids(self.results), np.array([], "S1"))
        self._drop_settled_failures(state.results, samples)
        state.failures = line_ids(self.failures)
        with reading(self.summary, OTHER_FOLDER):
            state.seconds = float(self.saved_summary().get("seconds") or 0.0)
        open_calls: dict[str, list[float]] = {}
        for number, line in read_jsonl(self.calls) if self.calls.exists() else ():
            with reading(f"{self.calls}:{number}", OTHER_FOLDER):
                if "sent" in line:
                    open_calls.setdefault(line["sent"], []).append(float(line["usd"]))
                else:
                    _count_call(state, line, open_calls)
        lost = [usd for calls in open_calls.values() for usd in calls]
        state.usd_lost += sum(lost)
        if lost:
            state.faults[LOST] += len(lost)
            # Noted, so that the next run does not count them again.
            with self.calls.open("a", encoding="utf-8") as file:
                for id, calls in open_calls.items():
                    file.writelines(json.dumps({"id": id, "outcome": LOST, "lost": usd}) + "\n" for usd in calls)
            self.repairs.append(f"{self.calls}: {len(lost)} calls were in flight when the last run ended")
        return state

    def _drop_settled_failures(self, results: np.ndarray, samples: int):
        if not self.failures.exists():
            return
        failed = line_ids(self.failures)
        if not len(failed):
            return
        # A failure no longer counts once a retry brought a result; of several lines of one id the last is kept.
        done = Counter(results[np.isin(results, failed)].tolist())
        surplus = {id: count - max(samples - done[id], 0) for id, count in Counter(failed.tolist()).items()}
        surplus = {id: count for id, count in surplus.items() if count > 0}
        if not surplus:
            return

        def kept() -> Iterator[str]:
            for _, line in read_jsonl(self.failures):
                id = line["id"].encode()
                if surplus.get(id, 0) > 0:
                    surplus[id] -= 1
                else:
                    yield json.dumps(line, ensure_ascii=False) + "\n"

        replace_file(self.failures, kept())

    # ---- writing ----

    def open_files(self):
        self.result_file, self.failure_file = DurableFile(self.results), DurableFile(self.failures)
        self.call_fd = os.open(self.calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    async def close_files(self):
        await self.result_file.close()
        await self.failure_file.close()
        os.fsync(self.call_fd)
        os.close(self.call_fd)

    async def add_result(self, line: str):
        await self.result_file.append(self.redact(line) + "\n")

    async def add_failure(self, id: str, reason: str, raw: str):
        line = json.dumps({"id": id, "reason": reason, "raw": raw}, ensure_ascii=False)
        await self.failure_file.append(self.redact(line) + "\n")

    def add_lines(self, path: Path, lines: Iterable[str]):
        """Many lines at once, of results that cost nothing: synced every thousand lines."""
        lines = iter(lines)
        with path.open("a", encoding="utf-8") as file:
            while chunk := [self.redact(line) + "\n" for line in itertools.islice(lines, 1000)]:
                file.writelines(chunk)
                file.flush()
                os.fdatasync(file.fileno())

    def note(self, **line):
        """Add a line to the account book. It survives a kill of this process; a power cut may lose it."""
        write_all(self.call_fd, (self.redact(json.dumps(line)) + "\n").encode())


def _count_call(state: State, line: dict, open_calls: dict[str, list[float]]):
    id, outcome = line["id"], line["outcome"]
    if open_calls.get(id):
        open_calls[id].pop()
        if not open_calls[id]:
            del open_calls[id]
    state.usd += line.get("usd", 0.0)
    state.usd_lost += line.get("lost", 0.0)
    state.overrun = max(state.overrun, line.get("overrun", 1.0))
    if "usage" not in line:
        state.faults[outcome] += 1
        return
    state.prompt_tokens += line["usage"]["prompt_tokens"]
    state.completion_tokens += line["usage"]["completion_tokens"]
    state.reasoning_tokens += line["usage"].get("reasoning_tokens", 0)
    if "unusable" in line:
        state.unusable[line["unusable"]] += 1
    if outcome in (ACCEPTED, FAILED):
        state.attempts.pop(id, None)
    else:
        state.attempts[id] = state.attempts.get(id, 0) + 1


def line_ids(path: Path) -> np.ndarray:
    """The ``id`` of every line as an array of byte strings, 24 bytes each."""

    def ids() -> Iterator[str]:
        for number, line in read_jsonl(path) if path.exists() else ():
            if not isinstance(line.get("id"), str):
                raise InputError(f"{path}:{number}: no 'id'; this line was not written by labelling, remove it")
            yield line["id"]

    return id_array(ids())


def id_array(ids: Iterable[str]) -> np.ndarray:
    encoded = (id.encode() for id in ids)
    chunks = (np.array(chunk) for chunk in iter(lambda: list(itertools.islice(encoded, 10_000)), []))
    return np.concatenate([np.array([], "S1"), *chunks])


def write_synced(path: Path, record: dict, redact=str):
    """Append one line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(redact(json.dumps(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_all(fd: int, data: bytes):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def cut_torn_line(path: Path) -> int:
    """Cut off a last line that a kill left unfinished; keep one that lacks only its line feed. Returns bytes cut."""
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
        file.seek(start)
        tail = file.read()
        if not tail:
            return 0
        try:
            whole = isinstance(parse_json(tail), dict)
        except ValueError:
            whole = False
        if whole:
            file.write(b"\n")
        else:
            file.truncate(start)
        os.fsync(file.fileno())
        return 0 if whole else len(tail)


def _difference(before, now) -> str:
    if isinstance(before, str) and isinstance(now, str) and "\n" in before + now:
        pairs = zip(before.splitlines() + [""], now.splitlines() + [""], strict=False)
        number, (old, new) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        return f"line {number} was {old!r}, now {new!r}"
    return f"was {before!r}, now {now!r}"
