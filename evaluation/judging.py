"""Verdicts of an external model, asked for with labelling's client: its journal, retries and cost cap.

Verdicts are cached by a hash of the exact judge prompt, so none is paid for twice when models are added or a killed
part is started again. The cost cap covers everything judged into one --out, also by several judges at once.
"""

import asyncio
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from deepspeed_chat_tlcr.asking.client import (
    agreed,
    ask_about_model,
    check_endpoint,
    discount,
    expected_effort,
    known_price,
    make_endpoint,
    run_all,
    signals_interrupt,
)
from deepspeed_chat_tlcr.asking.endpoint import ChatAnswer, ChatRequest, Sampling, Unusable
from deepspeed_chat_tlcr.asking.journal import RunFolder, State
from deepspeed_chat_tlcr.asking.money import HIDDEN_TOKENS, Account, estimate_tokens, question_size
from deepspeed_chat_tlcr.asking.progress import Progress, Totals
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_jsonl
from evaluation.options import JudgeOptions

VERDICT_TOKENS = 300  # of a typical verdict with its explanation, for estimates
NAMES = ("questions", "verdicts")


@dataclass(frozen=True)
class Judged:
    """What a judge is asked: the messages, and the models' ``answers`` that stand in them."""

    messages: list[dict]
    answers: Sequence[str]


@dataclass(frozen=True)
class Shortfall:
    """What a judged part lacks: ``missing`` of the verdicts ``asked`` for; ``stopped``: why it ended early, if so."""

    asked: int
    missing: int
    stopped: str | None = None


@dataclass(frozen=True)
class Verdicts:
    """What a judge said. ``by_id``: the stored line of each of the ``asked`` requests that has one."""

    asked: int
    by_id: dict[str, dict]
    usd: float  # over all runs in the folder
    stopped: str | None  # why the run ended early, if it did

    @property
    def shortfall(self) -> Shortfall:
        return Shortfall(self.asked, self.asked - len(self.by_id), self.stopped)


def check_judge(options: JudgeOptions) -> None:
    """Raise ``InputError`` for a judge that cannot be asked (gone, no price, no key), before any model answers."""
    check_endpoint(options)
    if options.judge:
        if not sys.stdin.isatty():  # someone at a terminal is asked for an unknown price when it is needed
            known_price(options, options.judge)
        ask_about_model(options, options.judge, 0.0, "--judge (JUDGE)")


def message_id(messages: list[dict]) -> str:
    """The same messages have the same id in every run."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:24]


def file_name(judge: str) -> str:
    """A judge's name, safe for files and folders."""
    return re.sub(r"[^\w.+-]", "_", judge)


def judge_all(
    part: Path,
    questions: Mapping[str, Judged],
    read: Callable[[str, Sequence[str]], dict],
    options: JudgeOptions,
) -> Verdicts:
    """Ask for every verdict that is not in ``part/judge/NAME`` yet; ``part`` is OUT/PART.

    ``questions``: by ``message_id``. ``read`` turns a judge's text about some answers into what is stored of it, or
    raises ``Unusable``, and the question is asked again. Raises ``InputError`` where the folder has other settings.
    """
    folder = part / "judge" / file_name(options.judge)
    settings = {
        "judge": options.judge,
        "temperature": options.judge_temperature,
        "reasoning_effort": options.reasoning_effort,
    }
    with RunFolder(folder, results="verdicts.jsonl") as run:
        bind(run, settings)
        state = run.read_state()
        for repair in run.repairs:
            print(f"repaired: {repair}", flush=True)
        known, given_up = set(as_ids(state.results)), set(as_ids(state.failures))
        skip = known if options.retry_failed else known | given_up
        missing = {id: question for id, question in questions.items() if id not in skip}
        if options.retry_failed:
            missing = {id: question for id, question in missing.items() if id in given_up}
            state.attempts.clear()
        stopped = ask(run, missing, read, options, settings, state) if missing else None
        state = run.read_state()
        by_id = {line["id"]: line for _, line in read_jsonl(run.results)} if run.results.exists() else {}
        found = {id: by_id[id] for id in questions if id in by_id}
        return Verdicts(len(questions), found, state.usd + state.usd_lost, stopped)


def bind(run: RunFolder, settings: dict) -> None:
    """Tie the folder to the settings once an answer was paid for; until then they may still change."""
    state = run.read_state()
    paid = len(state.results) or state.prompt_tokens or state.completion_tokens
    in_batches = any(path.stat().st_size for path in run.path.glob("batches.jsonl"))
    if not paid and not in_batches and run.saved_summary().get("settings") != settings:
        run.failures.unlink(missing_ok=True)  # requests that were refused with the old settings
        run.write_summary({"settings": settings, "complete": False})
    run.bind(settings)


