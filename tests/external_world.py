"""A world that the project does not know: conftest's pairs, a reviser's file, and a truth of its own."""

import json
from pathlib import Path

from deepspeed_chat_tlcr.records import Preference, Revision

KIND, UNKIND = ("lovely", "rest", "likes", "stands"), ("awful", "must", "hates", "falls")


def score(prompt: str, response: str, ended: bool) -> float:
    """Kind words less unkind ones, less one for an answer without an end."""
    return sum(map(response.count, KIND)) - sum(map(response.count, UNKIND)) - (not ended)


def write(folder: Path, count: int) -> tuple[Path, Path]:
    """``pairs.jsonl`` and ``revisions.jsonl``: the bad phrase is replaced by the chosen one's."""
    from conftest import preferences  # not where the study imports the scorer

    pairs, revisions = folder / "pairs.jsonl", folder / "revisions.jsonl"
    records = preferences(count)
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = []
    for record in records:
        preference = Preference(**record)
        made.append(Revision(preference.id, *record.values(), record["chosen"], "It is unkind.", "rule", {}))
    revisions.write_text("".join(revision.to_json() + "\n" for revision in made))
    return pairs, revisions
