"""The stages' real entry points on a pretended CUDA device (pretended/gpu.py): what CUDA would refuse, it refuses.

``pytest -m whole`` runs all of RUNS; every day a few that hold most of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch, patience, write_jsonl
from transformers import AutoModelForTokenClassification

from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_token_classifier

TRAIN = "--model_name_or_path {tiny}/model --data_path {tiny}/data.jsonl --per_device_train_batch_size 4 "
PPO = (
    "--actor_model_name_or_path {tiny}/model --critic_model_name_or_path {made}/disc --data_path {tiny}/data.jsonl "
    "--max_answer_seq_len 12 --num_warmup_steps 0 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 4 --enable_test_mode --test_stop_step 2 "
)
SFT, DISC, STEP3 = "step1_sft/main.py", "step2_discriminator/main.py", "step3_ppo_tlcr/main.py"
PACKED = "--tokens_per_micro_batch 64 "
REVISIONS = "--revisions {tiny}/revisions.jsonl "
RECIPE = "--dtype bf16 --actor_zero_stage 2 --critic_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 "
FP16 = "--dtype fp16 --align_overflow --enable_ema --deepspeed_config {made}/overflow.json "
RUNS = {  # name: program, options, ranks
    "sft": (SFT, TRAIN + PACKED + "--dtype bf16 --zero_stage 2 --gradient_checkpointing", 1),
    "token": (DISC, TRAIN + PACKED + REVISIONS + "--dtype bf16 --zero_stage 3 --lora_dim 2 --only_optimize_lora", 2),
    "sequence": (DISC, TRAIN + PACKED + "--objective sequence --dtype fp32 --zero_stage 0", 1),
    "dpo": ("baselines/dpo/main.py", TRAIN + "--dtype bf16 --zero_stage 3 --offload", 1),
    "figa": ("baselines/figa/main.py", TRAIN + REVISIONS + "--dtype bf16", 1),
    "recipe": (
        STEP3,
        PPO + RECIPE + "--actor_gradient_checkpointing --critic_gradient_checkpointing --tokens_per_micro_batch 64",
        2,
    ),
    "offload": (STEP3, PPO + RECIPE + "--offload --enable_ema --save_answers", 1),
    "fp16": (STEP3, PPO + FP16 + "--eval_interval 1 --eval_prompts 2", 1),
    "zero3": (
        STEP3,
        PPO + "--dtype bf16 --actor_zero_stage 3 --critic_zero_stage 3 --offload --enable_ema "
        "--tokens_per_micro_batch 64",
        2,
    ),
    "lora": (STEP3, PPO + "--actor_lora_dim 2 --critic_lora_dim 2 --only_optimize_lora --rollout hf --top_p 0.9", 1),
    "remax": (
        STEP3,
        PPO + "--algo remax --dtype fp32 --rollout continuous --scale_rewards "
        "--reward sequence:{made}/rm random@0.1 tlcr_fixed@0.3 tlcr_positive_only@0.1 tlcr_released_code@0.1",
        1,
    ),
    "field": (
        STEP3,
        PPO + "--dtype bf16 --eval_interval 1 --eval_prompts 2 --normalise_rewards whiten --rlmec_judge {made}/rm "
        "--reward rlmec:{tiny}/model@0.5..1 abc:{made}/rm uniform:{made}/rm segments:{made}/disc tlcr_redistributed",
        1,
    ),
    "hybrid": (STEP3, PPO + "--dtype bf16 --rollout hybrid --whiten_advantages --ppo_epochs 2 --penalty full_kl", 1),
}
EVERY_DAY = ("recipe", "offload", "fp16", "hybrid")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """Untrained token classifiers, ``disc`` and ``rm``; a loss scale that overflows at first."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "overflow.json").write_text(json.dumps({"fp16": {"initial_scale_power": 32}}))
    for name, labels in (("disc", 2), ("rm", 1)):
        torch.manual_seed(labels)
        model = load_token_classifier(str(tiny / "model"), labels, torch.float32, new_head=True)
        model.save_pretrained(folder / name)
        for file in (tiny / "model").glob("token*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
        AutoModelForTokenClassification.from_pretrained(folder / name)
    return folder


def on_gpu(tiny: Path, made: Path, output: Path, names: list[str], kill_after: dict[str, int] | None = None) -> str:
    """Carry out RUNS on the pretended device; returns what they printed. Fails where one does not end with 0."""
    runs = []
    for name in names:
        program, arguments, ranks = RUNS[name]
        words = [*arguments.format(tiny=tiny, made=made).split(), "--output_dir", str(output / name)]
        killed = (kill_after or {}).get(name, 0)
        if killed:
            runs.append({"program": program, "arguments": words, "ranks": ranks, "kill_after": killed})
        runs.append({"program": program, "arguments": words, "ranks": ranks, "kill_after": 0})
    log = output / "log.txt"
    log.touch()
    command = [sys.executable, ROOT / "tests" / "two_ranks.py", json.dumps(runs), log]
    environment = os.environ | {"PRETENDED_GPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patience(900))
    said = log.read_text(errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    for run, status in zip(runs, statuses, strict=True):
        assert run["kill_after"] or set(status) == {0}, f"{run['arguments']}: {status}\n{said[-6000:]}"
    return said


def test_what_cuda_refuses_is_refused():
    code = """
import sys
sys.path.insert(0, "tests/pretended")
import gpu
gpu.install()
import torch
numbers = torch.arange(6.0, device="cuda").view(2, 3)
def refused(make):
    try:
        make()
    except (RuntimeError, TypeError):
        return True
assert refused(lambda: numbers + torch.ones(2, 3))
assert refused(lambda: torch.stack([numbers.sum(), torch.tensor(1.0)]))
assert refused(lambda: numbers.numpy())
assert refused(lambda: numbers + numbers.to("cuda:1"))
assert (numbers + torch.tensor(1.0)).device == torch.device("cuda:0")  # a number from the host is none of those
before = gpu.counts()
assert numbers.sum().item() == 15
assert sum(gpu.counted_since(before)["waits"].values()) == 1
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    doubled = numbers * 2
def item_while_capturing():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        numbers.sum().item()
assert refused(item_while_capturing)
numbers.fill_(5)
before = gpu.counts()
graph.replay()
assert gpu.counted_since(before)["launches"] == {"cudaGraphLaunch": 1}
assert doubled.tolist() == [[10.0] * 3] * 2
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_decoding_by_graphs_writes_the_same_tokens_at_a_launch_each():
    """Greedy, sampled and cut distributions; a family whose cache cannot stand in place falls back with a sentence."""
    command = [sys.executable, ROOT / "tests" / "pretended" / "graphed.py", "llama", "opt", "mistral"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    llama, opt, mistral = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert all(llama["same"] + opt["same"] + mistral["same"])
    for graphed in (llama, opt):
        assert graphed["said"] == []
        assert graphed["launches"] <= 5
        assert graphed["waits"] <= 0.15
    (sentence,) = mistral["said"]
    assert sentence.startswith("decoding without CUDA graphs, several times slower: MistralForCausalLM's cache")
    assert mistral["launches"] > 100


def test_ppo_on_a_pretended_gpu(tiny, made, tmp_path):
    """The recipe on two ranks, killed and continued; offloaded optimisers; fp16, which overflows at first; hybrid."""
    said = on_gpu(tiny, made, tmp_path, list(EVERY_DAY), {"offload": 1})
    for name in EVERY_DAY:
        assert [line["step"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["step"]] == [1, 2]
        assert (tmp_path / name / "actor" / "model.safetensors").is_file()
    assert (tmp_path / "offload" / "actor_ema" / "model.safetensors").is_file()
    assert read_metrics(tmp_path / "fp16" / "metrics.jsonl")[-1]["faults/actor_overflows"] > 0
    assert "hybrid engine: its kernels cannot be" in said


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in RUNS if name not in EVERY_DAY])
def test_everything_on_a_pretended_gpu(tiny, made, tmp_path, name):
    on_gpu(tiny, made, tmp_path, [name])
    assert (tmp_path / name / "results.json").is_file()


def test_evaluation_answers_and_judges_on_several_gpus(tiny, made, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"instruction": f"Tell me of {n} cats."} for n in range(5)])
    results = []
    for processes in (1, 2):
        launch(
            "tests/pretended/gpu.py",
            *("evaluation/reward_scores.py", "--models", f"a={tiny / 'model'}", "--prompts", prompts),
            *("--discriminator", made / "disc", "--sequence_reward", made / "rm", "--max_answer_seq_len", 6),
            *("--generation_batch_size", 2, "--num_processes", processes, "--out", tmp_path / str(processes)),
            fresh=True,
        )
        results.append(json.loads((tmp_path / str(processes) / "reward_scores" / "results.json").read_text()))
    assert results[0] == results[1]
