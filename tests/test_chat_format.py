"""DeepSpeed-Chat's folders: its critics load, and what --save_format deepspeed_chat writes is such a folder."""

import copy
import json
import pickle
import shutil

import deepspeed
import pytest
import torch
from conftest import byte_level_tokenizer, write_jsonl
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2MoeConfig,
    set_seed,
)

import baselines.figa.main
import labeling.main
import step1_sft.main
import step2_discriminator.main
import step3_ppo_tlcr.main
from deepspeed_chat_tlcr.chat_format import to_chat_critic, write_chat_folder
from deepspeed_chat_tlcr.deepspeed_config import build_config
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import head_of, label_count, load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.tokenization import load_tokenizer

IDS = torch.arange(3, 23).view(2, 10)
SIZES = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, intermediate_size=32),
    # OPT-350m's shape: the head reads a projection of the last hidden state.
    "opt": OPTConfig(
        **SIZES, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=32, do_layer_norm_before=False
    ),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
}


def chat_critic(folder, config, prefix="rwtransformer."):
    """A critic as DeepSpeed-Chat writes it, and its values for IDS, ``(B, T)``."""
    set_seed(0)
    backbone = AutoModel.from_config(config).eval()
    with torch.no_grad():
        hidden = backbone(IDS).last_hidden_state
    head = torch.randn(1, hidden.size(-1))
    folder.mkdir()
    weights = {prefix + key: tensor for key, tensor in backbone.state_dict().items()}
    torch.save(weights | {"v_head.weight": head}, folder / "pytorch_model.bin")
    named = config.to_dict() | {"architectures": ["SomeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(named))
    return hidden @ head[0]


def values_of(folder) -> torch.Tensor:
    with torch.no_grad():
        return load_token_classifier(str(folder), 1, torch.float32).eval()(IDS).logits.squeeze(-1)


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", "rwtranrsformer."), *((f, "rwtransformer.") for f in FAMILIES)]
)
def test_critics_of_deepspeed_chat_load(tmp_path, family, prefix):
    expected = chat_critic(tmp_path / "critic", FAMILIES[family], prefix)
    assert label_count(str(tmp_path / "critic")) == 1
    assert torch.allclose(values_of(tmp_path / "critic"), expected, atol=1e-6)


def test_critic_of_deepspeed_chat_loads_partitioned(tmp_path, in_process):
    from deepspeed_chat_tlcr import runtime

    runtime.start("fp32", 0)
    expected = chat_critic(tmp_path / "critic", FAMILIES["llama"])
    zero_3 = build_config(dtype="fp32", zero_stage=3, micro_batch_size=1, gradient_accumulation_steps=1, world_size=1)
    model = load_token_classifier(str(tmp_path / "critic"), 1, torch.float32, zero_3).eval()
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())), torch.no_grad():
        whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = load_token_classifier(str(tmp_path / "critic"), 1, torch.float32)
    assert all(torch.equal(whole[name], parameter) for name, parameter in plain.named_parameters())
    assert expected.shape == IDS.shape


def test_critics_that_are_none_are_refused_by_name(tmp_path):
    folder = tmp_path / "critic"
    chat_critic(folder, FAMILIES["llama"])
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    lacking = {key: tensor for key, tensor in weights.items() if "layers.1.mlp.up_proj" not in key}
    torch.save(lacking | {"extra.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight; 1 unexpected: extra"):
        values_of(folder)
    torch.save({"v_head.weight": weights["v_head.weight"]}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no backbone under rwtransformer"):
        values_of(folder)
    with pytest.raises(InputError, match="1 label"):
        load_token_classifier(str(folder), 2, torch.float32)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"v_head.weight": print}))
    with pytest.raises(InputError, match="read safely"):
        values_of(folder)


@pytest.fixture
def chat_run(tiny, tmp_path, in_process):
    """SFT, reward model, actor and critic written with --save_format deepspeed_chat."""
    save = ("--save_format", "deepspeed_chat", "--dtype", "fp32", "--data_path", tiny / "data.jsonl")
    train = (*save, "--model_name_or_path", tiny / "model", "--per_device_train_batch_size", 4)
    in_process(step1_sft.main.main, *train, "--output_dir", tmp_path / "sft")
    in_process(step2_discriminator.main.main, *train, "--output_dir", tmp_path / "rm")
    in_process(
        step3_ppo_tlcr.main.main,
        *(*save, "--actor_model_name_or_path", tmp_path / "sft", "--critic_model_name_or_path", tmp_path / "rm"),
        *("--output_dir", tmp_path / "ppo", "--max_answer_seq_len", 4, "--num_warmup_steps", 0),
        *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4),
        *("--enable_test_mode", "--test_stop_step", 1),
    )
    return tmp_path


