"""One kind of error for everything a user can mend."""

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable

EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED = 2, 1, 130


class InputError(ValueError):
    """Wrong data, file, flag or checkpoint. The message names which one and says what to do."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason outside the code: its message is all that the user needs. Exit code 1."""


class SaveError(RunError):
    """Something could not be written: the disk is full or gone. What was written before is untouched."""


def exits_cleanly(main: Callable) -> Callable:
    """Wrap an entry point: an ``InputError`` becomes one line on stderr and exit code 2, without a traceback.

    A ``RunError``, a full disk or a lost rank: one message and exit code 1.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            # Every rank sees the same mistake; one of them says so.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INPUT)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            # At once: exit handlers would wait for ranks that are waiting for this one.
            os._exit(EXIT_RUN)
        except RuntimeError as error:
            if not lost_a_rank(error):
                raise
            print("error: another rank is gone; its own message, if any, stands above", file=sys.stderr)
            print("checkpoints so far are whole: the same command continues", file=sys.stderr, flush=True)
            os._exit(EXIT_RUN)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            where = f" in {error.filename}" if error.filename else ""
            print(f"error: no space left to write{where}; checkpoints so far are whole", file=sys.stderr, flush=True)
            os._exit(EXIT_RUN)

    return wrapped


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end died."""
    # NCCL's errors have a class of their own, Gloo's are known by their text.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "gloo/transport" in str(error)


def told(error: Exception) -> str:
    """An error of somebody else's code in one line: its kind, its message, and the line of theirs that raised it."""
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({place[0].filename}:{place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"
