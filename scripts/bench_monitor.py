#!/usr/bin/env python3
"""What watching the machine costs while training: CPU seconds of the monitor's thread per second.

    python scripts/bench_monitor.py [--seconds 30]

A small model trains on the CPU beside the monitor as a run has it: on a CPU (resident memory 20 times a
second, the machine once) and on a GPU (the machine once a second through NVML). Without an NVIDIA card
NVML is the tests' stand-in: the same calls, the same look-up of 10 processes' names, but not the driver's own
time. Writes benchmarks/monitor.csv; `percent` is of one core, and its limit 0.5.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from bench_rows import here, write
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lowvram.gpu_driver import OwnMemory, read_driver  # noqa: E402
from lowvram.hardware import host_memory  # noqa: E402
from lowvram.training.machine import GpuUse, Machine  # noqa: E402
from lowvram.training.machine_warnings import MachineRules  # noqa: E402
from lowvram.training.monitor import MemoryMonitor  # noqa: E402
from lowvram.training.sampler import LOOK_SECONDS, Sampler  # noqa: E402
from lowvram.units import GiB, MiB  # noqa: E402
from tests.fake_gpu import FakeCard, fake_driver  # noqa: E402

LIMIT_PERCENT = 0.5
_PROCESSES = 10  # on a desktop's card


def train_for(seconds: float) -> int:
    """Steps of a small network on this thread; how many were done."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    x, steps, end = torch.randn(64, 256), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()
        steps += 1
    return steps


def beside(name: str, seconds: float, sampler: Sampler, start: Callable[[], None]) -> dict[str, Any]:
    """One row: the thread's CPU time while training ran for `seconds`."""
    started = time.monotonic()
    start()
    steps = train_for(seconds)
    sampler.stop()
    wall = time.monotonic() - started
    percent = 100 * sampler.cpu_seconds / wall
    return {
        "watched": name,
        "seconds": round(wall, 1),
        "training_steps": steps,
        "thread_cpu_ms": round(1000 * sampler.cpu_seconds, 2),
        "percent": round(percent, 4),
        "within_limit": percent < LIMIT_PERCENT,
    }


def on_a_cpu(seconds: float, rules: MachineRules) -> dict[str, Any]:
    """The monitor of a run on this CPU as it is."""
    monitor = MemoryMonitor("cpu")
    monitor.start(rules)
    assert monitor.sampler is not None
    return beside("CPU run", seconds, monitor.sampler, lambda: None)


def on_a_gpu(name: str, seconds: float, rules: MachineRules) -> dict[str, Any]:
    """The thread of a run on the driver's first card."""
    driver = read_driver()
    own = OwnMemory(driver, driver.cards[0].uuid, driver.cards[0].name, fresh=True)
    use = GpuUse(own.uuid, own.name, own.told_bytes, lambda: 4 * GiB, lambda: 180 * MiB)
    sampler = Sampler(Machine(use), rules)
    row = beside(name, seconds, sampler, sampler.start)
    assert sampler.latest is not None
    assert sampler.latest.gpu_free_bytes is not None, "the card was not read"
    return row


@contextmanager
def stand_in() -> Iterator[None]:
    """NVML that answers for a card with as many programs on it as a desktop has."""
    with pytest.MonkeyPatch.context() as patch:
        card = FakeCard()
        card.others = dict.fromkeys(psutil.pids()[:_PROCESSES], 40 * MiB)
        card.use()
        fake_driver(patch, card)
        yield


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    def rules() -> MachineRules:
        return MachineRules(Path("runs/bench"), 6 * GiB, host_memory()[0])

    yield on_a_cpu(seconds, rules())
    if read_driver().cards:
        yield on_a_gpu(f"GPU run, {read_driver().cards[0].name}", seconds, rules())
    with stand_in():
        yield on_a_gpu("GPU run, NVML's stand-in", seconds, rules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    asked = parser.parse_args()
    found = [
        row | {"looks_a_second": 1 / LOOK_SECONDS} | here("torch", "psutil", "nvidia-ml-py")
        for row in rows(asked.seconds)
    ]
    write(found, ROOT / "benchmarks" / "monitor.csv")
    table = Table("watched", "seconds", "thread CPU ms", "% of a core", "limit %", title=found[0]["machine"])
    for row in found:
        told = (row["watched"], row["seconds"], row["thread_cpu_ms"], row["percent"], LIMIT_PERCENT)
        table.add_row(*map(str, told))
    Console().print(table)


if __name__ == "__main__":
    main()
