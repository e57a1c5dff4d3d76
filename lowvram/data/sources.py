"""Sources: a data file, a saved or a hub data set, as chunks of rows that know the place they came from."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from lowvram.cache import data_folder
from lowvram.data.arrow_rows import without_filled
from lowvram.data.csv_files import CsvFile
from lowvram.data.text_files import (
    COMPRESSED,
    Chunk,
    Found,
    TextFile,
    kind_of,
    open_binary,
    plain_suffix,
    unreadable,
)
from lowvram.errors import ConfigError, DataError, first_line, refusals_of_the_system
from lowvram.file_hash import file_sha256

Row = tuple[str, dict[str, Any]]

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_KNOWN = (*_TEXT, ".parquet")
_UNPACK = {".zst": "unzstd", ".zip": "unzip", ".7z": "7z x", ".tar": "tar xf"}
_OPENERS: dict[str, Callable[[Any], IO[bytes]]] = {
    ".gz": cast(Callable[[Any], IO[bytes]], gzip.open),
    ".bz2": cast(Callable[[Any], IO[bytes]], bz2.open),
    ".xz": cast(Callable[[Any], IO[bytes]], lzma.open),
}
_HUB_ID = re.compile(r"^(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?::[\w.-]+)?$")
_FORMATS = (
    "Give a .jsonl, .json, .csv, .tsv or .parquet file (text also as .gz, .bz2 or .xz), a folder that "
    "datasets saved, or a Hugging Face dataset id such as owner/name."
)
_HUB_HELP = (
    "If it is a file, check the path. If it is a hub dataset, check its name (owner/name, or "
    "owner/name:config where it has several), its --split, your connection, and for a private one "
    "`hf auth login`."
)
_CHUNK_ROWS = 500


@dataclass(frozen=True)
class Table:
    """A data set that `datasets` holds memory-mapped."""

    name: str
    rows_of: Any  # datasets.Dataset, or anything with len and slices

    def chunks(self) -> Iterator[Chunk]:
        total = len(self.rows_of)
        for start in range(0, total, _CHUNK_ROWS):
            yield Chunk(start, min(_CHUNK_ROWS, total - start), start + 1)

    def rows(self, chunk: Chunk) -> Iterator[tuple[int, Found]]:
        """(row's number from 1, row) of one chunk."""
        columns = self.rows_of[chunk.start : chunk.start + chunk.size]
        for number, cells in enumerate(zip(*columns.values(), strict=True), start=chunk.number):
            yield number, without_filled(dict(zip(columns, cells, strict=True)))

    def place(self, number: int) -> str:
        return f"{self.name}:row {number}"

    def sha256(self) -> str:
        """Of the files that hold it; of its rows where it has none or is a part of them."""
        files = [f["filename"] for f in getattr(self.rows_of, "cache_files", ())]
        if files and getattr(self.rows_of, "_indices", None) is None:
            return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(repr(list(self.rows(chunk))).encode("utf-8", "replace"))
        return digest.hexdigest()


Source = TextFile | Table


def content_key(name: str, split: str | None) -> str:
    """What a source holds, in one hash, without understanding it.

    Raises:
        DataError, ConfigError: as `opened`.
    """
    if Path(name).is_file():
        open_binary(name, name).close()  # refuses in our words
        return f"{Path(name).suffixes[-2:]} {file_sha256(name)}".lower()
    with opened(name, split) as source:
        assert isinstance(source, Table)
        return source.sha256()


def rows_of(source: Source) -> Iterator[tuple[int, Found]]:
    """(number, row or what is wrong with it), in order, while they are read.

    Raises:
        DataError: what makes all that follows unreadable, or no row at all.
    """
    number = 0
    for chunk in source.chunks():
        for number, row in source.rows(chunk):
            yield number, row
    if not number:
        one = "a row" if isinstance(source, Table) else "a line"
        raise DataError(
            f"{source.name}:1: the file has no rows.", f"Write one example {one}, then try again."
        )


def read_rows(name: str, split: str | None = None) -> Iterator[Row]:
    """Rows of `name` in order, as (where, row); `where` is `FILE:LINE`, or `NAME:row N` without lines.

    Raises:
        DataError: nothing readable there, or a row that is no object; the message starts with the place.
        ConfigError: as `opened`.
    """
    with opened(name, split) as source:
        for number, row in rows_of(source):
            if isinstance(row, DataError):
                raise row
            yield source.place(number), row


@contextmanager
def opened(name: str, split: str | None = None) -> Iterator[Source]:
    """The source called `name`, with what had to be unpacked for it, until the block ends.

    `name` is a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, text also compressed; a folder written by
    save_to_disk; or a hub data set, `owner/name` or `owner/name:config`. `split` names a part of a data set:
    "train" unless told otherwise, or a slice such as "train[:10%]".

    Raises:
        DataError: nothing readable there.
        ConfigError: a split of a single file.
    """
    if not name:
        raise DataError("the name of the data is empty.", _FORMATS)
    path = Path(name)
    try:
        is_file, is_folder = path.exists() and not path.is_dir(), path.is_dir()
        saved = is_folder and _is_saved(path)
        if is_folder and not saved:
            raise DataError(f"{name}: is a folder, not a data file.", _files_inside(path))
    except OSError as error:  # a folder that may not be entered or listed
        raise unreadable(name, error) from error
    if is_file and split is not None:
        raise ConfigError(f"--split {split}: '{name}' is one file without splits.", "Leave --split out.")
    if saved:
        yield Table(name, _from_disk(name, split))
    elif is_file:
        with _file(name) as source:
            yield source
    else:
        yield _hub(name, split or "train")


@contextmanager
def _file(name: str) -> Iterator[Source]:
    suffix, packed = plain_suffix(name), Path(name).suffix.lower()
    if suffix in _TEXT and packed not in COMPRESSED:
        yield _text_file(name, name, suffix)
    elif suffix in _TEXT:
        with _workplace() as folder:
            plain = _unpacked(name, packed, folder / f"plain{suffix}")
            yield _text_file(name, plain, suffix)
    elif suffix == ".parquet" and packed not in COMPRESSED:
        with _workplace() as folder:
            yield Table(name, _of_parquet(name, folder / "rows.arrow"))
    elif packed in _UNPACK:
        unpack = f"{_UNPACK[packed]} {shlex.quote(name)}"
        raise DataError(f"{name}: is compressed.", f"Run: {unpack}, then give the unpacked file.")
    else:
        raise DataError(f"{name}: unknown extension '{suffix}'.", _FORMATS)


def _text_file(name: str, path: str, suffix: str) -> TextFile:
    kind = kind_of(path, name, suffix)
    return (CsvFile if kind in ("csv", "tsv") else TextFile)(name, path, kind)


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder for what is unpacked, beside the prepared data: /tmp may be memory."""
    with refusals_of_the_system("The data cannot be unpacked", "Set LOWVRAM_CACHE to a disk with room."):
        folder = Path(tempfile.mkdtemp(prefix=".unpacked-", dir=data_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpacked(name: str, packed: str, plain: Path) -> str:
    open_binary(name, name).close()
    try:
        with _OPENERS[packed](name) as source, plain.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError, OSError, ValueError) as error:
        if getattr(error, "errno", None):  # the disk's refusal, not the file's fault
            raise
        raise DataError(
            f"{name}: cannot be unpacked ({error}).", "Check that the file is whole: copy it again."
        ) from error
    return str(plain)


def _of_parquet(name: str, plain: Path) -> Any:
    """Unpacked here and not by load_dataset, for which a name such as a[1].parquet is a pattern of names."""
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

    handle = open_binary(name, name)
    try:
        with (
            handle,
            ParquetFile(handle) as source,
            plain.open("wb") as sink,
            pa.ipc.new_stream(sink, source.schema_arrow) as writer,
        ):
            for batch in source.iter_batches(batch_size=_CHUNK_ROWS):
                writer.write_batch(batch)
        return Dataset.from_file(str(plain))
    except Exception as error:  # pyarrow and datasets raise dozens of unrelated types
        if getattr(error, "errno", None):  # the disk's refusal, not the file's fault
            raise
        raise _cannot_load(name, error, "Check that the file is a whole parquet file.") from error


def _hub(name: str, split: str) -> Table:
    if Path(name).suffix.lower() in (*_KNOWN, *COMPRESSED, *_UNPACK) or not _HUB_ID.match(name):
        raise DataError(f"{name}: no such file (looked in {Path.cwd()}).", "Give the path of your data file.")
    dataset, _, config = name.partition(":")
    return Table(name, _loaded(name, dataset, *([config] if config else []), split=split))


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_inside(folder: Path) -> str:
    """What to type instead of a folder: a data file in it, if it has one."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _KNOWN)
    return f"Give a file, such as {files[0]}." if files else f"It holds no data file. {_FORMATS}"


def _from_disk(name: str, split: str | None) -> Any:
    from datasets import load_from_disk

    try:
        found = load_from_disk(name)
    except Exception as error:  # pyarrow raises dozens of unrelated types
        raise _cannot_load(name, error, "Write it again with save_to_disk.") from error
    if isinstance(found, dict):
        return _part(name, dict(found), split or "train")
    own = str(found.split or "train")
    return _part(name, {own: found}, split or own)


def _part(name: str, splits: dict[str, Any], wanted: str) -> Any:
    """What `wanted` names of a saved data set, in the words of the hub: test, train[:10%], train+test."""
    from datasets import ReadInstruction, concatenate_datasets

    if wanted in splits:
        return splits[wanted]
    try:
        rows_of_split = {split: len(rows) for split, rows in splits.items()}
        parts = ReadInstruction.from_spec(wanted).to_absolute(rows_of_split)
    except (ValueError, AssertionError) as error:  # no such split, or rows and percents that are none
        raise DataError(
            f"{name}: has no split '{wanted}' ({first_line(error).rstrip('.')}).",
            f"Give --split {' or '.join(splits)}, or a part of it such as '{next(iter(splits))}[:10%]'.",
        ) from error
    ranges = [(splits[part.splitname], range(part.from_, part.to)) for part in parts]
    try:
        return concatenate_datasets([rows.select(kept or []) for rows, kept in ranges])
    except Exception as error:  # columns of other types: what datasets and pyarrow raise of them differs
        names = " or ".join(dict.fromkeys(part.splitname for part in parts))
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"{name}: '{wanted}' cannot be one table ({reason}).", f"Give one of them: --split {names}."
        ) from error


def _loaded(name: str, *args: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(*args, split=split)
    except Exception as error:  # the hub client and pyarrow raise dozens of unrelated types
        raise _cannot_load(name, error, _HUB_HELP) from error


def _cannot_load(name: str, error: Exception, remedy: str) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{name}: cannot be loaded ({type(error).__name__}: {reason}).", remedy)
