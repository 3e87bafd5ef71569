"""Preference data from a ``--data_path``: Hub data sets DeepSpeed-Chat knows, local files, saved data sets.

Reading is one streaming pass that checks every record and writes prompt, chosen, rejected to an Arrow file; from then
on the file is memory-mapped and records are looked up by index. The Arrow file is named by a hash of the *content*
read, so an edited file is read again. The SFT / reward / RL split is DeepSpeed-Chat's arithmetic on indices, so with
equal seeds both tools take the same records. docs/data.md explains formats and split by worked examples.
"""

import hashlib
import itertools
import json
import logging
import math
import operator
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from deepspeed_chat_tlcr.dataset_formats import (
    FORMATS,
    LOCAL_JSON,
    OWN_FIELDS,
    ChatRecords,
    DatasetFormat,
    Triple,
    find_format,
    has_messages,
    own_strings,
)
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.record_files import ROWS_AT_ONCE, SUFFIXES, has_known_suffix, place, read_records
from deepspeed_chat_tlcr.records import Preference

log = logging.getLogger(__name__)

PARTS = ("sft", "reward", "rl")  # DeepSpeed-Chat's phases 1, 2, 3
SPLITS = ("train", "eval")
EVAL_NAMES = ("eval", "validation", "valid", "dev", "test")  # the first that a folder or saved data set has is its eval
_PROJECT = Path(__file__).resolve().parents[1]
_CACHE_VERSION = "1"  # part of the cache's key: raise it when a record is read in another way than before


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


# ---- where records come from -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecords:
    """Records of one or more files, in order."""

    files: tuple[Path, ...]
    fields: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[int, int, dict]]:
        """(file number, position, record)"""
        for number, file in enumerate(self.files):
            for position, record in read_records(file, self.fields):
                yield number, position, record

    def content_files(self) -> list[Path]:
        return list(self.files)

    def place(self, file_number: int, position: int) -> str:
        return place(self.files[file_number], position)

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"


@dataclass(frozen=True)
class ArrowRecords:
    """Records of one split of a ``datasets`` data set on disk."""

    dataset: object  # datasets.Dataset
    name: str
    fields: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[int, int, dict]]:
        """(0, 1-based number, record)"""
        columns = [column for column in self.dataset.column_names if column in self.fields]
        if not columns:
            known = ", ".join(self.dataset.column_names)
            raise InputError(f"{self.name}: none of the columns {', '.join(self.fields)} (found: {known})")
        position = 0
        for batch in self.dataset.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            for record in batch.to_pylist():
                position += 1
                yield 0, position, record

    def content_files(self) -> list[Path]:
        return [Path(file["filename"]) for file in self.dataset.cache_files]

    def place(self, file_number: int, position: int) -> str:
        return place(self.name, position)

    def __str__(self) -> str:
        return self.name


Records = FileRecords | ArrowRecords


@dataclass(frozen=True)
class Source:
    """One entry of ``--data_path``, found but not yet read."""

    data_path: str
    known: DatasetFormat | None  # None: the user's own records
    train: Records
    eval: Records | None  # None: train and eval are a 9:1 split of `train`

    @property
    def is_own(self) -> bool:
        """The user can mend the records, so one that lacks something is an error rather than left out."""
        return self.known is None or self.known.name == LOCAL_JSON


def find_source(data_path: str) -> Source:
    """What one ``--data_path`` entry stands for.

    A name DeepSpeed-Chat knows decides the record format wherever it occurs in the entry; the entry itself is then a
    local file, folder or saved data set if it exists, else a Hub data set. Raises ``InputError`` where it is neither.
    """
    known = find_format(data_path)
    fields = known.fields if known else OWN_FIELDS
    path = Path(data_path).expanduser()
    if known and known.name == LOCAL_JSON:
        return _local_json(data_path, known, path)
    if path.is_file():
        if not has_known_suffix(path):
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        train_files, eval_files = [path], _files_of(path.parent, known) if _split_name(path) == "train" else []
        return _from_files(data_path, known, fields, train_files, eval_files)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_dataset(data_path, known, fields, path)
        folder = path if _split_files(path, "train") else path / "data"  # Hub repositories keep their files in data/
        train_files = _split_files(folder, "train")
        if not train_files:
            raise InputError(
                f"{path}: neither a saved data set nor a folder with train.* (and eval.*, validation.* or test.*) "
                f"in one of {', '.join(SUFFIXES)}"
            )
        return _from_files(data_path, known, fields, train_files, _files_of(folder, known))
    if known and not data_path.startswith(("/", ".", "~")):
        return _hub_dataset(data_path, known, fields)
    names = ", ".join(known.name for known in FORMATS)
    raise InputError(
        f"--data_path {data_path}: no such file or folder, and no data set known by name. Known names: {names}. Other "
        "data: a file or folder of JSON lines, JSON or Parquet with prompt, chosen, rejected (docs/data.md)"
    )


