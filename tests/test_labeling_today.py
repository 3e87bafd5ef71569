"""labeling/main.py against a server with the habits of today's chat APIs (tests/fault_server.py)."""

import asyncio
import datetime
import json
import os
import socket
import threading
from contextlib import suppress

import pytest

from deepspeed_chat_tlcr.asking.client import EndpointOptions
from deepspeed_chat_tlcr.asking.dialect import Dialect, EffortRefused
from deepspeed_chat_tlcr.asking.endpoint import (
    ChatRequest,
    Endpoint,
    ErrorInAnswer,
    Fault,
    Sampling,
    read_completion,
    without_thinking,
)
from deepspeed_chat_tlcr.asking.journal import DurableFile
from deepspeed_chat_tlcr.asking.models import (
    DEFAULT_MODEL,
    EFFORTS,
    Listing,
    ask_listing,
    check_base_url,
    is_own_machine,
    read_table,
    reason_not_to_start,
)
from deepspeed_chat_tlcr.asking.money import Usage, counted_usage
from deepspeed_chat_tlcr.asking.redaction import printable
from deepspeed_chat_tlcr.errors import InputError
from tests.labeling_helpers import KEY, fault_server, ids, label, lines, run_json, write_pairs

BATCH = {"batch": True, "batch_poll": 0.2}
TODAY = datetime.date(2026, 11, 25)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 300)


def prices(tmp_path, **models) -> str:
    table = {name: {"input": given[0], "output": given[1]} for name, given in models.items()}
    (tmp_path / "prices.json").write_text(json.dumps(table))
    return str(tmp_path / "prices.json")


# ---- the dialect -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, BATCH], ids=["plain", "batch"])
def test_what_one_refusal_told_holds_for_the_crowd(way, pairs, tmp_path):
    """Another limit field, an effort that is not there, no sampling while it thinks: told once, not 64 times."""
    log, output = tmp_path / "log", tmp_path / "out"
    habits = {"wants": "max_completion_tokens", "efforts": "low,medium,high", "picky": True, "think": 200}
    with fault_server(log, **habits) as url:
        options = {"model": "my-deployment", "temperature": 0.7, "concurrency": 64, "max_tokens": 1000, **way}
        assert label(pairs, url, output, **options) == 0
    assert len(lines(output / "revisions.jsonl")) == 300
    assert lines(output / "failures.jsonl") == []
    refused = [line["why"] for line in lines(log) if line["got"] == "refused"]
    assert len(refused) == 2  # of the limit's field and of the effort, which tells of the temperature too
    learnt = run_json(output)["learnt"]
    assert (learnt["limit_field"], learnt["reasoning_effort"]) == ("max_completion_tokens", "low")
    assert "temperature" in learnt["left_out"]


def test_an_azure_batch_deployment_learns_from_a_batch_of_one(tmp_path):
    few, log = write_pairs(tmp_path / "few.jsonl", 12), tmp_path / "log"
    with fault_server(log, wants="max_completion_tokens", efforts="-") as url:
        azure = {"azure_api_version": "2024-10-21", "model": "d", "price": "1"}
        options = {**azure, **BATCH, "prices": prices(tmp_path, d=(1, 1))}
        del options["price"]
        assert label(few, url.removesuffix("/v1"), tmp_path / "out", **options) == 0
    assert len(lines(tmp_path / "out" / "revisions.jsonl")) == 12
    assert [line["requests"] for line in lines(log) if line["got"] == "batch"] == [1, 1, 1, 11]
    assert sum(line["got"] == "refused" for line in lines(log)) == 2


def test_an_effort_asked_for_by_name_is_not_exchanged(tmp_path, capsys):
    few = write_pairs(tmp_path / "few.jsonl", 3)
    with fault_server(efforts="low,medium") as url:
        assert label(few, url, tmp_path / "out", reasoning_effort="none") == 2
    assert "--reasoning_effort none: gpt-4-0125-preview takes low, medium" in capsys.readouterr().err


OTHER_LIMIT = {"limit_field": "max_completion_tokens"}
SENT = {"max_tokens": 1000, "temperature": 0.5, "reasoning_effort": "none"}


