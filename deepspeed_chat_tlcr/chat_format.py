"""Read DeepSpeed-Chat's critics and reward models, and write folders that its scripts read.

Such a folder holds ``config.json``, ``pytorch_model.bin`` and the tokenizer. A language model has the keys of
transformers 4; version 5 reads and writes them, but has other names in memory (``lm_head`` for GPT-NeoX's
``embed_out``, one tensor for all experts of Mixtral and Qwen2-MoE). A critic or reward model has its backbone under
``rwtransformer.`` (before October 2023 and in the forks ``rwtranrsformer.``) and a linear head without bias,
``v_head.weight``.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from deepspeed_chat_tlcr.errors import InputError

WEIGHTS = "pytorch_model.bin"
_BACKBONE_PREFIXES = ("rwtransformer.", "rwtranrsformer.")
_HEAD = "v_head.weight"


def is_chat_critic(path: str | Path) -> bool:
    """Whether a folder is a critic or reward model of DeepSpeed-Chat, by the names of its weights."""
    file = Path(path) / WEIGHTS
    return file.is_file() and _HEAD in _read(file)


def _read(file: Path) -> dict[str, torch.Tensor]:
    # weights_only: the file is a pickle, which must not run code. mmap: pages are read when they are used; files from
    # before PyTorch 1.6 cannot be mapped.
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{file}: no file of tensors that can be read safely ({type(error).__name__})") from None


def critic_state_dict(path: str | Path, config: PretrainedConfig, head: str) -> dict[str, torch.Tensor]:
    """The critic's weights under the names of transformers' token classifier for ``config``.

    ``head``: the name of that class's linear head, whose bias is 0. Raises ``InputError`` for a file whose backbone has
    neither of the known prefixes.
    """
    weights = _read(Path(path) / WEIGHTS)
    prefix = next((p for p in _BACKBONE_PREFIXES if any(key.startswith(p) for key in weights)), None)
    if prefix is None:
        raise InputError(f"{path}: has {_HEAD} but no backbone under {' or '.join(_BACKBONE_PREFIXES)}")
    backbone = classifier_class(config).base_model_prefix + "."
    renamed = {f"{head}.weight": weights[_HEAD], f"{head}.bias": torch.zeros(1, dtype=weights[_HEAD].dtype)}
    for key, tensor in weights.items():
        if key.startswith(prefix):
            renamed[backbone + key.removeprefix(prefix)] = tensor
        elif key != _HEAD:
            renamed[key] = tensor  # unknown: the strict check of keys will name it
    return renamed


def classifier_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """A family's token-classification class."""
    return AutoModelForTokenClassification._model_mapping[type(config)]  # type: ignore[return-value]


def to_chat_critic(
    state_dict: dict[str, torch.Tensor], model: PreTrainedModel, head: str, tokens: int
) -> dict[str, torch.Tensor]:
    """A token classifier's state dict under DeepSpeed-Chat's names. Raises ``InputError`` for what it cannot hold.

    DeepSpeed-Chat's step 3 expects an embedding of ``tokens``, the tokenizer's size, rounded up to a multiple of 8:
    zero rows are added, or unused rows left out.
    """
    if model.config.num_labels != 1:
        raise InputError("--save_format deepspeed_chat: it has no token discriminators; keep --save_format huggingface")
    bias = state_dict.get(f"{head}.bias")
    if bias is not None and bias.abs().max() > 0:
        raise InputError("--save_format deepspeed_chat: the head has a bias, which DeepSpeed-Chat's has no place for")
    backbone = model.base_model_prefix + "."
    state_dict = revert_weight_conversion(model, state_dict)
    renamed = {
        _BACKBONE_PREFIXES[0] + key.removeprefix(backbone): tensor
        for key, tensor in state_dict.items()
        if key.startswith(backbone)
    }
    embedding = next(name for name, part in model.base_model.named_modules() if part is model.get_input_embeddings())
    rows = renamed[f"{_BACKBONE_PREFIXES[0]}{embedding}.weight"]
    fitted = rows.new_zeros(-(-tokens // 8) * 8, rows.size(1))
    kept = min(len(rows), len(fitted))
    fitted[:kept] = rows[:kept]
    return renamed | {f"{_BACKBONE_PREFIXES[0]}{embedding}.weight": fitted, _HEAD: state_dict[f"{head}.weight"]}


def write_chat_folder(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write config, weights and tokenizer as DeepSpeed-Chat's scripts, which run on transformers 4, read them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # transformers 4 does not know the tokenizer classes of version 5.
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}
    loader = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    text = json.dumps(loader, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    # Not the classifier's name for a critic: its file does not have a classifier's keys.
    architecture = type(model if model.can_generate() else model.base_model).__name__
    config = _old_config(model.config.to_dict()) | {
        "architectures": [architecture],
        # chat.py looks for the tokenizer there, and needs the key.
        "_name_or_path": str(folder.resolve()),
    }
    if not model.can_generate():
        config["vocab_size"] = -(-len(tokenizer) // 8) * 8  # as to_chat_critic has fitted the embedding
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
        state_dict = revert_weight_conversion(model, state_dict)
    part = folder / f"{WEIGHTS}.part"
    torch.save({key: tensor.contiguous().cpu() for key, tensor in state_dict.items()}, part)
    part.replace(folder / WEIGHTS)


def _old_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the names of transformers 4 beside those of transformers 5."""
    config = dict(config)
    if config.get("dtype") is not None:
        config["torch_dtype"] = str(config["dtype"]).removeprefix("torch.")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = config["rotary_pct"] = rope["partial_rotary_factor"]
        config["rotary_emb_base"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config
