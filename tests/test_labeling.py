"""labeling/main.py against a real HTTP server that misbehaves (tests/fault_server.py)."""

import json
import random
import re
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, byte_level_tokenizer, patience

from deepspeed_chat_tlcr.records import read_revisions
from labeling.main import main
from labeling.merge import main as merge
from labeling.revising import edit_ratio
from labeling.show import main as show
from tests.labeling_helpers import KEY, fault_server, ids, label, lines, run_json, start, write_pairs

FAULTS = {"rate_limited": 0.06, "server_error": 0.04, "reset": 0.04, "truncated": 0.03, "garbage": 0.03, "hang": 0.005}
ANSWERS = {"malformed": 0.25, "odd": 0.3, "wrong_usage": 0.1}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 120)


def test_the_first_example_of_the_docs_works_as_typed(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "labeling.md").read_text().partition("## Your own pairs")[2]
    pair = re.search(r"```json\n *(.*)\n", text)[1]
    typed = re.search(r"3\. .*?```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", "")
    byte_level_tokenizer([pair]).save_pretrained(tmp_path / "MODEL_YOU_WILL_TRAIN")
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(pair + "\n")
    programs = {"labeling/main.py": main, "labeling/show.py": show}
    with fault_server(models='{"qwen": {}}') as url:
        for command in typed.replace("http://127.0.0.1:8000/v1", url).strip().splitlines():
            _, program, *arguments = shlex.split(command)
            assert not programs.pop(program, main)(arguments)
    assert not programs
    (revision,) = read_revisions("output/labels/revisions.jsonl")
    assert revision.modified == revision.rejected.replace("It", "better")
    assert "1 revision, " in capsys.readouterr().out
    good = re.search(r'such as "(.*?)"', " ".join(text.split()))[1]
    assert edit_ratio(json.loads(pair)["rejected"], good) < 0.3
    assert edit_ratio(" No.", json.loads(pair)["chosen"]) == 1


def test_every_pair_has_one_outcome_under_every_fault(pairs, tmp_path, capsys):
    log, output = tmp_path / "log", tmp_path / "out"
    with fault_server(log, **FAULTS, **ANSWERS, always_bad="w7,w8") as url:
        assert label(pairs, url, output, attempts=4, timeout=patience(1)) == 0
    revisions, failures = list(read_revisions(output / "revisions.jsonl")), lines(output / "failures.jsonl")
    run = run_json(output)
    assert set(ids(output).values()) == {1}
    assert len(revisions) + len(failures) == 120 == run["counts"]["pairs"]
    assert all(r.modified == " better " + r.rejected.split(" ", 2)[2] for r in revisions)
    assert len(failures) >= 2  # w7 and w8 are never answered well
    assert all(set(line) == {"id", "reason", "raw"} for line in failures)
    # Everything that the server did is counted, by kind.
    served = lines(log)
    answers = [line for line in served if "prompt_tokens" in line]
    unusable = run["counts"]["unusable_answers"]
    assert sum(unusable.values()) == sum(line["got"] != "good" for line in answers)
    assert {kind: sum(line["got"] == kind for line in answers) for kind in unusable} == unusable
    faults = run["counts"]["calls_without_answer"]
    assert faults["rate_limited"] == sum(line["got"] == "rate_limited" for line in served)
    assert faults["http_500"] == sum(line["got"] == "server_error" for line in served)
    assert faults["malformed_body"] == sum(line["got"] == "garbage" for line in served)
    assert faults["connection_lost"] == sum(line["got"] in ("reset", "truncated") for line in served)
    assert len(answers) <= 120 * 4
    assert run["usd"] == pytest.approx(
        sum(line.get("usd", 0) for line in lines(output / "calls.jsonl") if "usage" in line), abs=1e-5
    )
    assert "answers unusable: rewrite" in capsys.readouterr().out


