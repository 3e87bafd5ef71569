"""--batch against the server's Batch API (tests/fault_server.py): restarts, duplicates, expired and refused batches."""

import signal
import time

import pytest
from conftest import patience

from deepspeed_chat_tlcr.records import read_revisions
from tests.labeling_helpers import KEY, fault_server, ids, label, lines, run_json, start, write_pairs

QUICK = {"batch": True, "batch_poll": 0.2, "batch_size": 40, "max_failure_share": 0.5}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 100)


def answered(log):
    """Answers that the server was paid for: the first is a plain call's, which tells how to ask."""
    return sum("prompt_tokens" in line for line in lines(log))


def test_a_batch_run_ends_as_one_call_after_another_would(pairs, tmp_path):
    answers = {"malformed": 0.2, "odd": 0.3, "alike": True}
    batch, single, log = tmp_path / "batch", tmp_path / "single", tmp_path / "log"
    with fault_server(log, **answers, duplicates=0.3, expired=0.1, server_error=0.05) as url:
        assert label(pairs, url, batch, **QUICK) == 0
    with fault_server(**answers) as url:
        assert label(pairs, url, single, max_failure_share=0.5) == 0
    assert set(ids(batch).values()) == {1}
    found, expected = ({line["id"]: line for line in lines(folder / "failures.jsonl")} for folder in (batch, single))
    assert found == expected
    texts = [{r.id: (r.modified, r.reasoning) for r in read_revisions(f / "revisions.jsonl")} for f in (batch, single)]
    assert texts[0] == texts[1]
    run, other = run_json(batch), run_json(single)
    assert run["counts"]["unusable_answers"] == other["counts"]["unusable_answers"]
    assert run["tokens"] == other["tokens"]  # a duplicate delivery is not counted twice
    plain = [
        line["usd"] for line in lines(batch / "calls.jsonl") if "usd" in line and "batch" not in line and "id" in line
    ]
    assert 1 <= len(plain) <= 3
    assert run["usd"] == pytest.approx((other["usd"] + sum(plain)) / 2, abs=1e-5)
    # Only what brought no answer was sent again.
    assert answered(log) == sum(other["counts"]["unusable_answers"].values()) + other["counts"]["revisions"]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_killed_after_any_step_no_batch_is_paid_twice(steps, tmp_path):
    """Killed once the journal has so many lines (its first names the folder)."""
    few, output, log = write_pairs(tmp_path / "few.jsonl", 30), tmp_path / "out", tmp_path / "log"
    options = {**QUICK, "batch_size": 15}
    journal = output / "batches.jsonl"
    with fault_server(log, batch_seconds=0.3, alike=True, malformed=0.2) as url:
        process = start(few, url, output, **options)
        while (not journal.exists() or journal.read_text().count("\n") <= steps) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert label(few, url, output, **options) == 0
    assert set(ids(output).values()) == {1}
    assert len(ids(output)) == 30
    counts = run_json(output)["counts"]
    assert answered(log) == counts["revisions"] + sum(counts["unusable_answers"].values())


def test_killed_in_the_middle_of_a_merge(pairs, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    with fault_server(log, malformed=0.2, wrong_usage=0.5, alike=True) as url:
        assert label(pairs, url, output, **QUICK) == 0
        whole = {line["id"]: line for line in lines(output / "revisions.jsonl")}, run_json(output)
        # What the disk holds when a kill comes after 20 answers of the first batch: of the last, not what it cost.
        for name in ("revisions", "calls"):
            kept = (output / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (output / f"{name}.jsonl").write_text("".join(kept[: 20 if name == "revisions" else 24]))
        (output / "failures.jsonl").write_text("")
        journal = (output / "batches.jsonl").read_text().splitlines(keepends=True)
        merged = next(number for number, line in enumerate(journal) if '"merged"' in line)
        (output / "batches.jsonl").write_text("".join(journal[:merged]))
        (log).write_text("")
        assert label(pairs, url, output, **QUICK) == 0
    assert {line["id"]: line for line in lines(output / "revisions.jsonl")} == whole[0]
    assert set(ids(output).values()) == {1}
    assert run_json(output)["counts"]["failures"] == whole[1]["counts"]["failures"]
    assert run_json(output)["usd"] == pytest.approx(whole[1]["usd"])
    assert not [line for line in lines(log) if line["got"] == "batch" and line["requests"] == 40]  # none again


def test_a_batch_whose_id_was_never_heard_is_found_again(tmp_path):
    few, log = write_pairs(tmp_path / "few.jsonl", 10), tmp_path / "log"
    with fault_server(log, lose_batch_answer=True) as url:
        assert label(few, url, tmp_path / "out", **QUICK) == 0
    assert [line["requests"] for line in lines(log) if line["got"] == "batch"] == [9]


@pytest.mark.parametrize("fault", ["truncated", "garbage", "nonsense", "hang"])
def test_what_is_no_file_and_no_batch_is_asked_for_again(fault, tmp_path):
    few, log = write_pairs(tmp_path / "few.jsonl", 10), tmp_path / "log"
    with fault_server(log, api_fault=fault) as url:
        assert label(few, url, tmp_path / "out", **QUICK, timeout=0.5) == 0
    assert len(lines(tmp_path / "out" / "revisions.jsonl")) == 10


def test_batches_become_smaller_where_too_much_is_enqueued(pairs, tmp_path):
    log = tmp_path / "log"
    with fault_server(log, most_enqueued=30) as url:
        assert label(pairs, url, tmp_path / "out", **{**QUICK, "batch_poll": 0.05}) == 0
    assert len(lines(tmp_path / "out" / "revisions.jsonl")) == 100
    assert max(line["requests"] for line in lines(log) if line.get("status") == "in_progress") <= 30


def test_the_cost_cap_counts_batches_on_their_way(pairs, tmp_path):
    cap, log, output = 0.12, tmp_path / "log", tmp_path / "out"
    options = {**QUICK, "max_cost_usd": cap, "max_tokens": 200}
    with fault_server(log, malformed=0.3) as url:
        assert label(pairs, url, output, **options) == 3
    answers = [line for line in lines(log) if "prompt_tokens" in line]
    spent = sum(10 * line["prompt_tokens"] + 30 * line["completion_tokens"] for line in answers) / 2e6
    assert 0.6 * cap < spent <= cap
    assert run_json(output)["stopped"] == "cost cap"


def test_a_stop_signal_leaves_batches_to_the_next_run(tmp_path):
    few, output, log = write_pairs(tmp_path / "few.jsonl", 10), tmp_path / "out", tmp_path / "log"
    with fault_server(log, batch_seconds=3) as url:
        process = start(few, url, output, **QUICK)
        while not any(line["got"] == "batch" for line in lines(log)):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=patience(20))[0]
        assert process.returncode == 3, text
        assert run_json(output)["stopped"] == "signal SIGTERM"
        assert label(few, url, output, **QUICK) == 0
    assert answered(log) == len(lines(output / "revisions.jsonl")) == 10
