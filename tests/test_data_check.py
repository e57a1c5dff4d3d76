"""`lowvram data check`: every bad row counted, what is cut, and a page that is whole, escaped and silent."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowvram import data_view
from lowvram.data.conversations import load_conversations
from lowvram.data.shapes import Reading
from lowvram.data.tokens import tokenize
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DataError
from lowvram.training.data import prepare
from tests.test_plan_page import HOSTILE, _Reader

SKIP = Reading(skip_bad=True)
ROWS = [
    {"id": n, "question": f"{HOSTILE} {n}", "answer": "so " * (n + 1) + "&amp; <b>done</b>"}
    for n in range(40)
]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm: Path) -> None:
    assert smollm.is_dir()  # found in the user's cache first
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


def _file(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return _file(tmp_path, *map(json.dumps, ROWS))


def _printed(name: str, model: Path | None = None, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=140, record=True)
    try:
        data_view.check(name, str(model) if model else None, console, **options)
    finally:
        text = console.export_text()
    return text


def test_it_says_what_it_took_the_rows_for(good: str) -> None:
    text = " ".join(_printed(good).split())
    for said in ("shape question-answer (found)", "fields question, answer", "unread fields id", "rows 40"):
        assert said in text
    told = " ".join(_printed(good, reading=Reading(shape="question-answer")).split())
    assert "shape question-answer (as you said)" in told


def test_every_bad_row_is_counted_and_the_first_20_listed(tmp_path: Path) -> None:
    name = _file(tmp_path, *map(json.dumps, ROWS), *['{"question": "q"}'] * 25, "{", json.dumps(ROWS[0]))
    console = Console(file=io.StringIO(), width=140, record=True)
    with pytest.raises(DataError, match=r"train\.jsonl:41: .* In all 26 of 67 rows cannot be used") as caught:
        data_view.check(name, None, console)
    assert "--skip-bad" in caught.value.remedy
    text = console.export_text()
    assert [int(n) for n in re.findall(r"bad .*train\.jsonl:(\d+): ", text)] == list(range(41, 61))
    assert "and 6 more rows" in text
    facts = json.loads(_printed(name, as_json=True, reading=SKIP))
    assert (facts["rows"], facts["bad_rows"], facts["duplicates"], len(facts["bad"])) == (67, 26, 1, 20)


@pytest.mark.parametrize("reading", [Reading(), SKIP])
@pytest.mark.parametrize("good", [0, 1])
def test_bad_rows_are_told_where_too_few_are_good(tmp_path: Path, good: int, reading: Reading) -> None:
    name = _file(tmp_path, *map(json.dumps, ROWS[:good]), *["{"] * 50)
    said = rf":{good + 1}: not JSON, .* In all 50 of {good + 50} rows cannot be used\."
    with pytest.raises(DataError, match=said) as caught:
        _printed(name, reading=reading)
    assert caught.value.remedy
    assert ("needs at least 2 examples that differ" in caught.value.message) == bool(good)


@pytest.mark.parametrize("row", ["{", '{"question": "", "answer": "a"}'])
def test_a_run_tells_bad_rows_where_too_few_are_good(tmp_path: Path, smollm: Path, row: str) -> None:
    """Of the data, of its held-out file, and where none is good."""
    source, few = ModelSource(str(smollm)), _file(tmp_path, json.dumps(ROWS[0]), *[row] * 50)
    with pytest.raises(DataError, match=r"train\.jsonl:2: .* In all 50 of 51 rows cannot be used\."):
        prepare(few, source, reading=SKIP)
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):
        prepare(few, source)
    none, whole = tmp_path / "none.jsonl", tmp_path / "whole.jsonl"
    none.write_text(f"{row}\n" * 50)
    whole.write_text("".join(f"{json.dumps(good)}\n" for good in ROWS))
    with pytest.raises(DataError, match=r"none\.jsonl:1: .* In all 50 of 50 rows cannot be used\."):
        prepare(str(whole), source, reading=SKIP, eval_name=str(none))


def test_the_numbers_are_those_of_the_tokens(good: str, smollm: Path) -> None:
    tokenizer = ModelSource(str(smollm)).tokenizer
    examples = tokenize(load_conversations(good).conversations, tokenizer)
    lengths = [len(e) for e in examples]
    limit = sorted(lengths)[20]
    starts = [e.trained.index(1) for e in examples]
    facts = json.loads(_printed(good, smollm, as_json=True, seq_len=limit))
    assert facts["examples_lost"] == sum(start >= limit for start in starts)
    assert facts["examples_cut"] == sum(n > limit for n in lengths) - facts["examples_lost"] > 5
    assert facts["tokens_cut"] == sum(lengths) - sum(min(n, limit) for n in lengths) > 0
    assert facts["examples_trained"] + facts["held_out"] == len(examples)
    assert facts["masked_share"] == pytest.approx(1 - facts["trained_share"], abs=1e-4)
    assert 0.1 < facts["masked_share"] < 0.9
    assert "examples_cut" not in json.loads(_printed(good, smollm, as_json=True))


@pytest.mark.parametrize("options", [{"seq_len": 64}, {"html": Path("x.html")}])
def test_what_is_about_tokens_needs_a_model(good: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="need a model"):
        _printed(good, **options)


@pytest.fixture
def page(good: str, smollm: Path, tmp_path: Path) -> str:
    html = tmp_path / "data.html"
    with Path(good).open("a", encoding="utf-8") as file:
        file.write(f'{{"{HOSTILE[:8]}": 1}}\n')
    text = _printed(good, smollm, html=html, reading=SKIP, seq_len=80)
    assert "Open it in a browser" in text
    return html.read_text(encoding="utf-8")


def test_the_page_shows_every_example_once_as_text(page: str, smollm: Path, good: str) -> None:
    read = _Reader(page)
    tokenizer = ModelSource(str(smollm)).tokenizer
    first = tokenize(load_conversations(good, limit=1).conversations, tokenizer)[0]
    trained = tokenizer.decode([i for i, t in zip(first.input_ids, first.trained, strict=True) if t])
    assert trained == "so &amp; <b>done</b><|im_end|>"
    assert trained in read.text
    assert f"{HOSTILE[:26]}" in read.text
    assert read.count("pre", "example") == 3  # the first is the shortest too, the median, the longest
    assert read.count("mark", "trained") == 3
    assert "First and shortest example" in read.text
    assert "no known shape" in read.text
    assert not {"b", "script"} & {tag for tag, _ in read.tags}
    assert "\x1b" not in page


def test_the_page_asks_for_nothing(page: str) -> None:
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|\bsrc=|\bhref=", page)
    assert "prefers-color-scheme: dark" in page


def test_the_histogram_holds_every_example(page: str) -> None:
    titles = re.findall(r"<title>([\d,]+) to ([\d,]+) tokens: ([\d,]+) examples", page)
    facts = re.search(r"<dt>examples trained</dt><dd>(\d+)", page)
    longest = re.search(r"<dt>tokens longest</dt><dd>(\d+)", page)
    assert facts
    assert longest
    assert sum(int(count) for *_, count in titles) == int(facts[1]) == 38
    ends = [(int(low), int(high)) for low, high, _ in titles]
    assert ends == sorted(ends)
    assert ends[-1][0] <= int(longest[1]) <= ends[-1][1]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ends))
    read = _Reader(page)
    assert read.count("line", "cut") == 1
    bars = [a for tag, a in read.tags if tag == "rect"]
    assert max(float(str(bar["height"])) for bar in bars) == pytest.approx(172)
    assert all(0 <= float(str(bar["x"]).rstrip("%")) < 100 for bar in bars)


def test_an_existing_page_is_not_overwritten(good: str, smollm: Path, tmp_path: Path) -> None:
    html = tmp_path / "mine.html"
    html.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        _printed(good, smollm, html=html)
    assert html.read_text() == "mine"