def test_usage_is_recorded_and_summed_as_reported(pairs, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    with fault_server(log) as url:
        assert label(pairs, url, output) == 0
    answers, run = lines(log), run_json(output)
    assert run["tokens"]["prompt"] == sum(line["prompt_tokens"] for line in answers)
    assert run["tokens"]["completion"] == sum(line["completion_tokens"] for line in answers)
    usd = [(10 * line["prompt_tokens"] + 30 * line["completion_tokens"]) / 1e6 for line in answers]
    assert run["usd"] == pytest.approx(sum(usd), abs=1e-6)
    of_lines = [revision.usage for revision in read_revisions(output / "revisions.jsonl")]
    assert sorted(usage["usd"] for usage in of_lines) == pytest.approx(sorted(usd), abs=1e-7)
    assert run["settings"]["model"] == "gpt-4-0125-preview"
    assert run["complete"] is True
    assert run["seconds"] > 0


def test_killed_at_random_moments_nothing_is_lost_or_paid_twice(pairs, tmp_path):
    faults = {"rate_limited": 0.05, "server_error": 0.05, "reset": 0.05, "malformed": 0.2, "odd": 0.3, "alike": True}
    killed, whole, log, log_whole = (tmp_path / name for name in ("killed", "whole", "log", "log_whole"))
    draw, kills, concurrency = random.Random(0), 0, 6
    with fault_server(log, **faults, delay=0.1) as url:
        while kills < 5:
            process = start(pairs, url, killed, concurrency=concurrency)
            served = len(lines(log))
            while len(lines(log)) == served and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.3))
            if process.poll() is not None:
                break
            process.kill()
            process.communicate()
            kills += 1
        with (killed / "revisions.jsonl").open("a") as file:
            file.write('{"id": "torn')
        process = start(pairs, url, killed, concurrency=concurrency)
        text = process.communicate(timeout=patience(120))[0]
    assert process.returncode == 0, text
    assert kills >= 3
    assert "removed a torn last line of 12 bytes" in text
    with fault_server(log_whole, **faults) as url:
        assert label(pairs, url, whole) == 0

    def answered(log):
        return sum("prompt_tokens" in line for line in lines(log))

    assert answered(log) <= answered(log_whole) + kills * concurrency  # only calls in flight are repeated
    for name in ("revisions", "failures"):
        texts = [(folder / f"{name}.jsonl").read_text().splitlines() for folder in (killed, whole)]
        assert sorted(texts[0]) == sorted(texts[1])
    assert len(lines(whole / "failures.jsonl")) > 5
    assert set(ids(killed).values()) == {1}
    assert len(ids(killed)) == 120


