"""One pass over a source's records: check each, and write prompt, chosen and rejected to a memory-mapped Arrow file."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from deepspeed_chat_tlcr.dataset_formats import (
    ChatRecords,
    Triple,
    has_messages,
    own_strings,
)
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.record_files import ROWS_AT_ONCE
from deepspeed_chat_tlcr.record_sources import Records, Source
from deepspeed_chat_tlcr.records import Preference

_CACHE_VERSION = "2"  # part of the cache's key: raise it when a record is read in another way than before

_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string()),  # null: a record without prompt or chosen response, left out of every part
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("context", pa.string()),  # of a chat: its messages as the external model is shown them
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
        return Preference(*(self.value(column, row) for column in _SCHEMA.names[:4]))

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
        raise InputError(f"{records}: the records are chat messages; name a model with a chat template, --tokenizer")
    try:
        reader = ChatRecords(tokenizer)
    except InputError as error:
        raise InputError(f"{records}: {error}") from None
    template = [tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token, reader.own_bos, reader.end]
    return reader, json.dumps(template, sort_keys=True)


def _triples(source: Source, records: Records, read: Callable[[dict], Triple]) -> Iterator[tuple]:
    """Rows of ``_SCHEMA``. Raises ``InputError`` with the place of a record that is not in its form, and where most
    records repeat the prompt in their responses: one or the other may do so by chance ("Hi" and "Hi there").
    """
    count = doubled = 0
    for file_number, position, record in records:
        try:
            if read is own_strings and has_messages(record):
                raise InputError("chat messages, while the first record has strings; use one form per data set")
            prompt, chosen, rejected, *context = read(record)
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
            "--data_output_path or HF_DATASETS_CACHE names another place"
        ) from None
    return Table(path)
