"""Where text comes from: files, folders, Hugging Face datasets, TFDS, prepared tokens, Python's own reference.

There are two kinds of source. `Documents` are random access, so that a whole corpus can be shuffled without reading it;
a `Shard` can only be read forward (compressed JSON lines, Parquet, `hf:`), and is shuffled through a window.
A document is a string, or an array of token ids where it was tokenized before. Nothing here holds a corpus in memory.
"""

from __future__ import annotations

import array
import bisect
import functools
import glob
import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlin.command_line import whole_text
from jaxlin.config import UserError

Document = str | np.ndarray
EXTENSIONS = (".txt", ".md", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".arrayrecord", ".npy")
RECORDS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
PIECE_BYTES = 1 << 18  # a longer .txt is cut into documents of about this size, so that none must fit in memory
SEARCH_BYTES = 1 << 12  # how far past PIECE_BYTES the end of a line is looked for
SCAN_TOKENS = 1 << 24  # tokens of a .npy file looked at together


class Documents(Protocol):
    """A corpus with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


@dataclass(frozen=True)
class Field:
    """The part of a record that is read."""

    name: str
    convert: Callable[[Any, str], Any] | None = None
    """(value, where it is) -> what is read, or a UserError; None reads text."""
    flag: str = "--text"
    """The setting that the sources come from."""
    remedy: str = "; set --data.text-field"
    """What an error about the field ends with."""


@dataclass(frozen=True)
class Shard:
    """A part of a corpus that is read forward: `read(start)` yields its documents from number `start` on."""

    name: str
    read: Callable[[int], Iterator[Document]]


def open_text(text: Sequence[str], field: str | Field, *, end_of_text: int, vocab_size: int) -> Documents | list[Shard]:
    """Open the sources named by `text`, in order; documents if all of them have random access, else shards.

    `field` names the text of a record; `end_of_text` separates the documents of prepared tokens, whose ids must be
    below `vocab_size`. Raises UserError for what is missing, unreadable or of an unknown kind.
    """
    parts: list[Documents | Shard] = []
    read = field if isinstance(field, Field) else Field(field)
    for name in text:
        if name.startswith("hf:"):
            parts += _huggingface(name, read)
        elif name.startswith("tfds:"):
            parts.append(_tfds(name, read))
        else:
            parts += [_open_file(path, read, end_of_text, vocab_size) for path in files_of(name, read.flag)]
    if not text:
        parts.append(_python_reference())
    if not any(isinstance(part, Shard) for part in parts):
        return _Joined([part for part in parts if not isinstance(part, Shard)])
    return [
        part if isinstance(part, Shard) else Shard(f"source {number}", functools.partial(_read_documents, part))
        for number, part in enumerate(parts)
    ]


def read_records(names: Sequence[str], field: Field) -> Iterator[Any]:
    """`field` of every record of .jsonl (.zst, .gz) and .parquet files, folders of those, hf:NAME[:SUBSET], in order.

    Raises UserError for what is missing, unreadable or of another kind.
    """
    for name in names:
        if name.startswith("hf:"):
            shards = _huggingface(name, field)
        else:
            shards = [_open_records(path, field) for path in record_files(name, field)]
        for shard in shards:
            yield from shard.read(0)


def record_files(name: str, field: Field) -> list[Path]:
    """The files of records that `name`, which is not hf:, stands for."""
    return files_of(name, field.flag, RECORDS)


def files_of(name: str, flag: str = "--text", extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """The files that `name` (a file, a folder or a glob) stands for, in a fixed order."""
    scheme, colon, _ = name.partition(":")
    path = Path(name)
    if path.is_file():
        return [path]
    if name and path.is_dir():  # an empty name is this folder to pathlib
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(extensions))
        wanted = f"file ending in {' '.join(extensions)}"
    elif glob.has_magic(name):
        found, wanted = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()], "file"
    elif colon and scheme.isalnum() and "/" not in scheme:
        known = "hf:NAME[:SUBSET], tfds:NAME" if extensions is EXTENSIONS else "hf:NAME[:SUBSET]"
        raise UserError(f"{flag} {name}: unknown scheme {scheme}:, use {known} or a path")
    else:
        raise UserError(f"{flag} {name or repr(name)}: no such file or folder")
    if not found:
        raise UserError(f"{flag} {name}: holds no {wanted}")
    return found


def _open_records(path: Path, field: Field) -> Shard:
    """The reader of a file of records, forward only."""
    if path.name.endswith(".parquet"):
        return Shard(str(path), functools.partial(_read_parquet, path, field))
    if path.name.endswith(RECORDS):
        return Shard(str(path), functools.partial(_read_lines, path, field))
    raise UserError(f"{field.flag} {path}: unknown kind of file, use one of {' '.join(RECORDS)}")


def _open_file(path: Path, field: Field, end_of_text: int, vocab_size: int) -> Documents | Shard:
    """The reader that the end of the file's name asks for."""
    name = path.name
    try:
        if name.endswith((".txt", ".md")):
            return _TextFile(path)
        if name.endswith(".jsonl"):
            return _JsonLines(path, field)
        if name.endswith(RECORDS):
            return _open_records(path, field)
        if name.endswith(".arrayrecord"):
            return _ArrayRecords(path, field)
        if name.endswith(".npy"):
            return _TokenFile(path, end_of_text, vocab_size, field.flag)
    except OSError as error:
        raise UserError(f"{field.flag} {path}: cannot be read ({error.strerror or error})") from error
    raise UserError(f"{field.flag} {path}: unknown kind of file, use one of {' '.join(EXTENSIONS)}")


