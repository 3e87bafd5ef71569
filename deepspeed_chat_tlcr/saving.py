"""Saving models as Hugging Face folders, and other results, safely."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.chat_format import to_chat_critic, write_chat_folder
from deepspeed_chat_tlcr.errors import InputError, RunError, SaveError, first_line
from deepspeed_chat_tlcr.generation import Decoding
from deepspeed_chat_tlcr.model_card import Card, write_card
from deepspeed_chat_tlcr.models import head_of
from deepspeed_chat_tlcr.optim import merge_lora
from deepspeed_chat_tlcr.records import replace_file
from deepspeed_chat_tlcr.runtime import heartbeat
from deepspeed_chat_tlcr.turns import end_ids

_NO_LENGTH = 10**9
"""A ``model_max_length`` above this means that the tokenizer's author gave none (transformers then has 1e30)."""


def save_model(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    card: Card,
    decoding: Decoding | None = None,
) -> None:
    """Write an engine's model as a folder with its tokenizer and model card. A collective: every rank calls it.

    ``save_format`` among the card's options: huggingface, or deepspeed_chat for its chat.py and evaluation scripts.
    ``decoding``: the sampling that a policy was trained with, which becomes the saved model's default. Works at every
    ZeRO stage; LoRA layers are merged in the saved weights only. Raises ``SaveError`` if the disk is full or gone,
    ``RunError`` for weights that are not finite.
    """
    model, folder = engine.module, Path(folder)
    with writing(f"the model {folder}", lambda: "the newest checkpoint"):
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


@contextmanager
def writing(what: str, newest: Callable[[], object]) -> Iterator[None]:
    """Turn a full or lost disk into a ``SaveError`` that names ``what`` was being written, and the ``newest`` copy."""
    try:
        with heartbeat(f"saving {what}"):
            yield
    except RunError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = f"; {newest()} is whole" if newest() else ""
        remedy = "Make room, and the same command continues"
        raise SaveError(f"{what} could not be written: {first_line(error)}{kept}. {remedy}") from error


def generation_defaults(tokenizer: PreTrainedTokenizerFast, decoding: Decoding | None) -> GenerationConfig:
    """The generation config of a saved policy."""
    # With all the tokens that end an answer: without them a server would run on to its length limit.
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
    """Write one JSON document, whole or not at all; numbers that are not finite become null."""
    replace_file(Path(path), [json.dumps(without_nan(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"])


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null says "not measured"."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_writable(folder: str | Path) -> None:
    """Raise ``InputError``, before any work, if the output folder cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from None
