"""A pretended CUDA device: the project's real code on a CPU, refused wherever CUDA would refuse it.

``install()`` before torch is imported; from then on ``cuda:0`` and its neighbours exist, and DeepSpeed trains there.
A tensor there is an ordinary one whose memory is the host's. Operators that mix it with host tensors raise, and so do
``.numpy()``, collectives of host tensors, and whatever a CUDA graph cannot hold. ``counts()`` says how many kernels
were launched, who made the host wait, and what the device had to do by step 3's phases.

It cannot show: time, memory, numbers that only CUDA's kernels give, races between streams, or kernels of their own
(flash attention, DeepSpeed's inference kernels).
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = str(HERE.parents[1])
BUILDER = """
import sys
from torch.utils.cpp_extension import load
load("pretended_device", [sys.argv[1]], build_directory=sys.argv[2], extra_cflags=["-O1"], is_python_module=False)
"""

waits: collections.Counter = collections.Counter()
collectives: collections.Counter = collections.Counter()
device = None  # the compiled half


def build() -> Path:
    """Compile the device half where this version of it, PyTorch and Python have not been yet; about a minute, once."""
    version = importlib.util.find_spec("torch").origin.encode() + sys.version.encode()
    name = hashlib.sha256(version + (HERE / "device.cpp").read_bytes()).hexdigest()[:12]
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deepspeed-chat-tlcr" / f"pretended-{name}"
    )
    library = folder / "pretended_device.so"
    if not library.exists():
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "guard"):
            if not library.exists():
                (folder / "lock").unlink(missing_ok=True)  # of a killed build
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
                command = [sys.executable, "-c", BUILDER, HERE / "device.cpp", folder]
                subprocess.run(command, check=True, env=os.environ | {"PATH": path})
    return library


def install():
    """Make the device there is; returns the compiled half."""
    global device
    if device is not None:
        return device
    if "torch" in sys.modules:
        raise RuntimeError("install() before torch is imported, which looks for devices once")
    library = build()
    os.environ["DS_ACCELERATOR"] = "cuda"
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # registers itself before torch asks
    import torch

    spec = importlib.util.spec_from_file_location("pretended_device", library)
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    device.listen(lambda why: waits.update([f"{why} @ {asker()}"]))
    _runtime(torch)
    _collectives(torch)
    _deepspeed()
    return device


def asker() -> str:
    """The line of this project that is being carried out, or the innermost one outside PyTorch."""
    frame, innermost = sys._getframe(1), None
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT) and not name.startswith(str(HERE)):
            return f"{name[len(PROJECT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        if innermost is None and "/torch/" not in name and not name.startswith(str(HERE)):
            innermost = f"{name.split('site-packages/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return innermost or "?"


def counts() -> dict:
    """Since the start: ``launches`` by operator, ``waits`` and ``collectives`` by what and where, ``done`` by phase.

    A key of ``done`` is phase;kind;a;b (device.cpp): kernel;operations;bytes, host;0;bytes copied, link;0;bytes of a
    collective, token;rows of the table;0, computed;0;0 and real;0;0 tokens of the models' calls, launch;0;0, wait;0;0.
    """
    done = {";".join(map(str, key)): count for key, count in device.done().items()}
    return {"launches": device.launched(), "waits": dict(waits), "collectives": dict(collectives), "done": done}


def counted_since(before: dict) -> dict:
    """``counts()`` less an earlier one's."""
    now = counts()
    return {
        kind: {k: n - before[kind].get(k, 0) for k, n in now[kind].items() if n > before[kind].get(k, 0)}
        for kind in now
    }


class Stream:
    """All streams are one, in which everything is done at once."""

    def __init__(self, *args, **kwargs):
        self.device, self.cuda_stream, self.stream_id, self.priority = None, 0, 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def synchronize(self):
        waits[f"Stream.synchronize @ {asker()}"] += 1

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    wait = record

    def query(self):
        return True

    def synchronize(self):
        waits[f"Event.synchronize @ {asker()}"] += 1

    def elapsed_time(self, other):
        return 1.0


class Graph:
    """torch.cuda.CUDAGraph: records the operators of its capture; a replay runs them on the same memory."""

    def __init__(self, *args, **kwargs):
        self.inner = device.Graph()

    def capture_begin(self, *args, **kwargs):
        self.inner.begin()

    def capture_end(self):
        self.inner.end()

    def replay(self):
        self.inner.replay()

    def pool(self):
        return (0, 0)

    def reset(self):
        self.inner = device.Graph()


