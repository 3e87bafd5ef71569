"""Preference data from a ``--data_path``: Hub data sets DeepSpeed-Chat knows, local files, saved data sets.

Reading is one streaming pass (``preference_tables``) over the records of each source (``record_sources``), which checks
every record and writes prompt, chosen, rejected to an Arrow file; from then on the file is memory-mapped and records
are looked up by index. The Arrow file is named by a hash of the *content* read, so an edited file is read again. The
SFT / reward / RL split is DeepSpeed-Chat's arithmetic on indices, so with equal seeds both tools take the same records.
docs/data.md explains formats and split by worked examples.
"""

import hashlib
import itertools
import logging
import math
import operator
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from deepspeed_chat_tlcr.arguments import DataOptions
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.preference_tables import Table, read_table
from deepspeed_chat_tlcr.record_sources import SPLITS, Records, Source, find_source
from deepspeed_chat_tlcr.records import Preference

log = logging.getLogger(__name__)

PARTS = ("sft", "reward", "rl")  # DeepSpeed-Chat's phases 1, 2, 3


# ---- split arithmetic ------------------------------------------------------------------------------------------------


def parse_data_split(data_split: str) -> tuple[float, float, float]:
    """Fractions of the SFT, reward and RL parts: "2,4,4" -> (0.2, 0.4, 0.4), scaled to sum 1 as in DeepSpeed-Chat.

    Raises ``InputError`` unless these are three numbers, none negative and not all zero.
    """
    try:
        weights = [float(text) for text in data_split.split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if len(weights) != 3 or min(weights) < 0 or not 0 < total < math.inf:
        raise InputError(
            f"--data_split {data_split!r}: expected three numbers for SFT, reward and RL, "
            'none negative and not all zero, as in "2,4,4" (20 %, 40 %, 40 %)'
        )
    if not any(math.isclose(total, whole) for whole in (1, 10, 100)):
        shares = ", ".join(f"{100 * weight / total:.1f} %" for weight in weights)
        log.warning("--data_split %s adds up to %g, not 1, 10 or 100: read as %s", data_split, total, shares)
    return tuple(weight / total for weight in weights)


def split_indices(size: int, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Record indices of each part: DeepSpeed-Chat's shuffle, cut at its rounded boundaries.

    Each part has round(fraction * size) records; what the rounding has too many or too few is taken from or given to
    the *first* part, because every boundary after the start moves by it. One departure: a first part too small to
    give keeps 0 records (DeepSpeed-Chat's boundary turns negative there, and its parts overlap).
    """
    boundaries = np.cumsum([0] + [round(fraction * float(size)) for fraction in fractions])
    boundaries[1:] -= boundaries[-1] - size
    boundaries = np.maximum(boundaries, 0)
    shuffled = np.arange(size, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(shuffled)
    return [shuffled[start:end] for start, end in itertools.pairwise(boundaries)]


# ---- what stages get -------------------------------------------------------------------------------------------------


class Preferences(Sequence[Preference]):
    """Preferences looked up on disk when asked for. Holds 4 bytes per record; picklable."""

    def __init__(self, pieces: Sequence[tuple[Table, np.ndarray]]):
        """``pieces``: tables with the rows taken of each, in order."""
        self._pieces = list(pieces)
        self._ends = list(itertools.accumulate(len(rows) for _, rows in self._pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> "Preferences": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            wanted = range(len(self))[index]
            located = [self._locate(i) for i in wanted]
            groups = itertools.groupby(located, key=lambda pair: pair[0])
            return Preferences(
                [(self._pieces[piece][0], np.array([row for _, row in rows], np.uint32)) for piece, rows in groups]
            )
        piece, row = self._locate(operator.index(index))
        return self._pieces[piece][0].preference(row)

    def __add__(self, other: "Preferences") -> "Preferences":
        """Both, one after the other; a file that both look into stays mapped once."""
        tables = {str(table.path): table for table, _ in reversed([*self._pieces, *other._pieces])}
        return Preferences([(tables[str(table.path)], rows) for table, rows in [*self._pieces, *other._pieces]])

    def file_order(self) -> np.ndarray:
        """The indices as their records lie on disk: looked up like this, each page of the map is read once."""
        tables = list({id(table): None for table, _ in self._pieces})
        rows = [rows for _, rows in self._pieces]
        numbers = [np.full(len(rows), tables.index(id(table))) for table, rows in self._pieces]
        return np.lexsort((np.concatenate(rows), np.concatenate(numbers)))

    def _locate(self, index: int) -> tuple[int, int]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} of {size} preferences")
        index %= size
        piece = bisect_right(self._ends, index)
        rows = self._pieces[piece][1]
        return piece, int(rows[index - self._ends[piece] + len(rows)])


def load_preferences(
    data_path: str | Sequence[str],
    part: str,
    split: str,
    data_split: str = "2,4,4",
    data_seed: int = 1234,
    require_rejected: bool = True,
    tokenizer=None,
    cache_dir: str | Path | None = None,
) -> Preferences:
    """The preferences of one part ("sft", "reward", "rl", or "all" before the split) of "train" or "eval" data.

    Several entries of ``data_path`` are each split on their own and follow one another. ``tokenizer`` is needed where
    records are chat messages. ``cache_dir`` is where the read text is kept (default: in HF_DATASETS_CACHE).
    With ``require_rejected`` false, records may lack the rejected response, which is None then.

    Raises ``InputError``, after checking *all* records of the split, for data that is missing, empty or malformed.
    """
    if part not in (*PARTS, "all"):
        raise InputError(f"unknown part {part!r} of the data; known are {', '.join(PARTS)}, all")
    fractions = parse_data_split(data_split)
    tables = _read_tables(data_path, split, data_seed, require_rejected, tokenizer, cache_dir)
    found = Preferences([_part_of(entry, part, split, fractions, data_seed, require_rejected) for entry in tables])
    if not len(found):
        sizes = ", ".join(f"{len(table)} records in {records}" for _, records, table in tables)
        whole = any(source.eval is None for source, _, _ in tables)
        remedy = "; without an eval file it is split 9:1: give more records, or eval.jsonl" if whole else ""
        raise InputError(f"the {part} part of the {split} data is empty at --data_split {data_split} ({sizes}){remedy}")
    return found


def load_part(options: DataOptions, part: str, split: str, tokenizer, require_rejected: bool = True) -> Preferences:
    """``load_preferences`` as a stage's data options say."""
    return load_preferences(
        options.data_path,
        part,
        split,
        options.data_split,
        options.data_seed,
        require_rejected,
        tokenizer,
        options.data_output_path,
    )


def _read_tables(
    data_path: str | Sequence[str], split: str, data_seed: int, require_rejected: bool, tokenizer, cache_dir
) -> list[tuple[Source, Records, Table]]:
    """Find, check and read the train or eval records of every entry."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    if not 0 <= data_seed < 2**32:
        raise InputError(f"--data_seed {data_seed}: expected 0 to 2**32 - 1")
    paths = [data_path] if isinstance(data_path, str | os.PathLike) else list(data_path)
    if not paths:
        raise InputError("--data_path is empty: name at least one data set, file or folder")
    sources = [find_source(str(path)) for path in paths]
    tables = []
    for source in sources:
        if require_rejected and source.known and not source.known.has_rejected:
            raise InputError(
                f"--data_path {source.data_path}: {source.known.name} has no rejected responses; it serves for SFT "
                "only (--sft_only_data_path, or --data_path of step 1)"
            )
        records = source.eval if split == "eval" and source.eval else source.train
        table = read_table(source, records, tokenizer, cache_dir)
        if not len(table):
            raise InputError(f"{records}: no records")
        tables.append((source, records, table))
    return tables


def _part_of(
    entry: tuple[Source, Records, Table], part: str, split: str, fractions: Sequence[float], seed: int, rejected: bool
) -> tuple[Table, np.ndarray]:
    """A table and its rows that belong to one part of train or eval, in the split's order."""
    source, records, table = entry
    rows = np.arange(len(table), dtype=np.uint32)
    if source.eval is None:
        rows = split_indices(len(rows), (0.9, 0.1), seed)[SPLITS.index(split)]
    if part != "all":
        rows = rows[split_indices(len(rows), fractions, seed)[PARTS.index(part)]]
    return table, rows[_usable(source, records, table, rejected)[rows]]


def _usable(source: Source, records: Records, table: Table, require_rejected: bool) -> np.ndarray:
    """Which records have what is needed, shape (len(table),); in the user's own data one that lacks it is an error."""
    usable = table.present("prompt")
    if require_rejected:
        has_rejected = table.present("rejected")
        if source.is_own and not has_rejected.all():
            row = int(np.argmin(has_rejected))
            where = records.place(table.value("file", row), table.value("position", row))
            raise InputError(
                f"{where}: no 'rejected' response (so {np.count_nonzero(~has_rejected)} of {len(table)} records); "
                "data without serves for SFT only (--sft_only_data_path, or --data_path of step 1)"
            )
        usable &= has_rejected
    left_out = np.count_nonzero(~usable)
    if left_out:
        log.warning("%s: %d of %d records lack a prompt or response and are left out", records, left_out, len(table))
    return usable


# ---- which part a prompt belongs to ----------------------------------------------------------------------------------


class PromptSet:
    """Which prompts there are, in 8 bytes each: 64-bit hashes, so of a million a false hit is a 1e-13 chance."""

    def __init__(self, prompts: Iterable[str]):
        self._hashes = np.unique(np.fromiter(map(self._hash, prompts), np.uint64))

    @staticmethod
    def _hash(prompt: str) -> int:
        return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")

    def __contains__(self, prompt: str) -> bool:
        value = np.uint64(self._hash(prompt))
        at = np.searchsorted(self._hashes, value)
        return bool(at < len(self._hashes) and self._hashes[at] == value)

    def __len__(self) -> int:
        """The number of different prompts."""
        return len(self._hashes)


def part_of_prompts(
    data_path: str | Sequence[str],
    data_split: str = "2,4,4",
    data_seed: int = 1234,
    split: str = "train",
    tokenizer=None,
    cache_dir: str | Path | None = None,
) -> dict[str, PromptSet]:
    """The prompts of each part, ``{"sft": PromptSet, "reward": PromptSet, "rl": PromptSet}``; one may be empty.

    A prompt that the data repeats can be in several parts. Arguments and errors as in ``load_preferences``.
    """
    fractions = parse_data_split(data_split)
    tables = _read_tables(data_path, split, data_seed, False, tokenizer, cache_dir)
    prompts = {}
    for part in PARTS:
        pieces = [_part_of(entry, part, split, fractions, data_seed, False) for entry in tables]
        in_file_order = ((table, row) for table, rows in pieces for row in np.sort(rows))
        prompts[part] = PromptSet(table.value("prompt", row) for table, row in in_file_order)
    return prompts
