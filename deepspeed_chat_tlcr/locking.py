"""One process at a time writes to a folder: an advisory lock, which the system releases when its holder dies."""

import fcntl
from pathlib import Path
from typing import TextIO

from deepspeed_chat_tlcr.errors import InputError


def lock(folder: str | Path, flag: str = "--output_dir") -> TextIO:
    """Lock a folder until the returned file is closed or the process ends.

    Raises ``InputError`` naming ``flag`` if the folder cannot be written or another run has it.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = (path / ".lock").open("a+")
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        taken.close()
        raise InputError(f"{flag} {path}: another run is writing there; wait for it or choose another folder") from None
    return taken