@pytest.mark.parametrize(
    ("code", "param", "message", "after"),
    [
        (
            "unsupported_parameter",
            "max_tokens",
            "Use 'max_completion_tokens'",
            {"limit_field": "max_completion_tokens"},
        ),
        ("", "", "Extra inputs are not permitted: max_tokens", OTHER_LIMIT),
        ("unsupported_value", "temperature", "Only the default (1) is supported", {"left_out": ["temperature"]}),
        ("", "", "Unrecognized request argument supplied: reasoning_effort", {"effort": None}),
        ("", "body.reasoning_effort", "Input should be 'low', 'medium' or 'high'", {"effort": "low"}),
        ("", "", "max_tokens is too large: 1000. This model supports at most 512", {"most_output": 512}),
        ("", "", "This model's maximum context length is 2048 tokens. However, you requested 3000", {"context": 2048}),
    ],
)
def test_refusals_in_the_words_of_several_servers(code, param, message, after):
    dialect = Dialect(effort="none", lowest=True)
    assert dialect.learn(400, code, param, message, SENT)
    for name, value in after.items():
        assert getattr(dialect, name) == value


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "content_filter", "max_tokens and temperature are not supported for this prompt"),
        (400, "", "the prompt is too long"),
        (500, "unsupported_parameter", "max_tokens is not supported"),
        (400, "invalid_request_error", "we cannot process your request"),
    ],
)
def test_refusals_that_tell_nothing(status, code, message):
    dialect = Dialect(effort="none", lowest=True)
    assert not dialect.learn(status, code, "", message, SENT)
    assert dialect == Dialect(effort="none", lowest=True)


def test_two_limit_fields_that_are_refused_are_both_left_out():
    dialect = Dialect()
    assert dialect.learn(400, "", "max_tokens", "unknown field", {"max_tokens": 9})
    assert dialect.learn(400, "", "max_completion_tokens", "unknown field", {"max_completion_tokens": 9})
    assert dialect.fields(9) == {}
    with pytest.raises(EffortRefused):
        Dialect(effort="none").learn(400, "", "reasoning_effort", "does not support 'none', but 'low'", SENT)


