"""Sources: every kind of file yields its rows with their places, and every broken one says where and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset

from lowvram.data.sources import opened, read_rows, rows_of
from lowvram.errors import DataError

LONG = '{"a": ' + "1" * 5000 + "}"  # Python reads 4,300 digits


def _write(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _rows(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Rows with the folder taken off their places."""
    return [(Path(where).name, row) for where, row in read_rows(name)]


def _error(name: str) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(name))
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_count_blank_lines_and_tolerate_a_bom_and_windows_line_ends(
    tmp_path: Path, name: str
) -> None:
    path = _write(tmp_path, name, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9"}')
    assert _rows(path) == [(f"{name}:1", {"a": 1}), (f"{name}:4", {"a": "é"})]


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.jsonl", '{"a": 1}\nbroken\n')
    assert next(read_rows(path))[1] == {"a": 1}


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": 2}\n')
    assert [where for where, _ in _rows(path)] == ["a.jsonl:1", "a.jsonl:2"]


def test_an_array_keeps_the_line_of_each_object(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.json", '\n[\n  {"a":\n 1},\n\n  {"a": 2}, {"a": 3}\n]\n')
    assert _rows(path) == [("a.json:3", {"a": 1}), ("a.json:6", {"a": 2}), ("a.json:6", {"a": 3})]


def test_csv_cells_stay_as_written_and_keep_the_line_where_the_row_starts(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.csv", 'question,answer\nhow many,42\n\n"two\nlines",NA\nlast,007\n')
    assert _rows(path) == [
        ("a.csv:2", {"question": "how many", "answer": "42"}),
        ("a.csv:4", {"question": "two\nlines", "answer": "NA"}),
        ("a.csv:6", {"question": "last", "answer": "007"}),
    ]


def test_parquet_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": []}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert _rows(str(path)) == [("a.parquet:row 1", rows[0]), ("a.parquet:row 2", rows[1])]


@pytest.mark.parametrize(
    "name", ["a[1].parquet", "b*.parquet", "c?.parquet", "d[1]*/a.parquet", "**/a.parquet"]
)
def test_a_name_is_no_pattern_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Beside each file lies the one that it would match as a pattern; the folder of the cache is one too."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache[1]*"))
    for other in ("a1.parquet", "b2.parquet", "c3.parquet", "d1x/a.parquet", "a.parquet", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        Dataset.from_list([{"text": other}]).to_parquet(tmp_path / other)
    assert [row["text"] for _, row in read_rows(str(tmp_path / name))] == [name]
    rows = Dataset.from_list([{"text": "right"}])
    Dataset.from_list([{"text": "wrong"}]).save_to_disk(tmp_path / "s1x")
    rows.save_to_disk(tmp_path / "s[1]*")
    assert [row for _, row in read_rows(str(tmp_path / "s[1]*"))] == [{"text": "right"}]


def test_words_of_a_category_are_read_from_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array(["x", None, "y"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert [row["text"] for _, row in read_rows(str(path))] == ["x", None, "y"]


def test_parquet_brings_no_bars_but_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "a.parquet")
    capfd.readouterr()
    assert len(list(read_rows(str(tmp_path / "a.parquet")))) == 1
    assert capfd.readouterr() == ("", "")


def test_parquet_without_rows_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    error = _error(str(path))
    assert (error.message, error.remedy) == (
        f"{path}:1: the file has no rows.",
        "Write one example a row, then try again.",
    )


def test_a_hub_id_is_loaded_with_its_config_and_the_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*args: str, **options: str) -> Dataset:
        calls.append((args, options))
        return Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(read_rows("openai/gsm8k:main")) == [("openai/gsm8k:main:row 1", {"text": "x"})]
    assert list(read_rows("owner/name.v1")) == [("owner/name.v1:row 1", {"text": "x"})]
    assert len(list(read_rows("owner/name", "test[:10%]"))) == 1
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("owner/name.v1",), {"split": "train"}),
        (("owner/name",), {"split": "test[:10%]"}),
    ]


