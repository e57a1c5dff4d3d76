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
        csv.field_size_limit(max(csv.field_size_limit(), _CELL_BYTES))
        delimiter = "\t" if file.kind == "tsv" else ","
        self.reader = csv.reader(self._lines(), strict=True, delimiter=delimiter)

    def _lines(self) -> Iterator[str]:
        for count, raw in enumerate(self.handle):
            self.bytes += len(raw)
            line = decoded(self.file.place(self.number + count), raw)
            if isinstance(line, DataError):
                raise line
            yield line

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        first = number = self.number
        try:
            for cells in self.reader:
                yield number, cells
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
    with file.open() as handle:
        handle.seek(_after_bom(handle))
        return next(((line, cells) for line, cells in _Records(file, handle) if cells), (1, []))


def _csv_rows(file: TextFile, chunk: Chunk) -> Iterator[tuple[int, Found]]:
    """Every cell as it is written: type guessing would turn the answer 42 into 42.0, and NA into nothing."""
    header_line, header = _header(file)
    for number, cells in _Records(file, io.BytesIO(read_chunk(file, chunk)), chunk.number):
        if not cells or number == header_line:
            continue
        if len(cells) != len(header):
            yield (
                number,
                DataError(
                    f"{file.place(number)}: {len(cells)} cells where the header has {len(header)}.",
                    'Put quotes around a cell that holds a comma: "like, this".',
                ),
            )
        else:
            yield number, dict(zip(header, cells, strict=True))
