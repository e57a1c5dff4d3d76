"""Prepared: a source's rows checked and tokenised, on disk and memory-mapped, remembered by their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.cache import data_folder
from lowvram.data.chunk_work import ChunkWork
from lowvram.data.row_store import Entry, RowStore, in_all
from lowvram.data.shapes import Known, Reading, find_shape, known_from
from lowvram.data.sources import Source, Table, content_key, opened, rows_of
from lowvram.data.spelling import require_fast
from lowvram.data.text_files import TextFile
from lowvram.data.work_force import Progress, do_all
from lowvram.errors import DataError, refusals_of_the_system
from lowvram.file_hash import file_sha256
from lowvram.frozen import write_atomically
from lowvram.shell import typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_MOST_KEPT_BYTES = 20 << 30  # before one is added, however large
_ABANDONED_S = 24 * 3600  # what was being made longer ago was killed before it could clear up
_ENTRY = "entry.json"


def prepare_rows(
    name: str,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress = lambda _done, _left: None,
    *,
    pairs: bool = False,
    keep_bad: bool | None = None,
) -> RowStore:
    """Every row of the source called `name`, checked, and tokenised unless `tokenizer` is None.

    What was prepared before is found again by the content of the source, `reading`, the tokenizer and our
    code; an entry whose files are not as they were written is made anew.

    Args:
        progress: hears (share done, seconds left), and nothing when it is a matter of a second.
        pairs: make a source and a target of each row, for an encoder-decoder.
        keep_bad: record rows that cannot be used, instead of stopping at the first; None: `reading.skip_bad`.

    Raises:
        DataError: the first row that cannot be used, or nothing readable there.
        ConfigError, DoesNotFitError: the cache folder cannot be written.
    """
    keeps = reading.skip_bad if keep_bad is None else keep_bad
    folder = data_folder() / _key(name, reading, tokenizer, pairs)
    store = _found(folder, name) or _made(folder, name, reading, tokenizer, pairs, progress, keeps)
    if not keeps:
        store.require_good()
    return store


def _key(name: str, reading: Reading, tokenizer: PreTrainedTokenizerBase | None, pairs: bool) -> str:
    asked = reading.model_dump_json(exclude={"skip_bad"})
    parts = (content_key(name, reading.split), asked, _tokenizer_key(tokenizer), str(pairs), _code())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return "no tokenizer"
    require_fast(tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    said = json.dumps([tokenizer.chat_template, special, tokenizer.all_special_ids], sort_keys=True)
    return hashlib.sha256((tokenizer.backend_tokenizer.to_str() + said).encode()).hexdigest()


@cache
def _code() -> str:
    """Of all that decides how a row becomes tokens."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    return " ".join((digest, *(version(name) for name in _LIBRARIES)))


def _found(folder: Path, name: str) -> RowStore | None:
    """What is remembered there, if it is whole; a bad row's message names its file, so not of another."""
    with suppress(OSError, ValueError):
        entry = Entry.model_validate_json((folder / _ENTRY).read_bytes())
        same = {file.name: file_sha256(file) for file in folder.glob("*.arrow")} == entry.files
        if same and (entry.n_bad == 0 or entry.name == name):
            os.utime(folder)
            return RowStore(folder, entry.model_copy(update={"name": name}))
    return None


def _made(
    folder: Path,
    name: str,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: bool,
    progress: Progress,
    keeps: bool,
) -> RowStore:
    with refusals_of_the_system(
        "The data cannot be prepared", "Free some space, or set LOWVRAM_CACHE to a disk with room."
    ):
        _forget_oldest(data_folder())
        work_folder = Path(tempfile.mkdtemp(prefix=".making-", dir=data_folder()))
        try:
            with opened(name, reading.split) as source:
                known, unread = _first_of(source, reading, keeps)
                do_all(ChunkWork(source, known, tokenizer, pairs, not keeps, str(work_folder)), progress)
                entry = Entry(
                    name=name,
                    known=known,
                    unread=unread,
                    pairs=pairs,
                    in_rows=isinstance(source, Table),
                    files={f.name: _sealed(f) for f in work_folder.glob("*.arrow")},
                )
            store = RowStore(work_folder, entry)
            if not keeps:
                store.require_good()  # a half read source is not remembered
            entry = entry.model_copy(update={"n_bad": len(store.bad_rows)})
            write_atomically(work_folder / _ENTRY, entry.model_dump_json())
            store.close()
            shutil.rmtree(folder, ignore_errors=True)
            try:
                work_folder.rename(folder)
            except OSError:
                if found := _found(folder, name):  # another process made it meanwhile
                    return found
                raise
            return RowStore(folder, entry)
        finally:
            shutil.rmtree(work_folder, ignore_errors=True)


def _first_of(source: Source, reading: Reading, keeps: bool) -> tuple[Known, tuple[str, ...]]:
    """The shape, and the fields of the first row that has it which nobody reads."""
    first_error, bad = None, 0
    for number, row in rows_of(source):
        try:
            if isinstance(row, DataError):
                raise row
            _refuse_wrapper(source, number, row, reading)
            known = known_from(source.place(number), row, reading)
            known.named_our_way(source.place(number), row)
            return known, known.unread(row)
        except DataError as error:
            first_error, bad = first_error or error, bad + 1
            if not keeps:
                raise
    assert first_error is not None  # a source without rows is refused
    raise in_all(first_error, bad, bad)


def _refuse_wrapper(source: Source, number: int, row: dict[str, Any], reading: Reading) -> None:
    """Raises: DataError when a .json is one object that holds the examples as a list."""
    if Path(source.name).suffix.lower() != ".json" or reading.shape or find_shape(row):
        return
    if not isinstance(source, TextFile) or source.kind == "array":  # its elements: jq would want another path
        return
    lists = [field for field, value in row.items() if isinstance(value, list) and _are_rows(value)]
    if lists and sum(1 for _ in islice(rows_of(source), 2)) == 1:
        taken = f"jq {typed('.' + json.dumps(lists[0]))} {typed(source.name)} > {_new_name()}"
        raise DataError(
            f"{source.place(number)}: an object whose field '{lists[0]}' is the list of examples.",
            f"Make that list the file: {taken}",
        )


def _new_name() -> str:
    """For a file in the current folder that is not there: the shell empties what stands behind a >."""
    names = chain(["rows.json"], (f"rows-{number}.json" for number in count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _are_rows(values: list[Any]) -> bool:
    return any(isinstance(value, dict) and find_shape(value) for value in values)


def _sealed(file: Path) -> str:
    """Its hash, once it is on the disk and not only on its way there."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    return file_sha256(file)


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _forget_oldest(root: Path) -> None:
    """The entries that were not used for longest, until the rest is small enough."""
    folders = sorted((f for f in root.iterdir() if f.is_dir()), key=os.path.getmtime, reverse=True)
    kept = 0
    for folder in folders:
        with suppress(OSError):  # another process forgets as well
            in_use = folder.name.startswith(".") and time.time() - folder.stat().st_mtime < _ABANDONED_S
            kept += folder_bytes(folder)
            if not in_use and (kept > _MOST_KEPT_BYTES or folder.name.startswith(".")):
                shutil.rmtree(folder, ignore_errors=True)
