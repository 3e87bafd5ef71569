"""Entry points run in forks of a process that has imported their libraries: seconds saved on every short run.

A stage leaves DeepSpeed, accelerate and torch.distributed initialised for one model, so it needs a process of its own;
but PyTorch, transformers and DeepSpeed, once imported, need not be imported again. The parent must not train itself:
PyTorch's autograd does not survive a fork.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBRARIES = ("deepspeed", "torch", "transformers.trainer", "datasets")


def warm_up() -> None:
    """Import what takes the time, before the first fork."""
    for name in LIBRARIES:
        importlib.import_module(name)


def module_of(program: str) -> str:
    """``step1_sft/main.py`` as it is imported: ``step1_sft.main``."""
    return program.removesuffix(".py").replace("/", ".")


def start(program: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run ``main(arguments)`` of a program, its output appended to ``log``; returns the child's process id.

    The child exits with the status that the program would have as a script. Wait for it with ``os.waitpid``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the parent does about it
        _die_with_parent()
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        os.environ.update(variables or {})
        sys.argv = [program, *arguments]
        found = importlib.import_module(module_of(program)).main(list(arguments))
        status = found if isinstance(found, int) else 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _die_with_parent() -> None:
    """A parent that is killed outright cannot end its children; alone they would write where its successor does."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(program: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> int:
    """``start``, then wait; returns the exit status (negative: the signal that ended it)."""
    return os.waitstatus_to_exitcode(os.waitpid(start(program, arguments, log, variables), 0)[1])