def test_saved_as_deepspeed_chat_reads_it(chat_run):
    for folder in ("sft", "rm", "ppo/actor", "ppo/critic"):
        path = chat_run / folder
        assert not list(path.glob("*.safetensors"))
        config = json.loads((path / "config.json").read_text())
        assert config["_name_or_path"] == str(path)  # chat.py takes the tokenizer from there
        assert config["rope_theta"] == 10000.0  # transformers 4 reads this name, 5 another
        assert config["torch_dtype"] == "float32"
        written = json.loads((path / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert AutoTokenizer.from_pretrained(path).eos_token == "</s>"
        weights = torch.load(path / "pytorch_model.bin", weights_only=True)
        if folder in ("sft", "ppo/actor"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
            model.load_state_dict(weights, strict=True)
            assert torch.equal(load_causal_lm(str(path), torch.float32)(IDS).logits, model(IDS).logits)
            continue
        # What DeepSpeed-Chat's class does: a backbone, and a head without bias on its last hidden state.
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(path)).eval()
        head = weights.pop("v_head.weight")
        backbone.load_state_dict({key.removeprefix("rwtransformer."): t for key, t in weights.items()}, strict=True)
        with torch.no_grad():
            assert torch.allclose(values_of(path), backbone(IDS).last_hidden_state @ head[0], atol=1e-6)


def test_vocabulary_that_is_no_multiple_of_8(tmp_path):
    """GPT-2's 50257, say. DeepSpeed-Chat's step 3 resizes the critic's embedding first, and then loads strictly."""
    tokenizer = byte_level_tokenizer(["a cat"], vocab_size=259)
    assert len(tokenizer) % 8
    set_seed(0)
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, intermediate_size=32, num_labels=1)
    model = AutoModelForTokenClassification.from_config(config).eval()
    write_chat_folder(
        model, to_chat_critic(model.state_dict(), model, "score", len(tokenizer)), tokenizer, tmp_path / "c"
    )
    backbone = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "c"))
    backbone.resize_token_embeddings(-(-len(tokenizer) // 8) * 8)
    weights = torch.load(tmp_path / "c" / "pytorch_model.bin", weights_only=True)
    head = weights.pop("v_head.weight")
    backbone.load_state_dict({key.removeprefix("rwtransformer."): t for key, t in weights.items()}, strict=True)
    with torch.no_grad():
        expected = model(IDS).logits.squeeze(-1)
        assert torch.allclose(backbone.eval()(IDS).last_hidden_state @ head[0], expected, atol=1e-6)
    assert torch.allclose(values_of(tmp_path / "c"), expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [1, 3])
def test_reward_models_saved_as_sequence_classifiers_load(tmp_path, family, labels):
    """As TRL and others save them: the score of a text is the head's value at its last token."""
    set_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.num_labels, config.pad_token_id = labels, 0
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "rm")
    # Whatever head it has is no discriminator's: step 2 starts from the backbone.
    assert load_token_classifier(str(tmp_path / "rm"), 2, torch.float32, new_head=True)(IDS).logits.shape == (2, 10, 2)
    if labels == 3:
        assert label_count(str(tmp_path / "rm")) is None
        with pytest.raises(InputError, match="ForSequenceClassification, not a trained reward model"):
            values_of(tmp_path / "rm")
        return
    assert label_count(str(tmp_path / "rm")) == 1
    with torch.no_grad():
        assert torch.allclose(values_of(tmp_path / "rm")[:, -1], model(IDS).logits[:, 0], atol=1e-6)


EXPERTS = SIZES | {"num_key_value_heads": 2, "intermediate_size": 32}
OTHER_NAMES = {
    # What transformers 4.45 calls them, which DeepSpeed-Chat runs on; version 5 has other names in memory.
    "gpt-neox": (FAMILIES["gpt-neox"], {"embed_out.weight"}),
    "mixtral": (
        MixtralConfig(**EXPERTS, num_local_experts=2),
        {f"model.layers.1.block_sparse_moe.experts.1.w{n}.weight" for n in (1, 2, 3)},
    ),
    "qwen2-moe": (
        Qwen2MoeConfig(
            **EXPERTS, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
        ),
        {f"model.layers.1.mlp.experts.1.{name}_proj.weight" for name in ("gate", "up", "down")},
    ),
}


@pytest.mark.parametrize("family", OTHER_NAMES)
def test_keys_are_those_of_transformers_4(tmp_path, family):
    config, names = OTHER_NAMES[family]
    tokenizer = byte_level_tokenizer(["a cat"], vocab_size=320)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    write_chat_folder(model, model.state_dict(), tokenizer, tmp_path / "lm")
    assert names <= torch.load(tmp_path / "lm" / "pytorch_model.bin", weights_only=True).keys()
    with torch.no_grad():
        assert torch.equal(load_causal_lm(str(tmp_path / "lm"), torch.float32).eval()(IDS).logits, model(IDS).logits)

    config = copy.deepcopy(config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    critic = AutoModelForTokenClassification.from_config(config).eval()
    head, _ = head_of(critic)
    weights = to_chat_critic(critic.state_dict(), critic, head, len(tokenizer))
    backbone = {name.partition(".")[2] for name in names if "layers" in name}
    assert {f"rwtransformer.{name}" for name in backbone} <= weights.keys()
    write_chat_folder(critic, weights, tokenizer, tmp_path / "critic")
    with torch.no_grad():
        assert torch.allclose(values_of(tmp_path / "critic"), critic(IDS).logits.squeeze(-1), atol=1e-6)


def test_what_the_format_cannot_hold_is_refused_before_training(tiny, tmp_path, in_process, capsys):
    train = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / "a")
    train = (*train, "--save_format", "deepspeed_chat", "--dtype", "fp32", "--per_device_train_batch_size", 4)
    with pytest.raises(SystemExit):
        in_process(step2_discriminator.main.main, *train, "--revisions", tiny / "revisions.jsonl")
    assert "no token discriminators" in capsys.readouterr().err


def test_bare_vocabulary_takes_the_tokenizer_of_the_model_it_names(tiny, tmp_path):
    chat_critic(tmp_path / "critic", FAMILIES["llama"])
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    (tmp_path / "critic" / "config.json").write_text(json.dumps(config | {"_name_or_path": str(tiny / "model")}))
    assert load_tokenizer(tmp_path / "critic").get_vocab() == load_tokenizer(tiny / "model").get_vocab()


def test_chat_template_is_used_and_saved(tiny, tmp_path, in_process):
    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template + "{% if add_generation_prompt %}[a]{% endif %}"
    tokenizer.save_pretrained(model)
    chats = [
        {
            "chosen": [{"role": "user", "content": f"the cat {n}"}, {"role": "assistant", "content": " is lovely"}],
            "rejected": [{"role": "user", "content": f"the cat {n}"}, {"role": "assistant", "content": " is awful"}],
        }
        for n in range(20)
    ]
    data = write_jsonl(tmp_path / "chats.jsonl", chats)
    for save_format in ("huggingface", "deepspeed_chat"):
        out = tmp_path / save_format
        in_process(
            step1_sft.main.main,
            *("--model_name_or_path", model, "--data_path", data, "--data_split", "10,0,0", "--dtype", "fp32"),
            *("--per_device_train_batch_size", 4, "--output_dir", out, "--save_format", save_format),
        )
        saved = AutoTokenizer.from_pretrained(out)
        shown = saved.apply_chat_template(chats[0]["chosen"], tokenize=False)
        assert shown == "[u]the cat 0[a] is lovely"
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation["eos_token_id"] == saved.eos_token_id

    # The same data through labelling, the discriminator and FIGA.
    label = ("--data_path", data, "--data_split", "0,10,0", "--reviser", "chosen", "--output_dir", tmp_path / "labels")
    with pytest.raises(InputError, match="--tokenizer"):
        labeling.main.main.__wrapped__(list(map(str, label)))
    assert labeling.main.main.__wrapped__([*map(str, label), "--tokenizer", str(model)]) == 0
    revised = [json.loads(line) for line in (tmp_path / "labels" / "revisions.jsonl").read_text().splitlines()]
    assert {(one["prompt"][:11], one["modified"]) for one in revised} == {("[u]the cat ", " is lovely")}
    for stage in (step2_discriminator.main, baselines.figa.main):
        in_process(
            stage.main,
            *("--model_name_or_path", model, "--data_path", data, "--data_split", "0,10,0", "--dtype", "fp32"),
            *("--per_device_train_batch_size", 4, "--output_dir", tmp_path / stage.__name__),
            *("--revisions", tmp_path / "labels" / "revisions.jsonl"),
        )
