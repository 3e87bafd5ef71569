"""How fast labelling is, and how much memory it takes. Figures are printed as ratios, nothing is asserted.

    python benchmarks/labeling.py calls      a server that answers after 500 ms, concurrency 128: our rate against the
                                             ideal 256 a second and against a bare asyncio + openai loop
    python benchmarks/labeling.py memory     resident memory over a million pairs (--pairs), in a dry run and labelled
                                             by a server that answers at once
    python benchmarks/labeling.py labels     45,000 HH-like pairs: tokenise in context and label; alignment alone

Server and client share the machine, so `calls` wants two idle cores.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "hh_harmless_base_test.jsonl.gz"
MODEL = "benchmark"
WORDS = "the a quick brown fox jumps over lazy dog and then some more words that make one sentence long enough to edit"


# ---- a server that only waits ----------------------------------------------------------------------------------------


async def serve(delay: float):
    """Answers every chat request after ``delay`` seconds with the same revision; prints its port first."""
    text = (
        "<|Start of Reasoning|>\nIt is rude.\n<|End of Reasoning|>\n<|Start of Modified Response|>\n"
        f"{WORDS} better\n<|End of Modified Response|>"
    )
    body = json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 500, "completion_tokens": 60, "total_tokens": 560},
        }
    ).encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                if delay:
                    await asyncio.sleep(delay)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def start_server(delay: float) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, __file__, "serve", "--delay", str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


def write_pairs(path: Path, count: int):
    from deepspeed_chat_tlcr.records import Preference, write_jsonl

    draw, words = random.Random(0), WORDS.split()

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    prompts = (f"\n\nHuman: {number} {text(100)}\n\nAssistant:" for number in range(count))
    pairs = (Preference(prompt, f" {text(50)}", f" {WORDS} worse {n}") for n, prompt in enumerate(prompts))
    write_jsonl(path, map(Preference.as_pair, pairs))


# ---- calls -----------------------------------------------------------------------------------------------------------


async def bare_loop(url: str, questions: list[list[dict]], concurrency: int) -> float:
    """Calls a second of openai's client and nothing else: no journal, no retry, no account."""
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=1000, max_keepalive_connections=1000)
    client = openai.AsyncOpenAI(
        api_key="none", base_url=url, max_retries=0, http_client=openai.DefaultAsyncHttpxClient(limits=limits)
    )
    source = iter(questions)

    async def work():
        for messages in source:
            await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1024)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    rate = len(questions) / (time.perf_counter() - started)
    await client.close()
    return rate


async def our_run(url: str, pairs: list, concurrency: int, output: Path) -> float:
    from deepspeed_chat_tlcr.asking.dispatch import Dispatcher, Limits
    from deepspeed_chat_tlcr.asking.endpoint import Endpoint
    from deepspeed_chat_tlcr.asking.journal import RunFolder
    from deepspeed_chat_tlcr.asking.models import price_of
    from deepspeed_chat_tlcr.asking.money import Account
    from labeling.revising import question

    endpoint = Endpoint(MODEL, url)
    with RunFolder(output) as folder:
        state = folder.read_state()
        account = Account(price_of("gpt-6-luna"), cap=1e9)
        dispatcher = Dispatcher(endpoint, folder, account, Limits(concurrency=concurrency), state)
        folder.open_files()
        started = time.perf_counter()
        stopped = await dispatcher.run(question(pair, pair.id, MODEL) for pair in pairs)
        rate = len(pairs) / (time.perf_counter() - started)
        await folder.close_files()
    await endpoint.close()
    if stopped or dispatcher.accepted != len(pairs):
        sys.exit(f"{dispatcher.accepted} of {len(pairs)} revisions ({stopped}): not a measurement")
    return rate


