#!/usr/bin/env python3
"""Times the prediction: a whole trace, the planner's shortcut, `lowvram plan` cold and warm, `--help`.

Prints seconds and ratios; nothing is asserted, for timings depend on the machine and on who shares it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("Qwen/Qwen2-7B", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1")
COMMAND = [sys.executable, "-c", "from lowvram.cli import main; main()"]


def timed(work: Callable[[], Any]) -> float:
    """The best of three, in seconds."""
    return min(_once(work) for _ in range(3))


def _once(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def traces() -> None:
    """Whole trace against four blocks extended, both replayed through the allocator."""
    from lowvram.engine.config import StepConfig
    from lowvram.engine.known_models import known_config
    from lowvram.memory.estimate import estimate, estimate_of
    from lowvram.memory.run import trace_step

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    step = StepConfig(seq_len=2048, target_modules=targets)
    for name in MODELS:
        config = known_config(name)
        assert config is not None
        whole = timed(lambda c=config: estimate_of(trace_step(c, step, "cuda", (8, 6)), step, "cuda"))
        short = timed(lambda c=config: estimate(c, step, "cuda", (8, 6)))
        print(f"{name}: whole trace {whole:.2f} s, one candidate {short:.2f} s, {whole / short:.1f}x")


def commands() -> None:
    """`lowvram plan` with an empty and with a filled cache of traces, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LOWVRAM_CACHE": folder, "HF_HUB_OFFLINE": "1"}

        def run(*words: str) -> None:
            subprocess.run([*COMMAND, *words], env=environment, check=True, capture_output=True)

        plan = ("plan", "--model", MODELS[0], "--vram", "8GB", "--json")
        cold = _once(lambda: run(*plan))
        warm = timed(lambda: run(*plan))
        print(f"lowvram plan {MODELS[0]}: cold {cold:.1f} s, warm {warm:.1f} s, {cold / warm:.1f}x")
        print(f"lowvram --help: {timed(lambda: run('--help')):.2f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    traces()
    commands()
