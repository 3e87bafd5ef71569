"""Damaged, foreign and half downloaded models: one sentence each, before anything trains."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import load_causal_lm, load_config
from deepspeed_chat_tlcr.tokenization import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{1:064d}\nsize 4976698672\n"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_header(folder, change):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lying(header):
    next(entry for name, entry in header.items() if name != "__metadata__")["shape"] = [1, 2, 3]


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    return folder


DAMAGE = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), r"model\.safetensors: is a git-lfs pointer"),
    "pointer in config": (lambda f: (f / "config.json").write_text(POINTER), r"config\.json: is a git-lfs pointer"),
    "half": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:20000]),
        "20,000 bytes",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "0 bytes are no safetensors file"),
    "nonsense": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"x" * 100), "header is damaged"),
    "long header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
        "100 bytes are no safetensors file",
    ),
    "lying shape": (lambda f: edit_header(f, lying), "no model could be loaded"),
    "no norm": (lambda f: rewrite(f, lambda w: w.pop("model.norm.weight")), "missing: model.norm.weight"),
    "one more": (lambda f: rewrite(f, lambda w: w.update(more=torch.ones(2))), "unexpected: more"),
    "no weights": (without_weights, "no model could be loaded"),
    "other shape": (lambda f: edit(f, vocab_size=999), "of another shape: lm_head.weight"),
    "shard missing": (
        lambda f: (without_weights(f) / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
        ),
        r"model-00001-of-00002\.safetensors: is missing",
    ),
    "shard elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}})),
        "is not a file of its folder",
    ),
    "odd index": (lambda f: (f / "model.safetensors.index.json").write_text("[1]"), "no weight_map"),
    "bin": (
        lambda f: (without_weights(f) / "pytorch_model.bin").write_bytes(b"not a zip, not a pickle"),
        "no model could be loaded|no file of tensors",
    ),
    "list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "layers": (lambda f: edit(f, num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "layers in words": (lambda f: edit(f, num_hidden_layers="two"), "num_hidden_layers is 'two'"),
    "width": (lambda f: edit(f, hidden_size=-4), "hidden_size is -4"),
    "odd heads": (lambda f: edit(f, num_attention_heads="x"), "no model could be loaded"),
    "no heads": (lambda f: edit(f, num_attention_heads=0), "no model could be loaded"),
    "unknown": (lambda f: edit(f, model_type="some_new_model"), "some_new_model"),
    "gptq": (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), r"quantised weights \(gptq\)"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is a LoRA adapter; merge it"),
    "gguf": (
        lambda f: ((f / "config.json").unlink(), (f / "m.Q4.gguf").write_bytes(b"GGUF")),
        r"convert it once: python -m deepspeed_chat_tlcr\.gguf \S*m\.Q4\.gguf FOLDER",
    ),
    "parent": (
        lambda f: ((f / "actor").mkdir(), (f / "config.json").rename(f / "actor" / "config.json")),
        "name one of the folders in it: actor",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_one_sentence(name, tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(InputError, match=words) as caught:
        load_causal_lm(str(folder), torch.float32)
    assert "\n" not in str(caught.value)


TOKENIZER_DAMAGE = {
    "pointer": ("tokenizer.json", POINTER, "is a git-lfs pointer"),
    "empty": ("tokenizer.json", "", "no tokenizer could be loaded"),
    "half": ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"', "no tokenizer could be loaded"),
    "other": ("tokenizer.json", '{"a": 1}', "no tokenizer could be loaded"),
    "odd settings": ("tokenizer_config.json", "[1, 2]", "no tokenizer could be loaded"),
}


@pytest.mark.parametrize("name", TOKENIZER_DAMAGE)
def test_a_damaged_tokenizer_is_one_sentence(name, tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    file, text, words = TOKENIZER_DAMAGE[name]
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_file_and_a_missing_folder_are_named(tiny, tmp_path):
    with pytest.raises(InputError, match="is a file; name the folder"):
        load_config(str(tiny / "model" / "config.json"))
    with pytest.raises(InputError, match="no such folder"):
        load_config(str(tmp_path / "nowhere"))


def test_code_in_a_folder_is_never_run_nor_asked_about(tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    edit(folder, model_type="its_own", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nC = M = None\n")
    with pytest.raises(InputError, match="no model could be loaded"):
        load_causal_lm(str(folder), torch.float32)
    assert not ran.exists()


@pytest.mark.parametrize("pad", [-1, 10**6])
def test_a_pad_token_without_a_row_is_no_obstacle(pad, tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    edit(folder, pad_token_id=pad)
    assert load_causal_lm(str(folder), torch.float32).config.pad_token_id is None


def test_tokens_without_an_embedding(tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    rows = load_config(str(folder)).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == rows  # SFT gives it a row
    assert load_tokenizer(folder, rows=rows).pad_token_id == tokenizer.eos_token_id
    with pytest.raises(InputError, match=f"token {rows + 1}, has no embedding in a model of {rows} rows"):
        load_tokenizer(folder, "<|new|>", rows)


def test_weights_of_another_dtype_load(tiny, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_causal_lm(str(folder), torch.float32).dtype == torch.float32
