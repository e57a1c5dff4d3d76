"""Text files, cut into chunks that are read on their own; of JSON lines and of JSON arrays their rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lowvram.errors import DataError

CHUNK_BYTES = 1 << 19  # some hundred rows: their tokens are little memory, their start-up cost less
BOM = b"\xef\xbb\xbf"

_LINE_HELP = "Every line must be one whole JSON object; check for a missing quote, comma or bracket."
_ARRAY_HELP = "Check for a missing quote, comma or bracket."
_JSON_HELP = (
    "A .json file is one list, [{...}, {...}], or one whole object a line; check for a missing quote, comma "
    "or bracket. One object over many lines: put it into [ ]; if it holds the list of examples, give only "
    "that."
)

Found = dict[str, Any] | DataError  # a row, or why there is none


class Chunk(NamedTuple):
    """A part of a source: where it begins, how far it goes (bytes, or rows of a table), its first number."""

    start: int
    size: int
    number: int


@dataclass(frozen=True)
class TextFile:
    """A file of rows; `name` is what the user calls it, `path` where its plain text is."""

    name: str
    path: str
    kind: str  # lines, array, csv or tsv

    def chunks(self) -> Iterator[Chunk]:
        """In order, of about CHUNK_BYTES, in one pass with flat memory.

        Raises:
            DataError: what makes all that follows unreadable: an array's broken syntax, a CSV's open quote.
        """
        return _chunks_of_array(self) if self.kind == "array" else _chunks_of_lines(self)

    def rows(self, chunk: Chunk) -> Iterator[tuple[int, Found]]:
        """(line, row or what is wrong with it) of one chunk."""
        return _json_array(self, chunk) if self.kind == "array" else _json_lines(self, chunk)

    def place(self, line: int) -> str:
        return f"{self.name}:{line}"

    def open(self) -> BinaryIO:
        return open_binary(self.path, self.name)


def open_binary(path: str, name: str) -> BinaryIO:
    """Raises: DataError when it may not be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: OSError) -> DataError:
    remedy = "Check its permissions, and those of the folders above it."
    return DataError(f"{name}: cannot be read ({error.strerror}).", remedy)


def decoded(place: str, raw: bytes) -> str | DataError:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(place, raw[error.start], error.start + 1)


def not_utf8(place: str, byte: int, at: int) -> DataError:
    return DataError(
        f"{place}: not UTF-8 (byte 0x{byte:02x} at byte {at}).",
        "Save the file as UTF-8 (in most editors: Save as, encoding UTF-8).",
    )


def read_chunk(file: TextFile, chunk: Chunk) -> bytes:
    with file.open() as handle:
        handle.seek(chunk.start)
        block = handle.read(chunk.size)
    return block.removeprefix(BOM) if chunk.start == 0 else block


# JSON lines -------------------------------------------------------------------------------------------------


def _chunks_of_lines(file: TextFile) -> Iterator[Chunk]:
    start, number = 0, 1
    with file.open() as handle:
        while block := handle.read(CHUNK_BYTES):
            if not block.endswith(b"\n"):
                block += handle.readline()
            yield Chunk(start, len(block), number)
            start, number = start + len(block), number + block.count(b"\n")


def _json_lines(file: TextFile, chunk: Chunk) -> Iterator[tuple[int, Found]]:
    remedy = _JSON_HELP if plain_suffix(file.name) == ".json" else _LINE_HELP
    for number, raw in enumerate(read_chunk(file, chunk).split(b"\n"), start=chunk.number):
        if raw.strip():
            yield number, _json_line(file.place(number), raw, remedy)


def _json_line(place: str, raw: bytes, remedy: str) -> Found:
    line = decoded(place, raw)
    if isinstance(line, DataError):
        return line
    try:
        value = json.loads(line.rstrip("\r"))  # else an error at the end is one of the next line
    except (ValueError, RecursionError) as error:
        return _not_read(place, error, line, remedy)
    return _object(place, value, line)


def _not_read(place: str, error: Exception, text: str, remedy: str) -> DataError:
    """What json said of a text; it takes a number of more than 4,300 digits for a wrong value."""
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        reason = str(error).split(";")[0]  # then follows how a program raises the limit
        return DataError(f"{place}: a number is too long. {reason}.", "Shorten it, or put it in quotes.")
    reason, column = str(getattr(error, "msg", "nested too deeply")), getattr(error, "colno", 1)
    return DataError(f"{place}: not JSON, column {column}: {reason}. The line starts: {_start(text)}", remedy)


