"""An OpenAI-compatible server that misbehaves as asked: for tests of labelling, in a process of its own.

    python tests/fault_server.py --rate_limited 0.1 --malformed 0.2 …      prints its port, then serves

What one question gets depends on its text and on how often it was asked; with --alike its answers are all the same, so
that an interrupted and an uninterrupted run must end alike. Each request is written to --log: time, what it got, the
question's id, the tokens it was billed.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter

TAGS = "<|Start of Reasoning|>\nIt is {why}.\n<|End of Reasoning|>\n<|Start of Modified Response|>\n{text}\n"
END = "<|End of Modified Response|>"
SECTION = r"<\|Start of {0} Response\|>\n(.*?)\n<\|End of {0} Response\|>"

# Answers that cannot be used, by the reason that labelling should find.
MALFORMED = {
    "empty": lambda q: "",
    "refusal": lambda q: "I'm sorry, but I can't help with that.",
    "tags_missing": lambda q: "Here you are: " + q["edited"],
    "cut_by_max_tokens": lambda q: "<|Start of Reasoning|>\nIt is",
    "echo_of_instruction": lambda q: q["all"],
    "identical_to_rejected": lambda q: TAGS.format(why="fine", text=q["rejected"]) + END,
    "identical_to_chosen": lambda q: TAGS.format(why="worse", text=q["chosen"]) + END,
    "rewrite": lambda q: TAGS.format(why="bad", text="Nothing here " + " ".join(f"new{i}" for i in range(40))) + END,
}
# Answers in unusual wrapping that can be used.
ODD = [
    lambda q: (TAGS.format(why="bad", text=q["edited"]) + END).replace("Start of", "Start Of"),
    lambda q: TAGS.format(why="bad", text=q["edited"]),
    lambda q: "Sure!\n```\n" + TAGS.format(why="bad", text=q["edited"]) + END + "\n```\nI hope this helps.",
    lambda q: "<think>Hm. <|Start of Modified Response|></think>" + TAGS.format(why="b", text=q["edited"]) + END,
]


def read_question(body: dict) -> dict:
    text = body["messages"][0]["content"]
    if "<|Start of Preferred Response|>" not in text:  # a judge's question, not a reviser's
        asked = json.dumps(body["messages"])
        return {"all": asked, "chosen": "", "rejected": "", "edited": "", "key": asked}
    chosen = re.search(SECTION.format("Preferred"), text, re.DOTALL)[1]
    rejected = re.search(SECTION.format("Non-Preferred"), text, re.DOTALL)[1]
    words = rejected.split()
    edited = " ".join(["better", *words[1:]])
    return {"all": text, "chosen": chosen, "rejected": rejected, "edited": edited, "key": words[-1]}


class Server:
    def __init__(self, options):
        self.options = options
        self.asked = Counter()
        self.log = open(options.log, "a") if options.log else None  # noqa: SIM115
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}

    def record(self, **line):
        if self.log:
            self.log.write(json.dumps({"time": time.time(), **line}) + "\n")
            self.log.flush()

    def draw(self, *what) -> random.Random:
        return random.Random(hashlib.sha256(json.dumps([self.options.seed, *what]).encode()).digest())

    # ---- chat ----

    def completion(self, body: dict, count: int) -> dict:
        """The answer to the ``count``-th time a question gets an answer."""
        o, question = self.options, read_question(body)
        draw = self.draw("answer", question["key"], 0 if o.alike else count)
        finish = "stop"
        if o.verdict:
            kind, text = "verdict", o.verdict
        elif question["key"] in o.always_bad.split(",") or draw.random() < o.malformed:
            kind = o.malformed_kind or draw.choice(sorted(MALFORMED))
            text = MALFORMED[kind](question)
            finish = "length" if kind == "cut_by_max_tokens" else "stop"
        else:
            kind = "good"
            good = TAGS.format(why="bad", text=question["edited"]) + END
            text = draw.choice(ODD)(question) if draw.random() < o.odd else good
        usage = {"prompt_tokens": len(question["all"]) // 4, "completion_tokens": len(text) // 4 + 1}
        self.record(got=kind, key=question["key"], **usage)
        if draw.random() < o.wrong_usage:
            usage = draw.choice(
                [
                    None,
                    {},
                    {"prompt_tokens": -5},
                    {"prompt_tokens": "many", "completion_tokens": 10**12},
                    {"prompt_tokens": 1, "completion_tokens": 1},
                ]
            )
        message = {"role": "assistant", "content": text}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": usage,
        }

    async def chat(self, body: dict, headers: dict) -> tuple[int, dict, bytes | str]:
        o = self.options
        if o.delay:
            await asyncio.sleep(o.delay)
        if o.refuse_key:
            given = headers.get("authorization", "") + headers.get("api-key", "")
            return error(401, f"Incorrect API key provided: {given}", "invalid_api_key")
        if body.get("model") == "unknown":
            return error(404, "The model `unknown` does not exist", "model_not_found")
        if o.no_quota:
            return error(429, "You exceeded your current quota", "insufficient_quota")
        if o.refuse_all:
            return error(400, o.refuse_all, "invalid_request_error")
        question = read_question(body)
        key = question["key"]
        if key in o.refuse_keys.split(","):
            return error(400, "too long", "context_length_exceeded")
        count = self.asked[key]
        self.asked[key] += 1
        if o.faults_per_question is None or count < o.faults_per_question:
            fault = self.draw("fault", key, count).random()
            for name in ("rate_limited", "server_error", "hang", "reset", "truncated", "garbage"):
                rate = getattr(o, name)
                if fault < rate:
                    self.record(got=name, key=key)
                    return await self.misbehave(name, headers, key, count)
                fault -= rate
        answers = self.asked[key, "answers"]
        self.asked[key, "answers"] += 1
        return 200, {}, json.dumps(self.completion(body, answers)).encode()

    async def misbehave(self, name: str, headers: dict, key: str, count: int) -> tuple[int, dict, bytes | str]:
        if name == "rate_limited":
            wait = self.draw("wait", key, count).choice([{}, {"retry-after": "0.2"}, {"retry-after-ms": "100"}])
            status, extra, body = error(429, "slow down " + headers.get("authorization", ""), "rate_limit_exceeded")
            return status, {**extra, **wait}, body
        if name == "server_error":
            return error(500, "oops " + headers.get("authorization", ""), "server_error")
        if name == "hang":
            await asyncio.sleep(3600)
        if name == "reset":
            return 0, {}, "reset"
        if name == "truncated":
            return 0, {}, "truncated"
        return 200, {}, b'{"choices": [{"mess'

    # ---- files and batches ----

    async def api(self, method: str, path: str, raw: bytes, headers: dict) -> tuple[int, dict, bytes]:
        o = self.options
        if path.endswith("/models"):
            return ok({"object": "list", "data": []})
        kind = method + re.sub(r"\w+-\d+|\?.*", "", path)
        self.asked[kind] += 1
        if o.api_fault == "hang":
            if kind == "POST/v1/files" and self.asked[kind] == 1:
                await asyncio.sleep(3600)
        elif o.api_fault and self.asked[kind] == 1:
            faults = {"truncated": (0, {}, "truncated"), "garbage": (200, {}, b'{"id'), "nonsense": ok({"hello": 1})}
            return faults[o.api_fault]
        if path.endswith("/files") and method == "POST":
            boundary = re.search(r"boundary=(\S+)", headers["content-type"])[1].encode()
            part = next(p for p in raw.split(b"--" + boundary) if b"filename=" in p)
            id = f"file-{len(self.files)}"
            self.files[id] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            return ok({"id": id, "object": "file", "bytes": 1, "created_at": 1, "filename": "x", "purpose": "batch"})
        match = re.search(r"/files/([^/]+)/content", path)
        if match:
            return 200, {"content-type": "application/octet-stream"}, self.files[match[1]]
        if path.split("?")[0].endswith("/batches"):
            if method == "GET":
                return ok({"object": "list", "data": list(self.batches.values()), "has_more": False})
            return self.create_batch(json.loads(raw))
        batch = self.batches[path.rsplit("/", 1)[1]]
        if batch["status"] == "in_progress" and time.time() - batch["created_at"] >= o.batch_seconds:
            self.run_batch(batch)
        return ok(batch)

    def create_batch(self, body: dict) -> tuple[int, dict, bytes]:
        id = f"batch-{len(self.batches)}"
        lines = self.files[body["input_file_id"]].splitlines()
        busy = any(batch["status"] == "in_progress" for batch in self.batches.values())
        too_much = self.options.most_enqueued and (busy or len(lines) > self.options.most_enqueued)
        self.batches[id] = batch = {
            "id": id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "failed" if too_much else "in_progress",
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
        }
        if too_much:
            batch["errors"] = {"data": [{"code": "token_limit_exceeded", "message": "too much enqueued"}]}
        self.record(got="batch", requests=len(lines), status=batch["status"])
        if self.options.lose_batch_answer and len(self.batches) == 1:
            return 0, {}, "reset"  # the batch exists, but the client never hears of it
        return ok(batch)

    def run_batch(self, batch: dict):
        output, errors = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            key = read_question(request["body"])["key"]
            count = self.asked[key]
            self.asked[key] += 1
            draw = self.draw("batch", key, count)
            head = {"id": "r", "custom_id": request["custom_id"]}
            if draw.random() < self.options.expired:
                errors.append({**head, "response": None, "error": {"code": "batch_expired", "message": "late"}})
                continue
            if draw.random() < self.options.server_error:
                body = {"error": {"code": "server_error", "message": "oops"}}
                errors.append({**head, "response": {"status_code": 500, "body": body}, "error": None})
                continue
            answers = self.asked[key, "answers"]
            self.asked[key, "answers"] += 1
            body = self.completion(request["body"], answers)
            line = {**head, "response": {"status_code": 200, "body": body}, "error": None}
            output += [line] * (2 if draw.random() < self.options.duplicates else 1)
        self.draw("order").shuffle(output)
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        batch["status"] = "expired" if self.options.expired else "completed"

    # ---- HTTP ----

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                pairs = (line.split(":", 1) for line in head[1:] if ":" in line)
                headers = {name.strip().lower(): value.strip() for name, value in pairs}
                if headers.get("transfer-encoding") == "chunked":
                    raw = b""
                    while size := int(await reader.readline(), 16):
                        raw += (await reader.readexactly(size + 2))[:-2]
                    await reader.readline()
                else:
                    raw = await reader.readexactly(int(headers.get("content-length", 0)))
                if self.options.log_requests:
                    self.record(got="request", path=path, has_api_key="api-key" in headers)
                if "/chat/completions" in path:
                    status, extra, body = await self.chat(json.loads(raw), headers)
                else:
                    status, extra, body = await self.api(method, path, raw, headers)
                if body == "reset":
                    writer.transport.abort()
                    return
                if body == "truncated":
                    writer.write(
                        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id"'
                    )
                    await writer.drain()
                    return
                fields = {"content-type": "application/json", **extra, "content-length": str(len(body))}
                lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


def ok(body: dict) -> tuple[int, dict, bytes]:
    return 200, {}, json.dumps(body).encode()


def error(status: int, message: str, code: str) -> tuple[int, dict, bytes]:
    return status, {}, json.dumps({"error": {"message": message, "type": code, "code": code}}).encode()


async def main():
    parser = argparse.ArgumentParser()
    for name in ("rate_limited", "server_error", "hang", "reset", "truncated", "garbage"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    for name in ("malformed", "odd", "wrong_usage", "delay", "duplicates", "expired", "batch_seconds"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    for name in ("refuse_key", "no_quota", "lose_batch_answer", "alike", "log_requests"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("malformed_kind", "refuse_all", "refuse_keys", "always_bad", "log", "verdict", "api_fault"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--faults_per_question", type=int)
    parser.add_argument("--most_enqueued", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    server = Server(parser.parse_args())
    listening = await asyncio.start_server(server.serve, "127.0.0.1", server.options.port, backlog=1000, limit=2**26)
    print(listening.sockets[0].getsockname()[1], flush=True)
    async with listening:
        await listening.serve_forever()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
