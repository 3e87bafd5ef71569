"""Preference data from a ``--data_path``: Hub data sets DeepSpeed-Chat knows, local files, saved data sets.

One streaming pass checks every record and writes prompt, chosen and rejected to an Arrow file, which is then
memory-mapped: records are looked up by index. The file is named by a hash of the content read, so an edited file is
read again. docs/data.md explains formats and split with worked examples.
"""

import hashlib
import itertools
import json
import logging
import operator
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from deepspeed_chat_tlcr.arguments import DataOptions
from deepspeed_chat_tlcr.data.formats import ChatRecords, Triple, has_messages, own_strings
from deepspeed_chat_tlcr.data.sources import ROWS_AT_ONCE, SPLITS, Records, Source, find_source
from deepspeed_chat_tlcr.data.split import PARTS, parse_data_split, split_indices
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference, sha256_of

log = logging.getLogger(__name__)

_CACHE_VERSION = "2"  # part of the cache's key: raise it when records are read differently

_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string()),  # null: a record without prompt or chosen response, left out of every part
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("context", pa.string()),  # of a chat: its messages in the form that the external model sees
        pa.field("file", pa.int32()),
        pa.field("position", pa.int64()),
    ]
)


class Table:
    """Prompts and responses of one source on disk, memory-mapped; ``len`` counts left-out records too."""

    def __init__(self, path: Path):
        self.path = path
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: damaged cache file ({error}); delete it") from None
        # Every batch but the last has ROWS_AT_ONCE records. The columns point into the map: nothing is read yet.
        self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]

    def __reduce__(self):
        return Table, (self.path,)

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def value(self, column: str, row: int):
        number, offset = divmod(int(row), ROWS_AT_ONCE)
        return self._batches[number].column(column)[offset].as_py()

    def preference(self, row: int) -> Preference:
        return Preference(*(self.value(column, row) for column in _SCHEMA.names[:4]))

    def present(self, column: str) -> np.ndarray:
        """Which records have a value in this column; shape (len,), bool."""
        masks = [batch.column(column).is_valid().to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate([np.zeros(0, bool), *masks])


def _reader(source: Source, records: Records, tokenizer) -> tuple[Callable[[dict], Triple], str]:
    """The function that reads one record, and its part of the cache's key."""
    if source.known:
        return source.known.read, source.known.name
    first = next((record for _, _, record in records), {})
    if not has_messages(first):
        return own_strings, "own"
    if tokenizer is None:
        raise InputError(f"{records}: the records are chat messages; name a model with a chat template, --tokenizer")
    try:
        reader = ChatRecords(tokenizer)
    except InputError as error:
        raise InputError(f"{records}: {error}") from None
    template = [tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token, reader.own_bos, reader.end]
    return reader, json.dumps(template, sort_keys=True)  # type: ignore[return-value] # with context, a fourth text


def _triples(source: Source, records: Records, read: Callable[[dict], Triple]) -> Iterator[tuple]:
    """Rows of ``_SCHEMA``. Raises ``InputError`` for a malformed record, and if most responses repeat their prompt (a
    few may do so by chance: "Hi" and "Hi there").
    """
    count = doubled = 0
    for file_number, position, record in records:
        try:
            if read is own_strings and has_messages(record):
                raise InputError("chat messages, while the first record has strings; use one form per data set")
            texts: tuple = read(record)
            prompt, chosen, rejected, *context = texts
            for text in (prompt, chosen, rejected):
                if text is not None:
                    text.encode()
        except InputError as error:
            raise InputError(f"{records.place(file_number, position)}: {error}") from None
        except UnicodeEncodeError:
            raise InputError(f"{records.place(file_number, position)}: half of a surrogate pair, not text") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            known = source.known
            raise InputError(
                f"{records.place(file_number, position)}: not a record of {known.name}, whose name is in the path and "
                f"whose fields are {', '.join(known.fields)} ({type(error).__name__}: {error})"
            ) from None
        usable = bool(prompt) and chosen is not None
        texts = (prompt, chosen, rejected, context[0] if context else None)
        yield *(texts if usable else (None,) * 4), file_number, position
        count += 1
        doubled += usable and _repeats(prompt, chosen) and (rejected is None or _repeats(prompt, rejected))
    if source.is_own and doubled > count / 2:
        raise InputError(
            f"{records}: in {doubled} of {count} records the responses begin with the prompt, so the text would hold "
            "it twice; cut it off 'chosen' and 'rejected'"
        )


def _repeats(prompt: str, response: str) -> bool:
    return bool(prompt.strip()) and response.strip().startswith(prompt.strip())


def _write(path: Path, rows: Iterator[tuple], label: str):
    """Write rows to ``path``, whole or not at all. One writer at a time."""
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            progress = iter(tqdm(rows, desc=f"reading {label}", unit=" records", delay=3, mininterval=2, leave=False))
            while batch := list(itertools.islice(progress, ROWS_AT_ONCE)):
                columns = map(pa.array, zip(*batch, strict=True), _SCHEMA.types)
                writer.write_batch(pa.record_batch(list(columns), schema=_SCHEMA))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _content_hash(files: list[Path], *extra: str) -> str:
    digest = hashlib.sha256()
    for text in extra:
        digest.update(hashlib.sha256(text.encode()).digest())
    for path in files:
        digest.update(sha256_of(path))
    return digest.hexdigest()[:32]


def _default_cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "deepspeed_chat_tlcr"


def read_table(source: Source, records: Records, tokenizer=None, cache_dir: str | Path | None = None) -> Table:
    """Check every record and write its text to the cache, or reuse the cache of the same content."""
    read, reader_key = _reader(source, records, tokenizer)
    folder = Path(cache_dir) if cache_dir else _default_cache()
    try:
        key = _content_hash(records.content_files(), _CACHE_VERSION, reader_key)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.arrow"
        if not path.exists():
            with FileLock(f"{path}.lock"):  # the ranks of a run arrive together: one reads, the others wait
                if not path.exists():
                    _write(path, _triples(source, records, read), str(records))
    except OSError as error:
        raise InputError(
            f"{records}: cannot be read into the cache {folder} ({error.strerror or error}); "
            "--data_output_path or HF_DATASETS_CACHE names another place"
        ) from None
    return Table(path)


# ---- what stages get -------------------------------------------------------------------------------------------------


class Preferences(Sequence[Preference]):
    """Preferences that are read from disk when accessed. Holds 4 bytes per record; picklable."""

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
            pieces = ((piece, np.array([row for _, row in rows], np.uint32)) for piece, rows in groups)
            return Preferences([(self._pieces[piece][0], rows) for piece, rows in pieces])
        piece, row = self._locate(operator.index(index))
        return self._pieces[piece][0].preference(row)

    def __add__(self, other: "Preferences") -> "Preferences":
        """Both, one after the other; a file that both use stays mapped once."""
        tables = {str(table.path): table for table, _ in reversed([*self._pieces, *other._pieces])}
        return Preferences([(tables[str(table.path)], rows) for table, rows in [*self._pieces, *other._pieces]])

    def file_order(self) -> np.ndarray:
        """The indices in the order of the records on disk, in which each page of the map is read once."""
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

    Each entry of ``data_path`` is split on its own; their parts follow one another. Chat messages need a ``tokenizer``.
    ``cache_dir``: folder for the text that was read (default: in HF_DATASETS_CACHE). Unless ``require_rejected``, the
    rejected response may be None.

    Raises ``InputError``, after checking *all* records of the split, for data that is missing, empty or malformed.
    """
    if part not in (*PARTS, "all"):
        raise InputError(f"unknown part {part!r} of the data; known are {', '.join(PARTS)}, all")
    fractions = parse_data_split(data_split)
    tables = _read_tables(data_path, split, require_rejected, tokenizer, cache_dir)
    pieces = [_part_of(table, part, split, fractions, data_seed, require_rejected) for table in tables]
    preferences = Preferences(pieces)
    if not len(preferences):
        sizes = ", ".join(f"{len(table)} records in {records}" for _, records, table in tables)
        whole = any(source.eval is None for source, _, _ in tables)
        remedy = "; without an eval file it is split 9:1: give more records, or eval.jsonl" if whole else ""
        raise InputError(f"the {part} part of the {split} data is empty at --data_split {data_split} ({sizes}){remedy}")
    return preferences


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
    data_path: str | Sequence[str], split: str, require_rejected: bool, tokenizer, cache_dir
) -> list[tuple[Source, Records, Table]]:
    """Find, check and read the train or eval records of every entry."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
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
    """A mask of the complete records, shape (len(table),). In the user's own data an incomplete one is an error."""
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
    """A set of prompts in 8 bytes each: 64-bit hashes, with a 1e-13 chance of a false hit among a million."""

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
    tokenizer=None,
    cache_dir: str | Path | None = None,
) -> dict[str, PromptSet]:
    """The prompts of each part of the training data, ``{"sft": PromptSet, "reward": …, "rl": …}``; one may be empty.

    A prompt that the data repeats can be in several parts. Arguments and errors as in ``load_preferences``.
    """
    fractions = parse_data_split(data_split)
    tables = _read_tables(data_path, "train", False, tokenizer, cache_dir)
    prompts = {}
    for part in PARTS:
        pieces = [_part_of(entry, part, "train", fractions, data_seed, False) for entry in tables]
        in_file_order = ((table, row) for table, rows in pieces for row in np.sort(rows))
        prompts[part] = PromptSet(table.value("prompt", row) for table, row in in_file_order)
    return prompts
