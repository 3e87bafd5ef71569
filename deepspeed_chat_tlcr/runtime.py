"""Where a stage runs: ranks, device, precision, seeds."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

import deepspeed
import torch
import torch.distributed
import transformers
from deepspeed.accelerator import get_accelerator

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.operators import load_operator

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h

TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other. Rank 0 saves while the others wait: NCCL's own limit of 10 minutes is too short
for a large model on a slow disk. If a rank dies, the others end at once, whatever the limit."""

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def seed(self, seed: int) -> None:
        """Give each rank its own random numbers. Call it after building the models, which must be equal on all."""
        transformers.set_seed(seed + self.rank)

    def say(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)

    def finish(self) -> None:
        """Leave the process group together: a rank that exits while its threads run can abort."""
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def start(dtype: str, seed: int) -> Runtime:
    """Join the process group, or make one without a launcher, and seed all random generators.

    Call it before any model loads: ZeRO-3 partitions while loading and needs the world size.
    """
    adopt_launcher()
    if "RANK" not in os.environ:
        # Started as plain `python main.py`: one rank, on a free port.
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **here)
    accelerator = get_accelerator()
    resolved = resolve_dtype(dtype)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        device = torch.device("cpu")
        load_operator("ShareMemCommBuilder")  # the CPU ranks' collectives
        keep_memory_small()
    else:
        device = torch.device(accelerator.device_name(), local_rank)
        accelerator.set_device(local_rank)
        take_cores(local_rank, int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1))
    deepspeed.init_distributed(timeout=TIMEOUT)
    unlink_shared_buffers()
    transformers.set_seed(seed)
    if torch.distributed.get_rank() != 0:
        transformers.logging.set_verbosity_error()
    elif resolved == "bf16" and on_cpu and not cpu_multiplies_bf16():
        print("warning: this CPU has no bf16 instructions: --dtype fp32 will be many times faster", flush=True)
    return Runtime(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, resolved)


def free_port() -> str:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI_SIZE": ("mpiexec", "PMI_RANK", "MPI_LOCALRANKID"),
}
"""Launchers with variables of their own: number of processes -> program, rank, rank on the node."""


def adopt_launcher() -> None:
    """Take rank and world size from srun or mpirun if they have started several processes.

    Otherwise each process would be a run of one rank, and all would write to one folder. Raises ``InputError`` without
    an address to meet at, and for variables that no launcher sets like this.
    """
    for size, (program, rank, local_rank) in LAUNCHERS.items():
        ranks = os.environ.get(size, "")
        if "RANK" in os.environ or not ranks.isdigit() or int(ranks) < 2:
            continue
        if any(name not in os.environ for name in (rank, "MASTER_ADDR", "MASTER_PORT")):
            raise InputError(
                f"started {ranks} times by {program}: set MASTER_ADDR (the first node) and MASTER_PORT (a free port), "
                "or start it with deepspeed or torchrun (docs/clusters.md)"
            )
        os.environ.update(RANK=os.environ[rank], WORLD_SIZE=ranks)
        os.environ.setdefault("LOCAL_RANK", os.environ.get(local_rank, "0"))
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    ):
        if not os.environ.get(name, "0").isdecimal():
            raise InputError(f"{name}={os.environ[name]} in the environment: expected a whole number")
    if "RANK" in os.environ:
        lacking = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if lacking:
            raise InputError(f"RANK is set, but {' and '.join(lacking)} is not: start it with deepspeed or torchrun")
        if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]) or int(os.environ["MASTER_PORT"]) > 65_535:
            raise InputError("RANK must be below WORLD_SIZE, MASTER_PORT at most 65535; the launcher sets them")


