"""The parts of labelling that a server cannot show: pace, money, the journal's files."""

import asyncio
import email.utils
import json
import os
import time

import pytest

from deepspeed_chat_tlcr.asking import pace
from deepspeed_chat_tlcr.asking.endpoint import ChatRequest, Endpoint, retry_after
from deepspeed_chat_tlcr.asking.journal import DurableFile, RunFolder, id_array
from deepspeed_chat_tlcr.asking.models import Price, price_of
from deepspeed_chat_tlcr.asking.money import (
    Account,
    CapReached,
    Usage,
    counted_usage,
    estimate,
    most_prompt_tokens,
)
from deepspeed_chat_tlcr.asking.pace import AdaptiveLimit, RateLimit, back_off
from deepspeed_chat_tlcr.asking.redaction import redactor, without_secrets
from deepspeed_chat_tlcr.errors import InputError

ASKED = [{"role": "user", "content": "x" * 400}]


# ---- pace ------------------------------------------------------------------------------------------------------------


def test_retry_after_in_its_three_forms():
    assert retry_after({}) is None
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < retry_after({"retry-after": date}) <= 60
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "soon"}) is None


def test_back_off_grows_with_jitter_and_honours_what_the_server_asks():
    for retry, most in ((0, 0.5), (1, 1.0), (3, 4.0), (20, 60.0)):
        delays = [back_off(retry, None) for _ in range(200)]
        assert most / 2 <= min(delays) < max(delays) <= most
    assert all(10 <= back_off(0, 10.0) <= 11 for _ in range(50))
    assert len({back_off(0, 10.0) for _ in range(50)}) > 40  # those told the same do not come back together


def test_concurrency_shrinks_once_per_burst_and_grows_again():
    async def run():
        limit = AdaptiveLimit(16)
        for _ in range(16):
            await limit.acquire()
        waiting = asyncio.create_task(limit.acquire())
        for _ in range(8):  # a burst: all these calls were on their way when the first was refused
            limit.release(rate_limited=True)
        assert limit.limit == 12
        for _ in range(8):
            limit.release(answered=True)
        await waiting
        assert 12 < limit.limit <= 15
        limit.release(answered=True)
        for _ in range(200):
            await limit.acquire()
            limit.release(answered=True)
        assert limit.limit == 16
        for _ in range(50):
            await limit.acquire()
            limit.release(rate_limited=True)
        assert limit.limit == 1  # never none at all
        await asyncio.wait_for(limit.acquire(), 1)

    asyncio.run(run())


def test_no_more_calls_in_flight_than_the_limit():
    async def run():
        limit, peak = AdaptiveLimit(5), 0

        async def work():
            nonlocal peak
            await limit.acquire()
            peak = max(peak, limit.in_flight)
            await asyncio.sleep(0)
            limit.release(answered=True)

        await asyncio.wait_for(asyncio.gather(*(work() for _ in range(100))), 5)
        assert peak == 5

    asyncio.run(run())


def test_a_rate_limit_spreads_calls_evenly(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    limit = RateLimit(per_minute=60)
    assert [limit.wait_for(1) for _ in range(3)] == [0, 1, 2]
    now[0] += 10  # an idle time is not saved up for a burst
    assert [limit.wait_for(1) for _ in range(2)] == [0, 1]
    limit.correct(5)
    assert limit.wait_for(1) == 2 + 5
    assert [RateLimit(0).wait_for(1) for _ in range(3)] == [0, 0, 0]


# ---- money -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"prompt_tokens": 90, "completion_tokens": 9}, Usage(90, 9)),
        ({}, Usage(149, 15, estimated=True)),
        ({"prompt_tokens": -1, "completion_tokens": 9}, Usage(149, 9, estimated=True)),
        ({"prompt_tokens": "90", "completion_tokens": "9", "cost": "0.5"}, Usage(90, 9, billed=0.5)),  # as text
        ({"prompt_tokens": True, "completion_tokens": 9}, Usage(149, 9, estimated=True)),
        ({"prompt_tokens": 90, "completion_tokens": 0}, Usage(90, 15, estimated=True)),  # there is text
        ({"prompt_tokens": 24, "completion_tokens": 9}, Usage(149, 9, estimated=True)),  # fewer than one for 16 bytes
        ({"prompt_tokens": 90, "completion_tokens": 2}, Usage(90, 15, estimated=True)),
        ({"prompt_tokens": 10**9, "completion_tokens": 9}, Usage(149, 9, estimated=True)),  # no model takes as many
        # The larger of all figures: more than was asked for, more tokens than bytes, the total's rest.
        ({"prompt_tokens": 90, "completion_tokens": 5000}, Usage(90, 5000)),
        ({"prompt_tokens": 4000, "completion_tokens": 9}, Usage(4000, 9)),
        ({"prompt_tokens": 90, "completion_tokens": 9, "total_tokens": 600}, Usage(90, 510)),
        # Hidden reasoning: within the completion, beside it, beside it and in the total, under other names.
        (
            {"prompt_tokens": 90, "completion_tokens": 60, "completion_tokens_details": {"reasoning_tokens": 50}},
            Usage(90, 60, 50),
        ),
        ({"prompt_tokens": 90, "completion_tokens": 10, "reasoning_tokens": 500}, Usage(90, 510, 500)),
        ({"prompt_tokens": 90, "completion_tokens": 10, "reasoning_tokens": 4}, Usage(90, 14, 4)),  # 6 are too few
        (
            {"input_tokens": 90, "output_tokens": 60, "output_tokens_details": {"reasoning_tokens": 50}},
            Usage(90, 60, 50),
        ),
        ({"prompt_tokens": 90, "completion_tokens": 9, "cost": 0.25}, Usage(90, 9, billed=0.25)),
    ],
)
def test_usage_is_the_larger_of_all_that_is_reported_and_never_less_than_the_text_has(reported, expected):
    assert counted_usage(reported, ASKED, "y" * 42, limit=100) == expected


