"""What the parts leave for the report: ``OUT/PART/results.json``."""

from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.saving import write_json


def save_results(out: str | Path, part: str, results: dict) -> Path:
    folder = Path(out) / part
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    return folder / "results.json"


def load_results(out: str | Path, part: str) -> dict | None:
    """None where the part has not been run. Raises ``InputError`` for a file that is not a result."""
    path = Path(out) / part / "results.json"
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not results that this program wrote; remove it and run the part again")
    return found