def test_a_hub_that_cannot_be_reached_is_bad_data_and_says_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: str, **__: str) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr("datasets.load_dataset", load)
    error = _error("owner/name")
    assert error.message == "owner/name: cannot be loaded (ConnectionError: Couldn't reach the Hub)."
    assert "connection" in error.remedy


def test_a_broken_parquet_file_is_bad_data(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.parquet", b"not parquet at all")
    assert _error(path).message.startswith(f"{path}: cannot be loaded")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a/b/c", "missing.CSV", "~/x"])
def test_a_missing_file_is_never_looked_for_on_the_hub(name: str) -> None:
    assert _error(name).message.startswith(f"{name}: no such file")


def test_a_folder_names_a_file_in_it(tmp_path: Path) -> None:
    assert "no data file" in _error(str(tmp_path)).remedy
    path = _write(tmp_path, "a.jsonl", "")
    error = _error(str(tmp_path))
    assert error.message == f"{tmp_path}: is a folder, not a data file."
    assert path in error.remedy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "x,y\n"),
    ],
)
def test_an_empty_file(tmp_path: Path, name: str, content: str) -> None:
    path = _write(tmp_path, name, content)
    assert _error(path).message == f"{path}:1: the file has no rows."


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a" 1}\n', 3, "not JSON, column 6: Expecting ':' delimiter"),
        ("a.jsonl", '{"a": "cut\n', 1, "not JSON, column 7"),
        ("a.jsonl", '{"a": 1\r\n', 1, "not JSON, column 8"),
        ("a.jsonl", "[" * 100_000, 1, "not JSON, column 1: nested too deeply"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', 2, "a list, not an object. The line starts: [1, 2]"),
        ("a.jsonl", '"text"\n', 1, "a str, not an object"),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', 2, "half of a \\ud"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', 2, "not UTF-8 (byte 0xe9 at byte 8)"),
        ("a.jsonl", "{}".encode("utf-16"), 1, "not UTF-8"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}]', 3, "not JSON, column 6"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', 3, "not JSON, column 1: Expecting ',' or ']'"),
        ("a.json", '[\n{"a": 1},\n7]', 3, "a int, not an object"),
        ("a.json", '[\n{"a": 1}\n', 3, "not JSON"),
        ("a.json", '[{"a": 1}]\n\n[{"a": 1}]', 3, "text after the array's closing ]"),
        (
            "a.jsonl",
            f'{{"a": 1}}\n{{"a": {"1" * 5000}}}\n',
            2,
            "a number is too long. Exceeds the limit (4300 ",
        ),
        (
            "a.json",
            f'[\n{{"a": 1}},\n{{"a": {"1" * 5000}}}]',
            3,
            "integer string conversion: value has 5000 ",
        ),
        ("a.csv", "x,y\n1,2\n1,2,3\n", 3, "3 cells where the header has 2"),
        ("a.csv", "x,y\n1,2\n\n1\n", 4, "1 cells where the header has 2"),
        ("a.csv", b"x,y\n1,2\n1,\xe9\n", 3, "not UTF-8 (byte 0xe9 at byte 3)"),
        ("a.csv", b"x,\xe9\n1,2\n", 1, "not UTF-8 (byte 0xe9 at byte 3)"),
        ("a.csv", "\nx,y,z,y\n1,2,3,4\n", 2, "columns 2 and 4 are both named 'y'"),
        ("a.csv", 'x,y\n1,2\n"1,2\n3,4\n', 3, "not CSV"),
    ],
)
def test_a_broken_row_is_reported_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, line: int, reason: str
) -> None:
    path = _write(tmp_path, name, content)
    message = _error(path).message
    assert message.startswith(f"{path}:{line}: ")
    assert reason in message


