"""The frame of every training stage: check, lock the folder, join the ranks, train, leave together."""

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TypeVar

from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.arguments import RunOptions, announce
from deepspeed_chat_tlcr.checkpoints import is_finished
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.hub import require_repository, upload
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.metrics import require_trackers
from deepspeed_chat_tlcr.runtime import Runtime

Options = TypeVar("Options", bound=RunOptions)


def run_stage(options: Options, train: Callable[[Options, Runtime], None], inputs: Iterable[str | None] = ()) -> None:
    """Call ``train(options, runtime)`` on every rank, unless this very command has finished before.

    ``inputs``: the models that the stage starts from. Raises ``InputError``, before anything loads, if the output
    folder is one of them, is in use by another run, or holds results of another command.
    """
    output = os.path.realpath(options.output_dir)  # does not fail on circular links
    if any(os.path.realpath(path) == output for path in inputs if path):
        raise InputError(f"--output_dir {options.output_dir}: is the model that the stage begins with; choose another")
    require_trackers(options.report_to)
    require_repository(options)
    runtimes.adopt_launcher()
    with lock(options.output_dir) if os.environ.get("RANK", "0") == "0" else nullcontext():
        runtime = runtimes.start(options.precision, options.seed)
        runtime.say(f"{runtime.world_size} process(es), {runtime.device.type}, {runtime.dtype}")
        if not is_finished(options, runtime):
            if runtime.is_main:
                announce(options)
            train(options, runtime)
        runtime.finish()
        upload(options, runtime)
