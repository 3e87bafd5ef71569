"""Memory, cost and disk estimates against numbers done by hand, published sizes, and DeepSpeed's own estimators."""

import copy
import dataclasses
import datetime
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, patience, preferences, write_jsonl
from test_families import FAMILIES, LLAMA_LIKE, SIZES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deepspeed_chat_tlcr.errors import InputError
from training_scripts.planning import duration, hours, memory, plan
from training_scripts.planning.model_shapes import KNOWN_MODELS, ModelShape, shape_of
from training_scripts.planning.recipe import Recipe

GIB = 2**30

PAPER = {
    "model": "meta-llama/Llama-2-7b-hf",
    "model_config": "",
    "data": "Dahoas/full-hh-rlhf",
    "data_split": "2,4,4",
    "output": "output/x",
    "stages": "step1 label step2 step3",
    "ppo_folder": "step3_ppo_tlcr",
    "sequence_folder": "step2_sequence",
    "dtype": "bf16",
    "num_gpus": "8",
    "hostfile": "",
    "master_port": 29500,
    "gpu_memory_gb": 80.0,
    "gpu_card": "A100",
    "gpu_hour_usd": "",
    "label_model": "gpt-4-0125-preview",
    "label_base_url": "",
    "label_effort": "lowest",
    "label_batch": False,
    "label_price": "",
    "api_key_env": "OPENAI_API_KEY",
    "max_seq_len": 512,
    "sft_batch_size": 16,
    "sft_accumulation_steps": 1,
    "sft_epochs": 2,
    "sft_zero_stage": 2,
    "sft_offload": False,
    "sft_gradient_checkpointing": True,
    "sft_tokens_per_micro_batch": 0,
    "discriminator_batch_size": 16,
    "discriminator_accumulation_steps": 1,
    "discriminator_epochs": 2,
    "discriminator_zero_stage": 2,
    "discriminator_offload": False,
    "discriminator_gradient_checkpointing": True,
    "discriminator_tokens_per_micro_batch": 1024,
    "sequence_batch_size": 16,
    "sequence_accumulation_steps": 1,
    "sequence_epochs": 2,
    "sequence_zero_stage": 2,
    "sequence_offload": False,
    "sequence_gradient_checkpointing": True,
    "sequence_tokens_per_micro_batch": 0,
    "dpo_batch_size": 8,
    "dpo_accumulation_steps": 1,
    "dpo_epochs": 1,
    "dpo_zero_stage": 3,
    "dpo_offload": True,
    "dpo_gradient_checkpointing": True,
    "figa_batch_size": 4,
    "figa_accumulation_steps": 4,
    "figa_epochs": 5,
    "figa_zero_stage": 3,
    "figa_offload": False,
    "figa_gradient_checkpointing": True,
    "grm_max_seq_len": 1024,
    "grm_batch_size": 8,
    "grm_accumulation_steps": 2,
    "grm_epochs": 3,
    "grm_zero_stage": 2,
    "grm_offload": False,
    "grm_gradient_checkpointing": True,
    "reward": "tlcr",
    "algo": "ppo",
    "generation_batch_size": 16,
    "generation_batches": 1,
    "decode_batch_size": 0,
    "rollout": "loop",
    "rollout_hosts": "",
    "ppo_batch_size": 16,
    "ppo_accumulation_steps": 1,
    "ppo_tokens_per_micro_batch": 2048,
    "ppo_save_interval": 50,
    "prompt_epochs": 1,
    "max_prompt_len": 256,
    "max_answer_len": 256,
    "actor_zero_stage": 2,
    "critic_zero_stage": 2,
    "reference_zero_stage": 3,
    "reward_zero_stage": 3,
    "ppo_offload": True,
    "ppo_gradient_checkpointing": True,
    "ppo_ema": False,
    "revisions": "output/x/labeling/revisions.jsonl",
    "made_here": "",
}

