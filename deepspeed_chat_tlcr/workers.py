"""Work spread over the GPUs of a node, one process each. A process loads its model once; results keep their order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
import transformers
from deepspeed.accelerator import get_accelerator

from deepspeed_chat_tlcr.errors import InputError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None
"""In a worker process: the function that ``load`` returned."""


def processes_of(asked: int) -> int:
    """``--num_processes``: 0 means one for each visible GPU, or one on a CPU. Raises ``InputError`` for too many."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return asked or 1
    if asked > accelerator.device_count():
        raise InputError(f"--num_processes {asked}: each needs a GPU, and {accelerator.device_count()} are visible")
    return asked or accelerator.device_count()


def spread(load: Callable[[], Callable[[Item], Result]], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """``load()(item)`` of each item, in the items' order.

    A single process is this one; several are new ones with a device each, and ``load``, items and results must be
    picklable. Without items nothing is loaded. Errors of the work are raised here; a process that dies is a
    ``RunError``.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        work = load() if items else None
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    started = context.Value("i", 0)
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, context, _begin, (started, threads)) as pool:
        try:
            yield from pool.map(_carry_out, [load] * len(items), items)
        except BrokenProcessPool:
            raise RunError(
                "one of --num_processes' processes was killed (out of memory?); what is written stays, and the same "
                "command continues"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(started: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all at once; the parent prints a message
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(number)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which would keep their GPUs' memory."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _carry_out(load: Callable[[], Callable[[Item], Result]], item: Item) -> Result:
    global _work
    if _work is None:
        _work = load()
    return _work(item)
