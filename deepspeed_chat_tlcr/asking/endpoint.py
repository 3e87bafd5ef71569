"""An OpenAI-compatible chat endpoint: one call, and what each kind of error means for the caller.

Works with OpenAI, Azure OpenAI and local servers (vLLM, ``transformers serve``, Ollama, llama.cpp).
"""

import asyncio
import logging
import math
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import openai

from deepspeed_chat_tlcr.asking.dialect import LOWEST, OF_ONE_REQUEST, Dialect, EffortRefused
from deepspeed_chat_tlcr.asking.models import OPENAI_URL, KnownModel
from deepspeed_chat_tlcr.asking.money import question_size
from deepspeed_chat_tlcr.asking.redaction import MOST_MESSAGE, printable, read_key, redactor, without_secrets
from deepspeed_chat_tlcr.errors import InputError

# The HTTP library that openai's client uses: httpx2 since its version 3, httpx before.
httpx: Any = sys.modules[type(openai.DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0]]

log = logging.getLogger(__name__)

SEEDS_APART = 1_000_003  # between two attempts of a request: more than anyone samples of a pair
CALLS_PER_CLIENT = 8  # a connection pool looks at each of its connections for each call: small ones are fast
MOST_ANSWER_BYTES = 32_000_000  # of one response; more is no answer to a question
MOST_FILE_BYTES = 4_000_000_000  # of a file of batch answers
CUT = "cut_by_max_tokens"
ROOM = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768, "max": 32768}
"""Tokens that the limit leaves for hidden reasoning, by effort, until answers show that it takes more."""
MOST_LIMIT = 65_536  # tokens that the limit of an answer grows to
MOST_LESSONS = 8  # refusals of one request that are learnt from: an endpoint can find fault for ever
LEAST_LIMIT = 256  # tokens that are asked for, however little a context length seems to leave
CUT_SHARE = 0.02  # of the answers: with more than that cut, all get more room, not only those asked again


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """An answer. ``usage`` is as reported, so it may be missing or wrong (``money.counted_usage``).

    ``text`` is without the thinking that some servers put in front of it, which is in ``thinking``.
    """

    text: str
    finish_reason: str
    usage: dict
    model: str
    thinking: str = ""


class Unusable(Exception):
    """An answer that cannot be used; ``reason`` says why in one word."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question. ``accept(answer, usage)`` turns its answer into the line to store, or raises ``Unusable``."""

    id: str
    messages: list[dict]
    accept: Callable[[ChatAnswer, dict], str]
    seed: int | None = None  # asks a server that knows seeds for another sample


class Fault(Exception):
    """The call brought no answer, but the same call may bring one later: worth a retry."""

    def __init__(
        self,
        kind: str,
        detail: str = "",
        wait: float | None = None,
        maybe_billed: bool = False,
        usage: dict | None = None,
    ):
        """``usage``: as reported by a call whose body was otherwise unreadable."""
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.wait, self.maybe_billed, self.usage = kind, wait, maybe_billed, usage or {}


class RequestRefused(Exception):
    """The endpoint will not answer this request as it is (too long, filtered). Others may be fine."""

    def __init__(self, status: int, code: str, message: str, param: str = ""):
        super().__init__(f"http {status} {code}: {message}" if status else f"{code}: {message}")
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def is_of_one_request(self) -> bool:
        """Whether the refusal is about this request's content, not about the settings."""
        return self.status == 413 or bool(OF_ONE_REQUEST.search(f"{self.code} {self.message}"))


class EndpointRefused(InputError):
    """The endpoint answers no request as things stand: wrong key, unknown model, nothing there."""


class Outage(Exception):
    """Stop for now: the endpoint is gone, or the credit is used up."""


class ErrorInAnswer(Exception):
    """An error in the body of an HTTP 200 response."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True)
class Sampling:
    """The settings of all requests. None: the server's default, and the field is not sent."""

    max_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    reasoning_effort: str | None = None  # or "lowest" of those the model has