# h 4, 3 blocks, 2 heads of 2, MLP 10, 7 tokens: small enough to count on paper.
SMALL_SIZES = {
    **{"hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 10, "vocab_size": 7, "pad_token_id": 0},
}
SMALL = ModelShape(
    **{"hidden": 4, "layers": 3, "heads": 2, "kv_heads": 2, "intermediate": 10, "vocabulary": 7, "head_size": 2},
    **{"embedding": 4, "layer_parameters": 192, "backbone_parameters": 608, "causal_parameters": 636},
)


def environment(**changes) -> dict[str, str]:
    def text(value):
        return str(int(value)) if isinstance(value, bool) else str(value)

    return {name.upper(): text(value) for name, value in (PAPER | changes).items()}


def recipe(**changes) -> Recipe:
    return Recipe.from_environment(environment(**changes))


# ---- sizes of models -------------------------------------------------------------------------------------------------


def counted(folder, config) -> ModelShape:
    config.save_pretrained(folder)
    return shape_of(str(folder))


def test_small_shape_by_hand(tmp_path):
    """q, k, v, o: 4 of 4 x 4 = 64; gate, up, down: 3 of 4 x 10 = 120; two norms 8: 192 in a block.

    Embedding 28, blocks 576, last norm 4, output 28.
    """
    assert counted(tmp_path, LlamaConfig(**SMALL_SIZES)) == SMALL
    tied = counted(tmp_path, LlamaConfig(**SMALL_SIZES, tie_word_embeddings=True))
    assert (tied.causal_parameters, tied.backbone_parameters) == (608, 608)
    # two labels: 2 x 4 weights and 2 biases
    assert SMALL.classifier_parameters(2) == 618
    assert memory.largest_layer(SMALL) == 192


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-2-7b", LlamaConfig()),
        ("mixtral-8x7b", MixtralConfig()),
        ("opt-125m", OPTConfig()),
        ("gemma-7b", GemmaConfig()),
        ("gpt2-xl", GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
        ("bloom-560m", BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880)),
    ],
)
def test_known_models_are_what_is_counted(tmp_path, name, config):
    assert counted(tmp_path, config) == KNOWN_MODELS[name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-7b", 8_537_680_896),
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("EleutherAI/pythia-1.4b-deduped", 1_414_647_808),
        ("bigscience/bloom-560m", 559_214_592),
        ("bigscience/bloom-7b1", 7_069_016_064),
        ("microsoft/phi-2", 2_779_683_840),
        ("AdamG012/chat-opt-1.3b-sft-deepspeed", 1_315_758_080),
    ],
)
def test_published_parameter_counts(name, published):
    assert shape_of(name).causal_parameters == published


