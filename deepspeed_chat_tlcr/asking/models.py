"""Chat models' prices, last days and reasoning efforts, from ``prices.json`` and from their server.

Needs only the standard library, so that the plan and the preflight work before anything is installed.
"""

import datetime
import http.client
import ipaddress
import json
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from deepspeed_chat_tlcr.asking.redaction import MOST_MESSAGE, printable
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json

PRICES = Path(__file__).parent / "prices.json"
OPENAI_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-6-luna"  # the cheapest of the current family: the successor where a table names none
BATCH_DISCOUNT = 0.5
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # from the least thinking to the most
SOON = 30  # days before a shutdown from which a plan mentions it
MOST_BYTES = 4_000_000  # of a list of models


@dataclass(frozen=True)
class Price:
    """US$ per million tokens."""

    input: float
    output: float

    def usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6

    @classmethod
    def parse(cls, text: str, what: str = "--price") -> "Price":
        """Of "0.1,0.5": in, out. Raises ``InputError`` where these are not two prices."""
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 2 or not all(0 <= number < 1e6 for number in numbers):
            raise InputError(f"{what} {text}: expected IN,OUT in US$ per million tokens, such as 0.1,0.5")
        return cls(*numbers)

    def discounted(self, factor: float) -> "Price":
        return Price(self.input * factor, self.output * factor)


@dataclass(frozen=True)
class KnownModel:
    """An entry of the table. ``batch``: the share of the price that a batch costs; ``read``: the day of reading."""

    name: str
    price: Price
    batch: float = BATCH_DISCOUNT
    efforts: tuple[str, ...] = ()
    default_effort: str | None = None
    shutdown: datetime.date | None = None
    successor: str | None = None
    read: str | None = None

    def end(self, today: datetime.date, days: float = SOON) -> str | None:
        """A sentence, if the model is shut down or will be within ``days``: when, and what to use instead."""
        if self.shutdown is None or (self.shutdown - today).days > days:
            return None
        when = "was shut down" if self.shutdown <= today else "will be shut down"
        return f"{self.name} {when} on {self.shutdown}; use {self.successor or DEFAULT_MODEL}"


def read_table(path: str | Path = PRICES) -> dict[str, KnownModel]:
    """The table by model. Raises ``InputError`` naming the file and the model for a malformed entry."""
    try:
        table = read_json(path)
    except InputError as error:
        raise InputError(f"--prices {error}") from None
    if not isinstance(table, dict):
        raise InputError(f"--prices {path}: not a JSON object of models")
    return {name: _read_entry(path, name, entry) for name, entry in table.items()}


def _read_entry(path: str | Path, name: str, entry) -> KnownModel:
    try:
        numbers = [float(entry["input"]), float(entry["output"]), float(entry.get("batch", BATCH_DISCOUNT))]
        if not all(0 <= number < 1e6 for number in numbers):
            raise ValueError("a price is negative or no number")
        efforts = tuple(entry.get("efforts") or ())
        if unknown := [effort for effort in efforts if effort not in EFFORTS]:
            raise ValueError(f"unknown effort {unknown[0]!r}; known are {', '.join(EFFORTS)}")
        shutdown = datetime.date.fromisoformat(entry["shutdown"]) if entry.get("shutdown") else None
        texts = [entry.get(key) for key in ("default_effort", "successor", "read")]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError("default_effort, successor and read are texts")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        form = '{"MODEL": {"input": US$ per million tokens, "output": US$ per million tokens}}'
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--prices {path}: {name}: expected {form} ({reason}); see docs/labeling.md") from None
    default_effort, successor, read = texts
    return KnownModel(name, Price(*numbers[:2]), numbers[2], efforts, default_effort, shutdown, successor, read)


def known_model(model: str | None, path: str | Path = PRICES) -> KnownModel | None:
    return read_table(path).get(model) if model else None


def price_of(model: str | None, base_url: str | None = None, path: str | Path = PRICES) -> Price | None:
    """The model's price; 0 for an unlisted model on a machine of the user's own; None: not known."""
    if known := known_model(model, path):
        return known.price
    return Price(0.0, 0.0) if base_url is not None and is_own_machine(base_url) else None


def is_own_machine(base_url: str) -> bool:
    """Whether an address is on this machine or in a private network, where calls cost nothing."""
    host = (urlsplit(base_url).hostname or "").lower()
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".localdomain"))


