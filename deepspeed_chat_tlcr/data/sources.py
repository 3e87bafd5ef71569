"""Where the records of a ``--data_path`` come from: files, saved data sets, Hub names that DeepSpeed-Chat knows.

Records come one at a time, each with its position: the line of a JSON record, the 1-based number of another.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepspeed_chat_tlcr.data.formats import FORMATS, LOCAL_JSON, OWN_FIELDS, DatasetFormat, find_format
from deepspeed_chat_tlcr.errors import InputError, first_line
from deepspeed_chat_tlcr.records import read_jsonl

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 1 << 20
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def suffix_of(path: Path) -> str | None:
    """Which of ``SUFFIXES`` a file has."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def place(path: str | Path, position: int) -> str:
    """How a message names a record: ``file:line`` or, where lines mean nothing, ``path: record n``."""
    by_line = str(path).lower().endswith((".json", ".jsonl", ".gz"))
    return f"{path}:{position}" if by_line else f"{path}: record {position}"


def read_records(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield ``(position, record)``, streaming. Of a Parquet file only the columns in ``fields`` are read.

    Raises ``InputError`` with file and position for what cannot be read.
    """
    name = path.name.lower()
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from read_jsonl(path)
        elif name.endswith((".json", ".json.gz")):
            with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as file:
                yield from _read_json(path, file)  # type: ignore[arg-type] # a GzipFile reads bytes
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, fields)
        else:
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_json(path: Path, file: IO[bytes]) -> Iterator[tuple[int, dict]]:
    """One array of objects, or objects one after another (one per line, or pretty-printed); bounded memory."""
    text = _JsonText(path, file)
    in_array = text.next_character() == "["
    if in_array:
        text.skip_character()
        if text.next_character() == "]":
            return
    while in_array or text.next_character():
        line, value = text.next_value()
        if not isinstance(value, dict):
            raise InputError(f"{path}:{line}: expected a JSON object, found {type(value).__name__}")
        yield line, value
        if in_array:
            separator = text.next_character()
            text.skip_character()
            if separator == "]":
                break
            if separator != ",":
                raise text.error("the array of records is not closed" if not separator else "expected , or ]")
    if text.next_character():
        raise text.error("text after the end of the array")


class _JsonText:
    """A window that moves over a JSON text and decodes one value at a time."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.window, self.at, self.line, self.ended = "", 0, 1, False

    def next_character(self) -> str:
        """The next character that is not white space, without moving past it; empty at the end."""
        while True:
            self._move(_WHITE_SPACE.match(self.window, self.at).end() - self.at)
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self._read(_CHARACTERS_AT_ONCE)

    def skip_character(self):
        self._move(min(1, len(self.window) - self.at))

    def next_value(self) -> tuple[int, object]:
        """The line a value begins on, and the value."""
        self.next_character()
        amount = _CHARACTERS_AT_ONCE
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                # A value that the window cuts is wrong only near the window's end, or a string without an end.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - 16
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from None
                self._read(amount)
                amount *= 2
            except (ValueError, RecursionError) as error:
                raise self.error("nested too deep" if isinstance(error, RecursionError) else str(error)) from None
            else:
                line = self.line
                self._move(end - self.at)
                return line, value

    def error(self, message: str, at: int | None = None) -> InputError:
        line = self.line + self.window.count("\n", self.at, at or self.at)
        return InputError(f"{self.path}:{line}: not JSON ({message})")

    def _move(self, characters: int):
        self.line += self.window.count("\n", self.at, self.at + characters)
        self.at += characters

    def _read(self, amount: int):
        data = self.file.read(amount)
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.window.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            raise InputError(f"{self.path}:{line}: not UTF-8 ({error.reason})") from None
        self.window, self.at = self.window[self.at :] + more, 0


def _read_parquet(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in fields]
            position = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                rows = batch.to_pylist() if columns else [{}] * batch.num_rows
                for row in rows:
                    position += 1
                    yield position, row
    except UnicodeDecodeError as error:
        raise InputError(f"{place(path, position + 1)} or after: not UTF-8 ({error.reason})") from None
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from None


SPLITS = ("train", "eval")
EVAL_NAMES = ("eval", "validation", "valid", "dev", "test")  # the first of these that exists is the eval split
_PROJECT = Path(__file__).resolve().parents[2]


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

    dataset: Any  # datasets.Dataset
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
        """Whether the user can mend the records: then an incomplete one is an error rather than left out."""
        return self.known is None or self.known.name == LOCAL_JSON


def find_source(data_path: str) -> Source:
    """The records that one ``--data_path`` entry names.

    A name that DeepSpeed-Chat knows decides the record format wherever it occurs in the entry; the entry itself is a
    local file, folder or saved data set if it exists, else a Hub data set. Raises ``InputError`` if it is neither.
    """
    known = find_format(data_path)
    path = Path(data_path).expanduser()
    if known and known.name == LOCAL_JSON:
        return _local_json(data_path, known, path)
    if path.is_file():
        if not suffix_of(path):
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        split = _split_of(path)
        eval_files = _eval_files(path.parent, known, split) if _is_train(split) else []
        return _from_files(data_path, known, [path], eval_files)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_dataset(data_path, known, path)
        folder, splits = _split_folder(path)
        train_splits = sorted(filter(_is_train, splits))
        if not train_splits:
            raise InputError(
                f"{path}: neither a saved data set nor a folder with train.* (and eval.*, validation.* or test.*) "
                f"in one of {', '.join(SUFFIXES)}"
            )
        if len(train_splits) > 1:
            raise InputError(
                f"{path}: several train splits ({', '.join(train_splits)}), which may hold different things; name "
                f"one of them, as in --data_path {path / train_splits[0]}"
            )
        return _from_split(data_path, known, folder, train_splits[0])
    folder, splits = _split_folder(path.parent)
    if _is_train(path.name.lower()) and path.name.lower() in splits:
        return _from_split(data_path, known, folder, path.name.lower())
    if known and not data_path.startswith(("/", ".", "~")):
        return _hub_dataset(data_path, known)
    names = ", ".join(known.name for known in FORMATS)
    raise InputError(
        f"--data_path {data_path}: no such file or folder, and no data set known by name. Known names: {names}. Other "
        "data: a file or folder of JSON lines, JSON or Parquet with prompt, chosen, rejected (docs/data.md)"
    )


def _split_of(path: Path) -> str | None:
    """'train' for train.jsonl, train-00000-of-00002.parquet, train_1.json.gz; 'train_prefs' for train_prefs.parquet;
    None for a file of another kind.
    """
    name, suffix = path.name.lower(), suffix_of(path)
    # The Hub once put a hash behind the number of a shard.
    return suffix and re.sub(r"([-_.]\d+(-of-\d+(-[0-9a-f]{16})?)?)+$", "", name.removesuffix(suffix))


def _is_train(split: str) -> bool:
    """Whether a split is one to train on: 'train', 'train_prefs'."""
    return re.match(r"train(?![a-z])", split) is not None


def _split_folder(path: Path) -> tuple[Path, set[str]]:
    """The folder that holds the split files, which Hub repositories keep in data/, and its splits."""
    for folder in (path, path / "data"):
        splits = {split for file in folder.glob("*") if file.is_file() and (split := _split_of(file))}
        if any(map(_is_train, splits)):
            return folder, splits
    return path, set()


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split. Raises ``InputError`` if they are of several kinds: then one is a copy of the other."""
    files = sorted(file for file in folder.glob("*") if file.is_file() and _split_of(file) == split)
    one_of_each = {suffix_of(file): file.name for file in files}
    if len(one_of_each) > 1:
        raise InputError(f"{folder}: {' and '.join(one_of_each.values())} are two forms of one split; name one file")
    return files


def _eval_files(folder: Path, known: DatasetFormat | None, train_split: str) -> list[Path]:
    """The files of the eval split that belongs to a train split: test_prefs, not test_sft, to train_prefs.

    A folder's only train split may also go with a plain name such as test.
    """
    names = (known.eval_split, *EVAL_NAMES) if known and known.eval_split else EVAL_NAMES
    candidates = [name + train_split[len("train") :] for name in names]
    if sum(map(_is_train, _split_folder(folder)[1])) == 1:
        candidates += names
    return next((files for name in candidates if (files := _split_files(folder, name))), [])


def _from_split(data_path: str, known: DatasetFormat | None, folder: Path, split: str) -> Source:
    return _from_files(data_path, known, _split_files(folder, split), _eval_files(folder, known, split))


def _from_files(data_path: str, known: DatasetFormat | None, train_files: list[Path], eval_files: list[Path]) -> Source:
    fields = known.fields if known else OWN_FIELDS
    own_split = not eval_files or (known and known.eval_split is None)
    eval_records = None if own_split else FileRecords(tuple(eval_files), fields)
    return Source(data_path, known, FileRecords(tuple(train_files), fields), eval_records)


def _local_json(data_path: str, known: DatasetFormat, path: Path) -> Source:
    folders = [path, path / "data"] if path.is_dir() else [Path("data"), _PROJECT / "data"]
    for folder in folders:
        train, evaluation = folder / "train.json", folder / "eval.json"
        if train.is_file() and evaluation.is_file():
            return _from_files(data_path, known, [train], [evaluation])
    where = " or ".join(str(folder.absolute()) for folder in folders)
    raise InputError(f"--data_path {data_path}: needs train.json and eval.json, both in {where}")


def _saved_dataset(data_path: str, known: DatasetFormat | None, path: Path) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path), keep_in_memory=False)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path}: the saved data set cannot be opened ({error})") from None
    return _from_datasets(data_path, known, saved)


def _hub_dataset(data_path: str, known: DatasetFormat) -> Source:
    import datasets

    hub_id = known.hub_id or data_path
    try:
        try:
            loaded = datasets.load_dataset(hub_id, keep_in_memory=False)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Data sets that were published as a loading script: the Hub keeps a Parquet export of each.
            export = {"revision": "refs/convert/parquet", "data_dir": known.hub_folder}
            loaded = datasets.load_dataset(hub_id, keep_in_memory=False, **export)
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error).rstrip(".")
        offline = " Offline mode is on: only the cache was searched." if datasets.config.HF_HUB_OFFLINE else ""
        raise InputError(
            f"--data_path {data_path}: the Hub data set {hub_id} cannot be loaded ({reason}).{offline} "
            f"Without network: load it where there is one, save_to_disk() it to a folder whose path ends in "
            f"{known.name}, and give that path; or bring the filled HF_DATASETS_CACHE and set HF_DATASETS_OFFLINE=1"
        ) from None
    return _from_datasets(data_path, known, loaded)


def _from_datasets(data_path: str, known: DatasetFormat | None, loaded) -> Source:
    splits = loaded if hasattr(loaded, "keys") else {"train": loaded}
    if "train" not in splits:
        raise InputError(f"{data_path}: no train split, only {', '.join(splits)}; save them as train and test")
    fields = known.fields if known else OWN_FIELDS
    names = EVAL_NAMES if known is None else (known.eval_split, *EVAL_NAMES) if known.eval_split else ()
    evaluation = next((name for name in names if name in splits), None)
    train = ArrowRecords(splits["train"], f"{data_path} (train)", fields)
    if evaluation is None:
        return Source(data_path, known, train, None)
    return Source(data_path, known, train, ArrowRecords(splits[evaluation], f"{data_path} ({evaluation})", fields))
