"""Row store: prepared rows on disk, of which tokens and numbers are read when they are asked for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from lowvram.data.shapes import Known
from lowvram.data.tokens import Example, cut
from lowvram.errors import DataError
from lowvram.frozen import Frozen

Numbers = npt.NDArray[np.signedinteger[Any]]  # of rows 4 bytes each: no source has 2 billion


class Entry(Frozen):
    """What is known of a prepared source beside its rows."""

    name: str
    known: Known
    unread: tuple[str, ...] = Field(description="fields of the first row that nothing is made of")
    pairs: bool = Field(description="rows are a source and a target, of which the target is trained")
    in_rows: bool = Field(description="places are numbers of rows, not lines")
    files: dict[str, str] = Field(description="name: sha256")
    n_bad: int = 0


def in_all(first: DataError, bad: int, rows: int) -> DataError:
    """The first bad row's error, with the number of them."""
    stop = "" if first.message.endswith(".") else "."
    return DataError(f"{first.message}{stop} In all {bad} of {rows} rows cannot be used.", first.remedy)


class RowStore:
    """The rows of one source, in order, good and bad; index `i` counts the good ones."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        self.folder, self.entry = folder, entry
        self._maps = [pa.memory_map(str(folder / name)) for name in sorted(entry.files)]
        tables = [pa.ipc.open_stream(source).read_all() for source in self._maps]
        self._table: pa.Table = pa.concat_tables(tables)

    def close(self) -> None:
        """Let go of the files, as Windows wants it before they are renamed."""
        for source in self._maps:
            source.close()

    @property
    def _is_bad(self) -> npt.NDArray[np.bool_]:
        is_bad: npt.NDArray[np.bool_] = ~self._table["problem"].is_null().to_numpy()
        return is_bad

    @cached_property
    def _rows(self) -> Numbers:
        """Of each good row its place in the table."""
        return np.flatnonzero(~self._is_bad).astype(np.int32)

    @cached_property
    def bad_rows(self) -> Numbers:
        """Of each bad row its place in the table."""
        return np.flatnonzero(self._is_bad).astype(np.int32)

    def problems(self, at_most: int | None = None) -> Iterator[str]:
        """`FILE:LINE: what is wrong`, in order."""
        for row in self.bad_rows[:at_most]:
            yield self._table["problem"][int(row)].as_py()

    def first_bad(self) -> DataError | None:
        """What is wrong with the first bad row, and how many there are."""
        if not len(self.bad_rows):
            return None
        bad, error = len(self.bad_rows), self._error_of(int(self.bad_rows[0]))
        return in_all(error, bad, bad + len(self))

    def _error_of(self, row: int) -> DataError:
        return DataError(self._table["problem"][row].as_py(), self._table["remedy"][row].as_py())

    def require_good(self) -> None:
        """Raises: DataError, the first bad row's."""
        if len(self.bad_rows):
            raise self._error_of(int(self.bad_rows[0]))

    def __len__(self) -> int:
        return len(self._rows)

    def _column(self, name: str) -> Numbers:
        values: Numbers = self._table[name].to_numpy()
        return values[self._rows] if len(self.bad_rows) else values

    @property
    def lengths(self) -> Numbers:
        """Tokens of each good row."""
        return self._column("n_tokens")

    @property
    def n_trained(self) -> Numbers:
        """Trained tokens of each good row."""
        return self._column("n_trained")

    @property
    def answer_starts(self) -> Numbers:
        """Tokens before the first trained one, of each good row."""
        return self._column("answer_start")

    @property
    def skipped_turns(self) -> Numbers:
        """Earlier assistant turns of each good row that the template rewrites, so left untrained."""
        return self._column("skipped_turns")

    @property
    def characters(self) -> Numbers:
        """Of each good row's texts."""
        return self._column("characters")

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Of each good row's content 8 bytes as a number: two of a billion rows share one in 3 % of cases."""
        found, at = np.empty(len(self), np.uint64), 0
        for block in self._digest_blocks():
            found[at : at + len(block)] = block[:, :8].copy().view(">u8")[:, 0]
            at += len(block)
        return found

    def n_different(self) -> int:
        """How many of the good rows are no copy of another."""
        ascending = self.digests
        ascending.sort()
        return min(len(self), 1) + int(np.count_nonzero(ascending[1:] != ascending[:-1]))

    def _digest_blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The 32 bytes of each good row's digest, as a row of numbers."""
        for part in self._table["digest"].chunks:
            good = b"".join(part.drop_null().to_pylist())
            yield np.frombuffer(good, np.uint8).reshape(-1, 32)

    def sha256(self) -> str:
        """Of the content of all good rows in their order, whatever the file's name or format."""
        digest = hashlib.sha256()
        for block in self._digest_blocks():
            digest.update(block.tobytes().hex().encode())
        return digest.hexdigest()

    def place(self, index: int) -> str:
        number = self._table["number"][int(self._rows[index])].as_py()
        return f"{self.entry.name}:{'row ' if self.entry.in_rows else ''}{number}"

    @cached_property
    def _starts(self) -> Numbers:
        """First row of each chunk of the table's columns."""
        return np.cumsum([0, *(len(chunk) for chunk in self._table["trained"].chunks)])

    def example(self, index: int) -> Example:
        """The tokens of good row `index`, from the disk."""
        row = int(self._rows[index])
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        at = row - int(self._starts[chunk])
        ids = self._ids("input_ids", chunk, at)
        trained = self._column_chunk("trained", chunk)[at].as_py()
        skipped = self._column_chunk("skipped_turns", chunk)[at].as_py()
        source_ids = self._ids("source_ids", chunk, at) if self.entry.pairs else None
        return Example(ids, trained, self.place(index), skipped, source_ids)

    def _ids(self, column: str, chunk: int, at: int) -> array[int]:
        return array("i", self._column_chunk(column, chunk)[at].values.to_numpy().tobytes())

    def _column_chunk(self, name: str, chunk: int) -> Any:
        return self._table[name].chunk(chunk)

    def select(self, indices: Sequence[int] | Numbers) -> Examples:
        return Examples(self, np.asarray(indices, dtype=np.int32))