def test_unreported_tokens_of_a_model_that_thinks_are_counted_as_all_that_it_may_have_used():
    assert counted_usage({"prompt_tokens": 90}, ASKED, "y" * 42, limit=2000, thinks=True).completion_tokens == 2000


def test_what_an_answer_cost_beyond_its_limit_is_expected_of_the_next():
    account = Account(Price(0, 100), cap=2.0)
    assert account.most(ASKED, 1000) == pytest.approx(0.1)
    assert account.watch(0.05, ASKED, 1000) == 1.0
    assert account.watch(0.5, ASKED, 1000) == pytest.approx(7.5)  # 1.5 times what it was beyond
    assert account.most(ASKED, 1000) == pytest.approx(0.75)
    assert account.usd(Usage(90, 9, billed=0.25)) == 0.25


def test_prices(tmp_path):
    assert price_of("gpt-4-0125-preview") == Price(10, 30)
    assert Price(10, 30).usd(1_000_000, 100_000) == 13
    assert price_of("my-model") is None
    assert price_of("my-model", "https://api.example.com/v1") is None
    assert price_of("my-model", "http://127.0.0.1:8000/v1") == Price(0, 0)
    assert price_of("my-model", "http://gpu-node-3:8000/v1") == price_of("m", "http://10.0.0.7/v1") == Price(0, 0)
    wrong = {
        "[]": "not a JSON object",
        "{": "not JSON",
        "[" * 100_000: "not JSON",
        '{"m": {"input": 1}}': "m: expected",
        '{"m": {"input": -1, "output": 0}}': "m: expected",
        '{"m": {"input": 1, "output": 1, "efforts": ["little"]}}': "unknown effort 'little'",
        '{"m": {"input": 1, "output": 1, "shutdown": "soon"}}': "m: expected",
    }
    for text, complaint in wrong.items():
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(InputError, match=rf"--prices .*p.json: .*{complaint}"):
            price_of("m", path=tmp_path / "p.json")


def test_the_estimate():
    found = estimate(1000, 4_000_000, 400_000, Price(10, 30), concurrency=50)
    assert (found.calls, found.prompt_tokens, found.completion_tokens) == (1000, 1_000_000, 260_000)
    assert found.usd == pytest.approx(10 + 7.8)
    assert found.hours == pytest.approx((1000 * 1 + 260_000 * 0.025) / 50 / 3600)
    assert estimate(1000, 0, 0, None, 50, requests_per_minute=10).hours == pytest.approx(100 / 60)
    assert estimate(1000, 4_000_000, 0, None, 50, tokens_per_minute=10_000).hours == pytest.approx(1.16e6 / 1e4 / 60)


def test_an_account_holds_back_what_calls_in_flight_may_cost():
    async def run():
        account = Account(Price(10, 30), cap=1.0, spent=0.2, lost=0.1)
        await account.hold(0.4)
        waiting = asyncio.create_task(account.hold(0.4))
        await asyncio.sleep(0)
        assert not waiting.done()
        account.settle(0.4, spent=0.1)  # it cost less than it might have
        await asyncio.wait_for(waiting, 1)
        account.settle(0.4, lost=0.4)
        with pytest.raises(CapReached):
            await account.hold(0.3)
        assert (account.spent, account.lost, account.held) == (pytest.approx(0.3), pytest.approx(0.5), 0)

    asyncio.run(run())
    assert Account(Price(10, 30)).most(ASKED, 100) == pytest.approx((most_prompt_tokens(ASKED) * 10 + 3000) / 1e6)


# ---- the endpoint ----------------------------------------------------------------------------------------------------


def test_secrets_are_taken_out_of_any_text():
    key = "sk-a+b/c0123456789"
    redact = redactor(key, "https://user:pass-word@host/v1?code=query-secret")
    text = f"Bearer {key} {json.dumps(key)} sk-a%2Bb%2Fc0123456789 pass-word code=query-secret sk-other"
    assert redact(text) == 'Bearer [secret] "[secret]" [secret] [secret] [secret] sk-other'
    assert redactor("none")("none of them") == "none of them"  # a placeholder is no secret
    assert without_secrets("https://user:pass-word@host:8/v1?code=x") == "https://host:8/v1"


