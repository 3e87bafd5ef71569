"""The key, and what keeps it and a server's words from doing harm: redacted first, then cut, then made printable."""

import json
import os
import re
from collections.abc import Callable
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit

from deepspeed_chat_tlcr.errors import InputError

MOST_MESSAGE = 300  # characters of a server's message that are kept


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


def redactor(key: str, url: str | None = None) -> Callable[[str], str]:
    """A function that takes secrets out of text: the key, and a user's password in the address.

    Keys of fewer than 8 characters ("none", "EMPTY": placeholders for local servers) are words, not secrets.
    """
    parts = urlsplit(url or "")
    secrets = [secret for secret in (key, parts.password or "", parts.query) if len(secret) >= 8]
    spellings = (str, lambda s: quote(s, safe=""), quote_plus, lambda s: json.dumps(s)[1:-1], lambda s: repr(s)[1:-1])
    forms = {spelling(secret) for secret in secrets for spelling in spellings}
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


def printable(text: str) -> str:
    """One line that cannot control a terminal: no control, bidirectional or half characters; blanks in their place."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", " ", text).split())
