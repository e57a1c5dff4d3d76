"""Times what each lever costs: the step with it over the step without, in turns, on SmolLM2-135M in NF4.

    PYTHONPATH=. python scripts/bench_levers.py [--rounds N] [--tokens N ...] [--lever NAME ...] [--out FILE]

A CPU has no second memory and no copy engine: what offload_checkpoints and streamed cost here is copying
within one memory. Writes benchmarks/levers.csv, from which planner/time_model.py has its shares. Nothing is
asserted of the times, for they depend on the machine and on who shares it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_rows import here, medians, ratios, write
from bench_step import BENCHMARKS, LINEARS, Step, our_step, random_text, rounds_of
from rich.progress import track
from transformers.utils.logging import disable_progress_bar

from lowvram.demo.model import demo_model
from lowvram.engine.config import Levers, StepConfig

OFF = {"gradient_checkpointing": False, "loss_chunk_tokens": 2048}
RECOMPUTE = {"gradient_checkpointing": True, "loss_chunk_tokens": 2048}


@dataclass(frozen=True)
class Case:
    """A lever, and what its step is compared with."""

    name: str
    without: dict[str, Any]
    lever: dict[str, Any]


CASES = (
    Case("gradient_checkpointing", OFF, RECOMPUTE),
    Case("kept_layers=15 of 30", OFF, {**RECOMPUTE, "kept_layers": 15}),
    Case("loss_chunk_tokens=256", OFF, {"loss_chunk_tokens": 256}),
    Case("loss_chunk_tokens=64", OFF, {"loss_chunk_tokens": 64}),
    Case("offload_checkpoints", RECOMPUTE, {"offload_checkpoints": True}),
    Case("tile_tokens: a quarter", RECOMPUTE, {"tile_tokens": 0}),  # filled in for each length
    Case("head=nf4", RECOMPUTE, {"head": "nf4"}),
    Case("head=int8", RECOMPUTE, {"head": "int8"}),
    Case("head=streamed", RECOMPUTE, {"head": "streamed"}),
    Case("double_quantization=off", RECOMPUTE, {"double_quantization": False}),
    Case("optimizer=adamw8bit", RECOMPUTE, {"optimizer": "adamw8bit"}),
    Case("base_precision=int8 instead of nf4", RECOMPUTE, {"base_precision": "int8"}),
)


@dataclass(frozen=True)
class Row:
    """One lever at one length: seconds of a step, and the ratio round by round."""

    lever: str
    tokens: int
    rounds: int
    seconds_without: float
    seconds_with: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    machine: str
    threads: int
    torch: str
    date: str


def measure(folder: str, names: list[str], lengths: list[int], rounds: int) -> Iterator[Row]:
    """Case by case, for each holds two models."""
    for case in track([case for case in CASES if case.name in names], "levers"):
        for tokens in lengths:
            lever = {"tile_tokens": tokens // 4} if "tile_tokens" in case.lever else case.lever
            steps = [_step(folder, case.without), _step(folder, {**case.without, **lever})]
            yield _row(case.name, tokens, rounds_of(steps, random_text(tokens), rounds))


def _step(folder: str, settings: dict[str, Any]) -> Step:
    levers = {name: value for name, value in settings.items() if name in Levers.model_fields}
    rest = {name: value for name, value in settings.items() if name not in levers}
    config = StepConfig(target_modules=LINEARS, accumulation=1, levers=Levers(**levers), **rest)
    return our_step(folder, config)


def _row(name: str, tokens: int, seconds: list[list[float]]) -> Row:
    without, with_it = medians(seconds)
    return Row(
        lever=name,
        tokens=tokens,
        seconds_without=without,
        seconds_with=with_it,
        **ratios(seconds),
        **here("torch"),
    )


def earlier_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What an earlier run wrote, by lever and tokens."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["lever"], row["tokens"]): row for row in csv.DictReader(file)}


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--lever", nargs="+", choices=names, default=names, help="others' rows stay")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "levers.csv")
    args = parser.parse_args()
    disable_progress_bar()
    rows = earlier_rows(args.out)
    for row in measure(demo_model(print), args.lever, args.tokens, args.rounds):
        rows[row.lever, str(row.tokens)] = asdict(row)
        write(list(rows.values()), args.out)
        span = f"{row.lowest_ratio:.2f} to {row.highest_ratio:.2f}"
        print(f"{row.lever}, {row.tokens} tokens: {row.ratio:.2f} ({span})", flush=True)


if __name__ == "__main__":
    main()
