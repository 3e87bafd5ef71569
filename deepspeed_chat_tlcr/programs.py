"""A stage as a program."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed_chat_tlcr.errors import exits_cleanly


def stage(
    train: str, parse_args: Callable[[Sequence[str] | None], Any], models: Sequence[str] = ("model_name_or_path",)
) -> tuple[Callable[..., None], Callable[[], None]]:
    """A stage's ``main(argv)``, and ``program``, which is ``main`` in a process that then ends by ``runtime.leave``.

    ``train``: the module whose ``train(options, runtime)`` is the stage's work. It is imported when the options are
    parsed, since PyTorch and DeepSpeed take seconds, for which --help and a wrong flag need not wait. ``models``: the
    options that name models which the stage begins with.
    """

    @exits_cleanly
    def main(argv: Sequence[str] | None = None) -> None:
        options = parse_args(argv)
        from deepspeed_chat_tlcr.stages import run_stage

        run_stage(options, importlib.import_module(train).train, [getattr(options, name) for name in models])

    def program() -> None:
        main()
        from deepspeed_chat_tlcr.runtime import leave

        leave()

    return main, program
