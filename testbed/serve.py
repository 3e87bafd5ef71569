"""The oracle reviser behind an OpenAI-compatible endpoint, so that labelling asks it as it would ask GPT-4.

It reads nothing but the question's text (the paper's Appendix A prompt: conversation, preferred and non-preferred
response between tags) and answers in the paper's tagged format. The same question with the same ``seed`` always gets
the same answer.
"""

import hashlib
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import parse_json
from testbed.reviser import revise
from testbed.world import World

MODEL = "oracle-reviser"

_SECTION = re.compile(r"<\|start of ([\w\s-]+)\|>(.*?)<\|end of \1\|>", re.IGNORECASE | re.DOTALL)


class RequestError(ValueError):
    """A request that cannot be answered, with the HTTP status that says why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def read_question(messages: list[dict]) -> tuple[str, str]:
    """The conversation and the non-preferred response of a labelling question; the last section of a name counts.

    Raises ``RequestError`` where a message is not text or a section is missing.
    """
    texts = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "every message needs a 'content' that is a string")
    sections = {name.strip().lower(): body.strip() for name, body in _SECTION.findall("\n".join(texts))}
    wanted = ("context", "preferred response", "non-preferred response")
    missing = [f"<|Start of {name.title()}|>" for name in wanted if name not in sections]
    if missing:
        raise RequestError(400, f"the question lacks the section {', '.join(missing)}")
    return sections["context"], sections["non-preferred response"]


def answer(world: World, messages: list[dict], seed: int = 0, choice: int = 0) -> str:
    """The tagged answer to a labelling question; ``seed`` and ``choice`` pick one of many possible revisions."""
    context, rejected = read_question(messages)
    question = json.dumps([world.seed, seed, choice, context, rejected])
    rng = random.Random(hashlib.sha256(question.encode()).digest())
    try:
        modified, reasoning = revise(world, context, rejected, rng)
    except InputError as error:
        raise RequestError(400, str(error)) from None
    return (
        f"<|Start of Reasoning|>\n{reasoning}\n<|End of Reasoning|>\n"
        f"<|Start of Modified Response|>\n{modified}\n<|End of Modified Response|>"
    )


def complete(world: World, model: str, body: bytes) -> dict:
    """The body of a chat completion for the body of its request."""
    try:
        request = parse_json(body)
        messages, seed, choices = request.get("messages"), request.get("seed", 0), request.get("n", 1)
    except (ValueError, AttributeError):
        raise RequestError(400, "the request's body is not a JSON object") from None
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "'messages' must be a list of at least one message")
    if request.get("model") != model:
        raise RequestError(404, f"the model {request.get('model')!r} does not exist; this server has {model!r}")
    if request.get("stream"):
        raise RequestError(400, "'stream' is not supported")
    if not isinstance(choices, int) or not 1 <= choices <= 64:
        raise RequestError(400, "'n' must be a whole number from 1 to 64")
    texts = [answer(world, messages, seed or 0, choice) for choice in range(choices or 1)]
    asked = sum(_length(message["content"]) for message in messages)
    answered = sum(map(_length, texts))
    return {
        "id": "chatcmpl-" + hashlib.sha256("\n".join(texts).encode()).hexdigest()[:24],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ],
        "usage": {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered},
    }


def _length(text: str) -> int:
    """Words and punctuation marks: what this model calls a token."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def make_server(world: World, host: str = "127.0.0.1", port: int = 0, model: str = MODEL) -> ThreadingHTTPServer:
    """A server bound to ``host:port`` (0: any free port, then ``server.server_port``); ``serve_forever`` runs it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_GET(self):
            listed = {"id": model, "object": "model", "created": 0, "owned_by": "testbed"}
            if self.path == "/v1/models":
                return self._send(200, {"object": "list", "data": [listed]})
            if self.path == f"/v1/models/{model}":
                return self._send(200, listed)
            return self._refuse(404, f"there is no {self.path}")

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path != "/v1/chat/completions":
                return self._refuse(404, f"there is no {self.path}")
            try:
                return self._send(200, complete(world, model, body))
            except RequestError as error:
                return self._refuse(error.status, str(error))

        def _refuse(self, status: int, message: str) -> None:
            kind = "not_found_error" if status == 404 else "invalid_request_error"
            self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})

        def _send(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass  # one line per request would drown the labelling's own progress

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    return Server((host, port), Handler)


def serve_in_thread(world: World, model: str = MODEL) -> ThreadingHTTPServer:
    """Start a server on a free port of this machine; ``server.shutdown()`` and ``server.server_close()`` end it."""
    server = make_server(world, model=model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
