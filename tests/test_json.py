"""JSON that no reader should take: named with its file, never a traceback."""

import json
import math
import re
from pathlib import Path

import pytest

from deepspeed_chat_tlcr.data.sources import read_records
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json, read_jsonl
from deepspeed_chat_tlcr.saving import write_json


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5_000, '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"])
def test_json_without_end_is_named_wherever_it_is_read(text, tmp_path):
    """Nesting and numbers that Python's reader gives up on are errors of the file, not of this program."""
    path = tmp_path / "x.jsonl"
    path.write_text(text + "\n")
    for read in (read_json, lambda path: list(read_jsonl(path)), lambda path: list(read_records(path, ("prompt",)))):
        with pytest.raises(InputError, match=r"x\.jsonl"):
            read(path)
    array = tmp_path / "x.json"
    array.write_text(f"[{text}]")
    with pytest.raises(InputError, match=r"x\.json"):
        list(read_records(array, ("prompt",)))


def test_the_only_reader_of_json():
    """Elsewhere ``json.loads`` would bring its own ideas of what may go wrong."""
    root = Path(__file__).parents[1]
    folders = ("deepspeed_chat_tlcr", "labeling", "evaluation", "testbed", "step1_sft", "step2_discriminator")
    found = [
        path.relative_to(root).as_posix()
        for folder in (*folders, "step3_ppo_tlcr", "baselines")
        for path in (root / folder).rglob("*.py")
        if re.search(r"json\.loads?\(", path.read_text(encoding="utf-8"))
    ]
    # The plan's table needs no package; the study's archive is a stream.
    allowed = {"deepspeed_chat_tlcr/records.py", "deepspeed_chat_tlcr/asking/models.py"}
    assert set(found) <= allowed


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has no NaN, and most readers of a file refuse one that says so."""
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": "NaN"})
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [1.5, None, {"c": None}], "d": "NaN"}