# ---- hidden reasoning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, BATCH], ids=["plain", "batch"])
@pytest.mark.parametrize("thought", ["", "reasoning_content", "reasoning", "tag"])
def test_an_answer_that_thinking_ate_is_asked_again_with_more_room(thought, way, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    data = write_pairs(tmp_path / "pairs.jsonl", 60)
    with fault_server(log, think=1400, thought=thought, efforts="-") as url:
        assert label(data, url, output, max_tokens=600, attempts=4, model="m", **way) == 0
    run = run_json(output)
    assert lines(output / "failures.jsonl") == []
    assert set(run["counts"]["unusable_answers"]) == {"cut_by_max_tokens"}
    limits = [line["limit"] for line in lines(log) if "limit" in line]
    assert limits[0] == 600
    assert max(limits) >= 1400
    if not way:
        assert sum(limit == 600 for limit in limits) < 40  # once two were cut, all get more room
    billed = [line for line in lines(log) if line["got"] == "billed"]
    assert run["tokens"]["completion"] >= sum(line["completion"] for line in billed)
    assert run["tokens"]["of_which_reasoning"] > 0
    assert all("So I think" not in line["modified"] + line["reasoning"] for line in lines(output / "revisions.jsonl"))


@pytest.mark.parametrize("usage", ["openai", "apart", "apart_total", "names"])
@pytest.mark.parametrize("way", [{}, BATCH], ids=["plain", "batch"])
def test_the_cap_holds_under_every_usage_report(usage, way, pairs, tmp_path):
    """US$ as the server bills, hidden reasoning beyond the limit included: not under-counted, never above the cap."""
    log, output, cap = tmp_path / "log", tmp_path / "out", 8.0
    options = {"model": "m", "prices": prices(tmp_path, m=(1, 100)), "max_cost_usd": cap, "concurrency": 64}
    with fault_server(log, think=4000, usage=usage, efforts="-") as url:
        assert label(pairs, url, output, max_tokens=1000, **options, **way, yes=True) == 3
        assert label(pairs, url, output, max_tokens=1000, **options, **way, yes=True) == 3  # nor by starting again
    run, plain = run_json(output), run_json(output)["counts"]["revisions"]
    billed = [line for line in lines(log) if line["got"] == "billed"]
    usd = sum(line["prompt"] + 100 * line["completion"] for line in billed) / 1e6 * (0.5 if way else 1)
    assert plain > 0
    assert usd <= run["usd"] + 0.4 * bool(way) + 1e-6
    assert run["usd"] <= cap
    assert usd <= cap
    assert run["stopped"] == "cost cap"


def test_thinking_in_tags_is_not_the_answer():
    assert without_thinking("<think>a</think>\n\nb") == ("b", "a")
    assert without_thinking("\n<Thinking>a</thinking><think>b</think>c") == ("c", "ab")
    assert without_thinking("opened by the template</think>\nb") == ("b", "opened by the template")
    assert without_thinking("<think>cut", cut=True) == ("", "cut")
    assert without_thinking("<think> is a tag") == ("<think> is a tag", "")
    assert without_thinking("use <think>x</think> here") == ("use <think>x</think> here", "")
    assert without_thinking(" plain\n") == (" plain\n", "")


# ---- early answers, errors, credit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["filter", "too_long"])
def test_refusals_of_single_pairs_are_theirs_however_early_they_come(word, tmp_path):
    data = tmp_path / "pairs.jsonl"
    write_pairs(data, 60)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows[:36]:
        row["rejected"] = " forbidden" + row["rejected"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with fault_server(tmp_path / "log", **{word: "forbidden"}, delay=0.05) as url:
        assert label(data, url, tmp_path / "out", max_failure_share=0.7) == 0
        assert label(data, url, tmp_path / "strict") == 4
        assert run_json(tmp_path / "strict")["complete"] is False
        assert label(data, url, tmp_path / "strict") == 4  # not by starting again either
        assert label(data, url, tmp_path / "strict", max_failure_share=0.7) == 0
    assert len(lines(tmp_path / "out" / "revisions.jsonl")) == 24
    assert {line["reason"] for line in lines(tmp_path / "out" / "failures.jsonl")} == {"refused_by_endpoint"}


@pytest.mark.parametrize(
    "credit",
    [
        "402|payment_required|Payment required",
        "402||insufficient credits",
        "429|insufficient_quota|You exceeded your current quota, please check your plan and billing details.",
        "400|billing_hard_limit_reached|Billing hard limit has been reached",
        "400|invalid_request_error|Your credit balance is too low to access the API.",
        "403|permission_denied|Insufficient balance",
    ],
)
def test_credit_that_ends_stops_the_run_which_can_go_on(credit, tmp_path, capsys):
    few, output = write_pairs(tmp_path / "few.jsonl", 30), tmp_path / "out"
    with fault_server(tmp_path / "log", credit_after=10, credit=credit) as url:
        assert label(few, url, output, concurrency=4) == 3
    assert lines(output / "failures.jsonl") == []
    assert len(lines(output / "revisions.jsonl")) == 10
    assert "the credit at" in capsys.readouterr().out
    with fault_server() as url:
        assert label(few, url, output) == 0


def test_errors_inside_http_200_are_errors_in_their_own_words(tmp_path):
    few, output = write_pairs(tmp_path / "few.jsonl", 40), tmp_path / "out"
    with fault_server(tmp_path / "log", error_in_200=0.3) as url:
        assert label(few, url, output, concurrency=8) == 0
    run = run_json(output)
    assert run["counts"]["calls_without_answer"] == {"http_502": pytest.approx(17, abs=15)}
    assert run["usd_possibly_billed_without_answer"] == 0
    with pytest.raises(ErrorInAnswer, match="Provider returned error"):
        read_completion({"choices": None, "error": {"message": "Provider returned error", "code": 502}})


def test_bodies_without_end_cost_neither_memory_nor_the_run(tmp_path):
    few, output = write_pairs(tmp_path / "few.jsonl", 20), tmp_path / "out"
    with fault_server(tmp_path / "log", huge=0.4) as url:
        assert label(few, url, output, concurrency=4, timeout=20) == 0
    assert len(lines(output / "revisions.jsonl")) == 20
    kinds = set(run_json(output)["counts"]["calls_without_answer"])
    assert kinds <= {"too_large", "malformed_body", "connection_lost"}
    assert "too_large" in kinds


@pytest.mark.parametrize("way", [{}, BATCH], ids=["plain", "batch"])
def test_a_key_at_every_place_of_a_message_is_nowhere(way, tmp_path, capfd):
    """The server repeats it at each offset, cut and whole, with escape sequences and half characters around it."""
    data, output = write_pairs(tmp_path / "pairs.jsonl", 120), tmp_path / "out"
    with fault_server(tmp_path / "log", echo_key=True) as url:
        assert label(data, url, output, **way) == 4
    texts = list(capfd.readouterr()) + [path.read_text() for path in output.rglob("*") if path.is_file()]
    assert any("[secret]" in text for text in texts)
    for text in texts:
        assert all(KEY[:length] not in text for length in (12, len(KEY)))
        assert "\x1b[2J" not in text
        assert "\u202e" not in text
    assert printable("a\x1b[2J\u202eb\ud800c\nd") == "a [2J b?c d"


@pytest.mark.parametrize(
    "odd",
    ["missing", "junk", "unreadable", "id_number", "id_list", "text_response", "text_body", "endless_status"],
)
def test_a_batch_that_lacks_or_garbles_answers_ends_and_is_in_the_book(odd, tmp_path):
    """Once: the pair is asked again. For ever: it is a failure after --max_retries, and what may be billed counts."""
    few, log = write_pairs(tmp_path / "few.jsonl", 12), tmp_path / "log"
    options = {"model": "m", "prices": prices(tmp_path, m=(1, 10)), "max_retries": 2, **BATCH}
    with fault_server(log, batch_odd=odd, batch_odd_once=True) as url:
        assert label(few, url, tmp_path / "once", **options) == 0
    failed = len(lines(tmp_path / "once" / "failures.jsonl"))
    assert failed == (odd == "text_body")  # a refusal of this one pair
    assert len(ids(tmp_path / "once")) == 12
    log.write_text("")
    with fault_server(log, batch_odd=odd) as url:
        assert label(few, url, tmp_path / "ever", max_failure_share=1, **options) == 0
    assert set(ids(tmp_path / "ever").values()) == {1}
    assert sum(line["got"] == "batch" for line in lines(log)) <= 40
    lost = run_json(tmp_path / "ever")["usd_possibly_billed_without_answer"]
    if odd == "unreadable":  # by what it reports: 500 in, 4,000 out, at half the price
        calls = run_json(tmp_path / "ever")["counts"]["calls_without_answer"]["malformed_body"]
        assert lost == pytest.approx(calls * 0.5 * (500 + 40_000) / 1e6, rel=1e-3)
    assert (lost > 0) == (odd != "text_body")


@pytest.mark.parametrize("odd", ["credit", "gone", "key"])
def test_a_line_of_a_batch_that_ends_the_run_does_not_lock_its_folder(odd, tmp_path):
    few, output = write_pairs(tmp_path / "few.jsonl", 12), tmp_path / "out"
    with fault_server(batch_odd=odd, batch_odd_once=True) as url:
        assert label(few, url, output, **BATCH) == 3
        assert len(lines(output / "revisions.jsonl")) == 11  # the other answers were paid for, and are there
        assert label(few, url, output, **BATCH) == 0
    assert set(ids(output).values()) == {1}
    assert len(lines(output / "revisions.jsonl")) == 12


def test_texts_do_not_follow_a_redirect(tmp_path, capsys):
    few, log = write_pairs(tmp_path / "few.jsonl", 3), tmp_path / "elsewhere"
    with fault_server(log) as other, fault_server(redirect=f"{other}/chat/completions") as url:
        assert label(few, url, tmp_path / "out") == 2
        assert f"redirects to {other}/chat/completions: give the final address" in capsys.readouterr().err
    assert lines(log) == []


def test_an_endpoint_that_finds_fault_for_ever_is_not_asked_for_ever(tmp_path):
    few = write_pairs(tmp_path / "few.jsonl", 4)
    with fault_server(tmp_path / "log", shrinks=True) as url:
        assert label(few, url, tmp_path / "out") == 4
    assert len(lines(tmp_path / "out" / "failures.jsonl")) == 4


@pytest.mark.parametrize("wait", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "nan", "-1"])
def test_a_waiting_time_that_is_none_is_no_waiting_time(wait, tmp_path):
    few = write_pairs(tmp_path / "few.jsonl", 4)
    with fault_server(odd_wait=wait) as url:
        assert label(few, url, tmp_path / "out") == 0


@pytest.mark.parametrize("way", ["drip", "broken", "garbage"])
def test_a_models_route_that_misbehaves_holds_nothing_up(way):
    """A byte now and then for ever, a chunk without its end, no HTTP at all."""
    served = {
        "drip": b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n{",
        "broken": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\n{",
        "garbage": b"NOPE\r\n",
    }
    stop = threading.Event()

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.recv(65_536)
                    connection.sendall(served[way])
                    while way == "drip" and not stop.wait(0.05):
                        connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        assert ask_listing("m", f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "", timeout=1.0) == Listing()
        stop.set()


def answer_of(**message) -> dict:
    return {"choices": [{"message": {"content": "x", **message}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], "x", 3, {}, {"choices": {}}, {"choices": "abc"}, {"choices": [None]}, {"choices": [[]]}),
        *({"choices": ["a"]}, {"choices": [{"message": "hi"}]}, {"choices": [], "error": None}),
        *(answer_of(content=3), answer_of(content=["a"]), answer_of(content=[{"text": 3}]), answer_of(refusal=4)),
        *({"error": "boom"}, {"error": ["a"]}, {"error": {"code": [1], "message": {"a": 1}}}),
        *({"choices": [{"error": {"code": 500}}]}, {"error": {"code": 429}}),
    ],
)
def test_bodies_of_odd_types_are_calls_without_an_answer(body):
    with pytest.raises(Fault):
        Endpoint("m", "http://127.0.0.1:1/v1").read(body)


@pytest.mark.parametrize(
    "usage",
    [
        [1],
        {"completion_tokens_details": [1], "prompt_tokens": float("nan"), "cost": float("nan")},
        {"cost": "free", "total_tokens": True, "completion_tokens_details": {"reasoning_tokens": "five"}},
        {"completion_tokens_details": {"reasoning_tokens": [5]}, "completion_tokens": -1},
        {"prompt_tokens": "many", "completion_tokens": "4e2", "cost": [1]},
    ],
)
def test_usage_of_odd_types_is_estimated(usage):
    endpoint, asked = Endpoint("m", "http://127.0.0.1:1/v1"), [{"role": "user", "content": "q" * 30}]
    answer = endpoint.read({**answer_of(), "usage": usage})
    assert counted_usage(answer.usage, asked, answer.text, 100) == Usage(26, 1, estimated=True)
    assert not endpoint.observe(ChatRequest("i", asked, str), answer, 1024)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_the_table_of_models():
    table = read_table()
    assert (table["gpt-6-luna"].price.input, table["gpt-6-luna"].price.output) == (0.1, 0.5)
    assert table["gpt-4-0125-preview"].end(TODAY) == "gpt-4-0125-preview was shut down on 2026-03-26; use gpt-6-luna"
    assert table["gpt-5"].end(TODAY) == "gpt-5 will be shut down on 2026-12-11; use gpt-6.1-sol"
    assert table["gpt-5"].end(TODAY, days=10) is None
    assert table[DEFAULT_MODEL].end(TODAY) is None
    for model in table.values():
        assert list(model.efforts) == sorted(model.efforts, key=EFFORTS.index)
        assert model.default_effort is None or model.default_effort in model.efforts
        if model.shutdown:  # what it names as its successor lives longer
            heir = table[model.successor]
            assert heir.shutdown is None or heir.shutdown > model.shutdown


@pytest.mark.parametrize(
    ("listing", "hours", "sentence"),
    [
        (Listing(), 100, None),
        (Listing(shutdown=TODAY + datetime.timedelta(5)), 100, None),
        (Listing(shutdown=TODAY + datetime.timedelta(4)), 100, "m will be shut down before this run can end, on"),
        (Listing(shutdown=TODAY), 0, "m was shut down on 2026-11-25: set --model (LABEL_MODEL) to gpt-6-luna"),
        (Listing(unknown="no such model"), 0, "the endpoint has no model 'm' (no such model): set --model"),
    ],
)
def test_a_model_that_does_not_outlive_the_run(listing, hours, sentence):
    told = reason_not_to_start("m", listing, hours, "--model (LABEL_MODEL)", None, TODAY)
    assert told is None if sentence is None else sentence in told


def test_the_endpoint_is_asked_for_the_model_before_any_pair(pairs, tmp_path, capsys):
    day = datetime.date.today() + datetime.timedelta(1)
    models = {
        "alive": {"shutdown_date": None},
        "dying": {"shutdown_date": str(day - datetime.timedelta(1))},
        "ends": {"shutdown_date": str(day)},
    }
    few, log, output = write_pairs(tmp_path / "few.jsonl", 3), tmp_path / "log", tmp_path / "out"
    with fault_server(log, models=json.dumps(models)) as url:
        for model, sentence in (
            ("gone", "the endpoint has no model 'gone'"),
            ("gpt-4-0125-preview", "was shut down on 2026-03-26: set --model (LABEL_MODEL) to gpt-6-luna"),
            ("dying", "was shut down on"),
        ):
            assert label(few, url, output, model=model) == 2
            assert sentence in capsys.readouterr().err
            (output / "run.json").unlink()
        assert label(few, url, output, model="ends", **BATCH) == 2  # a batch may take a day
        assert "will be shut down before this run can end, on" in capsys.readouterr().err
        assert [line for line in lines(log) if line["got"] != "models"] == []
        (output / "run.json").unlink()
        assert label(few, url, output, model="alive") == 0


def test_a_server_with_one_model_needs_no_name_and_tells_its_context_length(tmp_path, capsys):
    few, output, log = write_pairs(tmp_path / "few.jsonl", 5), tmp_path / "out", tmp_path / "log"
    with fault_server(log, models=json.dumps({"qwen": {"max_model_len": 1200}}), think=1) as url:
        assert label(few, url, output, model="", max_tokens=1024) == 0
    run = run_json(output)
    assert (run["settings"]["model"], run["learnt"]["context"]) == ("qwen", 1200)
    limits = {line["limit"] for line in lines(log) if "limit" in line}
    assert all(256 <= limit < 1024 for limit in limits)  # what the prompt leaves
    with fault_server(models=json.dumps({"a": {}, "b": {}})) as url:
        assert label(few, url, tmp_path / "two", model="") == 2
    assert "--model is missing: name one of the models at" in capsys.readouterr().err


def test_a_price_that_is_given_counts(tmp_path):
    few, log = write_pairs(tmp_path / "few.jsonl", 5), tmp_path / "log"
    with fault_server(log) as url:
        assert label(few, url, tmp_path / "out", model="nobody-knows", price="1,10") == 0
    usd = sum(line["prompt_tokens"] + 10 * line["completion_tokens"] for line in lines(log)) / 1e6
    assert run_json(tmp_path / "out")["usd"] == pytest.approx(usd, abs=1e-6)


def test_an_unknown_price_is_asked_for(tmp_path, capsys, monkeypatch):
    few, url = write_pairs(tmp_path / "few.jsonl", 3), "https://api.example.com/v1"
    assert label(few, url, tmp_path / "out", model="m") == 2
    assert "the price of 'm' is not known" in capsys.readouterr().err
    assert label(few, url, tmp_path / "out", model="m", dry_run=True) == 0
    assert "US$ unknown" in capsys.readouterr().out


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/v1",
        "localhost:8000",
        "http//127.0.0.1/v1",
        "http://[::1/v1",
        "http://host:99999/v1",
        "http://host/v1\n",
        "http://host/v1/chat/completions",
        "ftp://host/v1",
        "",
    ],
)
def test_what_is_no_address_is_named_at_once(url, tmp_path, capsys):
    with pytest.raises(InputError, match=r"^--base_url "):
        check_base_url(url)