def test_a_number_too_long_is_one_bad_row_of_an_array(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.json", f'[{{"a": 1}},\n{LONG},\n{{"a": 3}}]')
    with opened(path) as source:
        (_, first), (line, bad), last = rows_of(source)
    assert (first, line, last) == ({"a": 1}, 2, (3, {"a": 3}))
    assert isinstance(bad, DataError)


def test_what_cannot_be_decoded_is_one_bad_row_of_a_csv(tmp_path: Path) -> None:
    """Also within a cell over lines; a quote that hides where its row ends is still the end of the file."""
    content = b'x,y\n1,2\n1,"a\n\xe9""\n"\n3,\xe94\n5,6\n'
    path = _write(tmp_path, "a.csv", content)
    with opened(path) as source:
        rows = list(rows_of(source))
    assert [line for line, _ in rows] == [2, 3, 6, 7]
    assert (rows[0][1], rows[3][1]) == ({"x": "1", "y": "2"}, {"x": "5", "y": "6"})
    said = [str(bad) for _, bad in rows[1:3]]
    assert said == [f"{path}:{line}: not UTF-8 (byte 0xe9 at byte {at})." for line, at in ((4, 1), (6, 3))]
    assert "a.csv:8: not CSV" in _error(_write(tmp_path, "a.csv", content + b'"7" 7,8\n')).message


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    assert _rows(_write(tmp_path, "a.csv", "x,,\n1,,\n")) == [("a.csv:2", {"x": "1", "": ""})]


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", '{\n"a": 1\n}', "Every line must be one whole JSON object"),
        ("a.json", '{\n"a": 1\n}', "One object over many lines: put it into [ ]"),
        ("a.json", '{\n"data": [\n{"a": 1}\n]}', "if it holds the list of examples, give only that"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', "Check for a missing quote, comma or bracket."),
    ],
)
def test_what_to_mend_is_that_of_the_kind_of_file(
    tmp_path: Path, name: str, content: str, remedy: str
) -> None:
    assert remedy in _error(_write(tmp_path, name, content)).remedy


def test_a_long_broken_line_is_shown_by_its_start_only(tmp_path: Path) -> None:
    message = _error(_write(tmp_path, "a.jsonl", '{"a": ' + "x" * 5000)).message
    assert message.endswith("The line starts: " + '{"a": ' + "x" * 54 + "...")


def test_an_array_named_jsonl_is_told_to_be_renamed(tmp_path: Path) -> None:
    assert "name it .json" in _error(_write(tmp_path, "a.jsonl", '[{"a": 1}]')).remedy


def test_an_unknown_extension_lists_the_known_ones(tmp_path: Path) -> None:
    error = _error(_write(tmp_path, "a.xlsx", "x"))
    assert "'.xlsx'" in error.message
    assert ".parquet" in error.remedy


def test_an_emoji_written_as_a_whole_pair_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.jsonl", json.dumps({"a": "😀"}))
    assert _rows(path) == [("a.jsonl:1", {"a": "😀"})]


@pytest.mark.parametrize("inside", ["", "a.jsonl"])
def test_a_place_without_permission_is_bad_data(locked: Path, inside: str) -> None:
    error = _error(str(locked / inside))
    assert error.message == f"{locked / inside}: cannot be read (Permission denied)."
    assert "permissions" in error.remedy


def test_no_name_is_no_folder() -> None:
    assert "empty" in _error("").message


@pytest.mark.parametrize(("suffix", "command"), [(".zst", "unzstd"), (".ZIP", "unzip")])
def test_a_compressed_file_is_told_how_to_unpack_it(tmp_path: Path, suffix: str, command: str) -> None:
    path = _write(tmp_path, f"my rows.jsonl{suffix}", b"\x1f\x8b")
    assert f"{command} '{path}'" in _error(path).remedy
    assert "no such file" in _error(f"missing{suffix}").message  # and not looked for on the hub