@contextlib.contextmanager
def heartbeat(what: str, every: float = 60.0) -> Iterator[None]:
    """Print once a minute, on rank 0, what is still going on: large models take long to save."""
    done, begun = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            print(f"still {what}, {(time.monotonic() - begun) / 60:.1f} min so far", flush=True)

    if torch.distributed.get_rank() == 0:
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def take_cores(local_rank: int, local_size: int) -> None:
    """Bind a rank to its own share of the node's cores, which DeepSpeed's launcher does not do: Adam on offloaded
    states needs its threads there. ``OMP_NUM_THREADS`` in the environment takes precedence."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_setaffinity"):
        return
    share = share_of_cores(sorted(os.sched_getaffinity(0)), _siblings, local_rank, local_size)
    os.sched_setaffinity(0, set(chain.from_iterable(share)))
    os.environ["OMP_NUM_THREADS"] = str(len(share))  # for processes of its own
    torch.set_num_threads(len(share))


def share_of_cores(
    processors: Sequence[int], siblings: Callable[[int], str], rank: int, ranks: int
) -> list[tuple[int, ...]]:
    """One rank's cores, each as a tuple of its logical processors; neighbours, so on one socket.

    ``siblings`` names a processor's core. With fewer cores than ranks, each rank gets one, and some share.
    """
    cores: dict[str, list[int]] = {}
    for processor in processors:
        cores.setdefault(siblings(processor), []).append(processor)
    listed = [tuple(members) for members in cores.values()]
    begin, end = rank * len(listed) // ranks, (rank + 1) * len(listed) // ranks
    return listed[begin : max(end, begin + 1)]


def _siblings(processor: int) -> str:
    file = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    return file.read_text().strip() if file.exists() else str(processor)


def unlink_shared_buffers() -> None:
    """Unlink this rank's shared-memory buffer once every rank has opened it.

    DeepSpeed never does: every run would leave 66 MiB per rank in memory until the machine restarts.
    """
    torch.distributed.barrier()
    owner = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], torch.distributed.get_rank())
    Path("/dev/shm/deepspeed_allreduce_buffer_" + "_".join(map(str, owner))).unlink(missing_ok=True)


def keep_memory_small() -> None:
    """Limit the memory that oneDNN and the allocator keep on a CPU, which grows with every new length of a batch.

    oneDNN keeps its compiled kernels for 128 shapes, not 1024: that is most of the growth. Freed blocks of 8 MiB and
    more go back to the system (glibc would raise this threshold up to 32 MiB). All threads share one arena, so that
    the backward pass keeps no free blocks of its own.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    with contextlib.suppress(AttributeError, OSError):  # another C library
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_ARENA_MAX, 1)
        allocator.mallopt(_M_MMAP_THRESHOLD, 8 << 20)


class Preemption:
    """SIGTERM, which clusters send before they take a machine away, and Ctrl-C: all ranks stop after the running step.
    A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.asked = self.heeded = False  # heeded: the run has saved and stopped
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has been asked to stop; a collective."""
        asked = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)


def leave() -> None:
    """End the process of a finished stage: run exit handlers, but do not tear down C++ libraries.

    There about one ZeRO-3 rank in forty aborts ("terminate called without an active exception"), and the launcher would
    call a stage failed whose models are saved.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions; an x86 without them takes many times as long as for fp32."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True  # an older torch cannot tell: no warning
    has = torch.cpu.get_capabilities()
    return has.get("architecture") != "x86_64" or bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def resolve_dtype(dtype: str) -> str:
    """The dtype, with ``auto`` replaced by the accelerator's best. Raises ``InputError`` for one that it cannot do."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if dtype == "auto":
        if on_cpu:
            return "fp32"
        return "bf16" if accelerator.is_bf16_supported() else "fp16"
    if dtype == "fp16" and on_cpu:
        raise InputError("--dtype fp16: DeepSpeed cannot train in fp16 on a CPU; use --dtype bf16 or --dtype fp32")
    if dtype == "bf16" and not on_cpu and not accelerator.is_bf16_supported():
        raise InputError("--dtype bf16: this accelerator has no bf16; use --dtype fp16")
    return dtype
