"""What the labelling tests share: preference pairs, a misbehaving server, the entry point, what its folder holds."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import warm
from conftest import patience

from labeling.main import main

ROOT = Path(__file__).parents[1]
KEY = "sk-test-0123456789abcdef"
SENTENCE = "the quick brown fox jumps over a lazy dog and then some more words follow to make it long"


def write_pairs(path: Path, count: int) -> Path:
    """Pairs whose rejected response ends in a word of its own, by which the server knows the question."""
    with path.open("w") as file:
        for i in range(count):
            words = SENTENCE[4 * (i % 5) :]
            row = {
                "prompt": f"\n\nHuman: question {i}?\n\nAssistant:",
                "chosen": f" good {words}",
                "rejected": f" bad {words} w{i}",
            }
            file.write(json.dumps(row) + "\n")
    return path


@contextmanager
def fault_server(log: Path | None = None, **options):
    """Run tests/fault_server.py; gives its base URL."""
    arguments = [str(part) for name, value in options.items() for part in flag(name, value)]
    command = [sys.executable, str(ROOT / "tests" / "fault_server.py"), *arguments]
    if log is not None:
        command += ["--log", str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def flag(name: str, value) -> list:
    return [f"--{name}"] if value is True else [f"--{name}", value]


def arguments(data: Path, url: str | None, output: Path, **options) -> list[str]:
    given = {
        "model": "gpt-4-0125-preview",
        "data_split": "0,10,0",
        "concurrency": 16,
        "timeout": patience(2),
        **options,
    }
    urls = ["--base_url", url] if url else []
    flags = [str(part) for name, value in given.items() for part in flag(name, value)]
    return ["--data_path", str(data), *urls, "--output_dir", str(output), *flags]


def label(data: Path, url: str | None, output: Path, **options) -> int:
    """labeling/main.py in this process; its exit code."""
    try:
        return main(arguments(data, url, output, **options))
    except SystemExit as exit:
        return exit.code


def start(data: Path, url: str, output: Path, env: dict | None = None, fresh: bool = False, **options):
    """labeling/main.py as a process of its own; ``fresh``: a new interpreter, not a fork."""
    words = [str(ROOT / "labeling" / "main.py"), *arguments(data, url, output, **options)]
    environment = {**os.environ, "OPENAI_API_KEY": KEY, **(env or {})}
    if not fresh:
        return warm.Program(words[0], words[1:], environment)
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *words], text=True, env=environment, **to)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ids(output: Path) -> Counter:
    """How often each id stands in the two files together."""
    return Counter(line["id"] for name in ("revisions", "failures") for line in lines(output / f"{name}.jsonl"))


def run_json(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())
