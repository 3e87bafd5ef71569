"""The errors that a user sees, and how programs end with them."""

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from deepspeed_chat_tlcr.bars import lines_instead_of_bars

EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED = 2, 1, 130


class InputError(ValueError):
    """Wrong data, file, flag or checkpoint. The message names which one and says what to do."""


class RunError(RuntimeError):
    """A run cannot continue, for a reason outside the code. The message says all that the user needs. Exit code 1."""


class SaveError(RunError):
    """Something could not be written: the disk is full or gone. What was written before is untouched."""


def exits_cleanly(main: Callable) -> Callable:
    """Wrap an entry point: an ``InputError`` becomes one line on stderr and exit code 2, without a traceback.

    So does a file that cannot be used. A ``RunError``, a full disk, too little memory or a lost rank becomes a message
    and exit code 1. A closed pipe (``| head``) ends the program silently. In a log, progress bars are lines.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        lines_instead_of_bars()
        try:
            return main(*args, **kwargs)
        except InputError as error:
            # Every rank makes the same mistake; one of them reports it, or all where their numbers are the mistake.
            rank = os.environ.get("LOCAL_RANK", "0")
            if not rank.isdecimal() or int(rank) == 0:
                print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INPUT)
        except KeyboardInterrupt:
            end("interrupted; the same command goes on from the newest checkpoint, if there is one", EXIT_INTERRUPTED)
        except RunError as error:
            end(f"error: {one_line(error)}")
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):
                end(f"error: port {os.environ.get('MASTER_PORT')} is in use; choose another with --master_port")
            if lost_a_rank(error):
                end(
                    "error: another rank is gone; its own message, if any, stands above\n"
                    "checkpoints so far are whole: the same command continues"
                )
            raise
        except BrokenPipeError:
            os._exit(EXIT_RUN)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                where = f" in {one_line(error.filename)}" if error.filename else ""
                end(f"error: no space left to write{where}; checkpoints so far are whole")
            if not error.filename or not error.strerror:
                raise
            print(f"error: {one_line(error.filename)}: {error.strerror}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INPUT)
        except MemoryError:
            end("error: out of memory; give this program more, or smaller batches")

    return wrapped


def end(message: str, status: int = EXIT_RUN) -> NoReturn:
    """Print why and exit at once: exit handlers would wait for ranks that are waiting for this one."""
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


@contextmanager
def reading(path: object, remedy: str = "remove it, or make it anew") -> Iterator[None]:
    """For code that uses the contents of a file of ours: a damaged file becomes an ``InputError`` that names it."""
    try:
        yield
    except (InputError, UnicodeError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: not as this program wrote it ({describe_error(error)}); {remedy}") from error


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end died."""
    # NCCL's errors have a class of their own, Gloo's are known by their text.
    classes = {base.__name__ for base in type(error).__mro__}
    return "DistError" in classes or "gloo/transport" in str(error)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MOST_SHOWN = 2000  # characters of a message


def one_line(message: object) -> str:
    """A message as one line that is safe to print: control characters are spelt out, as in ``a\\nb``."""
    text = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(message))
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]} … {text[-MOST_SHOWN // 2 :]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_error(error: Exception) -> str:
    """An error of other people's code in one line: its class, its message, and the line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({place[0].filename}:{place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}{where}"
