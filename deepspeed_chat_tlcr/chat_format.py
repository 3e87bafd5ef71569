"""DeepSpeed-Chat's own folders: its critics and reward models read, and folders written that its scripts read.

Such a folder holds ``config.json``, ``pytorch_model.bin`` and the tokenizer. A language model's keys are those of
transformers 4; version 5 reads and writes them too, but has other names in memory (``lm_head`` for GPT-NeoX's
``embed_out``, one tensor for all experts of Mixtral and Qwen2-MoE). A critic's or reward model's are the backbone's
under ``rwtransformer.`` (before October 2023 and in the forks ``rwtranrsformer.``) and ``v_head.weight``, a linear head
without bias.
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
    """Whether a folder is a critic or reward model of DeepSpeed-Chat. Reads names, not weights."""
    file = Path(path) / WEIGHTS
    return file.is_file() and _HEAD in _read(file)


def _read(file: Path) -> dict[str, torch.Tensor]:
    # weights_only: the file is a pickle, and nothing in a checkpoint may run code; mmap: pages come when they are used.
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{file}: no file of tensors that can be read safely ({type(error).__name__})") from None


def critic_state_dict(path: str | Path, config: PretrainedConfig, head: str) -> dict[str, torch.Tensor]:
    """The critic's weights under the names of transformers' token classifier for ``config``.

    ``head``: the name of that class's linear head. Its bias is 0: DeepSpeed-Chat's has none. Raises ``InputError`` for
    a file whose backbone has neither of the known prefixes.
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
            renamed[key] = tensor  # of no use: the strict check of keys will name it
    return renamed


def classifier_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """A family's token-classification class. Its ``base_model_prefix`` is where it keeps the backbone."""
    return AutoModelForTokenClassification._model_mapping[type(config)]  # type: ignore[return-value]


def to_chat_critic(
    state_dict: dict[str, torch.Tensor], model: PreTrainedModel, head: str, tokens: int
) -> dict[str, torch.Tensor]:
    """A token classifier's state dict under DeepSpeed-Chat's names. Raises ``InputError`` for what it cannot hold.

    DeepSpeed-Chat's step 3 makes the embedding fit ``tokens``, the tokenizer's, up to a multiple of 8 before it loads a
    critic: rows for no token are added (zero) or left out.
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
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Write config, weights and tokenizer as DeepSpeed-Chat's scripts, which run on transformers 4, read them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(_old_tokenizer_config(tokenizer), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # A critic's file has no classifier's keys: named after the classifier it would be taken for one.
    architecture = type(model if model.can_generate() else model.base_model).__name__
    config = _old_config(model.config.to_dict()) | {
        "architectures": [architecture],
        # Where chat.py looks for the tokenizer; it stops where the key is missing.
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
    """A config with the names that transformers 4 knows beside those of transformers 5."""
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


def _old_tokenizer_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What transformers 4 needs to load ``tokenizer.json``; class names of transformers 5 are unknown to it."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        if getattr(tokenizer, name, None) is not None:
            config[name] = getattr(tokenizer, name)
    return config | {"clean_up_tokenization_spaces": False}
