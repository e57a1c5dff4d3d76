"""Bytes of one long step of SmolLM2-135M: lowvram with every exact lever beside plain transformers + peft.

    PYTHONPATH=. python scripts/bench_long_step.py [--tokens 8192] [--tile 512] [--threads N] [--out FILE]

Each step is traced and, where it fits into --most-gb, really run on the CPU under torch's profiler. What is
counted is all memory of the process's tensors, weights and optimizer state as well. A CPU's host memory is
the memory of its device: offloaded checkpoints and the embedding on the host count in full, so this shows
what tiles and the loss in chunks save; a GPU is spared those as well (column `apart_bytes`, traced).
Writes benchmarks/long_step.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from bench_step import BENCHMARKS, LINEARS, Step, Text, our_step, plain_step
from transformers.utils.logging import disable_progress_bar

from lowvram.demo.model import demo_model
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.source import ModelSource
from lowvram.memory.estimate import estimate
from lowvram.memory.plain import PlainStep, plain_peak_bytes
from lowvram.memory.profiled import profiled_peak_bytes

TOKENS = 8192  # all positions that SmolLM2 knows
TILE = 512  # 256 saves 8 MB more and takes twice as many calls; 1024 costs 26 MB
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
    step(text_of(_WARM_UP_TOKENS))  # makes the optimizer's state
    gc.collect()
    held = sum(n_bytes for key, n_bytes in _alive().items() if key not in before)
    text, started = text_of(config.seq_len), time.perf_counter()
    peak = profiled_peak_bytes(lambda: step(text))
    return Executed(held + peak, time.perf_counter() - started)


def text_of(tokens: int) -> Text:
    """Random ids, all trained: the step that the trace assumes."""
    return Text(torch.randint(5, 40_000, (1, tokens), generator=torch.Generator().manual_seed(tokens)), 0)


def _alive() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor of this process holds."""
    tensors: Any = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {s.data_ptr(): s.nbytes() for s in storages}


if __name__ == "__main__":
    import sys

    disable_progress_bar()
    folder = demo_model(print)
    for name in sys.argv[2:]:
        c = config_of(name, int(sys.argv[1]))
        tr = traced_bytes(folder, name, c)
        print(name, "traced", tr, flush=True)
        print("cuda", traced_bytes(folder, name, c, "cuda"), flush=True)
        if name == "plain" and int(sys.argv[1]) > 4000:
            continue
        e = executed(folder, name, c)
        print(e, 100 * (tr / e.peak_bytes - 1), flush=True)
        from lowvram.memory.run import trace_step

        if name == "lowvram":
            t = trace_step(ModelSource(folder).config, c, "cpu")
            print(
                {
                    k: sum(a.n_bytes for a in t.allocations if a.component == k)
                    for k in ("base_weights", "embeddings", "head", "adapters", "optimizer_state")
                }
            )
