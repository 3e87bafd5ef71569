"""Reading records out of the user's own files, one at a time, each with its position.

A position is the line of a JSON record, the 1-based number of a Parquet record.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from deepspeed_chat_tlcr.errors import InputError
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
                yield from _read_json(path, file)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, fields)
        else:
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_json(path: Path, file: BinaryIO) -> Iterator[tuple[int, dict]]:
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

    def __init__(self, path: Path, file: BinaryIO):
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
                # A value cut by the end of the window looks wrong only there, or as a string without an end.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - 16
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from None
                self._read(amount)
                amount *= 2
            except (ValueError, RecursionError) as error:
                told = "nested too deep" if isinstance(error, RecursionError) else str(error)
                raise self.error(told) from None
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