VARIANTS = {
    "llama-biases": LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True, vocab_size=96),
    "qwen3-biases": Qwen3Config(**LLAMA_LIKE, attention_bias=True, vocab_size=96),
    "gpt2-inner": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=40, tie_word_embeddings=False),
    "opt-350m": OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False, vocab_size=96),
    "phi-norms": PhiConfig(**SIZES, intermediate_size=32, qk_layernorm=True, num_key_value_heads=1, vocab_size=96),
    "gpt_neox-tied": GPTNeoXConfig(**SIZES, intermediate_size=32, attention_bias=False, tie_word_embeddings=True),
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 96}
ODD_HEADS = LLAMA_LIKE | {"head_dim": 12, "vocab_size": 96}
UNTRAINED = {  # families whose stages are not tried here
    "gemma2": Gemma2Config(**ODD_HEADS),
    "gemma3_text": Gemma3TextConfig(**ODD_HEADS),
    "phi3": Phi3Config(**LLAMA_LIKE, vocab_size=96, pad_token_id=0),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=5, num_experts_per_tok=2, vocab_size=96),
    "qwen2_moe": Qwen2MoeConfig(**LLAMA_LIKE, **EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": Qwen3MoeConfig(**ODD_HEADS | EXPERTS, mlp_only_layers=[1]),
    "falcon": FalconConfig(**SIZES, vocab_size=96),
    "falcon-new": FalconConfig(**SIZES, vocab_size=96, new_decoder_architecture=True, num_kv_heads=1),
    "falcon-rw": FalconConfig(
        **SIZES, vocab_size=96, bias=True, alibi=True, multi_query=False, parallel_attn=False, ffn_hidden_size=40
    ),
}
CONFIGS = VARIANTS | UNTRAINED | {name: kind(vocab_size=96, **sizes) for name, (kind, sizes, _) in FAMILIES.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_of_a_local_config_are_transformers_own(tmp_path, name):
    config = CONFIGS[name]
    shape = counted(tmp_path, config)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    assert shape.causal_parameters == real.num_parameters()
    if name != "gemma3_text":  # has no token classifier
        with torch.device("meta"):
            classifier = AutoModelForTokenClassification.from_config(copy.deepcopy(config))  # of 2 labels
        assert shape.classifier_parameters(2) == classifier.num_parameters()
    blocks = max((m for m in real.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    assert shape.layer_parameters == sum(parameter.numel() for parameter in blocks[0].parameters())


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("olmo2", **LLAMA_LIKE, vocab_size=96),
        AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=3, vocab_size=96),
        # As on the hub: the text's sizes are within, those that are Gemma's defaults are left out, images have a model.
        Gemma3Config(text_config={"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 96}),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_are_counted_by_transformers(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config.to_diff_dict() | {"model_type": config.model_type}))
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    shape = shape_of(str(tmp_path))
    assert shape.causal_parameters == real.num_parameters()
    assert (shape.hidden, shape.layers) == (16, config.get_text_config().num_hidden_layers)


def test_what_a_token_does_not_pass_of_experts(tmp_path):
    """Mixtral-8x7B, by its makers 46.7 and 12.9 billion parameters; and by hand."""
    mixtral = KNOWN_MODELS["mixtral-8x7b"]
    assert mixtral.causal_parameters == 46_702_792_704
    assert mixtral.causal_parameters - mixtral.idle_parameters == pytest.approx(12.9e9, rel=0.005)
    sizes = SMALL_SIZES | {"intermediate_size": 6, "head_dim": 2, "moe_intermediate_size": 10}
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    small = counted(tmp_path, Qwen3MoeConfig(**sizes, **experts))
    # Three of five experts of three 4 x 10 matrices idle in each of three blocks, of which one has a single MLP.
    assert small.idle_parameters == 2 * 3 * 120
    # 120 more for each of four experts, 20 for the router, two norms of 2 for queries and keys: the largest block.
    assert small.layer_parameters == SMALL.layer_parameters + 4 * 120 + 20 + 4
    # The block in between has 3 x 4 x 6 = 72 for all of them.
    assert small.backbone_parameters == SMALL.backbone_parameters + 2 * 500 + 3 * 4 - (120 - 72)
    assert (small.intermediate, small.experts_used, small.qk_norm) == (10, 2, True)


def test_unknown_model_asks_for_its_config(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="MODEL_CONFIG=PATH"):
        shape_of("someone/mystery-9b")
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(InputError, match="transformers makes no language model of this 'mystery' config"):
        shape_of("someone/mystery-9b", str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"hidden_size": 16}')
    with pytest.raises(InputError, match="has no 'model_type'"):
        shape_of("someone/mystery-9b", str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="counted by transformers, and transformers is missing"):
        shape_of("someone/mystery-9b", str(tmp_path / "config.json"))
    with pytest.raises(InputError, match="no such file"):
        shape_of("someone/mystery-9b", str(tmp_path / "absent.json"))


def test_name_is_not_a_part_of_a_larger_number():
    with pytest.raises(InputError):
        shape_of("someone/myopt-1.3bb")


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "step"),
    [(0, 200, 200, 300, 100), (1, 200, 200, 300, 100), (2, 200, 50, 300, 100), (3, 50, 50, 300, 100)],
)
def test_model_states_by_hand(stage, weights, gradients, optimizer, step):
    """100 parameters in 16 bit on 4 ranks: 2 + 2 + 12 + 4 bytes each, divided by 4 from where the stage divides.

    Stage 0 in 16 bit is run as stage 1, see deepspeed_config.py.
    """
    states = memory.model_states(100, zero_stage=stage, ranks=4)
    assert (states.parameters, states.gradients, states.host) == (weights, gradients, 0)
    assert (states.optimizer, states.step) == (optimizer, step)


def test_offload_moves_the_optimizer_to_the_host():
    two = memory.model_states(100, zero_stage=2, ranks=4, offload=True)
    assert (two.parameters, two.gradients, two.optimizer, two.host) == (200, 0, 0, 1800)
    three = memory.model_states(100, zero_stage=3, ranks=4, offload=True)
    assert (three.parameters, three.gradients, three.optimizer, three.host) == (0, 0, 0, 2000)


def test_fp32_without_zero_keeps_no_second_copy():
    states = memory.model_states(100, zero_stage=0, ranks=1, bytes_per_parameter=4)
    assert (states.parameters, states.gradients, states.optimizer) == (400, 400, 800)


def test_frozen_model_has_only_its_weights():
    states = memory.model_states(100, zero_stage=3, ranks=4, trained=False, largest_layer=30)
    # All 100 may be gathered ahead of their turn.
    assert (states.parameters, states.gradients, states.optimizer, states.buffers) == (50, 0, 0, 200)


@pytest.mark.parametrize("offload", [False, True])
def test_states_agree_with_deepspeed_estimators(offload):
    """DeepSpeed's own formulas, without their safety factor and with the buffers that they leave out taken away."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    count, ranks, layer = 6_738_415_616, 4, 131_072_000
    host, gpu = estimate_zero2_model_states_mem_needs(count, ranks, 1, offload, additional_buffer_factor=1.0)
    ours = memory.model_states(count, zero_stage=2, ranks=ranks, offload=offload)
    assert ours.parameters + ours.gradients + ours.optimizer + ours.step == pytest.approx(gpu)
    if offload:  # they leave out 2 bytes, the reduced gradients in 16 bit
        assert ours.host - 2 * count == pytest.approx(host)
    host, gpu, largest = estimate_zero3_model_states_mem_needs(
        count, layer, ranks, 1, offload, offload, additional_buffer_factor=1.0
    )
    ours = memory.model_states(count, zero_stage=3, ranks=ranks, offload=offload)
    # Its ZeRO-3 estimate counts fp32 gradients only; the engine also keeps its part of them in 16 bit.
    assert ours.parameters + ours.optimizer + ours.step == pytest.approx(gpu - largest)
    if offload:
        assert ours.host - 2 * count == pytest.approx(host)


def kept_by_autograd(model, sequences: int, tokens: int) -> int:
    """Bytes of the different tensors, other than parameters, that a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.ones((sequences, tokens), dtype=torch.long))
    return sum(kept.values())


WIDE = {
    **{"hidden_size": 256, "n_embd": 256, "intermediate_size": 640, "ffn_dim": 640, "word_embed_proj_dim": 256},
    **{"num_attention_heads": 4, "n_head": 4, "head_dim": 64, "num_key_value_heads": 2},
}
NO_DROPOUT = {"dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize(
    ("family", "checkpointing"), [*((family, False) for family in FAMILIES), ("llama", True), ("opt", True)]
)
def test_activations_are_what_autograd_keeps(tmp_path, family, checkpointing):
    kind, sizes, _ = FAMILIES[family]
    # Enough blocks for what lies outside of them (the last norm, the mask) to be little.
    layers = 24 if checkpointing else 6
    wide = {name: WIDE.get(name, size) for name, size in sizes.items()} | NO_DROPOUT
    wide |= {"n_layer" if "n_layer" in sizes else "num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_config(kind(vocab_size=200, **wide)).bfloat16().train()
    model.config.use_cache = False
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    shape = counted(tmp_path, model.config)
    ours = memory.activations(shape, 2, 64, checkpointing)
    if checkpointing:
        # The one block that is recomputed comes later, in the backward pass.
        ours -= 2 * 64 * memory.layer_activations(shape, 64)
    assert ours == pytest.approx(kept_by_autograd(model, 2, 64), rel=0.2)


def test_working_memory_by_hand():
    # inputs and outputs of two norms 4 h = 16, q and attention's output 8, k and v 8, MLP 40: 72 values of 2 bytes,
    # and the norms' fp32 copies, 8 h = 32
    assert memory.layer_activations(SMALL, 5) == 176
    assert memory.activations(SMALL, sequences=2, tokens=5, checkpointing=False) == 2 * 5 * 3 * 176
    assert memory.activations(SMALL, sequences=2, tokens=5, checkpointing=True) == 2 * 5 * (3 * 4 * 2 + 176)
    # keys and values, 3 blocks, 4 wide, 2 bytes
    assert memory.kv_cache(SMALL, sequences=2, tokens=5) == 2 * 3 * 4 * 2 * 2 * 5
    # Llama-2-7B: half a MiB a token
    assert memory.kv_cache(KNOWN_MODELS["llama-2-7b"], 1, 1) == 2**19


def test_paper_recipe_fits_and_by_how_much():
    """SFT of Llama-2-7B at ZeRO-2 on 8 GPUs: 2 P + (2 + 12) P / 8 bytes of states, two buckets, the activations."""
    needs = plan.stage_needs(recipe(), KNOWN_MODELS["llama-2-7b"])
    sft = needs["step1_sft"]
    states = 6_738_415_616 * (2 + 14 / 8)
    # The logits are gone when a block is recomputed, whose activations take more.
    block = memory.layer_activations(KNOWN_MODELS["llama-2-7b"], 512)
    work = 16 * 512 * (32 * 4096 * 2 + max(block, 14 * 32000))
    assert sft.gpu_total == pytest.approx(states + 2 * 500_000_000 * 2 + work + 3 * GIB)
    # The discriminator sees two sequences for each revision.
    per_token = 32 * 4096 * 2 + memory.layer_activations(KNOWN_MODELS["llama-2-7b"], 512)
    assert needs["step2_discriminator"].gpu["work: forward and backward"] == 2 * 16 * 512 * per_token
    assert all(need.gpu_total < 80 * GIB for need in needs.values())
    # One GPU without offload cannot hold 18 bytes for each of 6.7 billion parameters.
    alone = plan.stage_needs(recipe(num_gpus="1"), KNOWN_MODELS["llama-2-7b"])
    assert alone["step1_sft"].gpu_total > 80 * GIB
    # Actor's and critic's optimisers together, 18 bytes for each parameter, on one node's host.
    both = 6_738_415_616 + 6_738_415_616 - 32000 * 4096 + 4097
    assert needs["step3_ppo_tlcr"].host["offloaded"] == pytest.approx(18 * both)


def test_the_model_of_time_by_hand():
    """A card of 100 operations and 10 bytes a second, of which half and all are reached."""
    card = duration.Card(100, 10, link=7, host=5, utilisation=0.5, share=1)
    assert duration.kernel(card, 100, 10) == 2  # two seconds of arithmetic, one of memory
    assert duration.kernel(card, 100, 40) == 4
    assert duration.computing(card, 25, 3, 4) == 2 * 25 * 3 * 4 / 50
    # Two answers: 2 x 2 x 10 operations, 20 bytes of weights and 5 of cache; the memory takes longer.
    assert duration.decoding(card, 10, 8, rows=2, cache=5) == 8 * 2.5
    assert duration.decoding(card, 10, 8, rows=2, launches=10**6) == 8 * 16  # the host takes longer
    # Three quarters of 28 bytes, at 0.7 of 7 bytes a second.
    assert duration.exchange(card, 28, 4) == pytest.approx(21 / 4.9)
    assert duration.exchange(card, 28, 1) == 0
    assert duration.exchange(duration.CARDS["A100"], 25e9, 2, nodes=2) == pytest.approx(0.5 / 0.7)
    assert duration.adam(card, 10, 4, 1, offload=False) == 28 * 10 / 4 / 10
    assert duration.adam(card, 2e9, 16, 2, offload=True) == pytest.approx(0.22)
    # Gradients and parameters, of 2 x 7 bytes each; ZeRO-3 gathers them in each of three passes.
    assert duration.zero(card, 7, 2, 3, 4, 1, 2) == pytest.approx(duration.exchange(card, 28, 4))
    assert duration.zero(card, 7, 3, 3, 4, 1, 2) == pytest.approx(duration.exchange(card, 56, 4))


def test_hours_of_the_paper_recipe_by_hand():
    """6.74e9 parameters, and attention to 2,048 or 240 tokens; 162.5 + 77.5 tokens, 140.4e12 operations a second."""
    shape, rate = KNOWN_MODELS["llama-2-7b"], 312e12 * 0.45
    seconds = plan.stage_seconds(recipe(ppo_offload=False), shape, plan.find_texts(recipe()))
    sft, disc, ppo = seconds.values()
    attention = 2 * 32 * 4096
    assert sft["learning"] == pytest.approx(2 * 22_410 * 240 * 8 * (6.7384e9 + attention * 240) / rate / 8, rel=1e-3)
    # The pair's prompt once, both answers: 162.5 + 2 x 77.5; no output layer.
    assert disc["learning"] == pytest.approx(2 * 44_821 * 317.5 * 8 * (6.6073e9 + attention * 240) / rate / 8, rel=1e-3)
    step = {part: each / 351 for part, each in ppo.items()}
    assert step["scoring"] == pytest.approx(3 * 2 * 16 * 240 * (6.7384e9 + attention * 2048) / rate, rel=1e-3)
    assert step["learning"] == pytest.approx(2 * 4 * 2 * 16 * 240 * (6.7384e9 + attention * 2048) / rate, rel=1e-3)
    # 13.48 GB of weights and half a MiB for each of 16 x (162 + 128) tokens.
    read = 2 * 6.7384e9 + 2**19 * 16 * 290
    assert step["decoding"] == pytest.approx(256 * read / (2.039e12 * 0.68), rel=0.01)
    assert sum(each for part, each in step.items() if part != "files") == pytest.approx(7.4, rel=0.15)
    # Eight checkpoints of actor and critic, 12 bytes a parameter; four models read and written.
    assert ppo["files"] == pytest.approx((8 * 12 + 3 * 2) * (6.7384e9 + 6.6073e9) / 1e9, rel=1e-3)


def test_what_changes_the_hours():
    shape = KNOWN_MODELS["llama-2-7b"]

    def step(model=shape, **changes):
        return hours.ppo_step(recipe(**changes), model, 160, 80, offload=False)

    usual = step()
    padded = step(ppo_tokens_per_micro_batch=0)
    assert usual["scoring"] < 0.65 * padded["scoring"]
    # Under ZeRO-3 no CUDA graph decodes: 1,770 launches a token, and 7/8 of the parameters come over the links.
    gathered = 2 * 6.7384e9 * 7 / 8 / (300e9 * 0.7)
    expected = 256 * (1770 * duration.LAUNCH + gathered)
    assert step(actor_zero_stage=3)["decoding"] == pytest.approx(expected, rel=0.01)
    # Four sets' prompts decoded together read the weights once for all.
    together = step(generation_batches=4)
    assert together["decoding"] < 0.5 * usual["decoding"]
    # ReMax: two answers to a prompt, no critic.
    remax = step(algo="remax")
    assert remax["decoding"] == 2 * usual["decoding"]
    assert (remax["scoring"], remax["learning"]) == (usual["scoring"], pytest.approx(usual["learning"] / 2))
    assert step(num_gpus="1")["between GPUs"] == 0
    assert hours.ppo_step(recipe(), shape, 160, 80, offload=True)["Adam on the host"] == pytest.approx(
        0.44 * 6.7384, rel=1e-3
    )
    # A token passes 12.9 of Mixtral's 46.7 billion parameters, and 16 of them read all.
    mixtral = KNOWN_MODELS["mixtral-8x7b"]
    assert step(mixtral)["learning"] / usual["learning"] == pytest.approx(12.9 / 6.74, rel=0.05)  # with attention
    assert step(mixtral)["decoding"] / usual["decoding"] > 5
    files = [hours.ppo_saving(recipe(ppo_save_interval=every), shape, 351) for every in (50, 0)]
    assert files[0] == pytest.approx((8 * 12 + 6) / (12 + 6) * files[1])


def test_hours_are_told_with_their_uncertainty_and_price():
    shape, texts = KNOWN_MODELS["llama-2-7b"], plan.find_texts(recipe())
    report = plan.hours_report(recipe(gpu_hour_usd="2"), shape, texts)
    rows = {words[0]: words[1:] for line in report.splitlines() if (words := line.split())}
    whole = float(rows["together"][0])
    assert [float(end) for end in rows["together"][1].split("-")] == pytest.approx([whole / 1.5, whole * 1.5], rel=0.01)
    assert float(rows["together"][2]) == pytest.approx(whole * 8 * 2, abs=1)
    assert whole == pytest.approx(sum(float(rows[name][0]) for name in rows if name.startswith("step")), abs=0.02)
    for expected in ("within a factor of 1.5, at US$ 2 per GPU hour", "a step of step3_ppo_tlcr: ", "files at 1 GB/s"):
        assert expected in report
    assert "(GPU_HOUR_USD=… adds US$)" in plan.hours_report(recipe(), shape, texts)
    # Where a pair's prompt is computed twice: of prompt + both answers only the answers are as many tokens.
    plain = plan.stage_seconds(recipe(discriminator_tokens_per_micro_batch=0), shape, texts)
    packed = plan.stage_seconds(recipe(), shape, texts)
    saved = texts.prompt / (2 * texts.prompt + texts.chosen + texts.rejected)
    learning = [each["step2_discriminator"]["learning"] for each in (packed, plain)]
    assert learning[0] == pytest.approx((1 - saved) * learning[1], rel=0.15)
    with pytest.raises(InputError, match="GPU_CARD=B7: known are A100, H100, H200"):
        recipe(gpu_card="B7")
    for price in ("much", "-1", "nan"):
        with pytest.raises(InputError, match=f"GPU_HOUR_USD={price}: expected a number"):
            plan.hours_report(recipe(gpu_hour_usd=price), shape, texts)


def test_step_3_offloads_where_it_would_not_fit_otherwise():
    """PPO_OFFLOAD=auto: Llama-2-7B on 8 GPUs fits with the optimisers on them, on 4 of 40 GB it does not."""
    shape = KNOWN_MODELS["llama-2-7b"]
    roomy, tight = recipe(ppo_offload="auto"), recipe(ppo_offload="auto", num_gpus="4", gpu_memory_gb=40.0)
    assert [plan.offloads_ppo(one, shape) for one in (roomy, tight)] == [False, True]
    assert plan.stage_needs(roomy, shape)["step3_ppo_tlcr"].host["offloaded"] == 0
    assert "offload of actor and critic" in plan.memory_report(tight, shape)
    assert "offload" not in plan.memory_report(roomy, shape)
    assert Recipe.from_environment(environment() | {"PPO_OFFLOAD": "auto"}).ppo_offload is None


def test_the_average_of_weights_is_4_bytes_a_parameter_over_all_ranks():
    """In host memory where ZeRO-3 has the parameters there; its checkpoints grow by as much."""
    shape = KNOWN_MODELS["llama-2-7b"]
    average = 4 * shape.causal_parameters
    for stage, on_gpu, on_host in ((2, average / 8, 0), (3, 0, average)):
        without, with_it = (
            plan.stage_needs(recipe(ppo_ema=ema, actor_zero_stage=stage), shape)["step3_ppo_tlcr"]
            for ema in (False, True)
        )
        assert with_it.gpu_total - without.gpu_total == pytest.approx(on_gpu)
        assert with_it.host["offloaded"] - without.host["offloaded"] == pytest.approx(on_host)
    disks = [plan.disk_needs(recipe(ppo_ema=ema), SMALL)["step3_ppo_tlcr"] for ema in (False, True)]
    assert disks[1].model - disks[0].model == 2 * 636
    assert disks[1].checkpoints - disks[0].checkpoints == 2 * 4 * 636


def test_remax_has_no_critic():
    shape = KNOWN_MODELS["llama-2-7b"]
    ppo, remax = (plan.stage_needs(recipe(algo=algo), shape)["step3_ppo_tlcr"] for algo in ("ppo", "remax"))
    assert ppo.gpu.keys() - remax.gpu.keys() >= {"critic"}
    # 2 bytes a parameter stay on the GPU at ZeRO-2 with offload, beside two buckets; the optimiser's 18 on the host.
    critic = shape.classifier_parameters(1)
    assert ppo.gpu_total - remax.gpu_total == pytest.approx(2 * critic + 2 * 500_000_000 * 2)
    assert ppo.host["offloaded"] - remax.host["offloaded"] == pytest.approx(18 * critic)
    disks = [plan.disk_needs(recipe(algo=algo), SMALL)["step3_ppo_tlcr"].model for algo in ("ppo", "remax")]
    assert disks == [2 * (636 + 613), 2 * 636]
    assert "no critic" in plan.memory_report(recipe(algo="remax"), shape)


@pytest.mark.parametrize(("batches", "decode", "together"), [(1, 0, 16), (8, 0, 128), (8, 32, 32), (1, 32, 16)])
def test_what_is_decoded_together_has_its_keys_and_values_in_memory(batches, decode, together):
    step3 = recipe(generation_batches=batches, decode_batch_size=decode, ppo_batch_size=1, generation_batch_size=16)
    # Blocks of no width but many keys: sampling is the largest phase.
    shape = dataclasses.replace(SMALL, layers=1000)
    work = plan.stage_needs(step3, shape)["step3_ppo_tlcr"].gpu
    # keys and values of 1000 blocks, 4 wide, 2 bytes, for 256 + 256 tokens
    assert work["KV cache"] == 2 * 1000 * 4 * 2 * together * 512


def test_two_nodes_share_the_host_memory(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two\nnode1 slots=8\nnode2 slots=8\n")
    one, two = recipe(), recipe(hostfile=str(hostfile), num_gpus="")
    assert (two.world_size, two.hosts()) == (16, {"node1": 8, "node2": 8})
    shape = KNOWN_MODELS["llama-2-7b"]
    offloaded = [plan.stage_needs(run, shape)["step3_ppo_tlcr"].host["offloaded"] for run in (one, two)]
    assert offloaded[0] == pytest.approx(2 * offloaded[1])


# ---- labelling, steps, disk ------------------------------------------------------------------------------------------


def test_parts_are_those_of_the_data_loader():
    from deepspeed_chat_tlcr.data.preferences import parse_data_split, split_indices

    assert plan.part_sizes(112_052, "2,4,4") == (22_410, 44_821, 44_821)
    for records in (1, 7, 59, 1003):
        for split in ("2,4,4", "1,1,1", "10,0,0", "0.5,0.25,0.25"):
            real = tuple(len(part) for part in split_indices(records, parse_data_split(split), 1234))
            assert plan.part_sizes(records, split) == real


def test_labelling_by_hand(monkeypatch):
    """10 records, 4 of them to label; 400 + 20 + 40 + 40 characters, 4 to a token, are 125 tokens a call."""
    monkeypatch.setattr(plan, "TEMPLATE", "x" * 400)
    cost = plan.labelling(recipe(), plan.Texts(10, 20, 40, 40, exact=True))
    assert (cost.calls, cost.prompt_tokens) == (4, 500)
    # An answer: reasoning and tags, and a response of 10 tokens like the rejected one.
    from deepspeed_chat_tlcr.asking.money import EXPLANATION_TOKENS, TAG_TOKENS

    assert cost.completion_tokens == 4 * (EXPLANATION_TOKENS + TAG_TOKENS + 10)
    # gpt-4-0125-preview: US$ 10 a million in, 30 out
    assert cost.usd == pytest.approx((500 * 10 + cost.completion_tokens * 30) / 1e6)
    assert plan.labelling(recipe(label_batch=True), plan.Texts(10, 20, 40, 40, exact=True)).usd == cost.usd / 2


def test_a_plan_says_what_the_reviser_costs_and_when_it_ends():
    """44,821 calls for the paper's data, as docs/labeling.md has it."""
    texts, day = plan.Texts(112_052, *plan.HH_CHARACTERS, exact=False), datetime.date(2026, 11, 25)
    told = plan.labelling_report(recipe(), texts, day)
    assert "gpt-4-0125-preview was shut down on 2026-03-26; use gpt-6-luna (LABEL_MODEL)" in told
    rows = {words[0]: words[-2:] for line in told.splitlines() if (words := line.split())[:1]}
    assert rows["gpt-4-0125-preview"] == ["576.62", "288.31"]
    assert rows["gpt-6-luna"] == ["7.90", "3.95"]
    assert "warning" not in plan.labelling_report(recipe(label_model="gpt-6-luna"), texts, day)
    own = plan.labelling_report(
        recipe(label_model="", label_base_url="http://u:secret-pass@127.0.0.1:1/v1"), texts, day
    )
    assert "the model served at http://127.0.0.1:1/v1" in own
    assert "secret-pass" not in own
    unknown = plan.labelling_report(recipe(label_model="nobody-knows"), texts, day)
    assert "unknown" in unknown
    assert "0.00" not in unknown


def test_steps_by_hand():
    # 22,410 records in batches of 16 x 8: 175.08, so 176 an epoch
    assert hours.work_of(recipe(), 112_052)["step1"] == hours.Work(records=22_410, batch=128, epochs=2)
    assert hours.Work(22_410, 128, 2).steps == 352


def test_disk_by_hand():
    needs = plan.disk_needs(recipe(), SMALL)
    # 636 parameters: the model in 2 bytes each; a checkpoint in 12, twice for a moment
    assert needs["step1_sft"] == plan.Disk(2 * 636, 2 * 12 * 636)
    assert needs["step3_ppo_tlcr"].model == 2 * (636 + 613)
    models = 2 * (636 + 618 + 636 + 613)
    assert plan.most_disk(needs.values()) == models + 2 * 12 * (636 + 613)


# ---- the program -----------------------------------------------------------------------------------------------------


def run_plan(**changes) -> subprocess.CompletedProcess:
    # No key, no home, no cache, and a Python without any installed package.
    bare = environment(**changes) | {"PYTHONPATH": str(ROOT), "PATH": os.defpath}
    command = [sys.executable, "-S", "-m", "training_scripts.planning.plan"]
    return subprocess.run(command, env=bare, capture_output=True, text=True, cwd=ROOT, timeout=patience(60))


def test_plan_needs_no_package_key_or_network():
    done = run_plan()
    assert done.returncode == 0, done.stderr
    for expected in ("44,821", "US$", "6,738,415,616 parameters", "total per GPU (of 80)", "Disk under output/x"):
        assert expected in done.stdout
    assert "does not fit" not in done.stdout


def test_plan_says_what_does_not_fit_and_what_it_does_not_know():
    done = run_plan(num_gpus="1", ppo_offload=False)
    assert done.returncode == 0
    assert "does not fit" in done.stdout
    done = run_plan(model="someone/mystery-9b", data="someone/data")
    assert done.returncode == 0
    assert "MODEL_CONFIG" in done.stdout
    assert "someone/data" in done.stdout


def test_plan_of_a_run_that_makes_its_own_inputs():
    done = run_plan(made_here="1", model="output/x/base", data="output/x/data")
    assert done.returncode == 0
    assert "the run makes its own data" in done.stdout
    assert "the run makes its own model" in done.stdout


def test_plan_counts_local_data(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", preferences(50))
    texts = plan.find_texts(recipe(data=str(data)))
    records = [json.loads(line) for line in data.read_text().splitlines()]
    # A single file gives nine tenths to training.
    assert (texts.records, texts.exact) == (45, True)
    assert texts.rejected == pytest.approx(sum(len(record["rejected"]) for record in records) / 50, rel=0.1)


def test_all_wrong_variables_are_told_at_once():
    wrong = environment(sft_zero_stage=4, ppo_batch_size=0, algo="grpo") | {"MASTER_PORT": "many", "PPO_OFFLOAD": "yes"}
    del wrong["MODEL"]
    with pytest.raises(InputError) as caught:
        Recipe.from_environment(wrong)
    for expected in (
        "MODEL is not set",
        "SFT_ZERO_STAGE=4: expected 0, 1, 2 or 3",
        "PPO_BATCH_SIZE=0: must be at least 1",
        "MASTER_PORT=many: expected a whole number",
        "PPO_OFFLOAD=yes: expected 1 (on), 0 (off) or auto",
        "ALGO=grpo: expected ppo or remax",
    ):
        assert expected in str(caught.value)
    with pytest.raises(InputError, match=r"run_7b\.sh"):
        Recipe.from_environment({})


@pytest.mark.parametrize(
    ("text", "message"), [("node1\n", ":1: expected"), ("node1 slots=x\n", ":1: expected"), ("\n", "no node")]
)
def test_bad_hostfile(tmp_path, text, message):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    with pytest.raises(InputError, match=message):
        recipe(hostfile=str(hostfile)).hosts()
