"""DeepSpeed's compiled operators, loaded so that a killed run cannot block the next one."""

import hashlib
import os
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory, get_default_build_root


def own_build_folder() -> None:
    """Compile into a folder for this Python environment, unless ``TORCH_EXTENSIONS_DIR`` names one.

    A build depends on its environment's headers: two environments in one folder would compile again and again.
    """
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{get_default_build_root()}/deepspeed-{environment}")


def load_operator(builder_name: str) -> None:
    """Compile (at its first use) and load one of DeepSpeed's operators, such as ``CPUAdamBuilder``.

    PyTorch guards a build with a plain file named ``lock``, which outlives a killed process: every later run would
    silently wait for ever. Here a lock of the operating system, which dies with its holder, is taken first; its holder
    knows that a leftover ``lock`` is nobody's.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return  # DeepSpeed works without, or reports what is missing
    own_build_folder()
    # This environment's ninja, not the first on PATH: another version would compile everything again.
    own = Path(sys.executable).parent
    if (own / "ninja").exists() and own != Path(os.environ["PATH"].split(os.pathsep)[0]):
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ['PATH']}"
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with FileLock(folder.with_name(f"{builder.name}.guard")):
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{builder.name}.so").exists():
            print(f"compiling DeepSpeed's {builder.name} (once, about a minute) ...", flush=True)
        builder.load(verbose=False)
