"""One kind of error for everything a user can mend."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_INPUT = 2


class InputError(ValueError):
    """Wrong data, file, flag or checkpoint. The message names which one and says what to do."""


def exits_cleanly(main: Callable) -> Callable:
    """Wrap an entry point: an ``InputError`` becomes one line on stderr and exit code 2, without a traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            # Every rank sees the same mistake; one of them says so.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INPUT)

    return wrapped


def cannot_load(what: str, path: str | Path, error: Exception) -> InputError:
    """The error for a model or tokenizer that does not load, saying whether the folder is missing or what is in it."""
    looks_local = str(path).startswith(("/", ".", "~"))
    if looks_local and not Path(path).is_dir():
        return InputError(f"no {what} could be loaded from {str(path)!r}: no such folder")
    lines = str(error).strip().splitlines()
    return InputError(f"no {what} could be loaded from {str(path)!r}: {lines[0] if lines else type(error).__name__}")
