"""ParaDetox's sentences and rewrites as prompts, toxic answers and people's minimal edits of them."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference, Revision, read_jsonl, write_jsonl
from labeling.revising import MAX_EDIT_RATIO, edit_ratio

LEAST_WORDS, MOST_WORDS = 2, 4  # of a prompt
TRAIN, TEST, JUDGE, VALIDATION = "train", "test", "judge", "validation"

_QUOTES = str.maketrans("‘’‚‛“”„‟`´", "''''\"\"\"\"''")
_BEFORE = re.compile(r"\s+([.,!?;:%)\]}]|n't\b|'(?:s|re|ve|ll|d|m)\b)")
_BEHIND = re.compile(r"([(\[{])\s+")
_END = re.compile(r"[\s.!,;:\"'…-]+$")


@dataclass(frozen=True)
class Pair:
    """A prompt, the toxic way it went on, and the least edited of people's rewrites; both begin with a space."""

    prompt: str
    toxic: str
    rewrite: str

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.prompt}\0{self.toxic}".encode()).hexdigest()[:16]


def clean(text: str) -> str:
    """One form for both sides, or a fifth of the edits would be punctuation: originals are in lower case, their
    punctuation stands apart, and few end in a full stop."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).lower()
    text = _BEHIND.sub(r"\1", _BEFORE.sub(r"\1", " ".join(text.split())))
    return _END.sub("", text)


def pair_of(toxic: str, rewrites: Iterable[str]) -> Pair | None:
    """None where no rewrite shares the first two words, or edits more than it keeps, or nothing."""
    before = clean(toxic).split()
    pairs = []
    for rewrite in rewrites:
        after = clean(rewrite).split()
        places = zip(before, after, strict=False)
        shared = next((at for at, (one, other) in enumerate(places) if one != other), MOST_WORDS)
        length = min(shared, MOST_WORDS, len(before) - 1, len(after) - 1)
        if length < LEAST_WORDS or before == after:
            continue
        own, other = (" ".join(["", *words[length:]]) for words in (before, after))
        if edit_ratio(own, other) <= MAX_EDIT_RATIO:
            pairs.append(Pair(" ".join(before[:length]), own, other))
    return min(pairs, key=lambda pair: edit_ratio(pair.toxic, pair.rewrite), default=None)


def part_of(pair: Pair, test_share: float) -> str:
    """By the prompt's hash, so that pairs that begin alike stay together: ``test``; ``validation``, a quarter as many;
    half of the others ``judge``, on which only the second discriminator trains, and half ``train``.
    """
    place = int(hashlib.sha256(pair.prompt.encode()).hexdigest()[:12], 16) / 16**12
    if place < test_share:
        return TEST
    if place < 1.25 * test_share:
        return VALIDATION
    return JUDGE if place < (1 + 1.25 * test_share) / 2 else TRAIN


def read_pairs(path: str | Path) -> list[Pair]:
    """Records ``{"toxic": text, "neutral": [texts]}``, one JSON a line, gzipped or not. Raises ``InputError``."""
    pairs = {}
    for number, record in read_jsonl(Path(path)):
        toxic, rewrites = record.get("toxic"), record.get("neutral")
        texts = isinstance(rewrites, list) and all(isinstance(text, str) for text in [toxic, *rewrites])
        if not texts:
            raise InputError(f"{path}:{number}: expected ParaDetox's toxic (text) and neutral (list of texts)")
        if pair := pair_of(toxic, rewrites):
            pairs.setdefault(pair.id, pair)
    if len(pairs) < 100:
        raise InputError(f"{path}: {len(pairs)} usable pairs, expected at least 100")
    return list(pairs.values())


def write_parts(pairs: Iterable[Pair], test_share: float, folder: Path) -> dict[str, int]:
    """What the stages read, below ``folder``; returns how many pairs each part has.

    ``PART/toxic``: what SFT learns, toxic answers alone; ``PART/pairs``: rewrite over toxic answer, for reward models,
    DPO and prompts; ``PART/revisions.jsonl``: people's edits as the labels' source.
    """
    parts: dict[str, list[Pair]] = {part: [] for part in (TRAIN, JUDGE, VALIDATION, TEST)}
    for pair in pairs:
        parts[part_of(pair, test_share)].append(pair)
    for part, kept in parts.items():
        if not kept:
            raise InputError(f"no pair is left for {part}: more data, or another --test_share")
        toxic = ({"prompt": pair.prompt, "chosen": pair.toxic} for pair in kept)
        rewrites = ({"prompt": pair.prompt, "chosen": pair.rewrite} for pair in kept)
        preferences = [Preference(pair.prompt, pair.rewrite, pair.toxic) for pair in kept]
        write_jsonl(folder / part / "toxic" / "train.jsonl", toxic)
        write_jsonl(folder / part / "rewrites" / "train.jsonl", rewrites)
        write_jsonl(folder / part / "pairs" / "train.jsonl", (preference.as_pair() for preference in preferences))
        revisions = (Revision(p.id, p.prompt, p.chosen, p.rejected, p.chosen, "", "people", {}) for p in preferences)
        write_jsonl(folder / part / "revisions.jsonl", map(asdict, revisions))
    return {part: len(kept) for part, kept in parts.items()}