def _value_of(record: Any, field: Field, where: str) -> Any:
    """What a record holds: its text, or what the field's `convert` makes of it."""
    name = field.name
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a record with a field {name!r}, found {type(record).__name__}")
    if name not in record:
        raise UserError(f"{where}: no field {name!r} among {', '.join(map(str, record))}{field.remedy}")
    value = record[name]
    if field.convert is not None:
        return field.convert(value, where)
    if isinstance(value, bytes):
        return _decode(value, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {type(value).__name__}, not text{field.remedy}")
    return whole_text(value, where)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); convert it first") from error


def _parse_line(line: bytes, field: Field, where: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from error
    return _value_of(record, field, where)


class _Joined:
    """Sources with random access, one after the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class _TextFile:
    """A file of plain text: one document, or several pieces ending at the end of a line where it is long."""

    def __init__(self, path: Path) -> None:
        self._path, size = path, path.stat().st_size
        self._ends: list[int] = []
        with path.open("rb") as file:
            while (target := (self._ends[-1] if self._ends else 0) + PIECE_BYTES) < size:
                file.seek(target)
                self._ends.append(target + self._cut(file.read(SEARCH_BYTES)))
        if size and (not self._ends or self._ends[-1] < size):
            self._ends.append(size)

    @staticmethod
    def _cut(data: bytes) -> int:
        """Where to cut: after a line or a word if one ends here, else before a character."""
        for mark in (b"\n", b" "):
            if (found := data.find(mark)) >= 0:
                return found + 1
        return next((n for n, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        with self._path.open("rb") as file:
            file.seek(start)
            return _decode(file.read(self._ends[index] - start), f"{self._path}, from byte {start}")


class _JsonLines:
    """A .jsonl file, through the offsets of its lines."""

    def __init__(self, path: Path, field: Field) -> None:
        self._path, self._field, self._offsets = path, field, array.array("q")
        offset = 0
        with path.open("rb", buffering=1 << 20) as file:
            for line in file:
                if not line.isspace():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> str:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return _parse_line(line, self._field, "")
        except UserError:  # only now is the number of the line worth counting
            return _parse_line(line, self._field, f"{self._path}, line {self._line(index)}")

    def _line(self, index: int) -> int:
        with self._path.open("rb") as file:
            return next(n for n, end in enumerate(_line_ends(file), 1) if end > self._offsets[index])


def _line_ends(lines: Iterator[bytes]) -> Iterator[int]:
    return itertools.accumulate(map(len, lines))


class _ArrayRecords:
    """An .arrayrecord file of JSON objects or UTF-8 text."""

    def __init__(self, path: Path, field: Field) -> None:
        import grain

        self._path, self._field = path, field
        self._records: Any  # has a length, which grain's type does not say
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(path)])
        except Exception as error:  # array_record raises bare RuntimeErrors
            raise UserError(f"{field.flag} {path}: not a readable ArrayRecord file ({_line_of(error)})") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        where = f"{self._path}, record {index}"
        try:
            record = self._records[index]
        except Exception as error:
            raise UserError(f"{where}: cannot be read ({_line_of(error)})") from error
        return _parse_line(record, self._field, where) if record[:1] == b"{" else _decode(record, where)


class _TokenFile:
    """A .npy file of token ids, one dimension, where an end-of-text token closes each document."""

    def __init__(self, path: Path, end_of_text: int, vocab_size: int, flag: str) -> None:
        self._path, self._end_of_text, self._flag, self._tokens = path, end_of_text, flag, None
        tokens, ends = self._map(), []
        for start in range(0, len(tokens), SCAN_TOKENS):
            part = np.asarray(tokens[start : start + SCAN_TOKENS])
            if (largest := int(part.max())) >= vocab_size:
                raise UserError(
                    f"{flag} {path}: token {largest} is outside the vocabulary of {vocab_size}; prepare it again"
                )
            ends.append(start + np.flatnonzero(part == end_of_text) + 1)
        if len(tokens) and tokens[-1] != end_of_text:
            ends.append(np.array([len(tokens)]))
        self._ends = np.concatenate(ends) if ends else np.zeros(0, np.int64)

    def _map(self) -> np.ndarray:
        try:
            tokens = np.load(self._path, mmap_mode="r")
        except ValueError as error:
            raise UserError(f"{self._flag} {self._path}: not a readable .npy file ({error})") from error
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            found = f"{tokens.dtype}{list(tokens.shape)}"
            raise UserError(f"{self._flag} {self._path}: expected one dimension of uint16 or uint32, found {found}")
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}  # a worker maps the file anew

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._tokens is None:
            self._tokens = self._map()
        tokens = np.asarray(self._tokens[self._ends[index - 1] if index else 0 : self._ends[index]], np.int32)
        return tokens[:-1] if tokens[-1] == self._end_of_text else tokens


def _read_documents(documents: Documents, start: int) -> Iterator[Document]:
    for index in range(start, len(documents)):
        yield documents[index]


def _read_lines(path: Path, field: Field, start: int) -> Iterator[Any]:
    """What .jsonl, .jsonl.zst or .jsonl.gz holds."""
    import pyarrow

    count, number = 0, 0
    try:
        with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"), 1 << 20) as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                if count >= start:
                    yield _parse_line(line, field, f"{path}, line {number}")
                count += 1
    except OSError as error:
        raise UserError(f"{path}, after line {number}: damaged or incomplete ({_line_of(error)})") from error


def _read_parquet(path: Path, field: Field, start: int) -> Iterator[Any]:
    """Documents of .parquet; row groups before `start` are not read."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field.name not in names:
                raise UserError(f"{path}: no field {field.name!r} among {', '.join(names)}{field.remedy}")
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[field.name]):
                    for value in batch.column(0).to_pylist():
                        if row >= start:
                            yield _value_of({field.name: value}, field, f"{path}, row {row}")
                        row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}, row {row}: not a readable Parquet file ({_line_of(error)})") from error


