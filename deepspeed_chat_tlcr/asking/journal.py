"""The output folder of a long series of paid calls: what is written there survives a kill at any moment.

    revisions.jsonl   accepted results, one line each, on disk before they count (the name is the caller's)
    failures.jsonl    id, reason and raw text of requests given up
    calls.jsonl       the account book: a line when a call starts, a line when it ends
    run.json          settings, counts, tokens, US$, seconds

One process at a time may write (an advisory lock, which the system drops when a process dies).
"""

import asyncio
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.errors import InputError, reading
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.records import parse_json, read_json, read_jsonl

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
            except Exception as error:  # whatever it is, somebody waits for each of these lines
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
    """Open with ``with``: takes the lock and repairs what a kill left behind; ``repairs`` says what that was."""

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
        """Tie the folder to settings. Raises ``InputError`` with every difference from those it is tied to."""
        saved = self.saved_summary()
        if not saved:
            if self.results.exists() and self.results.stat().st_size:
                raise InputError(f"{self.results} is there, but no {self.summary.name}: choose another --output_dir")
            self.write_summary({"settings": settings, "complete": False})
            return
        before = saved["settings"]
        # A setting that an earlier version did not have cannot speak against going on with what it paid for.
        names = [name for name in before if before[name] != settings.get(name)]
        if names:
            told = "; ".join(f"{name}: {_difference(before.get(name), settings.get(name))}" for name in names)
            raise InputError(
                f"--output_dir {self.path} holds a run with other settings, and mixing them would spoil it ({told}); "
                "use the earlier settings to continue it, or another --output_dir"
            )

    def write_summary(self, summary: dict):
        """Replace run.json; a reader sees the old or the new one, never half of it."""
        text = json.dumps(summary, indent=1, ensure_ascii=False).encode("utf-8", "replace").decode()
        replace_file(self.summary, [self.redact(text) + "\n"])

    # ---- what was done ----

    def read_state(self, samples: int = 1) -> State:
        """Read what earlier runs did; of the failures keep those still missing, at most ``samples`` lines per id."""
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
            # Written down, so that the next run does not take them for calls of this one.
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
        """Many lines at once, for what costs nothing: synced now and then, and at the end."""
        lines = iter(lines)
        with path.open("a", encoding="utf-8") as file:
            while chunk := [self.redact(line) + "\n" for line in itertools.islice(lines, 1000)]:
                file.writelines(chunk)
                file.flush()
                os.fdatasync(file.fileno())

    def note(self, **line):
        """A line in the account book: survives a kill of this process (not a loss of power, which costs an answer)."""
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
    """The ``id`` of every line as an array of byte strings: 24 bytes a line, not a Python object."""
    if not path.exists():
        return np.array([], "S1")
    return id_array(_id(path, number, line) for number, line in read_jsonl(path))


def _id(path: Path, number: int, line: dict) -> str:
    if not isinstance(line.get("id"), str):
        raise InputError(f"{path}:{number}: no 'id'; this line was not written by labelling, remove it")
    return line["id"]


def id_array(ids: Iterable[str]) -> np.ndarray:
    chunks, chunk = [np.array([], "S1")], []
    for id in ids:
        chunk.append(id.encode())
        if len(chunk) == 10_000:
            chunks.append(np.array(chunk))
            chunk = []
    return np.concatenate([*chunks, np.array(chunk, "S" if chunk else "S1")])


def replace_file(path: Path, lines: Iterable[str]):
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, record: dict, redact=str):
    """Append one line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(redact(json.dumps(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path):
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def cut_torn_line(path: Path) -> int:
    """Cut off a last line that a kill left unfinished; keep one that only lacks its line feed. Bytes removed."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = _last_line_start(file, end)
        file.seek(start)
        tail = file.read()
        if not tail or tail.endswith(b"\n"):
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


def _last_line_start(file, end: int) -> int:
    """Position of the last line, whether or not it ends with a line feed."""
    position = end - 1  # a line feed that ends the file ends the last line
    while position > 0:
        start = max(position - 65536, 0)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _difference(before, now) -> str:
    if isinstance(before, str) and isinstance(now, str) and "\n" in before + now:
        pairs = zip(before.splitlines() + [""], now.splitlines() + [""], strict=False)
        number, (old, new) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        return f"line {number} was {old!r}, now {new!r}"
    return f"was {before!r}, now {now!r}"
