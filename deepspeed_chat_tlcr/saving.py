"""Saved models and finished stages: Hugging Face folders, written so that a killed run leaves no half of one."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.models import head_of
from deepspeed_chat_tlcr.optim import merge_lora

SaveFormat = Literal["huggingface", "deepspeed_chat"]


def save_model(
    engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerFast, folder: str | Path, form: SaveFormat = "huggingface"
) -> None:
    """Write an engine's model and tokenizer as a Hugging Face folder, or as DeepSpeed-Chat's programs read it.

    A collective: every rank calls it. Works at every ZeRO stage; LoRA layers are merged in what is written, never in
    the model that goes on training.
    """
    model = engine.module
    if engine.zero_optimization_partition_weights():
        state_dict = engine._zero3_consolidated_16bit_state_dict()
    else:
        state_dict = model.state_dict()
    if torch.distributed.get_rank() == 0:
        folder = Path(folder)
        use_cache, model.config.use_cache = model.config.use_cache, True
        if model.can_generate():
            # What ends an answer belongs to the model: without it a server would run on to its length limit.
            model.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        merged = merge_lora(state_dict, model)
        if form == "deepspeed_chat":
            folder.mkdir(parents=True, exist_ok=True)
            model.config.save_pretrained(folder)
            torch.save(deepspeed_chat_keys(merged, model), folder / "pytorch_model.bin")
        else:
            model.save_pretrained(folder, state_dict=merged)
        tokenizer.save_pretrained(folder)
        model.config.use_cache = use_cache
    torch.distributed.barrier()


def deepspeed_chat_keys(state_dict: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A state dict under DeepSpeed-Chat's names, contiguous on the CPU.

    A causal LM's are Hugging Face's. A scoring model's backbone is ``rwtransformer.*``, its head ``v_head.weight``
    (RLHF-TLCR's discriminator: ``discriminate_head.weight``). Those programs' heads have no bias and they pass over
    one silently; it is written all the same, so that nothing is lost to readers who know it.
    """
    named = {}
    head = None if model.can_generate() else head_of(model)[0]
    head_name = "v_head" if model.config.num_labels == 1 else "discriminate_head"
    for name, tensor in state_dict.items():
        if head is not None and name.startswith(f"{head}."):
            name = name.replace(f"{head}.", f"{head_name}.", 1)
        elif head is not None:
            name = "rwtransformer." + name.removeprefix(f"{model.base_model_prefix}.")
        named[name] = tensor.detach().cpu().contiguous()
    return named


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically: the file is either the old one or the whole new one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def require_writable(folder: str | Path) -> None:
    """Raise ``InputError`` before any work if the output folder cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
