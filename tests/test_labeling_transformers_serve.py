"""Labelling against ``transformers serve`` with a tiny model: a real server that nobody here wrote.

Its answers are nonsense, so every pair must end in failures.jsonl, and nothing may be lost.
"""

import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import patience

from deepspeed_chat_tlcr.runtime import free_port
from tests.conftest import byte_level_tokenizer, tiny_llama
from tests.labeling_helpers import ids, label, lines, run_json, write_pairs

MISSING = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
START_SECONDS = 120


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    if MISSING:
        pytest.skip(f"`transformers serve` needs {' and '.join(MISSING)} (pip install transformers[serving])")
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer(["the quick brown fox jumps over the lazy dog"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny_llama(folder, tokenizer)
    port = free_port()
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    flags = ["serve", str(folder), "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    log = (folder / "log").open("w+")
    process = subprocess.Popen([sys.executable, "-c", start, *flags], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.time() + patience(START_SECONDS)
        while time.time() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        else:
            log.seek(0)
            pytest.fail(f"transformers serve did not start: {log.read()[-2000:]}")
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        log.close()


def test_nonsense_ends_in_failures_and_nothing_is_lost(served, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # a local server needs none
    model, url = served
    pairs, output = write_pairs(tmp_path / "pairs.jsonl", 6), tmp_path / "out"
    options = {"model": model, "max_tokens": 8, "attempts": 2, "concurrency": 3, "timeout": 60}
    assert label(pairs, url, output, **options) == 4  # all failed, more than --max_failure_share
    failures = lines(output / "failures.jsonl")
    assert len(ids(output)) == len(failures) == 6
    assert {failure["reason"] for failure in failures} <= {"cut_by_max_tokens", "tags_missing", "empty"}
    run = run_json(output)
    assert (
        run["counts"]["unusable_answers"] == {failures[0]["reason"]: 12} or len(run["counts"]["unusable_answers"]) > 1
    )
    assert run["tokens"]["prompt"] > 0  # the server reports usage
    assert run["usd"] == 0  # and costs nothing
