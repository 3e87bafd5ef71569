"""Step 3 against two real vLLM servers, tied and untied tiny Llama: weights follow, a killed server is no loss.

Needs .venv-vllm (training_scripts/setup_vllm.sh); without it the test is skipped, and says so.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, byte_level_tokenizer, launch, patience, preferences, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from deepspeed_chat_tlcr.metrics import read_metrics

ENVIRONMENT = Path(os.environ.get("VLLM_ENVIRONMENT", ROOT / ".venv-vllm"))
pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed-from").is_file(),
        reason=f"NO REAL vLLM SERVER WAS TESTED: no {ENVIRONMENT} (training_scripts/setup_vllm.sh makes it)",
    ),
]


REWARD = """
def even_tokens(rollout, tokenizer):
    return 1.0 - 2.0 * (rollout.action_ids % 2)  # PPO learns it within a few updates
"""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    package = folder / "served"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rewards.py").write_text(REWARD)
    records = preferences(60)
    write_jsonl(folder / "data.jsonl", records)
    tokenizer = byte_level_tokenizer([record["prompt"] + record["chosen"] for record in records])
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def serve(model: Path, port: int, log: Path) -> subprocess.Popen:
    settings = {"SERVE_DTYPE": "float32", "SERVE_PORT": str(port), "SERVE_CACHE_GB": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        command = ["bash", ROOT / "training_scripts/serve_rollouts.sh", model]
        environment = os.environ | settings
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def until_served(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + patience(300)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)


def end(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture
def servers(made, tmp_path):
    """Two servers as ``{port: process}``."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    running = {port: serve(made / "model", port, tmp_path / f"{port}.log") for port in ports}
    try:
        for port, server in running.items():
            until_served(server, port, tmp_path / f"{port}.log")
        yield running
    finally:
        for server in running.values():
            end(server)


def train(made: Path, output: Path, *more: object, check: bool = True) -> subprocess.CompletedProcess:
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{made}"
    line = (
        "--reward python:served.rewards:even_tokens --data_split 1,1,8"
        " --per_device_generation_batch_size 4 --per_device_training_batch_size 4"
        " --max_prompt_seq_len 100 --max_answer_seq_len 16 --num_train_epochs 9 --actor_learning_rate 3e-3"
        " --critic_learning_rate 3e-3 --num_warmup_steps 0 --kl_ctl 0 --dtype fp32 --save_answers"
        " --enable_test_mode --vllm_check_interval 1"
    )
    model = made / "model"
    paths = ["--actor_model_name_or_path", model, "--critic_model_name_or_path", model]
    paths += ["--data_path", made / "data.jsonl", "--output_dir", output]
    return launch("step3_ppo_tlcr/main.py", *paths, *line.split(), *more, check=check)


def rewards(output: Path) -> list[float]:
    return [line["reward/per_token"] for line in read_metrics(output / "metrics.jsonl")]


def test_weights_follow_and_a_killed_server_is_no_loss(made, servers, tmp_path):
    urls = [f"http://127.0.0.1:{port}" for port in servers]
    served = ("--rollout", "vllm", "--vllm_server", *urls, "--vllm_timeout", "60")
    output = tmp_path / "served"
    train(made, output, *served, "--test_stop_step", 12, "--save_interval", 12)
    first = read_metrics(output / "metrics.jsonl")
    assert len(first) == 12
    assert max(line["correction/difference"] for line in first) < 1e-4
    assert all(line["correction/weight"] == pytest.approx(1, abs=1e-4) for line in first)

    # Killed: one sentence that names it. Back with the old weights: the same command gives it the new ones.
    shutil.rmtree(output)
    port, victim = next(iter(servers.items()))
    end(victim)
    refused = train(made, output, *served, "--test_stop_step", 30, check=False)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert f"--vllm_server {urls[0]} does not answer" in refused.stderr
    servers[port] = serve(made / "model", port, tmp_path / f"{port}.log")
    until_served(servers[port], port, tmp_path / f"{port}.log")
    train(made, output, *served, "--test_stop_step", 30)
    lines = read_metrics(output / "metrics.jsonl")
    assert len(lines) == 30
    assert max(line["correction/difference"] for line in lines) < 1e-4

    loop = tmp_path / "loop"
    train(made, loop, "--test_stop_step", 30)
    # It learns, as the loop does: the means of the last ten updates, of 40 answers of 16 tokens each.
    learned, usual = (sum(rewards(folder)[-10:]) / 10 for folder in (output, loop))
    assert learned > sum(rewards(output)[:3]) / 3 + 0.3
    assert learned == pytest.approx(usual, abs=0.2)
    json.loads((output / "results.json").read_text())
