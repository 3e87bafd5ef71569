"""A stage on two nodes: network namespaces of this machine with an ssh server in each, as a cluster starts it."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, patience

ADDRESSES = {"tlcr1": "10.77.0.1", "tlcr2": "10.77.0.2"}
PORT = "2222"


def lacking() -> str:
    """Why namespaces with ssh cannot be made here; empty where they can."""
    missing = [
        program for program in ("ip", "pdsh", "ssh", "/usr/sbin/sshd", "ssh-keygen") if not shutil.which(program)
    ]
    if os.geteuid() != 0 or missing:
        return "needs root" if not missing else f"needs {' '.join(missing)}"
    tried = subprocess.run(["ip", "netns", "add", "tlcr-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "tlcr-probe"], capture_output=True)
    return tried.stderr.strip()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes(tmp_path):
    """Two namespaces joined by a cable, and a folder to put first on PATH, whose ssh knows the way to both."""
    if reason := lacking():
        pytest.skip(f"no two nodes here: {reason}")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "ssh_config").write_text(
        f"Host *\nPort {PORT}\nIdentityFile {tmp_path}/user\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\n"
        "LogLevel ERROR\n"
    )
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    (tmp_path / "sshd_config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nPort {PORT}\nPidFile none\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin yes\n"
    )
    with ExitStack() as stack:
        for name in ADDRESSES:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("link", "add", "tlcr1", "netns", "tlcr1", "type", "veth", "peer", "name", "tlcr2", "netns", "tlcr2")
        for name, address in ADDRESSES.items():
            ip("-n", name, "link", "set", name, "name", "cable0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            server = subprocess.Popen(
                ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "sshd_config"]
            )
            stack.callback(server.wait)
            stack.callback(server.terminate)
        for address in ADDRESSES.values():
            login = ["ip", "netns", "exec", "tlcr1", programs / "ssh", address, "true"]
            deadline = time.monotonic() + patience(60)
            while subprocess.run(login, capture_output=True).returncode != 0:
                assert time.monotonic() < deadline, f"no ssh login at {address}"
                time.sleep(0.1)
        yield programs


def test_two_nodes_train_what_two_local_ranks_train(nodes, tiny, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
    path = os.pathsep.join([str(nodes), str(Path(sys.executable).parent), os.environ["PATH"]])
    recipe = {"MODEL": tiny / "model", "DATA": tiny / "data.jsonl", "DTYPE": "fp32", "SFT_BATCH_SIZE": 2}
    recipe |= {"MAX_SEQ_LEN": 128, "PREFLIGHT": 0, "SFT_LEARNING_RATE": "1e-3", "PATH": path}
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    own |= {name: os.environ[name] for name in ("HOME", "TORCH_EXTENSIONS_DIR") if name in os.environ}

    def train(output: str, *prefix: str, **variables: object) -> Path:
        environment = own | {name: str(value) for name, value in (recipe | variables).items()}
        command = [*prefix, "bash", ROOT / "training_scripts/step1.sh"]
        folder = tmp_path / output
        environment["OUTPUT"] = str(folder)
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patience(400))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return folder / "step1_sft"

    # Gloo finds no way between namespaces unless both are told the cable's name: it comes with DS_ENV_FILE.
    far = train("far", "ip", "netns", "exec", "tlcr1", HOSTFILE=hosts, NUM_GPUS="", GLOO_SOCKET_IFNAME="cable0")
    near = train("near", NUM_GPUS=2, MASTER_PORT=29533)
    assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()
