"""A step of SmolLM2 at 8,192 tokens with all levers, really run: its traced peak, a third of plain's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_long_step as bench  # noqa: E402


def test_traced_bytes_are_at_most_a_third_of_plain_s(smollm: Path) -> None:
    """Checkpoints on a CPU's host count in full; without them on the device it is far less than a third."""
    traced = {n: bench.traced_bytes(str(smollm), n, bench.config_of(n, bench.TOKENS)) for n in bench.NAMES}
    assert 3 * traced["lowvram"] < traced["plain, checkpointing"] < traced["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain, checkpointing", "plain"])
def test_the_plain_step_takes_what_its_trace_says(smollm: Path, name: bench.Name) -> None:
    """The yardstick; at 1,024 tokens, for its logits alone would take 5 GB at 8,192."""
    config = bench.config_of(name, 1024)
    measured = bench.executed(str(smollm), name, config).peak_bytes
    assert bench.traced_bytes(str(smollm), name, config) == pytest.approx(measured, rel=0.01)


@pytest.mark.slow
def test_a_long_step_with_all_levers_takes_what_its_trace_says(smollm: Path) -> None:
    """Within 1 %, and at most a third of the plain step's traced bytes: minutes on two cores."""
    config = bench.config_of("lowvram", bench.TOKENS)
    measured = bench.executed(str(smollm), "lowvram", config).peak_bytes
    assert bench.traced_bytes(str(smollm), "lowvram", config) == pytest.approx(measured, rel=0.01)
    plain = bench.config_of("plain, checkpointing", bench.TOKENS)
    assert 3 * measured <= bench.traced_bytes(str(smollm), "plain, checkpointing", plain)


def test_a_table_has_a_row_for_each_step(tmp_path: Path) -> None:
    config = bench.config_of("lowvram", 64)
    row = bench.row_of("lowvram", config, 101, 50, bench.Executed(100, 1.25), 400)
    bench.write(
        [row, bench.row_of("plain", bench.config_of("plain", 64), 900, 800, None, None)], tmp_path / "x.csv"
    )
    header, first, second = (tmp_path / "x.csv").read_text().splitlines()
    assert header.startswith(
        "step,tokens,tile_tokens,traced_bytes,executed_bytes,error_percent,share_of_plain"
    )
    assert first.startswith("lowvram,64,1024,101,100,1.0,0.25,50,1.2,")
    assert second.startswith("plain,64,0,900,,,,800,,")