def _huggingface(name: str, field: Field) -> list[Shard]:
    """Shards of `hf:NAME[:SUBSET]`, the train split of a dataset on the hub or in a local folder."""
    import datasets

    dataset, _, subset = name.removeprefix("hf:").partition(":")
    try:
        stream = datasets.load_dataset(dataset, subset or None, split="train", streaming=True)
        if stream.column_names and field.name in stream.column_names:
            stream = stream.select_columns([field.name])
    except Exception as error:  # what goes wrong depends on the dataset: network, access, name, subset
        raise UserError(f"{field.flag} {name}: cannot be opened ({_line_of(error)})") from error
    count = stream.num_shards
    return [
        Shard(f"{name}[{n}]", functools.partial(_read_huggingface, stream.shard(count, n), field, f"{name}, shard {n}"))
        for n in range(count)
    ]


def _read_huggingface(stream: Any, field: Field, where: str, start: int) -> Iterator[Any]:
    try:
        for row, record in enumerate(stream.skip(start), start):
            yield _value_of(record, field, f"{where}, row {row}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot be read ({_line_of(error)})") from error


def _tfds(name: str, field: Field) -> Documents:
    """The train split of `tfds:NAME`, a TFDS name or the folder of a prepared one; TensorFlow is not needed."""
    import tensorflow_datasets as tfds

    dataset = name.removeprefix("tfds:")
    try:
        if Path(dataset).is_dir():
            builder = tfds.builder_from_directory(dataset)
        else:
            builder = tfds.builder(dataset, file_format="array_record")
            builder.download_and_prepare()
        records = builder.as_data_source(split="train")  # pyright: ignore[reportCallIssue]  # a decorator hides it
        return _Records(records, field, name)
    except Exception as error:
        raise UserError(f"{field.flag} {name}: cannot be opened ({_line_of(error)})") from error


@dataclass(frozen=True)
class _Records:
    """Records with random access."""

    records: Sequence[Mapping[str, Any]]
    field: Field
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        return _value_of(self.records[index], self.field, f"{self.name}, record {index}")


def _python_reference() -> Any:
    """The Python language reference that every interpreter carries: one document per topic, English, about 0.7 MB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compiling it warns about escapes in some versions
        from pydoc_data.topics import topics
    return [topics[name] for name in sorted(topics)]


def _line_of(error: BaseException) -> str:
    """An error from elsewhere, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
