"""A GGUF file as a folder of safetensors that every stage reads: ``python -m deepspeed_chat_tlcr.gguf FILE FOLDER``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deepspeed_chat_tlcr.errors import InputError, describe_error, exits_cleanly


def convert(file: str | Path, folder: str | Path) -> None:
    """Dequantise a model to fp32 and save it with its tokenizer and chat template. Raises ``InputError``.

    What quantising cost the weights stays lost: the folder computes what the GGUF file does.
    """
    # transformers takes seconds to import: a wrong command does without.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, folder = Path(file), Path(folder)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if (folder / "config.json").exists():
        raise InputError(f"{folder}: holds a model already; choose another folder")
    try:
        how = {"gguf_file": file.name, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    except ImportError:
        raise InputError("reading GGUF needs the package gguf: pip install gguf") from None
    except Exception as error:  # whatever a damaged file brings
        raise InputError(f"{file}: cannot be read as a GGUF model ({describe_error(error)})") from error
    # Whole numbers again: saved as they are, the weights would pass for quantised ones.
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{file} -> {folder}: {model.num_parameters():,} parameters")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    if len(words) != 2 or words[0] in ("-h", "--help"):
        raise InputError("usage: python -m deepspeed_chat_tlcr.gguf FILE.gguf FOLDER")
    convert(*words)


if __name__ == "__main__":
    main()
