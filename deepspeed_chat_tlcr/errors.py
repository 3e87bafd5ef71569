"""One kind of error for everything a user can mend."""

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deepspeed_chat_tlcr.bars import lines_instead_of_bars

EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED = 2, 1, 130


class InputError(ValueError):
    """Wrong data, file, flag or checkpoint. The message names which one and says what to do."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason outside the code: its message is all that the user needs. Exit code 1."""


class SaveError(RunError):
    """Something could not be written: the disk is full or gone. What was written before is untouched."""


def exits_cleanly(main: Callable) -> Callable:
    """Wrap an entry point: an ``InputError`` becomes one line on stderr and exit code 2, without a traceback.

    So does a file that cannot be used, whichever code met it. A ``RunError``, a full disk, too little memory or a lost
    rank: one message and exit code 1. A reader that has seen enough (``| head``) ends the program without a word. In a
    log, progress bars are lines.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        lines_instead_of_bars()
        try:
            return main(*args, **kwargs)
        except InputError as error:
            # Every rank sees the same mistake; one of them says so, or all where their numbers are the mistake.
            rank = os.environ.get("LOCAL_RANK", "0")
            if not rank.isdecimal() or int(rank) == 0:
                print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INPUT)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        except RunError as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            # At once: exit handlers would wait for ranks that are waiting for this one.
            os._exit(EXIT_RUN)
        except RuntimeError as error:
            if not lost_a_rank(error):
                raise
            print("error: another rank is gone; its own message, if any, stands above", file=sys.stderr)
            print("checkpoints so far are whole: the same command continues", file=sys.stderr, flush=True)
            os._exit(EXIT_RUN)
        except BrokenPipeError:
            os._exit(EXIT_RUN)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                where = f" in {one_line(error.filename)}" if error.filename else ""
                print(f"error: no space left to write{where}; checkpoints so far are whole", file=sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_RUN)
            if not error.filename or not error.strerror:
                raise
            print(f"error: {one_line(error.filename)}: {error.strerror}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INPUT)
        except MemoryError:
            print("error: out of memory; give this program more, or smaller batches", file=sys.stderr, flush=True)
            os._exit(EXIT_RUN)

    return wrapped


@contextmanager
def reading(path: object, remedy: str = "remove it, or make it anew") -> Iterator[None]:
    """Around code that uses what a file of ours says: a file that was damaged since is an ``InputError`` naming it."""
    try:
        yield
    except (InputError, UnicodeError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: not as this program wrote it ({told(error)}); {remedy}") from error


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end died."""
    # NCCL's errors have a class of their own, Gloo's are known by their text.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "gloo/transport" in str(error)


_ACTING = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MOST_SHOWN = 2000  # characters of a message


def one_line(message: object) -> str:
    """A message as one line that a terminal takes: what would act rather than show is spelt out, as in ``a\\nb``."""
    text = _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(message))
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]} … {text[-MOST_SHOWN // 2 :]}"


def told(error: Exception) -> str:
    """An error of somebody else's code in one line: its kind, its message, and the line of theirs that raised it."""
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({place[0].filename}:{place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"
