"""The plans of the reference pairs: the committed rows meet the demands, and are what the planner says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lowvram.alloc_conf import VARIABLE, alloc_conf
from lowvram.planner.variants import with_kept, with_length
from lowvram.units import GiB

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_plans as bench

DESKTOP_BYTES = int(1.1 * GiB)  # 0.7 GiB of context, 0.4 GiB held by others
REFERENCE = {  # model -> parameters in billions; card -> least rank, and alpha
    "Qwen/Qwen2-7B": 7.6,
    "meta-llama/Llama-3.1-8B": 8.0,
    "mistralai/Mistral-7B-v0.1": 7.2,
    "meta-llama/Llama-2-13b-hf": 13.0,
    "Qwen/Qwen2.5-14B": 14.8,
    "huggyllama/llama-30b": 32.5,
    "Qwen/Qwen2.5-32B": 32.8,
}
LORA = {8: (4, 16), 12: (8, 32), 16: (16, 32), 24: (16, 32)}
QUICK = (bench.Pair("Qwen/Qwen2-7B", 8), bench.Pair("Qwen/Qwen2.5-14B", 16))
ROWS = {bench.Pair(row["model"], int(row["card_gib"])): row for row in bench.earlier_rows()}


@pytest.fixture(autouse=True)
def _as_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory is counted by it."""
    monkeypatch.setenv(VARIABLE, alloc_conf())


def _text(columns: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in columns.items()}


def _part(pair: bench.Pair, columns: dict[str, Any]) -> dict[str, str]:
    return {name: ROWS[pair][name] for name in columns}


def test_the_file_has_every_pair_once() -> None:
    assert tuple(ROWS) == bench.PAIRS
    assert len(bench.earlier_rows()) == len(bench.PAIRS)
    assert {pair.model for pair in bench.PAIRS} == set(REFERENCE)


@pytest.mark.parametrize("pair", bench.PAIRS, ids=str)
def test_the_row_meets_the_demands(pair: bench.Pair) -> None:
    row = ROWS[pair]
    number = {name: int(value) for name, value in row.items() if value.isdigit()}
    rank, alpha = LORA[pair.card_gib]
    assert number["rank"] >= rank
    assert float(row["alpha"]) >= alpha
    assert row["dropout"] == "0.05"
    assert number["seq_len"] >= 2048
    assert number["parameters"] / 1e9 == pytest.approx(REFERENCE[pair.model], abs=0.05)
    assert number["budget_bytes"] <= pair.card_gib * GiB - DESKTOP_BYTES + 1  # bytes are rounded down
    assert number["peak_allocated_bytes"] <= number["peak_reserved_bytes"] <= number["budget_bytes"]
    assert number["left_bytes"] == number["budget_bytes"] - number["peak_reserved_bytes"]
    assert number["longest_as_planned"] >= number["seq_len"]
    assert number["largest_rank"] >= number["rank"]
    assert number["host_bytes"] <= bench.HOST_BYTES


@pytest.mark.parametrize("pair", QUICK, ids=str)
def test_the_row_is_what_the_search_finds_today(pair: bench.Pair) -> None:
    """Without a search for the longest sequence and the largest rank: those of the file are at the limit."""
    with bench.request_for(pair) as request:
        found = bench.searched(request)
        columns = bench.of_step(pair, found.step, found.search)
        assert _part(pair, columns) == _text(columns)
        longest, rank = (int(ROWS[pair][name]) for name in ("longest_as_planned", "largest_rank"))
        bare = with_kept(found.step, 0)
        assert found.search.fits(with_length(found.step, longest))
        assert not found.search.fits(with_length(found.step, longest + longest // 50 + 64))
        assert found.search.fits(bare.model_copy(update={"rank": rank}))
        assert not found.search.fits(bare.model_copy(update={"rank": 2 * rank}))


@pytest.mark.slow
@pytest.mark.parametrize("pair", bench.PAIRS, ids=str)
def test_the_whole_row_is_what_the_planner_says_today(pair: bench.Pair) -> None:
    columns = bench.planned_row(pair)
    assert _part(pair, columns) == _text(columns)


def test_the_readme_shows_the_file() -> None:
    assert bench.block(bench.earlier_rows()) in bench.README.read_text(encoding="utf-8")
