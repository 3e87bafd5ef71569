"""A stage as a program. Imports PyTorch only after the stage has run."""

from collections.abc import Callable


def as_program(main: Callable[[], None]) -> Callable[[], None]:
    """A stage's ``main`` for a script or console command, whose process then ends by ``runtime.leave``."""

    def program() -> None:
        main()
        from deepspeed_chat_tlcr.runtime import leave

        leave()

    return program