def as_ids(ids: np.ndarray) -> list[str]:
    return [id.decode() for id in ids.tolist()]


# ---- money -----------------------------------------------------------------------------------------------------------


class SharedAccount(Account):
    """An account whose cap covers everything judged into one OUT, also by several judges at once.

    The file ``spent`` in each judge's folder OUT/PART/judge/NAME holds the US$ spent there and reserved for calls in
    flight; it is written before a call is sent.
    """

    def __init__(self, folder: Path, *account, **more):
        super().__init__(*account, **more)
        self.folder, self.out = folder, folder.parents[2]
        # Held by the one judge of OUT that reads or writes what was spent.
        self.spending = FileLock(self.out / ".spending", poll_interval=0.01)
        with self.spending:
            self._write(0.0)

    def fits(self, usd: float) -> bool:
        with self.spending:
            total = self.spent + self.lost + self.held + usd
            fits = self.cap is None or total + self._elsewhere() <= self.cap
            if fits:
                self._write(usd)
            return fits

    def settle(self, *ended, **more):
        super().settle(*ended, **more)
        with self.spending:
            self._write(0.0)

    def _write(self, usd: float):
        part = self.folder / "spent.part"
        part.write_text(f"{self.spent + self.lost + self.held + usd:.9f}\n")
        part.replace(self.folder / "spent")

    def _elsewhere(self) -> float:
        others = (other for other in self.out.glob("*/judge/*") if other != self.folder and other.is_dir())
        return sum(map(spent, others))


def spent(folder: Path) -> float:
    """US$ spent or reserved in a judge's folder."""
    if (folder / "spent").is_file():
        return float((folder / "spent").read_text())
    if not (folder / "run.json").is_file():
        return 0.0
    saved = RunFolder(folder).saved_summary()  # of a version that wrote no such file
    return (saved.get("usd") or 0.0) + (saved.get("usd_possibly_billed_without_answer") or 0.0)


# ---- asking ----------------------------------------------------------------------------------------------------------


def ask(
    run: RunFolder,
    missing: Mapping[str, Judged],
    read: Callable[[str, Sequence[str]], dict],
    options: JudgeOptions,
    settings: dict,
    state: State,
) -> str | None:
    """One run of the client over the missing verdicts; why it stopped early, if it did."""
    price = known_price(options, options.judge)
    sampling = Sampling(options.judge_max_tokens, options.judge_temperature, None, options.reasoning_effort)
    endpoint = make_endpoint(options, options.judge, sampling)
    run.redact = endpoint.redact
    size = sum(question_size(question.messages) for question in missing.values())
    limits = (options.concurrency, options.requests_per_minute, options.tokens_per_minute)
    tokens = VERDICT_TOKENS + HIDDEN_TOKENS.get(expected_effort(options, options.judge) or "none", 0)
    charged = price.discounted(discount(options, options.judge))
    expected = estimate_tokens(len(missing), size, len(missing) * tokens, charged, *limits)
    print(f"{options.judge} at {endpoint.shown_url}: {expected}", flush=True)
    if not agreed(options, expected):
        return "not agreed to"
    endpoint.dialect.context = ask_about_model(options, options.judge, expected.hours, "--judge (JUDGE)")

    def request(id: str, question: Judged) -> ChatRequest:
        def accept(answer: ChatAnswer, usage: dict) -> str:
            if answer.finish_reason == "content_filter" or not answer.text.strip():
                raise Unusable("empty")
            verdict = read(answer.text, question.answers)
            line = {"id": id, **verdict, "judgment": answer.text, "usage": usage, "tstamp": time.time()}
            return json.dumps(line, ensure_ascii=False)

        return ChatRequest(id, question.messages, accept)

    asked = len(state.results) + len(state.failures) + len(missing)

    def totals(state: State, seconds: float) -> Totals:
        counts = asked, len(state.results), len(state.failures)
        return Totals(*counts, state, state.usd, state.usd_lost, seconds, NAMES)

    spent_so_far = (state.usd, state.usd_lost, discount(options, options.judge), state.overrun)
    account = SharedAccount(run.path, price, options.max_cost_usd, *spent_so_far)
    about = {"base_url": endpoint.shown_url}
    progress = Progress(run, settings, about, totals(state, state.seconds), account, len(missing))
    requests = (request(id, question) for id, question in missing.items())
    stopped: str | None = "refused by the endpoint"
    try:
        with signals_interrupt():
            stopped = asyncio.run(run_all(options, endpoint, run, account, state, requests, progress))
    except KeyboardInterrupt:
        stopped = "signal"
    except InputError as error:
        raise InputError(endpoint.redact(str(error))) from None
    finally:
        summary = totals(run.read_state(), progress.seconds).summary(settings, about, stopped is None, stopped)
        run.write_summary(summary)
    return stopped
