"""Chunks: each read on its own, they give the rows of the whole file, with the lines on which these begin."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowvram.data import text_files
from lowvram.data.csv_files import CsvFile
from lowvram.data.sources import content_key, opened, read_rows
from lowvram.data.text_files import Chunk, TextFile
from lowvram.errors import ConfigError, DataError

CELLS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",\n\t[]{}:\\é😀'),
    min_size=1,
    max_size=30,
)
ROWS = st.lists(st.fixed_dictionaries({"a": CELLS, "b": CELLS}), min_size=1, max_size=40)
SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _as_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)


def _as_array(rows: list[dict[str, str]]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def _as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["a", "b"], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _as_tsv(rows: list[dict[str, str]]) -> str:
    return _as_csv(rows, "\t")


KINDS: list[tuple[str, Callable[[list[dict[str, str]]], str]]] = [
    ("a.jsonl", _as_lines),
    ("a.json", _as_array),
    ("a.csv", _as_csv),
    ("a.tsv", _as_tsv),
]


def _read(path: Path) -> list[tuple[int, Any]]:
    with opened(str(path)) as source:
        return [found for chunk in list(source.chunks()) for found in source.rows(chunk)]


@pytest.mark.parametrize(("name", "write"), KINDS, ids=[name for name, _ in KINDS])
@SMALL
@given(rows=ROWS, size=st.integers(1, 200), bom=st.booleans())
def test_chunks_of_any_size_are_the_whole(
    tmp_path: Path,
    name: str,
    write: Callable[[list[dict[str, str]]], str],
    rows: list[dict[str, str]],
    size: int,
    bom: bool,
) -> None:
    path, text = tmp_path / name, write(rows)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", size)
        found = _read(path)
    assert [row for _, row in found] == rows
    assert [number for number, _ in found] == _first_lines(name, rows, text)


def _first_lines(name: str, rows: list[dict[str, str]], text: str) -> list[int]:
    """Where each row begins, known from how it was written: 2 lines each, 4 lines each, or as cells have."""
    if name == "a.jsonl":
        return list(range(1, 2 * len(rows), 2))
    if name == "a.json":
        return list(range(2, 4 * len(rows) + 1, 4))
    records = [1 + sum(cell.count("\n") for cell in row.values()) for row in rows]
    assert 1 + sum(records) == text.count("\n")
    return [2 + sum(records[:at]) for at in range(len(rows))]


def test_a_large_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " * 100}) + "\n" for n in range(5000)))
    chunks = list(TextFile(str(path), str(path), "lines").chunks())
    assert len(chunks) == -(-path.stat().st_size // text_files.CHUNK_BYTES) or len(chunks) > 3
    assert sum(chunk.size for chunk in chunks) == path.stat().st_size
    assert [number for number, _ in _read(path)] == list(range(1, 5001))


def test_an_array_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window over its text stays a few blocks wide."""
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1 << 12)
    widest, window = 0, text_files._Window.grow

    def grow(self: Any) -> bool:
        nonlocal widest
        more = window(self)
        widest = max(widest, len(self.text))
        return more

    monkeypatch.setattr(text_files._Window, "grow", grow)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 900}] * 2000))  # 1.8 MB
    assert len(_read(path)) == 2000
    assert widest < 4 * (1 << 12)


def test_a_broken_array_is_refused_where_it_breaks_and_read_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 256)
    path = tmp_path / "a.json"
    rows = [json.dumps({"text": f"row {n}"}) for n in range(2000)]
    path.write_text("[\n" + ",\n".join([*rows[:1000], '{"text": oops}', *rows[1000:]]) + "\n]")
    with pytest.raises(DataError, match=r"a\.json:1002: not JSON, column 10"):
        _read(path)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_packed_files_are_unpacked_and_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, pack: Any
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(pack.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    assert list(read_rows(str(path))) == [(f"{path}:1", {"text": "a"}), (f"{path}:3", {"text": "b"})]
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be unpacked"):
        list(read_rows(str(path)))


def test_saved_data_sets_are_read_with_their_splits(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    one = str(tmp_path / "one")
    assert list(read_rows(one)) == [(f"{one}:row 1", {"text": "a"}), (f"{one}:row 2", {"text": "b"})]
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    two = str(tmp_path / "two")
    assert [row["text"] for _, row in read_rows(two)] == ["a", "b"]
    assert [row["text"] for _, row in read_rows(two, "test")] == ["b"]
    for split, texts in (("train[:50%]", "a"), ("train[1:]", "b"), ("test+train[:1]", "ba")):
        assert "".join(row["text"] for _, row in read_rows(two, split)) == texts
    assert [row["text"] for _, row in read_rows(one, "train[-1:]")] == ["b"]
    with pytest.raises(DataError, match="no rows"):
        list(read_rows(two, "train[5:]"))
    DatasetDict(dev=rows).save_to_disk(tmp_path / "three")
    with pytest.raises(DataError, match="has no split 'train'"):
        list(read_rows(str(tmp_path / "three")))
    for name, split in ((one, "test"), (two, "dev")):
        with pytest.raises(DataError, match=f"has no split '{split}'") as caught:
            list(read_rows(name, split))
        assert "--split train" in caught.value.remedy


def test_splits_of_other_columns_are_not_joined(tmp_path: Path) -> None:
    parts = {"train": Dataset.from_list([{"text": "a"}]), "test": Dataset.from_list([{"text": 1}])}
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"'train\+test' cannot be one table") as caught:
        list(read_rows(str(tmp_path / "two"), "train+test"))
    assert caught.value.remedy == "Give one of them: --split train or test."


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="without splits"):
        list(read_rows(str(path), "test"))


def test_the_key_is_of_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"text": "a"}\n')
    two.write_text('{"text": "a"}\n')
    key = content_key(str(one), None)
    assert content_key(str(two), None) == key
    two.write_text('{"text": "b"}\n')
    assert content_key(str(two), None) != key
    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    for folder, kept in (("x", rows), ("y", rows), ("z", rows.select([1, 0]))):
        kept.save_to_disk(tmp_path / folder)
    x, y, z = (content_key(str(tmp_path / folder), None) for folder in "xyz")
    assert x != z
    assert x == content_key(str(tmp_path / "x"), None)
    assert len({x, y, z}) >= 2


def test_a_chunk_past_the_header_is_not_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\na,b\n1,2\na,b\n")
    assert _read(path) == [(3, {"a": "1", "b": "2"}), (4, {"a": "a", "b": "b"})]
    assert list(CsvFile(str(path), str(path), "csv").rows(Chunk(9, 4, 4))) == [(4, {"a": "a", "b": "b"})]
