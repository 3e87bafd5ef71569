"""An OpenAI-compatible chat endpoint: one call, and what each way of going wrong means for the caller.

Works with OpenAI, Azure OpenAI and local servers (vLLM, ``transformers serve``, Ollama, llama.cpp). Knows nothing of
revisions: whatever asks a chat model many questions can use it.
"""

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urlsplit, urlunsplit

import openai

from deepspeed_chat_tlcr.errors import InputError

# The HTTP library that openai's client uses: httpx2 since its version 3, httpx before.
httpx = sys.modules[type(openai.DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0]]

OPENAI_URL = "https://api.openai.com/v1"
SEEDS_APART = 1_000_003  # between two attempts of a request: more than anyone samples of a pair
CALLS_PER_CLIENT = 8  # a connection pool looks at each of its connections for each call: small ones are fast


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What came back: ``usage`` is as reported, so it may be missing or wrong; see ``money.counted_usage``."""

    text: str
    finish_reason: str
    usage: dict
    model: str


class Unusable(Exception):
    """An answer came, but not one that can be used; ``reason`` is one word for it."""

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

    def __init__(self, kind: str, detail: str = "", wait: float | None = None, maybe_billed: bool = False):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.wait, self.maybe_billed = kind, wait, maybe_billed


class RequestRefused(Exception):
    """The endpoint will never answer this one request (too long, filtered): the others may be fine."""


class EndpointRefused(InputError):
    """The endpoint answers no request as things stand: wrong key, unknown model, no quota, nothing there."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks for besides its messages. None: the server's default, and the field is not sent."""

    max_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None


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
    ):
        self.model, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.sampling, self.timeout = sampling or Sampling(), timeout
        self.shown_url = without_secrets(base_url or OPENAI_URL)
        # Newer OpenAI models refuse max_tokens; other servers may not know max_completion_tokens.
        newer = base_url is None and re.match(r"o\d|gpt-[5-9]", model)
        self.limit_name = "max_completion_tokens" if newer else "max_tokens"
        key = read_key(api_key_env, needed=base_url is None or azure_api_version is not None)
        self.redact = redactor(key, base_url)
        self.batch_url = "/chat/completions" if azure_api_version else "/v1/chat/completions"
        self.azure_api_version, self.key = azure_api_version, key or "none"
        if azure_api_version and not base_url:
            raise InputError("--azure_api_version needs --base_url https://NAME.openai.azure.com")
        self.tls = httpx.create_ssl_context()  # takes long to make, so all clients share it
        self.clients: list[openai.AsyncOpenAI] = []
        self.free: list[openai.AsyncOpenAI] = []  # a client stands here once for each call it can take
        self.client = self._connect()

    def _connect(self) -> openai.AsyncOpenAI:
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=None, max_keepalive_connections=CALLS_PER_CLIENT
        )
        common = {
            "api_key": self.key,
            "max_retries": 0,  # retries are the dispatcher's, which counts, paces and reports them
            "timeout": self.timeout,
            "http_client": openai.DefaultAsyncHttpxClient(limits=limits, timeout=self.timeout, verify=self.tls),
        }
        if self.azure_api_version:
            version = self.azure_api_version
            client = openai.AsyncAzureOpenAI(azure_endpoint=self.base_url, api_version=version, **common)
        else:
            client = openai.AsyncOpenAI(base_url=self.base_url or OPENAI_URL, **common)
        self.clients.append(client)
        self.free += [client] * CALLS_PER_CLIENT
        return client

    def body(self, request: ChatRequest, attempt: int = 0) -> dict:
        """The JSON body of a chat-completions request; a further attempt has another seed, if it has any."""
        fields = {
            "model": self.model,
            "messages": request.messages,
            self.limit_name: self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": None if request.seed is None else request.seed + attempt * SEEDS_APART,
        }
        return {name: value for name, value in fields.items() if value is not None}

    async def ask(self, request: ChatRequest, attempt: int = 0) -> ChatAnswer:
        """One call, no retry. Raises ``Fault``, ``RequestRefused`` or ``EndpointRefused``."""
        if not self.free:
            self._connect()
        client = self.free.pop()
        try:
            # Below client.chat.completions: its work on types takes a quarter of a call's processor time.
            call = client.post("/chat/completions", body=self.body(request, attempt), cast_to=object)
            with self.errors_told_apart():
                # The overall limit: a server that drips bytes would never meet a read timeout.
                body = await asyncio.wait_for(call, self.timeout)
            return read_completion(body)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise Fault("malformed_body", f"{type(error).__name__}: {error}", maybe_billed=True) from None
        finally:
            self.free.append(client)

    @contextmanager
    def errors_told_apart(self) -> Iterator[None]:
        """The client's exceptions as ``Fault``, ``RequestRefused`` or ``EndpointRefused``, without secrets."""
        try:
            yield
        except (asyncio.TimeoutError, openai.APITimeoutError):
            raise Fault("timeout", f"{self.timeout:g} s", maybe_billed=True) from None
        except openai.APIStatusError as error:
            code, wait = f"{error.code or ''} {error.type or ''}", retry_after(error.response.headers)
            self.raise_for(error.status_code, code, self.redact(_message(error)), wait)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if type(cause).__name__ == "ConnectError":
                raise Fault("unreachable", self.redact(str(cause))) from None
            raise Fault("connection_lost", self.redact(str(cause or error)), maybe_billed=True) from None
        except httpx.TimeoutException:  # as these two come from a body that is read as a stream
            raise Fault("timeout", f"{self.timeout:g} s", maybe_billed=True) from None
        except httpx.TransportError as error:
            raise Fault("connection_lost", self.redact(str(error)), maybe_billed=True) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Fault("malformed_body", f"{type(error).__name__}: {error}", maybe_billed=True) from None

    def raise_for(self, status: int, code: str, message: str, wait: float | None = None):
        """Raise what an error status means; ``code`` is the error's machine-readable kind, if any."""
        if status == 429 and re.search(r"insufficient_quota|billing|credit", code, re.IGNORECASE):
            raise EndpointRefused(f"{self.shown_url} reports that the quota is used up: {message}")
        if status == 429:
            raise Fault("rate_limited", message, wait)
        if status in (401, 403):
            raise EndpointRefused(
                f"{self.shown_url} refuses the key in the environment variable {self.api_key_env} ({status}): {message}"
            )
        if status == 400 and "max_completion_tokens" in message and self.limit_name == "max_tokens":
            self.limit_name = "max_completion_tokens"
            raise Fault("other_token_limit_field", message, 0.0)
        if status in (404, 405, 501):
            raise EndpointRefused(f"{self.shown_url} has no model {self.model!r} for chat ({status}): {message}")
        if status in (408, 409, 425) or status >= 500:
            raise Fault(f"http_{status}", message, wait)
        raise RequestRefused(f"http {status} {code}: {message}")

    async def close(self):
        for client in self.clients:
            await client.close()