def test_a_stop_signal_keeps_what_is_in_flight_and_can_be_continued(pairs, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out"
    with fault_server(log, delay=0.3) as url:
        for number in (signal.SIGTERM, signal.SIGINT):
            process = start(pairs, url, output, concurrency=10)
            before = len(lines(log))
            while len(lines(log)) == before:
                time.sleep(0.02)
            process.send_signal(number)
            text = process.communicate(timeout=patience(30))[0]
            assert process.returncode == 3, text
            assert f"signal {number.name}" in text
            assert sum(ids(output).values()) == len(lines(log))  # every answer that was paid for is there
            assert run_json(output)["complete"] is False
            assert run_json(output)["stopped"] == f"signal {number.name}"
        assert label(pairs, url, output) == 0
    assert len(lines(log)) == 120
    assert run_json(output)["complete"] is True


def test_a_second_signal_does_not_wait_for_calls_that_hang(pairs, tmp_path):
    with fault_server(tmp_path / "log", hang=1.0) as url:
        process = start(pairs, url, tmp_path / "out", timeout=60)
        while not lines(tmp_path / "log"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=patience(10))
    assert process.returncode == 3
    assert run_json(tmp_path / "out")["usd_possibly_billed_without_answer"] > 0


def test_the_cost_cap_is_never_passed(pairs, tmp_path):
    cap, log, output = 0.12, tmp_path / "log", tmp_path / "out"
    options = {"max_cost_usd": cap, "max_tokens": 300}
    with fault_server(log, malformed=0.3, wrong_usage=0.6) as url:
        assert label(pairs, url, output, **options) == 3
        assert label(pairs, url, output, **options) == 3  # nor by starting again
        spent = sum(10 * line["prompt_tokens"] + 30 * line["completion_tokens"] for line in lines(log)) / 1e6
        assert 0.6 * cap < spent <= cap
        assert run_json(output)["stopped"] == "cost cap"
        assert run_json(output)["usd"] <= cap
        assert label(pairs, url, output) == 0


def test_a_cap_counts_what_a_kill_may_have_cost(pairs, tmp_path):
    output = tmp_path / "out"
    with fault_server(tmp_path / "log", hang=1.0) as url:
        process = start(pairs, url, output, max_cost_usd=10, timeout=60)
        while not lines(tmp_path / "log"):
            time.sleep(0.02)
        process.kill()
        process.communicate()
    with fault_server() as url:
        assert label(pairs, url, output, max_cost_usd=0.05) == 3
    assert ids(output) == {}  # the first call, which was lost, may have cost 0.044: another might pass the cap
    assert 0.04 < run_json(output)["usd_possibly_billed_without_answer"] < 0.05


def test_retry_failed_takes_only_the_failed(pairs, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    with fault_server(always_bad="w1,w2,w3", malformed_kind="rewrite") as url:
        assert label(pairs, url, output, attempts=2) == 0
    failed = {line["id"]: line["reason"] for line in lines(output / "failures.jsonl")}
    assert list(failed.values()) == ["rewrite"] * 3
    with fault_server(log, always_bad="w2") as url:
        assert label(pairs, url, output) == 0
        assert lines(log) == []  # not without --retry_failed
        assert label(pairs, url, output, attempts=2, retry_failed=True) == 0
    assert {line["key"] for line in lines(log)} == {"w1", "w2", "w3"}
    assert len(lines(output / "failures.jsonl")) == 1
    assert len(lines(output / "revisions.jsonl")) == 119
    assert set(ids(output).values()) == {1}
    assert run_json(output)["counts"]["failures"] == 1


def test_two_runs_on_one_folder_refuse_each_other(pairs, tmp_path, capsys):
    output = tmp_path / "out"
    with fault_server(tmp_path / "log", delay=0.5) as url:
        process = start(pairs, url, output)
        while not lines(tmp_path / "log"):
            time.sleep(0.02)
        assert label(pairs, url, output) == 2
        assert "another run is writing there" in capsys.readouterr().err
        process.kill()
        process.communicate()


def test_other_settings_under_the_same_folder_are_refused_with_the_difference(pairs, tmp_path, capsys):
    output, prompt = tmp_path / "out", tmp_path / "prompt.txt"
    prompt.write_text("{context}{chosen}{rejected}\n<|Start of Modified Response|>")
    few = write_pairs(tmp_path / "few.jsonl", 10)
    with fault_server() as url:
        assert label(few, url, output) == 0
        capsys.readouterr()
        cases = {
            "model: was 'gpt-4-0125-preview', now 'other'": {"model": "other"},
            "temperature: was None, now 0.5": {"temperature": 0.5},
            "prompt: line 1 was": {"prompt_file": prompt},
            "data_split: was '0,10,0', now '0,5,5'": {"data_split": "0,5,5"},
        }
        for difference, options in cases.items():
            assert label(few, url, output, **options) == 2
            assert difference in capsys.readouterr().err
        assert label(pairs, url, output) == 2
        assert "data: was '10 pairs" in capsys.readouterr().err
        assert label(few, url, output, concurrency=3, timeout=9, attempts=1) == 0  # what may change


@pytest.mark.parametrize(
    ("server", "options", "sentence"),
    [
        ({"refuse_key": True}, {}, "refuses the key in the variable OPENAI_API_KEY (401)"),
        ({}, {"model": "unknown"}, "has no model 'unknown'"),
        ({"refuse_all": "no such parameter"}, {}, "refuses every request"),
    ],
)
def test_what_only_the_user_can_mend_stops_at_once_with_one_sentence(
    server, options, sentence, pairs, tmp_path, capsys
):
    started = time.time()
    with fault_server(**server) as url:
        assert label(pairs, url, tmp_path / "out", **options) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err
    assert ids(tmp_path / "out") == {}
    assert run_json(tmp_path / "out")["stopped"] == "refused by the endpoint"
    assert time.time() - started < 15


def test_a_single_request_that_is_refused_is_a_failure(pairs, tmp_path):
    with fault_server(refuse_keys="w5") as url:
        assert label(pairs, url, tmp_path / "out") == 0
    (failure,) = lines(tmp_path / "out" / "failures.jsonl")
    assert failure["reason"] == "refused_by_endpoint"
    assert "context_length_exceeded" in failure["raw"]


def test_nothing_at_the_address(pairs, tmp_path, capsys):
    assert label(pairs, "http://127.0.0.1:9/v1", tmp_path / "out") == 2
    assert "nothing answers at http://127.0.0.1:9/v1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SSL_CERT_FILE", "/nowhere", "the certificates of SSL_CERT_FILE or SSL_CERT_DIR: No such file"),
        ("ALL_PROXY", "http://proxy:port", "the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: "),
        ("HTTPS_PROXY", "rubbish://proxy", "the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: "),
    ],
)
def test_an_environment_that_cannot_connect_is_named(name, value, words, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert label(pairs, "https://127.0.0.1:9/v1", tmp_path / "out") == 2
    assert f"error: {words}" in capsys.readouterr().err


def test_newer_models_name_for_the_token_limit_is_found_out(pairs, tmp_path):
    few = write_pairs(tmp_path / "few.jsonl", 3)
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with fault_server(refuse_all=message) as url:
        assert label(few, url, tmp_path / "out") == 4  # this server refuses that one too: three failures, no loop
    failures = lines(tmp_path / "out" / "failures.jsonl")
    assert [failure["reason"] for failure in failures] == ["refused_by_endpoint"] * 3


def test_the_key_is_nowhere(tmp_path, monkeypatch, capsys):
    """After every failure that can be provoked: in no output, no file, no process argument."""
    few = write_pairs(tmp_path / "few.jsonl", 12)
    all_faults = {**FAULTS, **ANSWERS, "rate_limited": 0.3, "server_error": 0.3}
    with (
        fault_server(**all_faults) as faulty,
        fault_server(refuse_key=True) as refusing,
        fault_server(hang=1.0) as hung,
    ):
        processes = [
            start(few, url, tmp_path / f"out{number}", timeout=1, max_retries=1, fresh=url == faulty)
            for number, url in enumerate((faulty, refusing, hung))
        ]
        time.sleep(0.1)
        commands = [Path(f"/proc/{process.pid}/cmdline").read_text() for process in processes]
        texts = [process.communicate(timeout=patience(60))[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 2, 4]
    assert "[secret]" in texts[1]  # the server did repeat it
    assert label(few, None, tmp_path / "no", api_key_env=KEY) == 2
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\nx-evil: 1")
    assert label(few, None, tmp_path / "no") == 2
    texts += capsys.readouterr()
    for text in [*texts, *commands]:
        assert KEY not in text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        assert KEY.encode() not in path.read_bytes(), path


def test_several_samples_of_a_pair(tmp_path):
    few, output, log = write_pairs(tmp_path / "few.jsonl", 10), tmp_path / "out", tmp_path / "log"
    with fault_server(log, always_bad="w3") as url:
        assert label(few, url, output, n=3, attempts=2) == 0
        assert label(few, url, output, n=3, attempts=2) == 0
    assert set(ids(output).values()) == {3}
    assert len(lines(output / "revisions.jsonl")) == 27
    assert len(lines(log)) == 27 + 6


def test_shards_join_to_the_whole(pairs, tmp_path, capsys):
    folders = [tmp_path / f"shard{i}" for i in (1, 2, 3)]
    with fault_server(always_bad="w9", alike=True) as url:
        for i, folder in enumerate(folders, 1):
            assert label(pairs, url, folder, shard=f"{i}/3") == 0
        assert label(pairs, url, tmp_path / "whole") == 0
    found = [set(ids(folder)) for folder in folders]
    assert all(20 < len(shard) < 60 for shard in found)
    merged = tmp_path / "merged"
    assert merge(["--output_dir", str(merged), *map(str, folders)]) == 0
    assert ids(merged) == ids(tmp_path / "whole")
    assert run_json(merged)["counts"] == run_json(tmp_path / "whole")["counts"]
    assert run_json(merged)["usd"] == pytest.approx(run_json(tmp_path / "whole")["usd"], abs=1e-5)
    capsys.readouterr()
    for given, complaint in (
        (folders[:2], "shards missing: 3/3"),
        ([*folders, folders[0]], "another run is writing there"),
        ([tmp_path / "whole", folders[0]], "shards of different divisions"),
        ([tmp_path], "no run.json"),
    ):
        with pytest.raises(SystemExit) as exit:
            merge(["--output_dir", str(tmp_path / "x"), *map(str, given)])
        assert exit.value.code == 2
        assert complaint in capsys.readouterr().err
    lost = (folders[1] / "revisions.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "revisions.jsonl").write_text("".join(lost[1:]))
    with pytest.raises(SystemExit):
        merge(["--output_dir", str(tmp_path / "x"), *map(str, folders)])
    assert "finish this shard" in capsys.readouterr().err


def test_azure_is_asked_in_its_own_way(tmp_path):
    few, output = write_pairs(tmp_path / "few.jsonl", 3), tmp_path / "out"
    with fault_server(tmp_path / "log", log_requests=True) as url:
        options = {"azure_api_version": "2024-10-21", "model": "my-deployment", "max_retries": 0}
        assert label(few, url.removesuffix("/v1"), output, **options) == 0
    assert len(lines(output / "revisions.jsonl")) == 3
    requests = [line for line in lines(tmp_path / "log") if line["got"] == "request"]
    path = "/openai/deployments/my-deployment/chat/completions?api-version=2024-10-21"
    assert [(line["path"], line["has_api_key"]) for line in requests] == [(path, True)] * 3


def test_rate_limits_are_kept(tmp_path):
    few = write_pairs(tmp_path / "few.jsonl", 12)
    with fault_server(tmp_path / "log") as url:
        assert label(few, url, tmp_path / "out", requests_per_minute=600) == 0
        times = [line["time"] for line in lines(tmp_path / "log")]
        assert max(times) - min(times) > 11 * 0.1 - 0.05
        (tmp_path / "log").write_text("")
        assert label(few, url, tmp_path / "tokens", tokens_per_minute=60 * 6000) == 0
        used = [line["prompt_tokens"] + line["completion_tokens"] for line in lines(tmp_path / "log")]
        assert run_json(tmp_path / "tokens")["seconds"] > 0.6 * sum(used[:-1]) / 6000


def test_no_model_at_all(pairs, tmp_path):
    for _ in range(2):
        assert label(pairs, None, tmp_path / "out", reviser="chosen") == 0
    revisions = list(read_revisions(tmp_path / "out" / "revisions.jsonl"))
    assert len(revisions) == 120
    assert all(r.modified == r.chosen and r.model == "chosen" for r in revisions)


def test_a_full_disk_is_an_error_of_its_own(tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    few, output = write_pairs(tmp_path / "few.jsonl", 5), tmp_path / "out"
    with fault_server() as url:
        with monkeypatch.context() as patch:
            patch.setattr("os.fdatasync", full)
            assert label(few, url, output) == 3
        assert (
            "cannot be written (No space left on device); nothing that was paid for is lost" in capsys.readouterr().err
        )
        assert (output / "revisions.jsonl").read_text() == ""
        assert label(few, url, output) == 0
    assert len(lines(output / "revisions.jsonl")) == 5


def test_limit_and_duplicates(tmp_path, capsys):
    data, output = write_pairs(tmp_path / "few.jsonl", 10), tmp_path / "out"
    data.write_text(data.read_text() + data.read_text())
    with fault_server(tmp_path / "log") as url:
        assert label(data, url, output, limit=4) == 3
        assert len(lines(tmp_path / "log")) == 4
        assert label(data, url, output) == 0
    assert len(lines(tmp_path / "log")) == 10
    assert "10 pairs (10 repeated ones left out)" in capsys.readouterr().out


def test_the_estimate_comes_from_the_data_and_asks_where_someone_is_there(tmp_path, capsys, monkeypatch):
    few, output = write_pairs(tmp_path / "few.jsonl", 10), tmp_path / "out"
    assert label(few, None, output, dry_run=True) == 0
    assert "10 calls, about " in capsys.readouterr().out
    assert not output.exists()
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"gpt-4-0125-preview": {"input": 100_000, "output": 0}}))
    asked = threading.Event()

    class Terminal:
        def isatty(self):
            return True

        def readline(self):
            asked.set()
            return "\n"

    monkeypatch.setattr("sys.stdin", Terminal())
    with fault_server(tmp_path / "log") as url:
        assert label(few, url, output, prices=prices) == 3
        assert asked.is_set()
        assert lines(tmp_path / "log") == []
        assert label(few, url, output, prices=prices, yes=True) == 0
    assert len(lines(tmp_path / "log")) == 10


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"shard": "5/4"}, "--shard 5/4: expected i/n"),
        ({"attempts": 0}, "--attempts 0: must be from 1 to 100"),
        ({"timeout": 0}, "--timeout 0.0: must be from 0.001"),
        ({"concurrency": 3_000_000}, "--concurrency 3000000: must be from 1 to 4,096"),
        ({"requests_per_minute": 1e-300}, "--requests_per_minute 1e-300: must be 0, for no limit, or at least 0.1"),
        ({"temperature": "nan"}, "--temperature nan: must be from 0 to 2"),
        ({"top_p": 0}, "--top_p 0.0: must be above 0 and at most 1"),
        ({"reasoning_effort": "little"}, "--reasoning_effort little: known are lowest, none"),
        ({"max_failure_share": 2}, "--max_failure_share 2.0: must be from 0 to 1"),
        ({"price": "0,-2"}, "--price 0,-2: expected IN,OUT"),
        ({"max_edit_ratio": 1.5}, "--max_edit_ratio 1.5"),
        ({"model": "nobody-knows"}, "the price of 'nobody-knows' is not known"),
        ({"prices": "no.json"}, "--prices no.json: cannot be read"),
        ({"data_split": "0,0"}, "--data_split (DATA_SPLIT) '0,0'"),
        ({"reviser": "import"}, "--reviser import needs --from FILE"),
        ({"api_key_env": "NOT_THERE_AT_ALL"}, "the environment variable NOT_THERE_AT_ALL is not set"),
        ({"azure_api_version": "1"}, "--azure_api_version needs --base_url"),
    ],
)
def test_wrong_settings_are_named(options, complaint, tmp_path, capsys):
    few = write_pairs(tmp_path / "few.jsonl", 3)
    assert label(few, None, tmp_path / "out", **options) == 2
    assert complaint in capsys.readouterr().err