def _split_name(path: Path) -> str | None:
    """'train' for train.jsonl, train-00000-of-00002.parquet, train_1.json.gz; None for what is no split's file."""
    match = re.match(r"([a-z]+)(?:[-_.].*)?$", path.name.lower())
    return match and match[1] if has_known_suffix(path) else None


def _split_files(folder: Path, split: str) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and _split_name(file) == split)


def _files_of(folder: Path, known: DatasetFormat | None) -> list[Path]:
    """The files of a folder's eval split."""
    names = (known.eval_split, *EVAL_NAMES) if known and known.eval_split else EVAL_NAMES
    return next((files for name in names if (files := _split_files(folder, name))), [])


def _from_files(
    data_path: str,
    known: DatasetFormat | None,
    fields: tuple[str, ...],
    train_files: list[Path],
    eval_files: list[Path],
) -> Source:
    own_split = not eval_files or (known and known.eval_split is None)
    eval_records = None if own_split else FileRecords(tuple(eval_files), fields)
    return Source(data_path, known, FileRecords(tuple(train_files), fields), eval_records)


def _local_json(data_path: str, known: DatasetFormat, path: Path) -> Source:
    folders = [path, path / "data"] if path.is_dir() else [Path("data"), _PROJECT / "data"]
    for folder in folders:
        train, evaluation = folder / "train.json", folder / "eval.json"
        if train.is_file() and evaluation.is_file():
            return Source(
                data_path, known, FileRecords((train,), known.fields), FileRecords((evaluation,), known.fields)
            )
    where = " or ".join(str(folder.absolute()) for folder in folders)
    raise InputError(f"--data_path {data_path}: needs train.json and eval.json, both in {where}")


def _saved_dataset(data_path: str, known: DatasetFormat | None, fields: tuple[str, ...], path: Path) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path), keep_in_memory=False)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path}: the saved data set cannot be opened ({error})") from None
    return _from_datasets(data_path, known, fields, saved)


def _hub_dataset(data_path: str, known: DatasetFormat, fields: tuple[str, ...]) -> Source:
    import datasets

    hub_id = known.hub_id or data_path
    try:
        try:
            found = datasets.load_dataset(hub_id, keep_in_memory=False)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Data sets that were published as a loading script: the Hub keeps a Parquet export of each.
            export = {"revision": "refs/convert/parquet", "data_dir": known.hub_folder}
            found = datasets.load_dataset(hub_id, keep_in_memory=False, **export)
    except (OSError, ValueError, RuntimeError) as error:
        offline = " Offline mode is on: only the cache was searched." if datasets.config.HF_HUB_OFFLINE else ""
        raise InputError(
            f"--data_path {data_path}: the Hub data set {hub_id} cannot be loaded ({_first_line(error)}).{offline} "
            f"Without network: load it where there is one, save_to_disk() it to a folder whose path ends in "
            f"{known.name}, and give that path; or bring the filled HF_DATASETS_CACHE and set HF_DATASETS_OFFLINE=1"
        ) from None
    return _from_datasets(data_path, known, fields, found)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _from_datasets(data_path: str, known: DatasetFormat | None, fields: tuple[str, ...], found) -> Source:
    splits = found if hasattr(found, "keys") else {"train": found}
    if "train" not in splits:
        raise InputError(f"{data_path}: no train split (found: {', '.join(splits)})")
    names = EVAL_NAMES if known is None else (known.eval_split, *EVAL_NAMES) if known.eval_split else ()
    evaluation = next((name for name in names if name in splits), None)
    train = ArrowRecords(splits["train"], f"{data_path} (train)", fields)
    if evaluation is None:
        return Source(data_path, known, train, None)
    return Source(data_path, known, train, ArrowRecords(splits[evaluation], f"{data_path} ({evaluation})", fields))


