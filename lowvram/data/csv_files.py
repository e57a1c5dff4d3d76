"""CSV files: records of CSV and TSV, which may span lines, in chunks that begin and end with a record."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

from lowvram.data import text_files
from lowvram.data.text_files import BOM, Chunk, Found, TextFile, decoded, read_chunk
from lowvram.errors import DataError

_CELL_BYTES = 1 << 30  # Python's default of 128 KiB is shorter than a long chat


class CsvFile(TextFile):
    """Of which the first record names the fields."""

    def chunks(self) -> Iterator[Chunk]:
        """As `TextFile.chunks`; raises DataError where a quote hides where a row ends."""
        return _chunks_of_csv(self)

    def rows(self, chunk: Chunk) -> Iterator[tuple[int, Found]]:
        """(line, row or what is wrong with it) of one chunk."""
        return _csv_rows(self, chunk)


class _Records:
    """Records of a CSV text, each with the line on which it starts: a quoted cell may span lines."""

    def __init__(self, file: TextFile, handle: BinaryIO, number: int = 1) -> None:
        self.file, self.handle, self.number, self.bytes = file, handle, number, 0
        self.undecoded: DataError | None = None  # of the record that is being read
        csv.field_size_limit(max(csv.field_size_limit(), _CELL_BYTES))
        delimiter = "\t" if file.kind == "tsv" else ","
        self.reader = csv.reader(self._lines(), strict=True, delimiter=delimiter)

    def _lines(self) -> Iterator[str]:
        for count, raw in enumerate(self.handle):
            self.bytes += len(raw)
            line = decoded(self.file.place(self.number + count), raw)
            if isinstance(line, DataError):  # read on: quotes, commas and line ends are what they are
                self.undecoded = self.undecoded or line
                line = raw.decode("utf-8", "surrogateescape")
            yield line

    def __iter__(self) -> Iterator[tuple[int, list[str] | DataError]]:
        """(line, cells or why they cannot be decoded) of each record."""
        first = number = self.number
        try:
            for cells in self.reader:
                yield number, self.undecoded or cells
                self.undecoded = None
                number = first + self.reader.line_num
        except csv.Error as error:
            place = self.file.place(number)
            raise DataError(f"{place}: not CSV ({error}).", "Check the quotes of this row.") from error


def _chunks_of_csv(file: TextFile) -> Iterator[Chunk]:
    with file.open() as handle:
        handle.seek(_after_bom(handle))
        records = _Records(file, handle)
        base, start, number = handle.tell(), None, 1
        before = 0
        for line, _ in records:
            if start is None:
                start, number = before, line
            if records.bytes - start >= text_files.CHUNK_BYTES:
                yield Chunk(base + start, records.bytes - start, number)
                start = None
            before = records.bytes
        if start is not None:
            yield Chunk(base + start, records.bytes - start, number)


def _after_bom(handle: BinaryIO) -> int:
    return len(BOM) if handle.read(len(BOM)) == BOM else 0


def _header(file: TextFile) -> tuple[int, list[str]]:
    """(line, names); raises DataError where they cannot be told apart."""
    with file.open() as handle:
        handle.seek(_after_bom(handle))
        line, names = next(((line, cells) for line, cells in _Records(file, handle) if cells), (1, []))
    if isinstance(names, DataError):
        raise names
    for at, name in enumerate(names):
        if name and name in names[:at]:  # several without a name are what spreadsheets leave behind
            raise DataError(
                f"{file.place(line)}: columns {names.index(name) + 1} and {at + 1} are both named '{name}'.",
                "Rename or remove one of them.",
            )
    return line, names


def _csv_rows(file: TextFile, chunk: Chunk) -> Iterator[tuple[int, Found]]:
    """Every cell as it is written: type guessing would turn the answer 42 into 42.0, and NA into nothing."""
    header_line, header = _header(file)
    for number, cells in _Records(file, io.BytesIO(read_chunk(file, chunk)), chunk.number):
        if cells and number != header_line:
            yield number, _row(file.place(number), header, cells)


def _row(place: str, header: list[str], cells: list[str] | DataError) -> Found:
    if isinstance(cells, DataError):
        return cells
    if len(cells) != len(header):
        return DataError(
            f"{place}: {len(cells)} cells where the header has {len(header)}.",
            'Put quotes around a cell that holds a comma: "like, this".',
        )
    return dict(zip(header, cells, strict=True))
