"""Which pairs a run has to ask about: one streaming pass over the data that holds a few bytes per pair."""

import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepspeed_chat_tlcr.asking.journal import State
from deepspeed_chat_tlcr.data.preferences import Preferences
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference

REOPEN_EVERY = 10_000  # pairs


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``count``: its pairs are chosen by id, whatever their order in the data."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shard {text}: expected i/n with i from 1 to n, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def __contains__(self, id: str) -> bool:
        return int(id[:12], 16) % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Selection:
    """The pairs of this shard, each once, in their order on disk. Pair ``ids[k]`` is ``indices[k]`` in the data."""

    indices: np.ndarray
    ids: np.ndarray
    duplicates: int  # repetitions of pairs, left out
    prompt_bytes: int  # UTF-8 bytes of the pairs selected, duplicates counted too
    chosen_bytes: int
    rejected_bytes: int
    fingerprint: str  # of all pairs of the part, in order

    def __len__(self) -> int:
        return len(self.ids)


def stream(preferences: Preferences, indices: np.ndarray) -> Iterator[Preference]:
    """Read pairs one by one from a memory map of our own, which is reopened now and then.

    Pages that were read count as memory of the process until the map is closed.
    """
    for start in range(0, len(indices), REOPEN_EVERY):
        opened = copy.deepcopy(preferences)
        for index in indices[start : start + REOPEN_EVERY]:
            yield opened[int(index)]


def select(preferences: Preferences, shard: Shard) -> Selection:
    """Read every pair once: its id, whether it is in the shard, its size."""
    order = preferences.file_order()
    ids, mine = np.zeros(len(order), "S24"), np.zeros(len(order), bool)  # by place on disk
    sizes = [0, 0, 0]
    for place, preference in enumerate(stream(preferences, order)):
        id = preference.id
        ids[place] = id.encode()
        if id in shard:
            mine[place] = True
            for part, text in enumerate((preference.prompt, preference.chosen, preference.rejected)):
                sizes[part] += len(text.encode())
    in_order = ids[np.argsort(order)]
    digest = hashlib.sha256(in_order.tobytes()).hexdigest()[:16]
    places = np.flatnonzero(mine)
    _, first = np.unique(ids[places], return_index=True)
    places, duplicates = places[np.sort(first)], len(places) - len(first)
    fingerprint = f"{len(order)} pairs, sha256 {digest}"
    return Selection(order[places], ids[places], duplicates, sizes[0], sizes[1], sizes[2], fingerprint)


def to_ask(selection: Selection, state: State, samples: int, retry_failed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that need more samples: positions in the selection, and a count for each.

    With ``retry_failed`` a pair needs one for each failure, else ``samples`` minus its results and failures.
    """
    failed = _counts(selection.ids, state.failures)
    wanted = failed if retry_failed else samples - failed - _counts(selection.ids, state.results)
    positions = np.flatnonzero(wanted > 0)
    return positions, wanted[positions]


def _counts(ids: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """How often each of ``ids`` occurs in ``lines``."""
    if not len(lines):
        return np.zeros(len(ids), np.int64)
    known, counts = np.unique(lines, return_counts=True)
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[places] == ids, counts[places], 0)
