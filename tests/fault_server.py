"""An OpenAI-compatible server that misbehaves as asked: for tests of labelling, in a process of its own.

    python tests/fault_server.py --rate_limited 0.1 --malformed 0.2 …      prints its port, then serves

What one question gets depends on its text and on how often it was asked; with --alike its answers are all the same, so
that an interrupted and an uninterrupted run must end alike. Each request is written to --log: time, what it got, the
question's id, the tokens it was billed.
"""

import argparse
import asyncio
import gzip
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
        if o.think:
            self.record(got=kind, key=question["key"], limit=limit_of(body))
        else:
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
        if o.think:
            finish = self.think(message, usage, body, self.draw("think", question["key"], count), finish)
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": usage,
        }

    def think(self, message: dict, usage: dict, body: dict, draw: random.Random, finish: str) -> str:
        """Hidden reasoning before an answer, within the limit; the finish reason. What it really costs is logged."""
        o, limit = self.options, limit_of(body)
        effort = body.get("reasoning_effort")
        hidden = 0 if effort == "none" else draw.randint(o.think // 2, o.think)
        visible = usage["completion_tokens"]
        if o.usage != "apart" and o.usage != "apart_total" and hidden + visible > limit:
            hidden, visible = limit - (visible if hidden < limit else 0), visible if hidden < limit else 0
            if hidden + visible >= limit:
                hidden, visible, message["content"], finish = limit, 0, None if o.alike else "", "length"
        thought = "So I think. " * 3
        if o.thought == "tag":
            message["content"] = f"<think>{thought}</think>\n\n" + (message["content"] or "")
        elif o.thought:
            message[o.thought] = thought
        self.record(got="billed", prompt=usage["prompt_tokens"], completion=hidden + visible)
        if o.usage == "apart":
            usage |= {"completion_tokens": visible, "reasoning_tokens": hidden}
        elif o.usage == "apart_total":
            total = usage["prompt_tokens"] + visible + hidden
            usage |= {"completion_tokens": visible, "total_tokens": total}
        elif o.usage == "names":
            usage |= {"input_tokens": usage.pop("prompt_tokens"), "output_tokens": hidden + visible}
            del usage["completion_tokens"]
        else:
            details = {"reasoning_tokens": hidden}
            usage |= {"completion_tokens": hidden + visible, "completion_tokens_details": details}
        return finish

    def refusal(self, body: dict) -> tuple[int, dict, bytes] | None:
        """What today's models refuse in a request, one thing at a time."""
        o, text = self.options, json.dumps(body["messages"])
        if (
            o.wants
            and (other := next((n for n in ("max_tokens", "max_completion_tokens") if n in body), "")) != o.wants
        ):
            told = f"Unsupported parameter: '{other}' is not supported with this model. Use '{o.wants}' instead."
            return error(400, told, "unsupported_parameter", param=other)
        effort = body.get("reasoning_effort")
        if o.efforts and effort is not None and effort not in o.efforts.split(","):
            if o.efforts == "-":
                told = "Unrecognized request argument supplied: reasoning_effort"
                return error(400, told, "invalid_request_error")
            told = (
                f"Unsupported value: 'reasoning_effort' does not support '{effort}' with this model. Supported values "
            )
            told += "are: " + ", ".join(f"'{word}'" for word in o.efforts.split(",")) + "."
            return error(400, told, "unsupported_value", param="reasoning_effort")
        for name in ("temperature", "top_p"):
            if o.picky and name in body and effort != "none":
                told = f"Unsupported parameter: '{name}' is not supported with this model."
                return error(400, told, "unsupported_parameter", param=name)
        if o.echo_key:
            self.asked["echo"] += 1
            told = "x" * (self.asked["echo"] * 3 % 330) + f"{self.key} \x1b[2J\ud800 \u202e{self.key} was flagged"
            return error(400, told, "content_filter " + self.key)
        for word, code, told in (
            (o.filter, "content_filter", "The response was filtered due to the content management policy."),
            (o.too_long, "context_length_exceeded", "This model's maximum context length is 8192 tokens."),
        ):
            if word and word in text:
                return error(400, told, code)
        return None

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
        self.key = headers.get("authorization", "").removeprefix("Bearer ")
        if o.lost_key and self.key == o.lost_key and self.asked["answered", self.key]:
            await asyncio.sleep(3600)  # one of several clients loses its endpoint behind its first answer
        self.asked["answered", self.key] += 1
        if key in o.refuse_keys.split(","):
            return error(400, "too long", "context_length_exceeded")
        if (refused := self.refusal(body)) is not None:
            self.record(got="refused", key=key, why=json.loads(refused[2])["error"]["message"])
            return refused
        self.asked["chat"] += 1
        if o.redirect:
            return 307, {"location": o.redirect}, b""
        if o.shrinks:
            return error(400, f"This model's maximum context length is {90_000 - self.asked['chat']} tokens.", "x")
        if o.odd_wait and self.asked["chat"] == 2:
            status, _, told = error(429, "slow down", "rate_limit_exceeded")
            return status, {"retry-after-ms" if o.odd_wait == "nan" else "retry-after": o.odd_wait}, told
        if o.credit_after and self.asked["chat"] > o.credit_after:
            status, code, message = o.credit.split("|")
            return error(int(status), message, code)
        count = self.asked[key]
        self.asked[key] += 1
        if self.draw("in200", key, count).random() < o.error_in_200:
            body = {"id": None, "choices": None, "error": {"message": "Provider returned error", "code": 502}}
            return ok(body)
        if self.draw("huge", key, count).random() < o.huge:
            return self.huge(self.draw("kind", key, count).choice(("long", "gzip", "nested", "digits")))
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

    def huge(self, kind: str) -> tuple[int, dict, bytes]:
        """Bodies that no client should take in whole."""
        self.record(got=kind)
        if kind == "gzip":
            packed = gzip.compress(b'{"choices": "' + b"a" * 200_000_000 + b'"}', 1)
            return 200, {"content-encoding": "gzip"}, packed
        if kind == "nested":
            return 200, {}, b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
        if kind == "digits":
            return 200, {}, b'{"choices": ' + b"1" * 5_000 + b"}"
        return 200, {}, b'{"choices": "' + b"a" * 80_000_000 + b'"}'

    def models(self, path: str) -> tuple[int, dict, bytes]:
        """GET /models and /models/ID: of --models, by name; without it there is no such route."""
        known = json.loads(self.options.models) if self.options.models else None
        name = path.rpartition("/models")[2].strip("/")
        if known is not None:
            self.record(got="models", name=name)
        if not name:
            return ok({"object": "list", "data": [{"id": id, **more} for id, more in (known or {}).items()]})
        if known is None:
            return 404, {}, b'{"detail": "Not Found"}'
        if name not in known:
            return error(404, f"The model `{name}` does not exist or you do not have access to it.", "model_not_found")
        return ok({"id": name, "object": "model", **known[name]})

    # ---- files and batches ----

    async def api(self, method: str, path: str, raw: bytes, headers: dict) -> tuple[int, dict, bytes]:
        o, path = self.options, path.partition("?")[0]
        if "/models" in path:
            return self.models(path)
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
        o, output, errors = self.options, [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            key = read_question(request["body"])["key"]
            if (refused := self.refusal(request["body"])) is not None:
                self.record(got="refused", key=key, why=json.loads(refused[2])["error"]["message"])
                head = {"id": "r", "custom_id": request["custom_id"]}
                response = {"status_code": refused[0], "body": json.loads(refused[2])}
                errors.append({**head, "response": response, "error": None})
                continue
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
        if o.batch_odd and not self.asked["odd batches"]:
            self.asked["odd batches"] += o.batch_odd_once
            output = self.odd_batch(batch, output)
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        batch["status"] = "expired" if self.options.expired else "completed"

    def odd_batch(self, batch: dict, output: list[dict]) -> list[dict]:
        """A batch whose first answer, or all of it, is not as the API promises."""
        kind, first = self.options.batch_odd, output[0]
        body, told = first["response"]["body"], {"error": {"message": "gone", "code": "x"}}
        usage = {"prompt_tokens": 500, "completion_tokens": 4000}
        changes = {
            "junk": "not a line of ours",
            "unreadable": {**first, "response": {"status_code": 200, "body": {"choices": 5, "usage": usage}}},
            "id_number": {**first, "custom_id": 5},
            "id_list": {**first, "custom_id": ["a"]},
            "text_response": {**first, "error": {"message": "x"}, "response": "oops"},
            "text_body": {**first, "response": {"status_code": 400, "body": "oops"}},
            "endless_status": {**first, "response": {"status_code": float("inf"), "body": body}},
            "credit": {**first, "response": {"status_code": 402, "body": told}},
            "gone": {**first, "response": {"status_code": 404, "body": told}},
            "key": {**first, "response": {"status_code": 401, "body": told}},
        }
        return [] if kind == "missing" else [changes[kind], *output[1:]]

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


def error(status: int, message: str, code: str, **more) -> tuple[int, dict, bytes]:
    return status, {}, json.dumps({"error": {"message": message, "type": code, "code": code, **more}}).encode()


def limit_of(body: dict) -> int:
    return body.get("max_tokens") or body.get("max_completion_tokens") or 10**9


async def main():
    parser = argparse.ArgumentParser()
    for name in ("rate_limited", "server_error", "hang", "reset", "truncated", "garbage"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    for name in (
        "malformed",
        "odd",
        "error_in_200",
        "huge",
        "wrong_usage",
        "delay",
        "duplicates",
        "expired",
        "batch_seconds",
    ):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    for name in (
        "refuse_key",
        "no_quota",
        "lose_batch_answer",
        "alike",
        "log_requests",
        "picky",
        "echo_key",
        "shrinks",
        "batch_odd_once",
    ):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("malformed_kind", "refuse_all", "refuse_keys", "always_bad", "log", "verdict", "api_fault"):
        parser.add_argument(f"--{name}", default="")
    for name in (
        "wants",
        "efforts",
        "filter",
        "too_long",
        "models",
        "usage",
        "thought",
        "credit",
        "redirect",
        "odd_wait",
        "batch_odd",
        "lost_key",
    ):
        parser.add_argument(f"--{name}", default="")
    for name in ("think", "credit_after"):
        parser.add_argument(f"--{name}", type=int, default=0)
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
