"""Check a model's folder before transformers opens it: interrupted downloads, clones without git-lfs, conversions.

``check_folder`` reads no weights; ``loading`` reports errors that show only while a model loads.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError, RunError, first_line, lost_a_rank
from deepspeed_chat_tlcr.records import parse_json, read_json

_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST = {"num_hidden_layers": 10_000, "hidden_size": 1_000_000, "vocab_size": 100_000_000}
"""The largest plausible numbers of a config: a larger model would take hours to build, or all memory."""


def check_folder(path: str | Path, what: str = "model") -> None:
    """Raise ``InputError`` for a local folder that cannot be loaded; a hub name is left to transformers.

    ``what``: model or tokenizer. For a tokenizer only its own files are checked.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_file():
            raise InputError(f"{path}: is a file; name the folder with config.json, which it lies in")
        if str(path).startswith(("/", ".", "~")):
            raise InputError(f"{path}: no such folder, so no {what} in it")
        return
    if what == "tokenizer":
        _refuse_pointers(folder, "*.json")
        _refuse_pointers(folder, "*.model")
        return
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{path}: is a LoRA adapter; merge it into its base (peft's merge_and_unload) and save that")
    if not (folder / "config.json").is_file():
        raise InputError(f"{path}: no config.json, so no model; {_instead(folder)}")
    _refuse_pointers(folder, "*")
    _check_config(folder / "config.json")
    for index in folder.glob("*.index.json"):
        _check_index(index)
    for file in folder.glob("*.safetensors"):
        _check_header(file)


def _instead(folder: Path) -> str:
    """What to do with a folder without config.json."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"convert it once: python -m deepspeed_chat_tlcr.gguf {ggufs[0]} FOLDER"
    if any(folder.glob("*/config.json")):
        inner = ", ".join(sorted(config.parent.name for config in folder.glob("*/config.json"))[:3])
        return f"name one of the folders in it: {inner}"
    return "name the folder that a model was saved in"


def _refuse_pointers(folder: Path, pattern: str) -> None:
    for file in sorted(folder.glob(pattern)):
        if file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(_POINTER):
            raise InputError(f"{file}: is a git-lfs pointer, not the file itself; run `git lfs pull` in {folder}")


def _check_config(file: Path) -> None:
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(config).__name__}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{file}: quantised weights ({method}) cannot be trained; use the model in full precision")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, most in _MOST.items():
            value = part.get(name, 1)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise InputError(f"{file}: {name} is {value!r}, expected a whole number from 1 to {most:,}")


def _check_index(index: Path) -> None:
    shards = read_json(index)
    shards = shards.get("weight_map") if isinstance(shards, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: no weight_map of weights to files")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not a file of its folder")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name}: is missing, though {index.name} names it; download it again")


def _check_header(file: Path) -> None:
    """Compare a safetensors file's size with the one in its header."""
    size = file.stat().st_size
    with file.open("rb") as weights:
        start = weights.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise InputError(f"{file}: {size:,} bytes are no safetensors file; download or save it again")
        try:
            entries = parse_json(weights.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            needed = 8 + length + max(ends, default=0)
        except (ValueError, AttributeError, TypeError, KeyError, IndexError):
            raise InputError(f"{file}: its header is damaged; download or save it again") from None
    if needed != size:
        raise InputError(f"{file}: {size:,} bytes where its header says {needed:,}; download or save it again")


@contextlib.contextmanager
def loading(what: str, path: str | Path | None) -> Iterator[None]:
    """Turn whatever transformers raises for a damaged or foreign file into one ``InputError``."""
    try:
        yield
    except (InputError, RunError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and lost_a_rank(error):
            raise
        raise InputError(f"no {what} could be loaded from {str(path)!r}: {first_line(error)}") from None
