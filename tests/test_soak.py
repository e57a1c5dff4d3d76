"""Soak: 2,000 real optimizer steps leave no memory, no live tensor, no open file and no thread behind."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensor

from lowvram import hardware, planning
from lowvram.engine.source import ModelSource
from lowvram.planner.profiles import profile_for
from lowvram.planner.wishes import Wishes
from lowvram.training.live import LineView
from lowvram.training.loop import train
from lowvram.training.run_folder import RunFolder
from lowvram.units import MiB
from tests.tiny_models import save_llama

STEPS = 2000
WARM = 400  # until the allocators' pools and Python's caches have their size
SAMPLE_EVERY = 10
COUNTED = (500, STEPS - 1)  # the last step's report evaluates, saves and looks otherwise
MOST_BYTES_A_STEP = MiB / 1000


class Samples(LineView):
    """The real lines view, into nothing, that looks at its own process after a step."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "soak")
        self._process = psutil.Process()
        self.steps: list[int] = []
        self.resident: list[int] = []
        self.counts: list[dict[str, int]] = []

    def step(self, record: Any) -> None:
        super().step(record)
        if record.step % SAMPLE_EVERY == 0:
            self.steps.append(record.step)
            self.resident.append(self._process.memory_info().rss)
        if record.step in COUNTED:
            self.counts.append(
                {
                    "live tensors' bytes": live_bytes(),
                    "open files": len(self._process.open_files()),
                    "threads": self._process.num_threads(),
                }
            )

    def slope(self) -> float:
        """Bytes a step, fitted after the warm-up."""
        warm = np.array(self.steps) >= WARM
        steps, resident = np.array(self.steps)[warm], np.array(self.resident)[warm]
        return float(np.polyfit(steps, resident, 1)[0])


def live_bytes() -> int:
    """Of all storages that a tensor within the collector's reach still holds."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if _is_real_tensor(found)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _is_real_tensor(found: Any) -> bool:
    """Meta tensors and fake ones, of which planning leaves some, have no bytes."""
    kind = type(found)
    return issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor) and not found.is_meta


@pytest.fixture
def home(smollm: Path, tmp_path: Path) -> Path:
    """A one-layer model of SmolLM2's vocabulary, and 60 rows of unequal lengths."""
    save_llama(
        smollm,
        tmp_path / "tiny",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    rows = [{"question": "What is it? " * (i % 4 + 1), "answer": str(i)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_thousand_steps_leave_nothing_behind(home: Path) -> None:
    """NF4 and dropout, several micro-batches a step, saved and evaluated every hundred steps."""
    wishes = Wishes(precision="nf4", rank=2, batch=4, micro_batch=2, steps=STEPS)
    here, source = hardware.probe(trial=False), ModelSource(str(home / "tiny"))
    data = str(home / "rows.jsonl")
    planned = planning.plan_for(source, data, here, profile_for(here), wishes, lambda _: None)
    plan = planned.plan.model_copy(update={"evaluate_every": 100, "save_every": 100})
    assert planned.prepared is not None
    with Path(os.devnull).open("w") as nowhere:
        view = Samples(Console(file=nowhere))
        train(plan, RunFolder.create(home / "run"), source, planned.prepared, view)
    assert view.steps[-1] == STEPS
    assert view.counts[0]["live tensors' bytes"] > 1_000_000  # the embedding alone
    assert view.counts[1] == view.counts[0]
    assert view.slope() < MOST_BYTES_A_STEP
