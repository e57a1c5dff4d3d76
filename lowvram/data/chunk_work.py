"""Chunk work: one chunk of a source as a table of tokenised rows, in this process or in one of many."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lowvram.data.conversations import Conversation, content_sha256, conversation_of
from lowvram.data.seq2seq import tokenize_pairs
from lowvram.data.shapes import Known
from lowvram.data.sources import Source
from lowvram.data.text_files import Chunk, Found
from lowvram.data.tokens import Example, tokenize
from lowvram.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # line, or row of a table
        ("problem", pa.string()),  # null: the row is good
        ("remedy", pa.string()),
        ("digest", pa.binary()),  # of the content, 32 bytes
        ("characters", pa.int64()),
        ("n_tokens", pa.int32()),  # that a sequence length limits: of a pair those of its source
        ("n_trained", pa.int32()),
        ("answer_start", pa.int32()),  # tokens before the first trained one
        ("skipped_turns", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("source_ids", pa.list_(pa.int32())),  # of a pair; else empty
        ("trained", pa.binary()),  # one byte a token, 0 or 1
    ]
)
_DONE = "done"
_BAD = "bad-"


@dataclass(frozen=True)
class ChunkWork:
    """What is done to each chunk; goes to worker processes whole."""

    source: Source
    known: Known
    tokenizer: PreTrainedTokenizerBase | None  # None: rows are only read and checked
    pairs: bool  # a source and a target for an encoder-decoder
    stops_at_bad: bool
    folder: str  # where processes tell each other how far they are

    def in_worker(self, index: pa.Table) -> pa.Table:
        """As `datasets` calls it: one row of (at, start, size, number)."""
        row = index.to_pylist()[0]
        folder = Path(self.folder)
        if self.stops_at_bad and any(int(f.name[len(_BAD) :]) < row["at"] for f in folder.glob(f"{_BAD}*")):
            return SCHEMA.empty_table()  # the first bad row is in an earlier chunk
        table = self.table(Chunk(row["start"], row["size"], row["number"]))
        if self.stops_at_bad and table["problem"].null_count < len(table):
            (folder / f"{_BAD}{row['at']}").touch()
        with (folder / _DONE).open("ab") as handle:
            handle.write(b".")
        return table

    def table(self, chunk: Chunk) -> pa.Table:
        """The chunk's rows, good and bad, in order; up to the first bad one with `stops_at_bad`."""
        numbers: list[int] = []
        found: list[Conversation | DataError] = []
        for number, row in self.source.rows(chunk):
            numbers.append(number)
            found.append(self._checked(number, row))
            if self.stops_at_bad and isinstance(found[-1], DataError):
                break
        rows = list(self._tokenized(found)) if self.tokenizer is not None else found
        return _table(numbers[: len(rows)], found, rows)

    def _checked(self, number: int, row: Found) -> Conversation | DataError:
        if isinstance(row, DataError):
            return row
        try:
            return conversation_of(self.source.place(number), row, self.known)
        except DataError as error:
            return error

    def _tokenized(
        self, found: Sequence[Conversation | DataError]
    ) -> Iterator[Example | Conversation | DataError]:
        examples = self._examples([c for c in found if isinstance(c, Conversation)])
        for row in found:
            row_or_example = row if isinstance(row, DataError) else next(examples)
            yield row_or_example
            if self.stops_at_bad and isinstance(row_or_example, DataError):
                return

    def _examples(self, conversations: list[Conversation]) -> Iterator[Example | DataError]:
        """Halved where one of them cannot be tokenised, until it stands alone."""
        assert self.tokenizer is not None
        try:
            make = tokenize_pairs if self.pairs else tokenize
            yield from make(conversations, self.tokenizer)
        except DataError as error:
            if len(conversations) == 1:
                yield error
                return
            half = len(conversations) // 2
            yield from self._examples(conversations[:half])
            yield from self._examples(conversations[half:])


def chunks_done(folder: Path) -> int:
    """How many chunks worker processes have finished."""
    file = folder / _DONE
    return file.stat().st_size if file.exists() else 0


def clear_marks(folder: Path) -> None:
    """Remove what the processes told each other."""
    for file in (*folder.glob(f"{_BAD}*"), folder / _DONE):
        file.unlink(missing_ok=True)


def _table(numbers: list[int], found: Sequence[Any], rows: Sequence[Any]) -> pa.Table:
    good = [None if isinstance(row, DataError) else f for f, row in zip(found, rows, strict=False)]
    examples = [row if isinstance(row, Example) else None for row in rows]
    columns = {
        "number": numbers,
        "problem": [row.message if isinstance(row, DataError) else None for row in rows],
        "remedy": [row.remedy if isinstance(row, DataError) else None for row in rows],
        "digest": [bytes.fromhex(content_sha256(c)) if c else None for c in good],
        "characters": [_characters(c) if c else 0 for c in good],
        "n_tokens": [len(e) if e else 0 for e in examples],
        "n_trained": [e.n_trained if e else 0 for e in examples],
        "answer_start": [e.trained.index(1) if e else 0 for e in examples],
        "skipped_turns": [e.skipped_turns if e else 0 for e in examples],
        "input_ids": _lists([e.input_ids if e else None for e in examples]),
        "source_ids": _lists([e.source_ids if e else None for e in examples]),
        "trained": [e.trained if e else b"" for e in examples],
    }
    return pa.table(columns, schema=SCHEMA)


def _lists(ids: Sequence[array[int] | None]) -> pa.ListArray:
    whole = [np.frombuffer(some, dtype=np.int32) for some in ids if some]
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum([0, *(len(some or ()) for some in ids)]), pa.int32()),
        pa.array(np.concatenate(whole) if whole else [], pa.int32()),
    )


def _characters(conversation: Conversation) -> int:
    return len(conversation.text or "") + sum(len(m.content) for m in conversation.messages)
