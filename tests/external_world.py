"""A world that the project does not know: conftest's pairs, a reviser's file, and a truth of its own."""

import json
from pathlib import Path

from conftest import BAD, GOOD, preferences

from deepspeed_chat_tlcr.records import Preference, Revision


def score(prompt: str, response: str, ended: bool) -> float:
    """Good phrases less bad ones, less one for an answer without an end."""
    return sum(map(response.count, GOOD)) - sum(map(response.count, BAD)) - (not ended)


def write(folder: Path, count: int) -> tuple[Path, Path]:
    """``pairs.jsonl`` and ``revisions.jsonl``: the bad phrase is replaced by the chosen one's."""
    pairs, revisions = folder / "pairs.jsonl", folder / "revisions.jsonl"
    records = preferences(count)
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = []
    for record in records:
        preference = Preference(**record)
        made.append(Revision(preference.id, *record.values(), record["chosen"], "It is unkind.", "rule", {}))
    revisions.write_text("".join(revision.to_json() + "\n" for revision in made))
    return pairs, revisions
