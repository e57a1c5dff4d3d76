"""Sources: a data file or a hub dataset as rows, each with the place it came from."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lowvram.errors import DataError

Row = tuple[str, dict[str, Any]]

_KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_UNPACK = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd", ".zip": "unzip"}
_HUB_ID = re.compile(r"^(?:[\w-][\w.-]*/)?[\w-][\w.-]*(?::[\w.-]+)?$")
_FORMATS = "Give a .jsonl, .json, .csv or .parquet file, or a Hugging Face dataset id such as owner/name."
_BOM = b"\xef\xbb\xbf"
_CSV_CELL_BYTES = 1 << 30  # Python's default of 128 KiB is shorter than a long chat


def read_rows(name: str) -> Iterator[Row]:
    """Rows of `name` in file order, as (where, row); `where` is `FILE:LINE`, or `NAME:row N` without lines.

    `name` is a .jsonl, .ndjson, .json, .csv or .parquet file, or a hub dataset: `owner/name` or
    `owner/name:config`, of which the split `train` is read. JSON lines, CSV and parquet are streamed.

    Raises:
        DataError: nothing readable there, or a row that is no object; the message starts with the place.
    """
    if not name:
        raise DataError("the name of the data is empty.", _FORMATS)
    path = Path(name)
    try:
        if path.is_dir():
            raise DataError(f"{name}: is a folder, not a data file.", _files_inside(path))
        is_file = path.exists()
    except OSError as error:  # a folder that may not be entered or listed
        raise _unreadable(name, error) from error
    return _not_empty(name, _file_rows(name) if is_file else _hub_rows(name))


def _file_rows(name: str) -> Iterator[Row]:
    suffix = Path(name).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(name)
    if suffix == ".json":
        return _json_array(name) if _starts_array(name) else _json_lines(name)
    if suffix == ".csv":
        return _csv_rows(name)
    if suffix == ".parquet":
        return _dataset_rows(name, "parquet", data_files=name, streaming=True)
    if suffix in _UNPACK:
        unpack = f"{_UNPACK[suffix]} {shlex.quote(name)}"
        raise DataError(f"{name}: is compressed.", f"Run: {unpack}, then give the unpacked file.")
    raise DataError(f"{name}: unknown extension '{suffix}'.", _FORMATS)


def _hub_rows(name: str) -> Iterator[Row]:
    is_path = Path(name).suffix.lower() in (*_KNOWN, *_UNPACK) or not _HUB_ID.match(name)
    if is_path:
        raise DataError(f"{name}: no such file (looked in {Path.cwd()}).", "Give the path of your data file.")
    dataset, _, config = name.partition(":")
    return _dataset_rows(name, dataset, *([config] if config else []))


def _not_empty(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{name}:1: the file has no rows.", "Write one example a line, then try again.")


def _files_inside(folder: Path) -> str:
    """What to type instead of a folder: a data file in it, if it has one."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _KNOWN)
    return f"Give a file, such as {files[0]}." if files else f"It holds no data file. {_FORMATS}"


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad byte is reported with its line."""
    with _open_binary(name) as handle:
        for number, raw in enumerate(handle, start=1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1}).",
                    "Save the file as UTF-8 (in most editors: Save as, encoding UTF-8).",
                ) from error


def _open_binary(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> DataError:
    remedy = "Check its permissions, and those of the folders above it."
    return DataError(f"{name}: cannot be read ({error.strerror}).", remedy)


def _json_lines(name: str) -> Iterator[Row]:
    for number, line in _lines(name):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line.rstrip("\r\n"))  # else an error at the end is one of the next line
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error, line) from error
        yield where, _checked(where, value, line)


def _starts_array(name: str) -> bool:
    first = next((line for _, line in _lines(name) if line.strip()), "")
    return first.lstrip().startswith("[")


def _json_array(name: str) -> Iterator[Row]:
    """Objects of a top-level array one by one, so that each keeps the line on which it starts."""
    text = "".join(line for _, line in _lines(name))
    decoder = json.JSONDecoder()
    at, line = _skip(text, text.index("[") + 1), 1
    counted = 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
            yield f"{name}:{line}", _checked(f"{name}:{line}", value, text[at:end])
            at = _after_comma(text, end)
        except (json.JSONDecodeError, RecursionError) as error:
            broken = getattr(error, "lineno", line)
            raise _not_json(f"{name}:{broken}", error, _line_at(text, broken)) from error
    _nothing_after(name, text, at)


def _nothing_after(name: str, text: str, at: int) -> None:
    if text[at + 1 :].strip():
        line = text.count("\n", 0, _skip(text, at + 1)) + 1
        raise DataError(
            f"{name}:{line}: text after the array's closing ].", "Put every example in one array."
        )


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _after_comma(text: str, end: int) -> int:
    at = _skip(text, end)
    if text.startswith("]", at):
        return at
    if not text.startswith(",", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    return _skip(text, at + 1)


def _line_at(text: str, number: int) -> str:
    return text.split("\n", number)[number - 1]


def _not_json(where: str, error: Exception, line: str) -> DataError:
    reason = str(getattr(error, "msg", "nested too deeply"))
    column = getattr(error, "colno", 1)
    return DataError(
        f"{where}: not JSON, column {column}: {reason}. The line starts: {_start(line)}",
        "Every line must be one whole JSON object; check for a missing quote, comma or bracket.",
    )


def _start(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 60 else line[:60] + "..."


def _checked(where: str, value: object, line: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = " If the file is one JSON array, name it .json." if isinstance(value, list) else ""
        raise DataError(
            f"{where}: a {type(value).__name__}, not an object. The line starts: {_start(line)}",
            'Every example is an object, such as {"question": "...", "answer": "..."}.' + hint,
        )
    # Half of an emoji, as written by tools that cut strings in UTF-16: no tokenizer takes it.
    if "\\ud" in line.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: half of a \\ud... character pair.", "Remove that character."
            ) from error
    return value


def _csv_rows(name: str) -> Iterator[Row]:
    """Every cell as it is written: type guessing would turn the answer 42 into 42.0, and NA into nothing."""
    records = _csv_records(name)
    _, header = next(records, (1, []))
    for number, cells in records:
        if len(cells) != len(header):
            raise DataError(
                f"{name}:{number}: {len(cells)} cells where the header has {len(header)}.",
                'Put quotes around a cell that holds a comma: "like, this".',
            )
        yield f"{name}:{number}", dict(zip(header, cells, strict=True))


def _csv_records(name: str) -> Iterator[tuple[int, list[str]]]:
    """Records with the line on which each starts: a quoted cell may span lines."""
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_CELL_BYTES))
    reader = csv.reader((line for _, line in _lines(name)), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{number}: not CSV ({error}).", "Check the quotes of this row.") from error


def _dataset_rows(name: str, *args: str, **options: Any) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows: Iterable[dict[str, Any]] = load_dataset(*args, split="train", **options)
        for number, row in enumerate(rows, start=1):
            yield f"{name}:row {number}", dict(row)
    except Exception as error:  # the hub client and pyarrow raise dozens of unrelated types
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: cannot be loaded ({type(error).__name__}: {reason}).", _how(options)
        ) from error


def _how(options: dict[str, Any]) -> str:
    if options:
        return "Check that the file is a whole parquet file."
    return (
        "If it is a file, check the path. If it is a hub dataset, check its name (owner/name, or "
        "owner/name:config where it has several), your connection, and for a private one `hf auth login`."
    )
