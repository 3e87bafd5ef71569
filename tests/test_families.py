"""Ten model families, each made from its config with one tokenizer, through steps 1-3."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

import step1_sft.main
import step2_discriminator.main
import step3_ppo_tlcr.main
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_token_classifier
from deepspeed_chat_tlcr.optim import add_lora

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
LLAMA_LIKE = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "llama": (LlamaConfig, LLAMA_LIKE, "layers."),
    "opt": (OPTConfig, {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8}, "decoder.layers."),
    "mistral": (MistralConfig, {**LLAMA_LIKE, "sliding_window": 16}, "layers."),
    "qwen2": (Qwen2Config, LLAMA_LIKE, "layers."),
    "qwen3": (Qwen3Config, LLAMA_LIKE, "layers."),
    "gpt2": (GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}, "h."),
    "gpt_neox": (GPTNeoXConfig, {**SIZES, "intermediate_size": 32}, "layers."),
    "bloom": (BloomConfig, {"hidden_size": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}, "h."),
    "gemma": (GemmaConfig, {**LLAMA_LIKE, "pad_token_id": 1}, "layers."),
    "phi": (PhiConfig, {**SIZES, "intermediate_size": 32}, "layers."),
}
"""Config class, sizes, and the LoRA pattern of its blocks."""


def made(tiny, folder, family: str):
    kind, sizes, pattern = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    set_seed(0)
    AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, pattern


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_1_to_3(tiny, tmp_path, in_process, family):
    model, pattern = made(tiny, tmp_path / "model", family)
    data = ("--data_path", tiny / "data.jsonl", "--dtype", "fp32")
    train = (*data, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--dropout", 0.0)
    in_process(step1_sft.main.main, *train, "--model_name_or_path", model, "--output_dir", tmp_path / "sft")
    revisions = ("--revisions", tiny / "revisions.jsonl", "--lora_dim", 2, "--lora_module_name", pattern)
    in_process(
        step2_discriminator.main.main,
        *(*train, *revisions, "--model_name_or_path", model, "--output_dir", tmp_path / "disc"),
    )
    in_process(
        step3_ppo_tlcr.main.main,
        *(*data, "--actor_model_name_or_path", tmp_path / "sft", "--critic_model_name_or_path", tmp_path / "disc"),
        *("--output_dir", tmp_path / "ppo", "--max_answer_seq_len", 4, "--num_warmup_steps", 0),
        *("--actor_lora_dim", 2, "--actor_lora_module_name", pattern, "--actor_lora_learning_rate", 1e-2),
        *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4),
        *("--enable_test_mode", "--test_stop_step", 2),
    )
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "sft" / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < losses[0]
    log = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    # Before the first update the policy is the reference: the log-probs of decoding and of both passes agree.
    assert abs(log[0]["policy/kl"]) < 1e-4
    assert log[1]["policy/kl"] != 0
    assert json.loads((tmp_path / "ppo" / "results.json").read_text())["steps"] == 2
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "actor").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(pattern in name for name in changed)
    assert before.keys() == after.keys()
    AutoModelForTokenClassification.from_pretrained(tmp_path / "ppo" / "critic")


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_lora_pattern_that_matches_nothing_lists_what_would(tiny, tmp_path, family):
    model, pattern = made(tiny, tmp_path / "model", family)
    classifier = load_token_classifier(str(model), 2, torch.float32, new_head=True)
    with pytest.raises(InputError, match=r"'decoder\.layers\.' matches no linear layer") as refused:
        add_lora(classifier, 2, 1.0, "decoder.layers.", only_lora=False)
    assert f"transformer.{pattern}" in str(refused.value)