@contextlib.contextmanager
def capture(graph, *args, **kwargs):
    """torch.cuda.graph."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


class _OnDevice:
    """torch.cuda.device: another current device for a while."""

    def __init__(self, to):
        import torch

        self.index = torch.device(to).index if not isinstance(to, int) else to

    def __enter__(self):
        self.before = device.current()
        if self.index is not None and self.index >= 0:
            device.set_current(self.index)

    def __exit__(self, *args):
        device.set_current(self.before)


def _runtime(torch) -> None:
    """torch.cuda, as far as it is asked."""
    one, generator = Stream(), device.generator()

    def index_of(which):
        return which if isinstance(which, int) else torch.device(which).index or 0

    properties = types.SimpleNamespace(
        name="pretended A100", total_memory=80 << 30, major=8, minor=0, multi_processor_count=108, warp_size=32
    )
    states = {
        "get_rng_state": lambda *a: generator.get_state(),
        "set_rng_state": lambda state, *a: generator.set_state(state),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: generator.set_state(states[0]),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "initial_seed": generator.initial_seed,
    }
    always = {
        "_initialized": True,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "device": _OnDevice,
        "default_generators": (generator,) * 8,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": device.current,
        "set_device": lambda which: device.set_current(index_of(which)),
        "synchronize": lambda *a: waits.update([f"torch.cuda.synchronize @ {asker()}"]),
        "current_stream": lambda *a: one,
        "default_stream": lambda *a: one,
        "stream": lambda s: contextlib.nullcontext(),
        "set_stream": lambda s: None,
        "is_current_stream_capturing": lambda: False,
        "graph_pool_handle": lambda: (0, 0),
        "get_device_properties": lambda *a: properties,
        "get_device_name": lambda *a: properties.name,
        "get_device_capability": lambda *a: (8, 0),
        "get_arch_list": lambda: ["sm_80"],
        "is_bf16_supported": lambda *a, **k: True,
        "_is_in_bad_fork": lambda: False,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "mem_get_info": lambda *a: (79 << 30, 80 << 30),
        "memory_stats": lambda *a: collections.defaultdict(int),
        "nvtx": types.SimpleNamespace(range_push=lambda *a: 0, range_pop=lambda: 0, mark=lambda *a: None),
        "nccl": types.SimpleNamespace(version=lambda: (2, 27, 0)),
    }
    memory = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "utilization")
    always |= {name: lambda *a, **k: 0 for name in memory}
    resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached", "seed", "seed_all")
    always |= {name: lambda *a, **k: None for name in resets}
    for name, value in {**states, **always}.items():
        setattr(torch.cuda, name, value)
    for name, value in states.items():
        setattr(torch.cuda.random, name, value)
    torch.version.cuda = "12.6"
    # The host's memory is all one kind.
    torch.Tensor.pin_memory = lambda self, *a, **k: self
    torch.Tensor.is_pinned = lambda self, *a, **k: False
    torch.Tensor.record_stream = lambda self, stream: None

    def moved(self, *, device, non_blocking=False):
        """Storages are copied by kernels of their own; here as bytes of a tensor."""
        if self.device.type == torch.device(device).type:
            return self
        there = torch.empty(self.nbytes(), dtype=torch.uint8, device=device)
        there.copy_(torch.empty(0, dtype=torch.uint8, device=self.device).set_(self))
        return there.untyped_storage()

    torch.UntypedStorage.to = moved


def _collectives(torch) -> None:
    """A backend that takes device tensors alone, as NCCL does, and has Gloo do it on their memory."""
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    class Done(dist.Work):
        def __init__(self, outputs):
            super().__init__()
            self.outputs = outputs

        def wait(self, *args):
            return True

        is_completed = is_success = wait

        def result(self):
            return self.outputs

        def get_future(self):
            future = torch.futures.Future()
            future.set_result(self.outputs)
            return future

    def hosts(value):
        """The host's views of nested lists of tensors; raises for what NCCL refuses."""
        if isinstance(value, (list, tuple)):
            return [hosts(one) for one in value]
        if value.device.type != "cuda":
            raise RuntimeError(f"pretended NCCL: No backend type associated with device type {value.device.type}")
        if not value.is_contiguous():
            raise RuntimeError("pretended NCCL: Tensors must be contiguous")
        return device.host_view(value.detach())

    def averaged(opts):
        return opts is not None and opts.reduceOp == dist.ReduceOp.AVG

    class Group(dist.ProcessGroup):
        group_name = pg_name = "pretended"

        def __init__(self, store, rank, size, timeout):
            super().__init__(rank, size)
            self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("pretended", store), rank, size, timeout)

        def getBackendName(self):
            return "pretended"

        def _set_group_name(self, name):
            self.group_name = self.pg_name = name

        def _set_group_desc(self, text):
            pass

        def _get_backend(self, device):
            return types.SimpleNamespace(supports_splitting=False, supports_coalescing=False)

        def _sum(self, whole, opts):
            inner = dist.AllreduceOptions()
            if opts is not None and not averaged(opts):
                inner.reduceOp = opts.reduceOp
            self.gloo.allreduce([whole], inner).wait()
            if averaged(opts):
                whole.div_(self.size())

        def _done(self, what, outputs, moved=None):
            """``moved``: the tensors that every rank's part is of; a sum for all goes around twice."""
            collectives[f"{what} @ {asker()}"] += 1
            if outputs and self.size() > 1:
                device.account("link", 0, sum(t.nbytes for t in moved or outputs) * (1 + (what == "all_reduce")), 1)
            return Done(outputs)

        def allreduce(self, tensors, opts=None):
            for tensor in hosts(tensors):
                self._sum(tensor, opts)
            return self._done("all_reduce", tensors)

        allreduce_coalesced = allreduce

        def reduce(self, tensors, opts=None):  # other ranks may get it too
            return self.allreduce(tensors, None)

        def broadcast(self, tensors, opts):
            inner = dist.BroadcastOptions()
            inner.rootRank, inner.rootTensor = opts.rootRank, 0
            for tensor in hosts(tensors):
                self.gloo.broadcast([tensor], inner).wait()
            return self._done("broadcast", tensors)

        def allgather(self, outputs, inputs, opts=None):
            self.gloo.allgather(hosts(outputs), hosts(inputs)).wait()
            return self._done("all_gather", outputs, outputs[0])

        def _allgather_base(self, output, tensor, opts=None):
            parts = list(hosts(output).view(self.size(), -1))
            self.gloo.allgather([parts], [hosts(tensor).reshape(-1)]).wait()
            return self._done("all_gather", [output])

        all_gather_single = _allgather_base

        def allgather_into_tensor_coalesced(self, outputs, inputs, opts=None):
            for output, tensor in zip(outputs, inputs, strict=True):
                self._allgather_base(output, tensor)
            return Done(outputs)

        def _reduce_scatter_base(self, output, tensor, opts=None):
            whole = hosts(tensor).clone()
            self._sum(whole, opts)
            hosts(output).view(-1).copy_(whole.view(self.size(), -1)[self.rank()])
            return self._done("reduce_scatter", [output], [tensor])

        reduce_scatter_single = _reduce_scatter_base

        def reduce_scatter_tensor_coalesced(self, outputs, inputs, opts=None):
            for output, tensor in zip(outputs, inputs, strict=True):
                self._reduce_scatter_base(output, tensor, opts)
            return Done(outputs)

        def reduce_scatter(self, outputs, inputs, opts=None):
            for output, parts in zip(outputs, inputs, strict=True):
                self._reduce_scatter_base(output, torch.stack(list(parts)), opts)
            return Done(outputs)

        def barrier(self, opts=None):
            self.gloo.barrier().wait()
            return self._done("barrier", None)

    dist.Backend.register_backend("pretended", Group, devices=["cuda"])

    @contextlib.contextmanager
    def one_by_one(group=None, device=None, async_ops=False, *args, **kwargs):
        yield types.SimpleNamespace(wait=lambda: None)

    c10d._coalescing_manager = dist._coalescing_manager = one_by_one


