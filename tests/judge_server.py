"""An OpenAI-compatible judge with scripted verdicts, in this process: what it said to whom can be looked at.

``verdict(prompt, asked)`` returns the judge's text for the ``asked``-th time (0 first) that a prompt comes, an HTTP
status to fail with, or None to drop the connection.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Judge:
    def __init__(self, verdict: Callable[[str, int], str | int | None]):
        self.verdict = verdict
        self.asked: Counter = Counter()  # every request, by prompt
        self.paid: Counter = Counter()  # requests that got an answer
        self.bodies: list[dict] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower():
                length = next(line for line in head.split("\r\n") if line.startswith("content-length:"))
                body = json.loads(await reader.readexactly(int(length.split(":")[1])))
                prompt = body["messages"][-1]["content"]
                said = self.verdict(prompt, self.asked[prompt])
                self.asked[prompt] += 1
                self.bodies.append(body)
                if said is None:
                    writer.transport.abort()
                    return
                self.paid[prompt] += isinstance(said, str)
                writer.write(response(said))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


def response(said: str | int) -> bytes:
    if isinstance(said, int):
        status, content = said, {"error": {"message": "as scripted", "type": "server_error", "code": "x"}}
    else:
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        status, content = 200, {"model": "judge", "choices": [choice], "usage": usage}
    body = json.dumps(content).encode()
    fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"HTTP/1.1 {status} X\r\n{fields}\r\n".encode() + body


@contextmanager
def judging(verdict: Callable[[str, int], str | int | None]) -> Iterator[tuple[Judge, str]]:
    """The judge and its base URL, for as long as the block lasts."""
    judge, ready, loop = Judge(verdict), threading.Event(), asyncio.new_event_loop()
    address = []

    async def listen():
        server = await asyncio.start_server(judge.serve, "127.0.0.1", 0)
        address.append(server.sockets[0].getsockname()[1])
        ready.set()

    def work():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(listen())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield judge, f"http://127.0.0.1:{address[0]}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
