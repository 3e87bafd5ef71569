"""The text records that travel between stages, and JSON lines of them.

Only text is stored. Token labels are recomputed for whatever tokenizer trains, so one paid labelling serves every
model family.
"""

import codecs
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from deepspeed_chat_tlcr.errors import InputError


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two responses. ``prompt`` ends exactly where a response begins: ``prompt + chosen`` is the text.

    A data set without preferences (SFT only) has ``rejected=None``. ``context``: a chat's messages before the response,
    in the form that the external model sees; None where they can be read from the prompt.
    """

    prompt: str
    chosen: str
    rejected: str | None
    context: str | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """Content hash: the same triple has the same id in every file, shard and run."""
        text = json.dumps([self.prompt, self.chosen, self.rejected], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def as_pair(self) -> dict[str, str | None]:
        """The record that a file of pairs has of it."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True, slots=True)
class Revision:
    """A preference with the external model's minimal edit of the rejected response (paper section 4.1, Eq. 3)."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    modified: str
    reasoning: str
    model: str
    usage: dict

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


MOST_JSON_BYTES = 1_000_000_000  # of one document
MOST_LINE_BYTES = 100_000_000  # of one record


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, but every fault is a ``ValueError``, also endless nesting and endless numbers."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def require_file(path: str | Path) -> Path:
    """The path, if it is a regular file or a link to one: a pipe or a device might never end. Else ``InputError``."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: cannot be read (no such file)") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half of a surrogate pair in the name
        reason = getattr(error, "strerror", None) or "its name is no file name"
        raise InputError(f"{path}: cannot be read ({reason})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a directory" if stat.S_ISDIR(mode) else f"{path}: is no regular file")
    return path


def require_new_file(flag: str, path: str | Path, *inputs: str | Path) -> None:
    """Raise ``InputError``, before any work, if a file cannot be written or is one of the ``inputs``."""
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{flag} {path}: is a directory; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and any(path.samefile(one) for one in inputs if Path(one).exists()):
            raise InputError(f"{flag} {path}: is the file that is read; it would be overwritten")
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def read_json(path: str | Path) -> Any:
    """A file's one JSON document. Raises ``InputError`` naming the file if it cannot be read or is not JSON."""
    path = require_file(path)
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise InputError(f"{path}: larger than {MOST_JSON_BYTES:,} bytes")
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def sha256_of(path: Path) -> bytes:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def results_of_stages(run: Path, files: Mapping[str, str], script: str) -> dict[str, dict]:
    """The results of a run's stages, by stage. Raises ``InputError`` for a stage that has not finished."""
    for stage, file in files.items():
        if not (run / file).is_file():
            raise InputError(f"{run / file} is not there: the {stage} stage of {script} has not finished")
    results = {stage: read_json(run / file) for stage, file in files.items()}
    for stage, file in files.items():
        if not isinstance(results[stage], dict) or not results[stage]:
            raise InputError(f"{run / file}: not results that the {stage} stage of {script} wrote; run it again")
    return results


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield ``(line_number, object)`` of a ``.jsonl`` or ``.jsonl.gz`` file, streaming; blank lines are skipped.

    A byte-order mark at the start is ignored. Raises ``InputError`` naming file and line for a line that is not UTF-8,
    not JSON or not an object.
    """
    path = require_file(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE_BYTES + 1), b""), 1):
                if len(line) > MOST_LINE_BYTES:
                    raise InputError(f"{path}:{number}: a line of more than {MOST_LINE_BYTES:,} bytes")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    record = parse_json(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}:{number}: not UTF-8 ({error.reason}, byte {error.start})") from None
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from None
                except ValueError as error:
                    raise InputError(f"{path}:{number}: not JSON that can be read ({error})") from None
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
                yield number, record
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a complete gzip file ({error})") from None


def replace_file(path: Path, lines: Iterable[str]) -> int:
    """Write a file whole or not at all: a killed run leaves the old one or the new one. Returns the number of lines."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        count = sum(1 for line in lines if file.write(line))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
    return count


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_jsonl(path: Path, records: Iterable[dict]) -> int:
    """Write a file of JSON lines, whole or not at all, and its folder. Returns the number of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_file(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_revisions(path: str | Path) -> Iterator[Revision]:
    """Stream the revisions of a file written by ``labeling/main.py``.

    Raises ``InputError`` naming file, line and key where a key is missing or has the wrong type.
    """
    types = {field.name: dict if field.name == "usage" else str for field in fields(Revision)}
    for number, record in read_jsonl(path):
        for key, expected in types.items():
            if key not in record:
                raise InputError(f"{path}:{number}: no {key!r}; a revision has the keys {', '.join(types)}")
            if not isinstance(record[key], expected):
                actual = type(record[key]).__name__
                raise InputError(f"{path}:{number}: {key!r} is of type {actual}, expected {expected.__name__}")
        yield Revision(**{key: record[key] for key in types})