class Endpoint:
    """Asks one model at one address. Create and use it inside one event loop; ``close`` it at the end."""

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        azure_api_version: str | None = None,
        sampling: Sampling | None = None,
        timeout: float = 120.0,
        known: KnownModel | None = None,
    ):
        """``known``: the model's entry in the table of models, if it has one."""
        self.model, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.sampling, self.timeout = sampling or Sampling(), timeout
        self.shown_url = without_secrets(base_url or OPENAI_URL)
        lowest = self.sampling.reasoning_effort == LOWEST
        effort = ((known and known.efforts) or ("none",))[0] if lowest else self.sampling.reasoning_effort
        # A first guess: OpenAI takes the new name for every model, and all other servers know the old one.
        limit_field = "max_completion_tokens" if base_url is None else "max_tokens"
        self.dialect = Dialect(limit_field, effort, lowest)
        self.room = ROOM.get(effort or (known and known.default_effort) or "", 0)
        self.cuts: Counter[str] = Counter()  # by request: how often its answer was cut
        self.answers_here = self.cuts_here = 0  # since the room last grew
        self.answered = False  # then what refuses it for good is an outage: the settings are right
        self.thinks = self.room > 0  # or an answer spent tokens on hidden reasoning
        key = read_key(api_key_env, needed=base_url is None or azure_api_version is not None)
        self.redact = redactor(key, base_url)
        self.batch_url = "/chat/completions" if azure_api_version else "/v1/chat/completions"
        self.azure_api_version, self.key = azure_api_version, key or "none"
        if azure_api_version and not base_url:
            raise InputError("--azure_api_version needs --base_url https://NAME.openai.azure.com")
        self.clients: list[openai.AsyncOpenAI] = []
        self.free: list[openai.AsyncOpenAI] = []  # a client stands here once for each call it can take
        try:
            self.tls = httpx.create_ssl_context()  # takes long to make, so all clients share it
            self.client = self._connect()
        except OSError as error:
            raise InputError(f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR: {error.strerror or error}") from None
        except (httpx.InvalidURL, ImportError, ValueError) as error:
            raise InputError(
                f"the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: {self.redact(printable(str(error)))}"
            ) from None

    def _connect(self) -> openai.AsyncOpenAI:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CALLS_PER_CLIENT)
        common: dict[str, Any] = {
            "api_key": self.key,
            "max_retries": 0,  # retries are the dispatcher's, which counts, paces and reports them
            "timeout": self.timeout,
            "http_client": openai.DefaultAsyncHttpxClient(
                limits=limits, timeout=self.timeout, verify=self.tls, event_hooks={"response": [bound_size]}
            ),
            # A compressed answer of a megabyte can be a gigabyte.
            "default_headers": {"Accept-Encoding": "identity"},
        }
        client: openai.AsyncOpenAI
        if self.azure_api_version:
            version = self.azure_api_version
            client = openai.AsyncAzureOpenAI(azure_endpoint=self.base_url or "", api_version=version, **common)
        else:
            client = openai.AsyncOpenAI(base_url=self.base_url or OPENAI_URL, **common)
        self.clients.append(client)
        self.free += [client] * CALLS_PER_CLIENT
        return client

    def limit(self, request: ChatRequest) -> int:
        """Most tokens of the answer, hidden reasoning included; doubled each time that it was cut."""
        limit = (self.sampling.max_tokens + self.room) << min(self.cuts[request.id] if self.cuts else 0, 6)
        limit = min(limit, max(MOST_LIMIT, self.sampling.max_tokens))
        if self.dialect.limit_field in self.dialect.left_out:  # the endpoint takes no limit
            return max(MOST_LIMIT, limit)
        if self.dialect.context:
            left = self.dialect.context - question_size(request.messages) // 3 - 64
            limit = min(limit, max(left, LEAST_LIMIT))
        return min(limit, self.dialect.most_output or limit)

    def observe(self, request: ChatRequest, answer: ChatAnswer, limit: int) -> bool:
        """Note whether the limit cut the answer, and whether the model thinks. Returns whether it was cut."""
        self.answered = True
        self.thinks = self.thinks or bool(answer.thinking) or reasoning_tokens(answer.usage) > 0
        cut = answer.finish_reason == "length"
        if cut:
            self.cuts[request.id] += 1
        if limit == self.sampling.max_tokens + self.room:
            self.answers_here += 1
            self.cuts_here += cut
            many = self.cuts_here >= 2 and self.cuts_here > CUT_SHARE * self.answers_here
            if cut and many and limit < MOST_LIMIT:
                self.room += limit
                self.answers_here = self.cuts_here = 0
        return cut

    def body(self, request: ChatRequest, attempt: int = 0, limit: int | None = None) -> dict:
        """The JSON body of a chat-completions request; each attempt has a seed of its own, if any.

        ``limit``: the most tokens to ask for; unset: ``self.limit(request)``.
        """
        most = self.limit(request)
        fields = self.dialect.fields(
            most if limit is None else min(limit, most),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=None if request.seed is None else request.seed + attempt * SEEDS_APART,
        )
        return {"model": self.model, "messages": request.messages, **fields}

    async def ask(self, request: ChatRequest, attempt: int = 0, limit: int | None = None) -> ChatAnswer:
        """One call, repeated only where a refusal said how to ask instead. ``limit``: as in ``body``.

        Raises ``Fault``, ``RequestRefused``, ``EndpointRefused`` or ``Outage``.
        """
        if not self.free:
            self._connect()
        client = self.free.pop()
        try:
            for round in range(MOST_LESSONS + 1):
                body = self.body(request, attempt, limit)
                try:
                    # Not client.chat.completions, whose typed objects take a quarter of a call's processor time.
                    call: Awaitable[Any] = client.post("/chat/completions", body=body, cast_to=object)
                    with self.classify_errors():
                        # An overall limit: a server that sends byte by byte would never meet a read timeout.
                        return self.read(await asyncio.wait_for(call, self.timeout))
                except RequestRefused as refused:
                    # Other requests may have learnt it meanwhile: then this one is repeated as well.
                    learnt = self.learn(refused, body) or self.body(request, attempt, limit) != body
                    if not learnt or round == MOST_LESSONS:
                        raise
            raise AssertionError("the last round returns or raises")
        finally:
            self.free.append(client)

    def learn(self, refused: "RequestRefused", sent: dict) -> bool:
        """Whether a refusal says how to ask instead. Raises ``EndpointRefused`` for an unknown effort."""
        before = len(self.dialect.left_out)
        try:
            learnt = self.dialect.learn(refused.status, refused.code, refused.param, refused.message, sent)
            for name in self.dialect.left_out[before:]:
                if getattr(self.sampling, name, None) is not None and name in sent:
                    log.warning("%s takes no %s as it is asked here: it is left out", self.model, name)
            return learnt
        except EffortRefused as error:
            asked = f"--reasoning_effort {self.sampling.reasoning_effort}"
            raise EndpointRefused(f"{asked}: {self.model} takes {error}") from None

    def read(self, body: dict) -> ChatAnswer:
        """Read an answer's body. Raises as ``ask`` does for an error or an unreadable body."""
        try:
            return read_completion(body)
        except ErrorInAnswer as error:
            status = int(error.code) if re.fullmatch(r"[45]\d\d", error.code) else 0
            self.raise_for(status, error.code, self.cleaned(error.message))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            usage = body.get("usage") if isinstance(body, dict) else None
            usage = usage if isinstance(usage, dict) else None
            reason = self.cleaned(f"{type(error).__name__}: {error}")
            raise Fault("malformed_body", reason, maybe_billed=True, usage=usage) from None

    def cleaned(self, message: str) -> str:
        """A server's words without secrets, cut, on one printable line."""
        return printable(self.redact(message))[:MOST_MESSAGE]

    @contextmanager
    def classify_errors(self) -> Iterator[None]:
        """The client's exceptions as ``Fault``, ``RequestRefused`` or ``EndpointRefused``, without secrets."""
        try:
            yield
        # httpx's own errors come from a body that is read as a stream.
        except (asyncio.TimeoutError, openai.APITimeoutError, httpx.TimeoutException):
            raise Fault("timeout", f"{self.timeout:g} s", maybe_billed=True) from None
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            message = self.cleaned(str(body.get("message") or error.message or ""))
            code, wait = self.cleaned(f"{error.code or ''} {error.type or ''}"), retry_after(error.response.headers)
            self.raise_for(error.status_code, code, message, wait, str(error.param or ""))
        except (openai.APIConnectionError, httpx.TransportError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, TooLarge):
                raise Fault("too_large", str(cause), maybe_billed=True) from None
            if type(cause).__name__ == "ConnectError":
                raise Fault("unreachable", self.cleaned(str(cause))) from None
            raise Fault("connection_lost", self.cleaned(str(cause)), maybe_billed=True) from None
        except Redirected as error:
            raise EndpointRefused(f"{self.shown_url} redirects to {error}: give the final address") from None
        except TooLarge as error:
            raise Fault("too_large", str(error), maybe_billed=True) from None
        except InputError:
            raise
        except (ValueError, RecursionError) as error:  # not JSON, or nested too deep
            raise Fault("malformed_body", self.cleaned(f"{type(error).__name__}: {error}"), maybe_billed=True) from None

    def raise_for(self, status: int, code: str, message: str, wait: float | None = None, param: str = "") -> NoReturn:
        """Raise the exception for an error. ``status`` 0: an error inside an answer; ``code``: its name."""
        refused = Outage if self.answered else EndpointRefused
        if status == 402 or credit_is_used_up(status, code, message):
            raise Outage(f"the credit at {self.shown_url} is used up: {message or code}")
        if status == 429 or (status == 0 and re.search(r"rate.?limit|too many requests", f"{code} {message}", re.I)):
            raise Fault("rate_limited", message, wait)
        if status in (401, 403) and not OF_ONE_REQUEST.search(f"{code} {message}"):
            raise refused(f"{self.shown_url} refuses the key in the variable {self.api_key_env} ({status}): {message}")
        if status in (404, 405, 501):
            hint = "" if re.search(r"/v\d|/openai", self.shown_url) else "; does --base_url lack its /v1?"
            raise refused(f"{self.shown_url} has no model {self.model!r} for chat ({status}): {message}{hint}")
        if status in (408, 409, 425) or status >= 500:
            raise Fault(f"http_{status}", message, wait)
        if status == 0 and not OF_ONE_REQUEST.search(f"{code} {message}"):
            raise Fault("error_in_answer", f"{code}: {message}".strip(": "), wait)
        raise RequestRefused(status, code, message, param)

    async def close(self):
        for client in self.clients:
            await client.close()


