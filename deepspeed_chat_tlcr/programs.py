"""A stage as a program of its own. Imports PyTorch only when that has run."""

from collections.abc import Callable


def as_program(main: Callable[[], None]) -> Callable[[], None]:
    """A stage's ``main`` as a process of its own, script or console command, which ends well (``runtime.leave``)."""

    def program() -> None:
        main()
        from deepspeed_chat_tlcr.runtime import leave

        leave()

    return program
