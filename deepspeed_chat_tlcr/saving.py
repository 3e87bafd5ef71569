"""Saved models and finished stages: Hugging Face folders, written so that a killed run leaves no half of one."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.chat_format import to_chat_critic, write_chat_folder
from deepspeed_chat_tlcr.errors import InputError, RunError, SaveError
from deepspeed_chat_tlcr.generation import Decoding
from deepspeed_chat_tlcr.model_card import Card, write_card
from deepspeed_chat_tlcr.models import head_of
from deepspeed_chat_tlcr.optim import merge_lora
from deepspeed_chat_tlcr.runtime import heartbeat
from deepspeed_chat_tlcr.turns import end_ids

_NO_LENGTH = 10**9
"""A tokenizer's ``model_max_length`` above this says that its author named none (transformers then has 1e30)."""


def save_model(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    card: Card,
    decoding: Decoding | None = None,
) -> None:
    """Write an engine's model as a folder with its tokenizer and model card. A collective: every rank calls it.

    The options' ``save_format``: huggingface (safetensors, generation config, chat template), or deepspeed_chat, what
    its chat.py and evaluation scripts read. ``decoding``: the sampling that a policy was trained with, the default of
    whoever generates with the saved model. Works at every ZeRO stage; LoRA layers are merged in what is written, never
    in the model that goes on training. Raises ``SaveError`` when the disk is full or gone, ``RunError`` for weights
    that are not finite.
    """
    try:
        with heartbeat(f"saving the model in {folder}"):
            _save_model(engine, tokenizer, Path(folder), card, decoding)
    except RunError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise SaveError(
            f"the model could not be written in {folder}: {first_line}; the newest checkpoint is whole, the same "
            "command goes on from there when there is space"
        ) from error


def _save_model(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: Card,
    decoding: Decoding | None,
) -> None:
    model = engine.module
    if engine.zero_optimization_partition_weights():
        state_dict = engine._zero3_consolidated_16bit_state_dict()
    else:
        state_dict = model.state_dict()
    if torch.distributed.get_rank() == 0:
        use_cache, model.config.use_cache = model.config.use_cache, True
        if model.can_generate():
            model.generation_config = generation_defaults(tokenizer, decoding)
        if broken := [name for name, weight in state_dict.items() if not torch.isfinite(weight).all()]:
            raise RunError(
                f"nothing was saved in {folder}: {len(broken)} weights are not finite ({broken[0]}, …). Lower the "
                "learning rate, use bf16 or fp32, or look at the model that the run began with"
            )
        state_dict = merge_lora(state_dict, model)
        known_length = tokenizer.model_max_length
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions and known_length > _NO_LENGTH:
            tokenizer.model_max_length = positions
        if card.options.save_format == "deepspeed_chat":
            if not model.can_generate():
                state_dict = to_chat_critic(state_dict, model, head_of(model)[0], len(tokenizer))
            write_chat_folder(model, state_dict, tokenizer, folder)
        else:
            model.save_pretrained(folder, state_dict=state_dict)
            tokenizer.save_pretrained(folder)
        write_card(folder, card)
        tokenizer.model_max_length = known_length
        model.config.use_cache = use_cache
    torch.distributed.barrier()


def generation_defaults(tokenizer: PreTrainedTokenizerFast, decoding: Decoding | None) -> GenerationConfig:
    """What a saved policy generates with unless it is told otherwise."""
    # What ends an answer belongs to the model: without it a server would run on to its length limit.
    ends = end_ids(tokenizer)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    if decoding is None:
        return GenerationConfig(**special)
    return GenerationConfig(
        **special,
        do_sample=True,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
    )


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically: the file is either the old one or the whole new one. What is not finite becomes null."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(without_nan(content), file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null says "not measured"."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_writable(folder: str | Path) -> None:
    """Raise ``InputError`` before any work if the output folder cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