# ---- one pass over the records: check, and write what is needed to disk ----------------------------------------------

_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string()),  # null: a record without prompt or chosen response, left out of every part
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("file", pa.int32()),
        pa.field("position", pa.int64()),
    ]
)


class Table:
    """Prompts and responses of one source on disk, memory-mapped; ``len`` counts left-out records too."""

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def _open(self):
        try:
            file = pa.ipc.open_file(pa.memory_map(str(self.path)))
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.path}: damaged cache file ({error}); delete it") from None
        # Every batch but the last has ROWS_AT_ONCE records. The columns point into the map: nothing is read yet.
        self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict):
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def value(self, column: str, row: int):
        number, offset = divmod(int(row), ROWS_AT_ONCE)
        return self._batches[number].column(column)[offset].as_py()

    def preference(self, row: int) -> Preference:
        return Preference(*(self.value(column, row) for column in ("prompt", "chosen", "rejected")))

    def present(self, column: str) -> np.ndarray:
        """Which records have a value in this column; shape (len,), bool."""
        masks = [batch.column(column).is_valid().to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate([np.zeros(0, bool), *masks])


def _reader(source: Source, records: Records, tokenizer) -> tuple[Callable[[dict], Triple], str]:
    """The function that reads one record, and what of it belongs into the cache's key."""
    if source.known:
        return source.known.read, source.known.name
    first = next((record for _, _, record in records), {})
    if not has_messages(first):
        return own_strings, "own"
    if tokenizer is None:
        raise InputError(f"{records}: the records are chat messages: a tokenizer with a chat template is needed here")
    try:
        reader = ChatRecords(tokenizer)
    except InputError as error:
        raise InputError(f"{records}: {error}") from None
    template = [tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token, reader.own_bos]
    return reader, json.dumps(template, sort_keys=True)


def _triples(source: Source, records: Records, read: Callable[[dict], Triple]) -> Iterator[tuple]:
    """Rows of ``_SCHEMA``. Raises ``InputError`` with the place of a record that is not in its form."""
    for file_number, position, record in records:
        try:
            if read is own_strings and has_messages(record):
                raise InputError("chat messages, while the first record has strings; use one form per data set")
            triple = read(record)
            for text in triple:
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
        prompt, chosen, _ = triple
        usable = bool(prompt) and chosen is not None
        yield *(triple if usable else (None, None, None)), file_number, position


def _write(path: Path, rows: Iterator[tuple], label: str):
    """Write rows to ``path``: either the whole file is there afterwards or none. One writer at a time."""
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            progress = iter(tqdm(rows, desc=f"reading {label}", unit=" records", delay=3, mininterval=2, leave=False))
            while batch := list(itertools.islice(progress, ROWS_AT_ONCE)):
                columns = [
                    pa.array(column, kind) for column, kind in zip(zip(*batch, strict=True), _SCHEMA.types, strict=True)
                ]
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _content_hash(files: list[Path], *extra: str) -> str:
    digest = hashlib.sha256()
    for text in extra:
        digest.update(hashlib.sha256(text.encode()).digest())
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        digest.update(content.digest())
    return digest.hexdigest()[:32]


def _default_cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "deepspeed_chat_tlcr"


def read_table(source: Source, records: Records, tokenizer=None, cache_dir: str | Path | None = None) -> Table:
    """Check every record and keep its text on disk, or reuse what an earlier run kept of the same content."""
    read, reader_key = _reader(source, records, tokenizer)
    folder = Path(cache_dir) if cache_dir else _default_cache()
    try:
        key = _content_hash(records.content_files(), _CACHE_VERSION, reader_key)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.arrow"
        if not path.exists():
            with FileLock(f"{path}.lock"):  # the ranks of one run come here at the same time: one reads, others wait
                if not path.exists():
                    _write(path, _triples(source, records, read), str(records))
    except OSError as error:
        raise InputError(
            f"{records}: cannot be read into the cache {folder} ({error.strerror or error}); "
            "HF_DATASETS_CACHE names another place"
        ) from None
    return Table(path)


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
        raise InputError(f"the {part} part of the {split} data is empty at --data_split {data_split} ({sizes})")
    return found


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
