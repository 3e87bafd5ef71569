"""Verdicts of an external model: labelling's client, journal, retries and cost cap, and no verdict is paid for twice.

A verdict belongs to the exact messages it was asked with, by their hash. So models may be added, and a part started
again after a kill; what was judged before is not asked again. The cost cap holds for all that is judged into one --out.
"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.arguments import option
from deepspeed_chat_tlcr.asking.client import (
    EndpointOptions,
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
from deepspeed_chat_tlcr.asking.endpoint import ChatAnswer, ChatRequest, Endpoint, Sampling, Unusable
from deepspeed_chat_tlcr.asking.journal import RunFolder, State
from deepspeed_chat_tlcr.asking.models import Price
from deepspeed_chat_tlcr.asking.money import HIDDEN_TOKENS, Account, estimate_tokens, question_size
from deepspeed_chat_tlcr.asking.progress import Progress, Totals
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_jsonl

VERDICT_TOKENS = 300  # of a typical verdict with its explanation, for estimates
NAMES = ("questions", "verdicts")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(EndpointOptions):
    """judge"""

    judge: str | None = option(None, "the judging model, such as gpt-4; unset: answers are written but not judged")
    judge_temperature: float | None = option(0.0, "sampling temperature of the judge")
    judge_max_tokens: int = option(2048, "most tokens of a verdict")


@dataclass(frozen=True)
class Verdicts:
    """What a judge said. ``by_id``: the stored line of each request that has one; ``failed``: those given up."""

    by_id: dict[str, dict]
    failed: int
    usd: float | None  # over all runs in the folder; None where the price is unknown
    stopped: str | None  # why the run ended early, if it did


def message_id(messages: list[dict]) -> str:
    """The same messages have the same id in every run."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:24]


def file_name(judge: str) -> str:
    """A judge's name as files and folders have it."""
    return re.sub(r"[^\w.+-]", "_", judge)


def judge_all(
    part: Path,
    questions: Mapping[str, list[dict]],
    read: Callable[[str], dict],
    options: JudgeOptions,
) -> Verdicts:
    """Ask for every verdict that is not in ``part/judge/NAME`` yet; ``part`` is OUT/PART.

    ``questions``: messages by ``message_id``. ``read`` turns a judge's text into what is stored of it, or raises
    ``Unusable``, and the question is asked again. Raises ``InputError`` where the folder belongs to another judge.
    """
    check_endpoint(options)
    folder = part / "judge" / file_name(options.judge)
    settings = {"judge": options.judge, "temperature": options.judge_temperature}
    with RunFolder(folder, results="verdicts.jsonl") as run:
        run.bind(settings)
        state = run.read_state()
        for repair in run.repairs:
            print(f"repaired: {repair}", flush=True)
        known, given_up = set(as_ids(state.results)), set(as_ids(state.failures))
        skip = known if options.retry_failed else known | given_up
        missing = {id: messages for id, messages in questions.items() if id not in skip}
        if options.retry_failed:
            missing = {id: messages for id, messages in missing.items() if id in given_up}
            state.attempts.clear()
        stopped = ask(run, missing, read, options, settings, state) if missing else None
        state = run.read_state()
        wanted = questions.keys()
        by_id = {line["id"]: line for _, line in read_jsonl(run.results)} if run.results.exists() else {}
        usd = state.usd + state.usd_lost
        failed = len(wanted & set(as_ids(state.failures)) - by_id.keys())
        return Verdicts({id: by_id[id] for id in wanted if id in by_id}, failed, usd, stopped)


def spent_elsewhere(folder: Path) -> float:
    """US$ that the other judges' folders OUT/PART/judge/NAME beside ``folder`` have cost: the cap is on their sum."""
    spent = 0.0
    for other in sorted(folder.parents[2].glob("*/judge/*")):
        if other != folder and other.is_dir():
            with RunFolder(other, results="verdicts.jsonl") as run:
                state = run.read_state()
            spent += state.usd + state.usd_lost
    return spent


def as_ids(ids: np.ndarray) -> list[str]:
    return [id.decode() for id in ids.tolist()]


def ask(
    run: RunFolder,
    missing: Mapping[str, list[dict]],
    read: Callable[[str], dict],
    options: JudgeOptions,
    settings: dict,
    state: State,
) -> str | None:
    """One run of the client over the missing verdicts; why it stopped early, if it did."""
    price = known_price(options, options.judge)
    sampling = Sampling(options.judge_max_tokens, options.judge_temperature, None, options.reasoning_effort)
    endpoint = make_endpoint(options, options.judge, sampling)
    run.redact = endpoint.redact
    size = sum(map(question_size, missing.values()))
    limits = (options.concurrency, options.requests_per_minute, options.tokens_per_minute)
    tokens = VERDICT_TOKENS + HIDDEN_TOKENS.get(expected_effort(options, options.judge) or "none", 0)
    charged = price.discounted(discount(options, options.judge))
    expected = estimate_tokens(len(missing), size, len(missing) * tokens, charged, *limits)
    print(f"{options.judge} at {endpoint.shown_url}: {expected}", flush=True)
    if not agreed(options, expected):
        return "not agreed to"
    endpoint.dialect.context = ask_about_model(options, options.judge, expected.hours, "--judge (JUDGE)")
    try:
        return dispatch(run, missing, read, options, settings, state, price, endpoint)
    except InputError as error:
        raise InputError(endpoint.redact(str(error))) from None


def dispatch(
    run: RunFolder,
    missing: Mapping[str, list[dict]],
    read: Callable[[str], dict],
    options: JudgeOptions,
    settings: dict,
    state: State,
    price: Price,
    endpoint: Endpoint,
) -> str | None:
    def request(id: str, messages: list[dict]) -> ChatRequest:
        def accept(answer: ChatAnswer, usage: dict) -> str:
            if answer.finish_reason == "content_filter" or not answer.text.strip():
                raise Unusable("empty")
            line = {"id": id, **read(answer.text), "judgment": answer.text, "usage": usage, "tstamp": time.time()}
            return json.dumps(line, ensure_ascii=False)

        return ChatRequest(id, messages, accept)

    cap = None if options.max_cost_usd is None else options.max_cost_usd - spent_elsewhere(run.path)
    account = Account(price, cap, state.usd, state.usd_lost, discount(options, options.judge), state.overrun)
    about = {"base_url": endpoint.shown_url}
    asked = len(state.results) + len(state.failures) + len(missing)
    before = Totals(
        asked, len(state.results), len(state.failures), state, state.usd, state.usd_lost, state.seconds, NAMES
    )
    progress = Progress(run, settings, about, before, account, len(missing))
    requests = (request(id, messages) for id, messages in missing.items())
    stopped: str | None = "refused by the endpoint"
    try:
        with signals_interrupt():
            stopped = asyncio.run(run_all(options, endpoint, run, account, state, requests, progress))
    except KeyboardInterrupt:
        stopped = "signal"
    finally:
        state = run.read_state()
        totals = Totals(
            asked, len(state.results), len(state.failures), state, state.usd, state.usd_lost, progress.seconds, NAMES
        )
        run.write_summary(totals.summary(settings, about, stopped is None, stopped))
    return stopped