def test_addresses_that_work(tmp_path, monkeypatch):
    assert EndpointOptions(base_url="http://127.0.0.1:8000/v1/").address == "http://127.0.0.1:8000/v1"
    assert is_own_machine("http://[::1]:8000/v1")
    assert not is_own_machine("https://api.openai.com/v1")
    few = write_pairs(tmp_path / "few.jsonl", 2)
    with fault_server(tmp_path / "log") as url:
        assert label(few, url + "/", tmp_path / "slash") == 0
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert label(few, None, tmp_path / "out") == 0
    assert len(lines(tmp_path / "log")) == 4
    assert len(ids(tmp_path / "out")) == 2


def test_a_writer_that_fails_fails_its_run(tmp_path, monkeypatch):
    async def run():
        file = DurableFile(tmp_path / "x.jsonl")
        await file.append("half \ud83d of a character\n")  # cannot be written as UTF-8: replaced
        monkeypatch.setattr(os, "fdatasync", lambda fd: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # whatever it is, nobody waits for ever
            await asyncio.wait_for(file.append("two\n"), 10)

    asyncio.run(run())
    assert (tmp_path / "x.jsonl").read_text().startswith("half ? of a character\n")


def test_requests_carry_no_field_that_was_not_asked_for():
    plain = Endpoint("m", "http://127.0.0.1:1/v1", sampling=Sampling(100))
    assert plain.body(ChatRequest("i", [], str)) == {"model": "m", "messages": [], "max_tokens": 100}
    thinking = Endpoint("m", "http://127.0.0.1:1/v1", sampling=Sampling(100, reasoning_effort="low"))
    assert thinking.body(ChatRequest("i", [], str))["max_tokens"] == 100 + 2048
