"""Programs in processes of their own without the ten seconds of imports: forks of one process that has made them.

Each is a real process, which can be killed, with its own environment, folder and output. What only a fresh interpreter
shows (an environment variable that a library reads while it is imported, the launcher itself) needs a real start.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["tests.preloaded"])


class Program:
    """``subprocess.Popen`` as far as the tests need it.

    ``streams`` are the files that get its two outputs; by default both go into one, which ``communicate`` returns.
    """

    def __init__(
        self,
        script: str | Path,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        streams: tuple[Path, Path] | None = None,
    ):
        if streams is None:
            descriptor, name = tempfile.mkstemp(prefix="tlcr-tests-")
            os.close(descriptor)
            streams = (Path(name), Path(name))
        environment = dict(os.environ if environment is None else environment)
        given = (str(script), [str(argument) for argument in arguments], streams, environment, os.getcwd())
        self._process = forks.Process(target=_carry_out, args=given)
        self._output = streams[0]
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self._output), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        text = self._output.read_text(errors="replace")
        self._output.unlink()
        return text, None


def _carry_out(script: str, arguments: list[str], streams: tuple[Path, Path], environment: dict, folder: str) -> None:
    for descriptor, file in enumerate(streams, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    importlib.reload(huggingface_hub.constants)  # it holds what the environment was when it was imported
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    own = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(script).parent), *own, *(path for path in sys.path if path not in own)]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(script: str | Path, *arguments: object, ranks: int = 1, timeout: float) -> subprocess.CompletedProcess:
    """Run a program to its end: alone, or as several ranks with what DeepSpeed's launcher tells its processes.

    The exit status is that of the first rank that failed, 0 where none did.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        environment = dict(os.environ)
        if ranks > 1:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            environment |= shared | {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        started = [Program(script, arguments, environment | variables, streams) for variables in own]
        deadline = time.monotonic() + timeout
        statuses = [program.wait(deadline - time.monotonic()) for program in started]
        texts = [file.read_text(errors="replace") for file in streams]
    return subprocess.CompletedProcess([script, *arguments], next(filter(None, statuses), 0), *texts)