def calls(options):
    from deepspeed_chat_tlcr.records import Preference
    from labeling.prompt import build_messages

    process, url = start_server(0.5)
    ideal = options.concurrency / 0.5
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder) / "pairs.jsonl", options.calls)
            rows = [json.loads(line) for line in (Path(folder) / "pairs.jsonl").open()]
            pairs = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
            questions = [build_messages(pair) for pair in pairs]
            asyncio.run(bare_loop(url, questions[:500], options.concurrency))  # warm
            print(f"concurrency {options.concurrency}, answers after 0.5 s: ideal {ideal:.0f} calls a second")
            for number in range(options.repeats):
                started = time.process_time()
                bare = asyncio.run(bare_loop(url, questions, options.concurrency))
                between = time.process_time()
                ours = asyncio.run(our_run(url, pairs, options.concurrency, Path(folder) / f"out{number}"))
                work = [1e3 * seconds / len(pairs) for seconds in (time.process_time() - between, between - started)]
                print(
                    f"ours {ours:.1f} ({ours / ideal:.1%} of ideal), bare loop {bare:.1f}, ratio {ours / bare:.1%}, "
                    f"processor time of a call {work[0]:.2f}, bare {work[1]:.2f} ms"
                )
    finally:
        process.kill()


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(options):
    """Resident memory (VmRSS) of labeling/main.py every few seconds."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, options.pairs)
        environment = {**os.environ, "HF_DATASETS_CACHE": folder}
        base = [sys.executable, str(ROOT / "labeling" / "main.py"), "--data_path", str(data), "--data_split", "0,10,0"]
        watch(
            f"dry run, {options.pairs} pairs",
            [*base, "--dry_run", "--model", MODEL, "--output_dir", folder],
            environment,
        )
        write_pairs(data, options.served_pairs)
        process, url = start_server(0.0)
        try:
            output = ["--output_dir", f"{folder}/out", "--base_url", url, "--model", MODEL, "--concurrency", "64"]
            watch(f"instant server, {options.served_pairs} pairs", [*base, *output], environment)
        finally:
            process.kill()


def watch(name: str, command: list[str], environment: dict):
    started, seen = time.perf_counter(), []
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            seen.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
        except (OSError, IndexError):
            break
        time.sleep(0.25)
    code = process.wait()
    tenths = [max(seen[i * len(seen) // 10 : (i + 1) * len(seen) // 10 or 1] or [0]) for i in range(10)]
    shape = " ".join(f"{value:.0f}" for value in tenths)
    seconds = time.perf_counter() - started
    print(f"{name}: exit {code}, {seconds:.0f} s, peak {max(seen):.0f} MB; peak by tenths of the time: {shape}")


# ---- labels ----------------------------------------------------------------------------------------------------------


def labels(options):
    from deepspeed_chat_tlcr.records import Revision, read_jsonl
    from deepspeed_chat_tlcr.tokenization import tokenize_response
    from evaluation.qa_feedback import byte_level_bpe
    from labeling.token_labels import edit_targets, label_revision

    if not SHARED.is_file():
        sys.exit(f"{SHARED} is not here: this measurement needs real pairs")
    rows = [row for _, row in read_jsonl(SHARED)]
    tokenizer = byte_level_bpe((row["prompt"] + row["chosen"] for row in rows), 8000)
    # The chosen response in the modified one's place: more edits, hence more work, than a real revision has.
    pairs = [Revision("", r["prompt"], r["chosen"], r["rejected"], r["chosen"], "", "", {}) for r in rows]
    label_revision(tokenizer, pairs[0], 512)  # compiles, or loads what was compiled
    started = time.perf_counter()
    for number in range(options.pairs_to_label):
        label_revision(tokenizer, pairs[number % len(pairs)], 512)
    seconds = time.perf_counter() - started
    print(f"{options.pairs_to_label} pairs tokenised in context and labelled in {seconds:.1f} s, one process")

    ids = [
        tuple(tokenize_response(tokenizer, p.prompt, text).response_ids for text in (p.rejected, p.modified))
        for p in pairs[:300]
    ]
    seconds = min(cpu_seconds(edit_targets, ids, 10) for _ in range(5))
    print(f"alignment of {len(ids)} pairs alone: {1e6 * seconds / len(ids):.1f} us of processor time a pair")


def cpu_seconds(align, pairs: list, repeats: int) -> float:
    """Processor time of aligning all pairs once (other programs do not count)."""
    started = time.process_time()
    for _ in range(repeats):
        for a, b in pairs:
            align(a, b)
    return (time.process_time() - started) / repeats


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["calls", "memory", "labels", "serve"])
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--calls", type=int, default=5120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--served_pairs", type=int, default=50_000)
    parser.add_argument("--folder", help="where the pairs of `memory` are written: about 2 KB each, twice")
    parser.add_argument("--pairs_to_label", type=int, default=45_000)
    parser.add_argument("--delay", type=float, default=0.5)
    options = parser.parse_args()
    if options.what == "serve":
        asyncio.run(serve(options.delay))
    else:
        {"calls": calls, "memory": memory, "labels": labels}[options.what](options)


if __name__ == "__main__":
    if not __package__:
        # Started as a file, this folder is where imports look first, and `labeling` would be this very file.
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.labeling", *sys.argv[1:]])
    main()