def read_completion(body: dict) -> ChatAnswer:
    """A chat completion's body; raises ValueError, KeyError, TypeError or IndexError where it is not one."""
    choice = body["choices"][0]
    message = choice["message"]
    text, refusal = message.get("content"), message.get("refusal")
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(part.get("text", "") for part in text)
    if not isinstance(text, str | None) or not isinstance(refusal, str | None):
        raise TypeError("the message's content is not text")
    reason = choice.get("finish_reason") or ""
    if refusal and not text:
        text, reason = refusal, "content_filter"
    usage = body.get("usage")
    model = body.get("model")
    # Half surrogate pairs, which JSON can spell, cannot be written as UTF-8.
    clean = (text or "").encode("utf-8", "replace").decode()
    return ChatAnswer(clean, str(reason), usage if isinstance(usage, dict) else {}, str(model or ""))


def retry_after(headers) -> float | None:
    """Seconds to wait as the server asks, in any of the header's three forms; None where it does not."""
    try:
        if "retry-after-ms" in headers:
            return max(float(headers["retry-after-ms"]) / 1000, 0.0)
        if "retry-after" not in headers:
            return None
        value = headers["retry-after"].strip()
        if re.fullmatch(r"\d+(\.\d*)?", value):
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


def _message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    text = body.get("message") or error.message or ""
    return " ".join(str(text).split())[:300]


# ---- the key ---------------------------------------------------------------------------------------------------------


def read_key(name: str, needed: bool) -> str:
    """The key in the environment variable ``name``; "" where there is none and none is needed.

    Raises ``InputError``, which never shows a key: not even one given by mistake in place of the variable's name.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InputError("--api_key_env takes the name of an environment variable, such as OPENAI_API_KEY, not a key")
    key = os.environ.get(name, "").strip()
    if needed and not key:
        raise InputError(f"the environment variable {name} is not set: put the API key there (--api_key_env names it)")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise InputError(f"the environment variable {name} holds something that cannot be a key (spaces or non-ASCII)")
    return key


def redactor(key: str, url: str | None = None):
    """A function that takes secrets out of text: the key, and a user's password in the address.

    Keys of fewer than 8 characters ("none", "EMPTY": placeholders for local servers) are words, not secrets.
    """
    parts = urlsplit(url or "")
    secrets = [secret for secret in (key, parts.password or "", parts.query) if len(secret) >= 8]
    forms = {form for secret in secrets for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])}
    ordered = sorted(forms, key=len, reverse=True)

    def redact(text: str) -> str:
        for form in ordered:
            text = text.replace(form, "[secret]")
        return text

    return redact


def without_secrets(url: str) -> str:
    """An address as it may be shown: without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
