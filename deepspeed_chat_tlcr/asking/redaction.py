"""The API key; secrets are removed from texts before they are cut and made printable."""

import json
import os
import re
from collections.abc import Callable
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit

from deepspeed_chat_tlcr.errors import InputError

MOST_MESSAGE = 300  # characters of a server's message that are kept


def read_key(name: str, needed: bool) -> str:
    """The key in the environment variable ``name``; "" if there is none and none is needed.

    Raises ``InputError`` that never shows a key, not even one given by mistake instead of the variable's name.
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
    """A function that removes secrets from text: the key, and password and query of the address.

    Keys of fewer than 8 characters are placeholders for local servers ("none", "EMPTY").
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
    """One line that is safe to print: blanks for control characters, ``?`` for half of a surrogate pair."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", " ", text).split())
