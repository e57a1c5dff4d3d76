"""The README's table of ways of adapting: which rows stand beside which."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import adapter_table


def _row(method: str, tokens: int, rate: float, seed: int, loss: float) -> dict[str, Any]:
    losses = {"validation_loss": loss + 0.1, "test_loss": loss}
    where = {"machine": "here", "torch": "2", "peft": "1"}
    return {
        "method": method,
        "tokens": tokens,
        "learning_rate": rate,
        "seed": seed,
        **losses,
        **where,
        "init_seconds": 1,
        "predicted_peak_bytes": 2**30,
    }


def test_each_budget_has_its_own_reference_and_best_rate() -> None:
    """The larger budget turns the order around, at another rate; a method without its LoRA is left out."""
    rows = [
        *(_row("lora", 10, 0.1, seed, 2.0 + seed) for seed in (0, 1)),
        *(_row("rslora", 10, 0.1, seed, 1.5 + seed) for seed in (0, 1)),
        _row("rslora", 10, 0.3, 0, 9.0),
        _row("lora", 30, 0.3, 0, 1.0),
        _row("lora", 30, 0.1, 0, 5.0),
        _row("rslora", 30, 0.1, 0, 1.25),
        _row("dora", 50, 0.1, 0, 1.0),
    ]
    times = [{"method": method, "ratio": 1.0} for method in ("lora", "rslora", "dora")]
    lines = [
        line.split(" | ")[:6] for line in adapter_table.block(rows, times).splitlines()[2:] if " | " in line
    ]
    assert [[cell.strip("| ") for cell in line] for line in lines] == [
        ["rslora", "nf4", "10", "0.1", "2.0000 ± 0.7071", "+0.5000 ± 0.0000"],
        ["lora", "nf4", "10", "0.1", "2.5000 ± 0.7071", "+0.0000 ± 0.0000"],
        ["lora", "nf4", "30", "0.3", "1.0000", "+0.0000"],
        ["rslora", "nf4", "30", "0.1", "1.2500", "-0.2500"],
    ]
