"""Bytes of one long step of SmolLM2-135M: lowvram with every exact lever beside plain transformers + peft.

    PYTHONPATH=. python scripts/bench_long_step.py [--tokens 8192] [--tile 1024] [--threads N] [--out FILE]

Each step is traced, and where the trace says that it fits into --most-gb really run on the CPU under torch's
profiler. Counted is all memory of tensors, that of weights and optimizer state as well, which is found by
going through the process's tensors. A CPU's host memory is its device's: offloaded checkpoints and the
embedding on the host count in full, so what is left of the saving is due to tiles and the loss in chunks.
`gpu_traced_bytes` is the same step's trace on an H100, which is spared the host's part. Both steps train with
torch's AdamW: bitsandbytes' 8-bit one would save lowvram another 14 MB. Writes benchmarks/long_step.csv;
seconds are under the profiler, and nothing is asserted of them.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import bench_rows
import torch
from bench_rows import LIBRARIES, here
from bench_step import BENCHMARKS, LINEARS, Step, our_step, plain_step, random_text
from transformers.utils.logging import disable_progress_bar

from lowvram.demo.model import demo_model
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.source import ModelSource
from lowvram.memory.estimate import estimate
from lowvram.memory.plain import PlainStep, plain_peak_bytes
from lowvram.memory.profiled import profiled_peak_bytes

TOKENS = 8192  # all positions that SmolLM2 knows
TILE = 1024  # at 8,192 tokens 512 saves 25 MB more in twice as many calls, 2048 costs 73 MB
Name = Literal["lowvram", "plain, checkpointing", "plain"]
NAMES: tuple[Name, ...] = ("lowvram", "plain, checkpointing", "plain")
_WARM_UP_TOKENS = 16


def all_levers(tile_tokens: int) -> Levers:
    """Everything that saves memory; SmolLM2's tied embedding leaves the device only with its head."""
    return Levers(
        tile_tokens=tile_tokens,
        offload_checkpoints=True,
        loss_chunk_tokens=256,
        embedding_on_host=True,
        head="streamed",
    )


def config_of(name: Name, tokens: int, tile_tokens: int = TILE) -> StepConfig:
    """The same NF4 base, adapter and bf16 arithmetic for all three."""
    plain = Levers(gradient_checkpointing=name != "plain")
    return StepConfig(
        target_modules=LINEARS,
        seq_len=tokens,
        accumulation=1,
        levers=all_levers(tile_tokens) if name == "lowvram" else plain,
    )


def traced_bytes(folder: str, name: Name, config: StepConfig, backend: Literal["cpu", "cuda"] = "cpu") -> int:
    """Predicted peak, without running anything."""
    model = ModelSource(folder).config
    if name == "lowvram":
        return estimate(model, config, backend, (9, 0)).peak_allocated_bytes
    plain = PlainStep(
        method="qlora",
        rank=config.rank,
        targets=config.target_modules,
        dropout=config.dropout,
        seq_len=config.seq_len,
        checkpointing="non-reentrant" if config.levers.gradient_checkpointing else "no",
        clips=True,
    )
    return plain_peak_bytes(model, plain, backend, (9, 0))


@dataclass(frozen=True)
class Executed:
    """What a really run step took."""

    peak_bytes: int
    seconds: float  # under the profiler


def executed(folder: str, name: Name, config: StepConfig) -> Executed:
    """Tensors alive before the step, counted one by one, and what torch's profiler sees it allocate."""
    before = _alive()
    step: Step = (our_step if name == "lowvram" else plain_step)(folder, config)
    step(random_text(_WARM_UP_TOKENS))  # makes the optimizer's state
    gc.collect()
    held = sum(n_bytes for key, n_bytes in _alive().items() if key not in before)
    text, seconds = random_text(config.seq_len), [0.0]

    def run() -> None:
        started = time.perf_counter()
        step(text)
        seconds[0] = time.perf_counter() - started

    return Executed(held + profiled_peak_bytes(run), seconds[0])


def _alive() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor of this process holds."""
    tensors: Any = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = [t.detach().untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@dataclass(frozen=True)
class Row:
    """One step; the executed columns are empty where it was only traced."""

    step: Name
    tokens: int
    tile_tokens: int
    traced_bytes: int
    executed_bytes: int | None
    error_percent: float | None  # of the trace, signed
    share_of_plain: float | None  # executed bytes over those of plain with checkpointing
    gpu_traced_bytes: int
    seconds: float | None
    machine: str
    threads: int
    torch: str
    transformers: str
    peft: str
    bitsandbytes: str
    date: str


def measure(folder: str, tokens: int, tile_tokens: int, most_bytes: float) -> Iterator[Row]:
    """The plain steps first, whose bytes the other's are a share of."""
    yardstick: int | None = None
    for name in reversed(NAMES):
        config = config_of(name, tokens, tile_tokens)
        traced = traced_bytes(folder, name, config)
        run = executed(folder, name, config) if traced <= most_bytes else None
        if name == "plain, checkpointing" and run:
            yardstick = run.peak_bytes
        yield row_of(name, config, traced, traced_bytes(folder, name, config, "cuda"), run, yardstick)


def row_of(
    name: Name, config: StepConfig, traced: int, on_gpu: int, run: Executed | None, yardstick: int | None
) -> Row:
    """`yardstick`: executed bytes of plain with checkpointing, where they are known."""
    return Row(
        step=name,
        tokens=config.seq_len,
        tile_tokens=config.levers.tile_tokens,
        traced_bytes=traced,
        executed_bytes=run.peak_bytes if run else None,
        error_percent=round(100 * (traced / run.peak_bytes - 1), 3) if run else None,
        share_of_plain=round(run.peak_bytes / yardstick, 3) if run and yardstick else None,
        gpu_traced_bytes=on_gpu,
        seconds=round(run.seconds, 1) if run else None,
        **here(*LIBRARIES),
    )


def write(rows: list[Row], path: Path) -> None:
    bench_rows.write([asdict(row) for row in rows], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--tile", type=int, default=TILE)
    parser.add_argument("--threads", type=int, help="fewer than the cores where neighbours take some")
    parser.add_argument("--most-gb", type=float, default=10.0, help="a step that takes more is only traced")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "long_step.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    rows: list[Row] = []
    for row in measure(demo_model(print), args.tokens, args.tile, 1e9 * args.most_gb):
        rows.append(row)
        write(rows, args.out)
        executed_mb = f"{row.executed_bytes / 1e6:,.1f} MB" if row.executed_bytes else "not run"
        error = f", off by {row.error_percent:+.2f} %" if row.error_percent is not None else ""
        print(
            f"{row.step}: traced {row.traced_bytes / 1e6:,.1f} MB, executed {executed_mb}{error}", flush=True
        )


if __name__ == "__main__":
    main()