class Examples(Sequence[Example]):
    """Some rows of a store, cut to `seq_len` tokens; each is read when it is asked for.

    Of pairs, sources are cut to `seq_len` and targets to `target_len` tokens.
    """

    def __init__(
        self, store: RowStore, indices: Numbers, seq_len: int | None = None, target_len: int | None = None
    ) -> None:
        self.store, self.indices, self.seq_len, self.target_len = store, indices, seq_len, target_len

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Examples: ...
    def __getitem__(self, at: int | slice) -> Example | Examples:
        if isinstance(at, slice):
            return Examples(self.store, self.indices[at], self.seq_len, self.target_len)
        example = self.store.example(int(self.indices[at]))
        short = example if self.seq_len is None else cut(example, self.seq_len, self.target_len)
        assert short is not None  # `cut` left out what has no trained token
        return short

    @property
    def lengths(self) -> Numbers:
        """Tokens of each."""
        whole = self.store.lengths[self.indices]
        return whole if self.seq_len is None else np.minimum(whole, self.seq_len)

    @property
    def n_tokens(self) -> int:
        """Of all together, sources and targets, before any cut."""
        tokens = int(self.store.lengths[self.indices].sum())
        return tokens + (int(self.n_trained.sum()) if self.store.entry.pairs else 0)

    @property
    def n_trained(self) -> Numbers:
        """Trained tokens of each, before any cut."""
        return self.store.n_trained[self.indices]

    @property
    def answer_starts(self) -> Numbers:
        """Tokens of each before the first trained one."""
        return self.store.answer_starts[self.indices]

    @property
    def skipped_turns(self) -> Numbers:
        """Of each, assistant turns that are left untrained."""
        return self.store.skipped_turns[self.indices]

    def cut(self, seq_len: int, target_len: int | None = None) -> Examples:
        """The first `seq_len` tokens of each that has a trained token among them."""
        return Examples(self.store, self.indices[self.answer_starts < seq_len], seq_len, target_len)
