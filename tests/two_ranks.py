"""Stages on several ranks, in forks of one process that has imported the libraries: ``two_ranks.py RUNS LOG``.

RUNS is JSON: a list of ``{"program", "arguments", "ranks", "kill_after"}``. Where ``kill_after`` is not 0, all ranks
are killed once the metrics of that step are written. Prints the ranks' exit statuses, a JSON list for each run.
With ``PRETENDED_GPU`` set they run on the pretended CUDA device.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if os.environ.get("PRETENDED_GPU"):
    from pretended import gpu

    gpu.install()

import preloaded  # noqa: F401
from conftest import patience
from warm import free_port

from deepspeed_chat_tlcr.metrics import read_metrics
from testbed.study import forked


def start(program: str, arguments: list[str], ranks: int, log: Path, port: str) -> list[int]:
    """Process ids of all ranks, with what DeepSpeed's launcher tells its processes."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return [
        forked.start(program, arguments, log, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def kill(processes: list[int], metrics: Path, step: int) -> None:
    deadline = time.monotonic() + patience(120)
    while not any(line["step"] >= step for line in read_metrics(metrics)):
        if time.monotonic() > deadline or os.waitpid(processes[0], os.WNOHANG)[0]:
            sys.exit(f"{metrics}: ended before step {step}")
        time.sleep(0.002)
    for process in processes:
        os.kill(process, signal.SIGKILL)


def main(runs: list[dict], log: Path) -> None:
    statuses = []
    for run in runs:
        port = free_port()
        processes = start(run["program"], run["arguments"], run["ranks"], log, port)
        if run["kill_after"]:
            output = run["arguments"][run["arguments"].index("--output_dir") + 1]
            kill(processes, Path(output) / "metrics.jsonl", run["kill_after"])
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes])
        left = list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
        if left:
            sys.exit(f"left in memory: {left}")
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