def _deepspeed() -> None:
    """DeepSpeed's CUDA accelerator on it; its Adam for the host is the real one."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    class Accelerator(CUDA_Accelerator):
        def communication_backend_name(self):
            return "pretended"

        def pin_memory(self, tensor, *args, **kwargs):
            return tensor

        def available_memory(self, *args):
            return 79 << 30

    accelerator = Accelerator()
    real_accelerator.ds_accelerator = accelerator


def _phases() -> None:
    """Name step 3's phases as its trainer times them, and count the tokens of every call of a model."""
    from transformers import PreTrainedModel

    from step3_ppo_tlcr.trainer import Trainer

    timed, call, within = Trainer._timed, PreTrainedModel.__call__, []

    @contextlib.contextmanager
    def named(self, phase):
        device.name_phase(phase)
        with timed(self, phase):
            yield
        device.name_phase("")

    def counted(self, *args, **kwargs):
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or within:  # a model within another
            return call(self, *args, **kwargs)
        real = ids.numel()
        if mask is not None and mask.shape == ids.shape:  # else there is no padding, or its rows are packed
            real = int(device.host_view(mask).sum())
        device.account("computed", 0, 0, ids.numel())
        device.account("real", 0, 0, real)
        within.append(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            within.pop()

    Trainer._timed, PreTrainedModel.__call__ = named, counted


def main() -> None:
    """``python tests/pretended/gpu.py PROGRAM ARGUMENTS…``: any program of the project on it; PRETENDED_COUNTS=FILE
    writes ``counts()`` at its end."""
    import runpy
    from multiprocessing import spawn

    install()
    sys.modules["gpu"] = sys.modules["__main__"]
    leave, file = os._exit, os.environ.get("PRETENDED_COUNTS")

    def counted(status):
        if file:
            Path(file).write_text(json.dumps(counts(), indent=1))
        leave(status)

    os._exit = counted
    sys.argv = sys.argv[1:]
    sys.path.insert(0, PROJECT)
    # Processes that the program spawns come back here first.
    prepared, os.environ["PRETENDED_PROGRAM"] = spawn.get_preparation_data, sys.argv[0]
    spawn.get_preparation_data = lambda name: {
        **{key: value for key, value in prepared(name).items() if key != "init_main_from_name"},
        "init_main_from_path": __file__,
    }
    if file:
        _phases()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    import runpy

    install()
    globals().update(runpy.run_path(os.environ["PRETENDED_PROGRAM"], run_name="__mp_main__"))
