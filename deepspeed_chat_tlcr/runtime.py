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
"""How long ranks wait for each other. Rank 0 saves while the others wait: 10 minutes, NCCL's own limit, are too short
for a large model on a slow disk. A rank that dies ends the others at once, whatever the limit."""

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
        """Give each rank random numbers of its own, once the models are built, which must be alike on all."""
        transformers.set_seed(seed + self.rank)

    def say(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)

    def finish(self) -> None:
        """Leave the process group together: a rank that exits with its threads still running can abort."""
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def start(dtype: str, seed: int) -> Runtime:
    """Join (or, without a launcher, make) the process group and seed every generator.

    Call it before any model loads: ZeRO-3 partitions while loading and needs the world size by then.
    """
    adopt_launcher()
    if "RANK" not in os.environ:
        # Started as plain `python main.py`: one rank, on a port nobody uses.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = get_accelerator()
    resolved = resolve_dtype(dtype)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    else:
        load_operator("ShareMemCommBuilder")  # the CPU ranks' collectives
        keep_memory_small()
    if accelerator.device_name() != "cpu":
        take_cores(local_rank, int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1))
    deepspeed.init_distributed(timeout=TIMEOUT)
    unlink_shared_buffers()
    transformers.set_seed(seed)
    if torch.distributed.get_rank() != 0:
        transformers.logging.set_verbosity_error()
    elif resolved == "bf16" and accelerator.device_name() == "cpu" and not cpu_multiplies_bf16():
        print("warning: this CPU has no bf16 instructions: --dtype fp32 will be many times faster", flush=True)
    return Runtime(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        device=torch.device(accelerator.device_name(), local_rank)
        if accelerator.device_name() != "cpu"
        else torch.device("cpu"),
        dtype=resolved,
    )


LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI_SIZE": ("mpiexec", "PMI_RANK", "MPI_LOCALRANKID"),
}
"""Launchers that name a process in variables of their own: number of processes -> program, rank, rank on the node."""


def adopt_launcher() -> None:
    """Take rank and world size from srun or mpirun, where these have started several processes.

    Otherwise each of them would take itself for a run of one rank, and all would write one folder. Raises
    ``InputError`` where nobody has said at which address they meet, and for variables that no launcher sets so.
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
    """Say once a minute, on rank 0, what still goes on: saves of large models are long and otherwise silent."""
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
    """Keep a rank beside others on its own share of the cores: Adam on offloaded states wants all of its threads there,
    and DeepSpeed's launcher binds nobody. ``OMP_NUM_THREADS`` in the environment wins."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_setaffinity"):
        return
    share = share_of_cores(sorted(os.sched_getaffinity(0)), _siblings, local_rank, local_size)
    os.sched_setaffinity(0, set(chain.from_iterable(share)))
    os.environ["OMP_NUM_THREADS"] = str(len(share))  # for processes of its own
    torch.set_num_threads(len(share))


def share_of_cores(
    processors: Sequence[int], siblings: Callable[[int], str], rank: int, ranks: int
) -> list[tuple[int, ...]]:
    """One rank's cores, as tuples of the processors that each of them shows; neighbours, so of one socket.

    ``siblings`` names a processor's core. With fewer cores than ranks each gets one, some the same.
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
    """Take its name from this rank's shared buffer for collectives, once every rank on the machine has opened it.

    DeepSpeed never does, and every run would leave 66 MiB a rank in memory until the machine is started again.
    """
    torch.distributed.barrier()
    owner = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], torch.distributed.get_rank())
    Path("/dev/shm/deepspeed_allreduce_buffer_" + "_".join(map(str, owner))).unlink(missing_ok=True)


def keep_memory_small() -> None:
    """What a CPU's allocator and oneDNN would keep of every step, and batches of ever new lengths let grow.

    oneDNN remembers what it compiled for the newest 128 shapes, not for 1024: that is most of the growth. Freed blocks
    of 8 MiB and more, activations, go back to the system: left to itself glibc raises this threshold up to 32 MiB. One
    arena for all threads, so that the backward pass's has no free blocks of its own.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    with contextlib.suppress(AttributeError, OSError):  # another C library
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_ARENA_MAX, 1)
        allocator.mallopt(_M_MMAP_THRESHOLD, 8 << 20)


class Preemption:
    """SIGTERM, which clusters send before they take a machine away, and Ctrl-C: noted, and heeded between steps by all
    ranks. Ctrl-C a second time ends the process at once."""

    def __init__(self):
        self.asked = self.heeded = False  # heeded: set by who has saved and stopped
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
    """End the process of a finished stage, exit handlers and all, but without tearing down its C++ libraries.

    About one ZeRO-3 rank in forty otherwise aborts there ("terminate called without an active exception"), and the
    launcher calls a stage failed whose models are all saved.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16; an x86 without them takes many times as long as for fp32."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is None:
        return True  # an older torch that cannot say: no warning then
    able = ask()
    return able.get("architecture") != "x86_64" or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def resolve_dtype(dtype: str) -> str:
    """``auto`` to what the accelerator does best; raises ``InputError`` for one it cannot do."""
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