def _start(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 60 else line[:60] + "..."


def _object(place: str, value: object, line: str) -> Found:
    if not isinstance(value, dict):
        hint = " If the file is one JSON array, name it .json." if isinstance(value, list) else ""
        return DataError(
            f"{place}: a {type(value).__name__}, not an object. The line starts: {_start(line)}",
            'Every example is an object, such as {"question": "...", "answer": "..."}.' + hint,
        )
    # Half of an emoji, as written by tools that cut strings in UTF-16: no tokenizer takes it.
    if "\\ud" in line or "\\uD" in line:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return DataError(f"{place}: half of a \\ud... character pair.", "Remove that character.")
    return value


# One JSON array ---------------------------------------------------------------------------------------------


def _first_byte(path: str, name: str) -> bytes:
    with open_binary(path, name) as handle:
        head = handle.read(4096).removeprefix(BOM).lstrip()
        return head[:1]


class _Window:
    """The part of an array's text that is looked at: grows at its end, forgets what lies behind."""

    def __init__(self, file: TextFile, handle: BinaryIO) -> None:
        self.file, self.handle = file, handle
        head = handle.read(len(BOM))
        self.start = len(BOM) if head == BOM else 0  # byte in the file of text[at]
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line = self.decoder.decode(b"" if self.start else head), 0, 1

    def grow(self) -> bool:
        """Read on; False at the end of the file."""
        block = self.handle.read(max(CHUNK_BYTES, len(self.text) - self.at))  # doubled for a large object
        try:
            more = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object[: error.start].count(b"\n")
            byte_of_line = error.start - error.object.rfind(b"\n", 0, error.start)
            raise not_utf8(self.file.place(line), error.object[error.start], byte_of_line) from error
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(block)

    def pass_to(self, at: int) -> None:
        passed = self.text[self.at : at]
        self.start += len(passed) if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")
        self.at = at

    def next_sign(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            self.pass_to(_skip(self.text, self.at))
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def value_end(self) -> int:
        """Where the value that begins here ends in `text`."""
        while True:
            try:
                return _ENDS.raw_decode(self.text, self.at)[1]
            except json.JSONDecodeError as error:
                if not (_may_be_cut(error) and self.grow()):
                    raise self.broken(error) from error
            except RecursionError as error:
                raise _not_read(
                    self.file.place(self.line), error, self.text[self.at :], _ARRAY_HELP
                ) from error

    def broken(self, error: json.JSONDecodeError) -> DataError:
        line = self.line + self.text.count("\n", self.at, error.pos)
        shown = self.text[self.text.rfind("\n", 0, error.pos) + 1 :].split("\n", 1)[0]
        return _not_read(self.file.place(line), error, shown, _ARRAY_HELP)


_DECODER = json.JSONDecoder()
_ENDS = json.JSONDecoder(parse_int=len)  # finds the end of any number, also of one too long to be read


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether more text could mend it: it is at the end, or about a string that has none."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - 16  # \ud83d\ude00


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _chunks_of_array(file: TextFile) -> Iterator[Chunk]:
    with file.open() as handle:
        window = _Window(file, handle)
        window.next_sign()
        window.pass_to(window.at + 1)  # the [
        first = None
        for start, end, line in _elements(window):
            first = first or (start, line)
            if end - first[0] >= CHUNK_BYTES:
                yield Chunk(first[0], end - first[0], first[1])
                first = None
        if first:
            yield Chunk(first[0], end - first[0], first[1])


def _elements(window: _Window) -> Iterator[tuple[int, int, int]]:
    """(first byte, byte after the last, line) of every value of an array that has been opened."""
    sign = window.next_sign()
    while sign != "]":
        start, line = window.start, window.line
        window.pass_to(window.value_end())
        yield start, window.start, line
        sign = window.next_sign()
        if sign == ",":
            window.pass_to(window.at + 1)
            window.next_sign()
        elif sign != "]":
            raise window.broken(json.JSONDecodeError("Expecting ',' or ']'", window.text, window.at))
    window.pass_to(window.at + 1)
    if window.next_sign():
        raise DataError(
            f"{window.file.place(window.line)}: text after the array's closing ].",
            "Put every example in one array.",
        )


def _element(place: str, text: str, at: int) -> tuple[Found, int]:
    """The value that begins there, or what is wrong with it, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except ValueError as error:
        return _not_read(place, error, text[at:], _ARRAY_HELP), _ENDS.raw_decode(text, at)[1]
    return _object(place, value, text[at:end]), end


def _json_array(file: TextFile, chunk: Chunk) -> Iterator[tuple[int, Found]]:
    text = read_chunk(file, chunk).decode("utf-8")
    at, counted, line = 0, 0, chunk.number
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        found, end = _element(file.place(line), text, at)
        yield line, found
        at = _skip(text, _skip(text, end) + 1)


def kind_of(path: str, name: str, suffix: str) -> str:
    """lines, array, csv or tsv, by the name's ending and, of .json, by the first character."""
    if suffix == ".json" and _first_byte(path, name) == b"[":
        return "array"
    return {".csv": "csv", ".tsv": "tsv"}.get(suffix, "lines")


def plain_suffix(name: str) -> str:
    """The ending without that of compression: .jsonl of a.jsonl.gz."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


COMPRESSED = (".gz", ".bz2", ".xz")
