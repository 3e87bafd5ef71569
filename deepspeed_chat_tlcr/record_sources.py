"""Where the records of a ``--data_path`` come from: files, saved data sets, Hub names that DeepSpeed-Chat knows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from deepspeed_chat_tlcr.dataset_formats import (
    FORMATS,
    LOCAL_JSON,
    OWN_FIELDS,
    DatasetFormat,
    find_format,
)
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.record_files import ROWS_AT_ONCE, SUFFIXES, place, read_records, suffix_of

SPLITS = ("train", "eval")
EVAL_NAMES = ("eval", "validation", "valid", "dev", "test")  # the first that a folder or saved data set has is its eval
_PROJECT = Path(__file__).resolve().parents[1]


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
        if not suffix_of(path):
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        split = _split_of(path)
        train_files, eval_files = [path], _eval_files(path.parent, known, split) if _is_train(split) else []
        return _from_files(data_path, known, fields, train_files, eval_files)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_dataset(data_path, known, fields, path)
        folder, splits = _split_folder(path)
        kinds = sorted(filter(_is_train, splits))
        if not kinds:
            raise InputError(
                f"{path}: neither a saved data set nor a folder with train.* (and eval.*, validation.* or test.*) "
                f"in one of {', '.join(SUFFIXES)}"
            )
        if len(kinds) > 1:
            raise InputError(
                f"{path}: several train splits ({', '.join(kinds)}), which may hold different things; name what is "
                f"wanted of them, as in --data_path {path / kinds[0]}"
            )
        return _from_split(data_path, known, fields, folder, kinds[0])
    folder, splits = _split_folder(path.parent)
    if _is_train(path.name.lower()) and path.name.lower() in splits:
        return _from_split(data_path, known, fields, folder, path.name.lower())
    if known and not data_path.startswith(("/", ".", "~")):
        return _hub_dataset(data_path, known, fields)
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
    """The files of a split. Raises ``InputError`` where they are of several kinds: one is a copy of the other."""
    files = sorted(file for file in folder.glob("*") if file.is_file() and _split_of(file) == split)
    one_of_each = {suffix_of(file): file.name for file in files}
    if len(one_of_each) > 1:
        raise InputError(f"{folder}: {' and '.join(one_of_each.values())} are two forms of one split; name one file")
    return files


def _eval_files(folder: Path, known: DatasetFormat | None, train_split: str) -> list[Path]:
    """The files of the eval split that belongs to a train split: of test_prefs, not of test_sft, to train_prefs.

    A folder's only train split may also have one of plain name.
    """
    names = (known.eval_split, *EVAL_NAMES) if known and known.eval_split else EVAL_NAMES
    candidates = [name + train_split[len("train") :] for name in names]
    if sum(map(_is_train, _split_folder(folder)[1])) == 1:
        candidates += names
    return next((files for name in candidates if (files := _split_files(folder, name))), [])


def _from_split(
    data_path: str, known: DatasetFormat | None, fields: tuple[str, ...], folder: Path, split: str
) -> Source:
    train_files = _split_files(folder, split)
    return _from_files(data_path, known, fields, train_files, _eval_files(folder, known, split))


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
        found = ", ".join(splits)
        raise InputError(f"{data_path}: no train split (found: {found}); save the wanted ones as train and test")
    names = EVAL_NAMES if known is None else (known.eval_split, *EVAL_NAMES) if known.eval_split else ()
    evaluation = next((name for name in names if name in splits), None)
    train = ArrowRecords(splits["train"], f"{data_path} (train)", fields)
    if evaluation is None:
        return Source(data_path, known, train, None)
    return Source(data_path, known, train, ArrowRecords(splits[evaluation], f"{data_path} ({evaluation})", fields))