def test_the_body_of_a_request(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    local = Endpoint("m", "http://127.0.0.1:1/v1")
    request = ChatRequest("id", ASKED, accept=None, seed=5)
    assert local.body(request) == {"model": "m", "messages": ASKED, "max_tokens": 1024, "seed": 5}
    assert local.body(request, attempt=1)["seed"] != 5  # or a server that is deterministic would repeat itself
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    assert "max_completion_tokens" in Endpoint("whatever").body(request)  # OpenAI's own takes it for every model


# ---- the journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kept", "repaired"),
    [
        ('{"id": "a"}\n', '{"id": "a"}\n', False),
        ('{"id": "a"}\n{"id": "b"}', '{"id": "a"}\n{"id": "b"}\n', False),  # whole, only its line feed lacks
        ('{"id": "a"}\n{"id": "b', '{"id": "a"}\n', True),
        ('{"id": "a"}\n123', '{"id": "a"}\n', True),  # a number is a whole line of JSON, but not of ours
        ('{"id"', "", True),
        ('{"id": "a"}\n' + "\0" * 100_000, '{"id": "a"}\n', True),
        ('{"id": "' + "a" * 200_000 + '"}\n{"x', '{"id": "' + "a" * 200_000 + '"}\n', True),
        ("", "", False),
    ],
)
def test_a_torn_last_line_is_repaired(content, kept, repaired, tmp_path):
    path = tmp_path / "revisions.jsonl"
    path.write_text(content)
    with RunFolder(tmp_path) as folder:
        assert path.read_text() == kept
        assert bool(folder.repairs) == repaired


def test_a_line_counts_only_when_it_is_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: (time.sleep(0.05), synced.append(os.fstat(fd).st_size)))

    async def run():
        file = DurableFile(tmp_path / "x.jsonl")

        async def add(line):
            await file.append(line)
            assert synced[-1] >= 3
            return len(synced)

        syncs = await asyncio.gather(*(add(f"{i:02}\n") for i in range(50)))
        assert len(synced) < 10  # lines that arrive together share a sync
        assert max(syncs) == len(synced)
        await file.close()

    asyncio.run(run())
    assert (tmp_path / "x.jsonl").read_text().split() == [f"{i:02}" for i in range(50)]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    async def run():
        file = DurableFile(tmp_path / "x.jsonl")
        await file.append("one\n")
        monkeypatch.setattr(os, "fdatasync", full)
        with pytest.raises(OSError, match="No space left"):
            await file.append("two\n")
        await file.close()

    asyncio.run(run())
    assert (tmp_path / "x.jsonl").read_text() == "one\n"


def test_the_state_of_a_folder(tmp_path):
    def write(name, *records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 2}, "usd": 0.5}
    write("revisions.jsonl", {"id": "a"}, {"id": "b"})
    write("failures.jsonl", {"id": "b", "reason": "empty"}, {"id": "c", "reason": "x"}, {"id": "c", "reason": "y"})
    write(
        "calls.jsonl",
        {"sent": "a", "usd": 1.0},
        {"id": "a", "outcome": "accepted", **usage},
        {"sent": "d", "usd": 1.0},
        {"id": "d", "outcome": "unusable", "unusable": "rewrite", **usage},
        {"sent": "d", "usd": 1.0},
        {"id": "d", "outcome": "timeout", "lost": 1.0},
        {"sent": "e", "usd": 2.0},
        {"sent": "c", "usd": 1.0},
        {"id": "c", "outcome": "unusable", "unusable": "empty", **usage},
        {"id": "c", "outcome": "failed", "unusable": "empty", **usage},
    )
    for _ in range(2):  # reading notes the lost call: the second time it is not lost anew
        with RunFolder(tmp_path) as folder:
            state = folder.read_state()
        assert state.results.tolist() == [b"a", b"b"]
        assert state.failures.tolist() == [b"c"]  # b has a revision by now
        assert state.attempts == {"d": 1}  # c has its outcome
        assert (state.prompt_tokens, state.completion_tokens, state.usd) == (40, 8, 2.0)
        assert state.usd_lost == 1.0 + 2.0
        assert state.unusable == {"rewrite": 1, "empty": 2}
        assert state.faults == {"timeout": 1, "lost": 1}
    assert json.loads((tmp_path / "failures.jsonl").read_text())["reason"] == "y"


def test_ids_as_an_array():
    assert id_array([]).tolist() == []
    assert id_array(["ab", "c"]).tolist() == [b"ab", b"c"]
    assert len(id_array(f"{i:024x}" for i in range(25_000))) == 25_000


def test_a_folder_that_another_program_wrote_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"x": 1}')
    with RunFolder(tmp_path) as folder, pytest.raises(InputError, match="not a summary that this program wrote"):
        folder.bind({"model": "m"})
    (tmp_path / "run.json").unlink()
    (tmp_path / "revisions.jsonl").write_text('{"id": "a"}\n')
    with RunFolder(tmp_path) as folder, pytest.raises(InputError, match=r"no run\.json"):
        folder.bind({"model": "m"})