def check_base_url(url: str, what: str = "--base_url") -> None:
    """Raise ``InputError`` for an address that cannot be an endpoint's."""
    example = "give it like http://127.0.0.1:8000/v1"
    if re.search(r"[\x00-\x20\x7f]", url):
        raise InputError(f"{what} has blanks or control characters in it; {example}")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises where it is no port)
    except ValueError as error:
        raise InputError(f"{what} is not an address ({error}); {example}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{what} is not an http address; {example}")
    if re.search(r"/(chat/)?completions/?$", parts.path):
        raise InputError(f"{what} ends in {parts.path.rpartition('/v1')[2] or parts.path}: leave that out; {example}")


# ---- what the server lists -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """What ``GET /v1/models/ID`` says. ``unknown``: the server's words where it has the route but not the model."""

    unknown: str | None = None
    shutdown: datetime.date | None = None
    context: int | None = None  # tokens of prompt and answer together


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


def _get(url: str, key: str, timeout: float) -> tuple[int, dict]:
    """Status and JSON object of a GET; (0, {}) if nothing readable came back."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers["User-Agent"] = "deepspeed-chat-tlcr"
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    opener = urllib.request.build_opener(_NoRedirects, https)
    try:
        try:
            response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            body = json.loads(_read(response, time.monotonic() + timeout))
            status = response.status
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return 0, {}
    return status, body if isinstance(body, dict) else {}


def _read(response, deadline: float) -> bytes:
    """A body, at most ``MOST_BYTES`` of it. Raises ``TimeoutError`` at the deadline, also if it comes byte by byte."""
    parts, size = [], 0
    while size < MOST_BYTES and (part := response.read1(65_536)):
        if time.monotonic() > deadline:
            raise TimeoutError
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def ask_listing(model: str, base_url: str | None, key: str, timeout: float = 10.0) -> Listing:
    """What the endpoint lists of a model: nothing if it lacks the route or does not answer."""
    status, body = _get(f"{base_url or OPENAI_URL}/models/{quote(model, safe='')}", key, timeout)
    if status == 404:
        error = body.get("error")
        error = error if isinstance(error, dict) else {}
        message = str(error.get("message") or "")
        # A server without the route may repeat the path, and so the name: only words about the model count.
        about = rf"\bmodel\b\W*{re.escape(model)}\W.*(does not exist|not found|deprecated)"
        knows_route = error.get("code") == "model_not_found" or bool(re.search(about, message, re.IGNORECASE))
        return Listing(unknown=message or "no such model") if knows_route else Listing()
    if status != 200 or body.get("id") != model:
        return Listing()
    try:
        shutdown = datetime.date.fromisoformat(str(body.get("shutdown_date"))[:10])
    except ValueError:
        shutdown = None
    return Listing(shutdown=shutdown, context=_context(body))


def served_models(base_url: str, key: str, timeout: float = 10.0) -> dict[str, int | None]:
    """The models that a server lists, with their context lengths where it tells them."""
    _, body = _get(f"{base_url}/models", key, timeout)
    entries = body.get("data") if isinstance(body.get("data"), list) else []
    return {
        entry["id"]: _context(entry)
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    }


def _context(entry: dict) -> int | None:
    """vLLM's ``max_model_len``, llama.cpp's ``meta.n_ctx``."""
    meta = entry.get("meta") if isinstance(entry.get("meta"), dict) else {}
    for value in (entry.get("max_model_len"), meta.get("n_ctx"), entry.get("context_length")):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def reason_not_to_start(
    model: str,
    listing: Listing,
    hours: float,
    variable: str,
    known: KnownModel | None,
    today: datetime.date | None = None,
) -> str | None:
    """Why a run of so many hours should not start with this model, in one sentence; None if it may start.

    ``variable``: the setting that chooses another model, such as "--model (LABEL_MODEL)".
    """
    today = today or datetime.date.today()
    successor = (known.successor if known else None) or DEFAULT_MODEL
    if listing.unknown is not None:
        if known and known.shutdown and known.shutdown <= today:
            return f"{model} was shut down on {known.shutdown}: set {variable} to {successor}"
        reason = printable(listing.unknown)[:MOST_MESSAGE]
        return f"the endpoint has no model {model!r} ({reason}): set {variable} to one it has, such as {successor}"
    last_day = today + datetime.timedelta(hours=hours)
    if listing.shutdown is None or listing.shutdown > last_day:
        return None
    when = "was shut down" if listing.shutdown <= today else "will be shut down before this run can end,"
    return f"{model} {when} on {listing.shutdown}: set {variable} to {successor}"