def credit_is_used_up(status: int, code: str, message: str) -> bool:
    """Whether an error means that no credit is left, rather than a rate limit, which passes."""
    if re.search(r"insufficient_(quota|funds|credit|balance)|billing|credit", code, re.IGNORECASE):
        return True
    words = r"credit balance|insufficient (credit|fund|balance|quota)|out of credit|(requires|need) more credit|billing"
    return status in (0, 400, 403, 429) and bool(re.search(words, message, re.IGNORECASE))


def read_completion(body: dict) -> ChatAnswer:
    """Read a chat completion's body. Raises ``ErrorInAnswer``, or a Python error for any other kind of body."""
    choices = body.get("choices")
    error = body.get("error") or (choices[0].get("error") if choices else None)
    if error:
        error = error if isinstance(error, dict) else {"message": error}
        raise ErrorInAnswer(str(error.get("code") or error.get("type") or ""), str(error.get("message") or ""))
    message = choices[0]["message"]
    text, refusal = message.get("content"), message.get("refusal")
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(part.get("text") or "" for part in text if part.get("type", "text") in ("text", "output_text"))
    if not isinstance(text, str | None) or not isinstance(refusal, str | None):
        raise TypeError("the message's content is not text")
    reason = choices[0].get("finish_reason") or ""
    if refusal and not text:
        text, reason = refusal, "content_filter"
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    text, shown = without_thinking(text or "", reason == "length")
    # JSON can spell half of a surrogate pair, which UTF-8 cannot.
    clean = text.encode("utf-8", "replace").decode()
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    thinking = (thinking if isinstance(thinking, str) else "") + shown
    return ChatAnswer(clean, str(reason), usage, str(body.get("model") or ""), thinking)


_THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>(.*?)(</\1>|\Z)", re.DOTALL | re.IGNORECASE)


def without_thinking(text: str, cut: bool = False) -> tuple[str, str]:
    """Split an answer into its text and the thinking in front of it, which some servers leave there in tags.

    If the chat template opened the thought, only its end tag is there. ``cut``: whether the limit cut the answer.
    """
    thinking = ""
    while thought := _THOUGHT.match(text):
        if not thought[3] and not cut:
            break  # a complete text that only begins like a thought
        thinking, text = thinking + thought[2], text[thought.end() :]
    ends = re.search(r"</think>", text, re.IGNORECASE)
    if ends and "<think>" not in text[: ends.start()].lower():
        thinking, text = thinking + text[: ends.start()], text[ends.end() :]
    return (text.lstrip("\r\n") if thinking else text), thinking


def reasoning_tokens(usage: dict) -> int:
    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    value = (details if isinstance(details, dict) else usage).get("reasoning_tokens")
    return value if isinstance(value, int) else 0


class Redirected(Exception):
    """A redirect, which would send people's texts to another address. The message is that address."""


class TooLarge(Exception):
    """A response of more bytes than any answer has."""


class BoundedStream(httpx.AsyncByteStream):
    """A response's body that ends in ``TooLarge`` once it is longer than ``most`` bytes."""

    def __init__(self, stream, most: int):
        self.stream, self.most = stream, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self.stream:
            size += len(part)
            if size > self.most:
                raise TooLarge(f"more than {self.most:,} bytes in one response")
            yield part

    async def aclose(self):
        await self.stream.aclose()


async def bound_size(response):
    """Called with each response before its body is read, and before a redirect is followed."""
    if response.has_redirect_location and response.request.method == "POST":
        raise Redirected(printable(without_secrets(response.headers["location"]))[:MOST_MESSAGE])
    if response.headers.get("content-encoding", "identity") not in ("", "identity"):
        raise TooLarge("a compressed response, though none was asked for")
    is_file = response.request.url.path.endswith("/content")
    response.stream = BoundedStream(response.stream, MOST_FILE_BYTES if is_file else MOST_ANSWER_BYTES)


def retry_after(headers) -> float | None:
    """The seconds that the server asks to wait, in any of the header's three forms; None if it does not ask."""
    try:
        if "retry-after-ms" in headers:
            milliseconds = float(headers["retry-after-ms"])
            return max(milliseconds / 1000, 0.0) if math.isfinite(milliseconds) else None
        if "retry-after" not in headers:
            return None
        value = headers["retry-after"].strip()
        if re.fullmatch(r"\d+(\.\d*)?", value):
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None
