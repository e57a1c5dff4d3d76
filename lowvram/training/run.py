"""Run: everything that lives while a plan is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowvram.engine.source import ModelSource
from lowvram.engine.step import evaluate
from lowvram.planner.plan import Plan
from lowvram.training.data import TrainingData
from lowvram.training.events import Event, EventKind
from lowvram.training.live import View
from lowvram.training.monitor import MemoryMonitor
from lowvram.training.run_folder import RunFolder


@dataclass
class Run:
    """Everything that lives while a plan is trained."""

    plan: Plan
    folder: RunFolder
    source: ModelSource
    view: View
    accelerator: Accelerator
    monitor: MemoryMonitor
    model: Any  # PeftModel
    loss_of: nn.Module
    optimizer: Any
    scheduler: Any
    data: TrainingData
    step: int = 0
    measured_steps: int = 0  # of this process; `step` counts those before a resume too
    largest_batch_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def held_out_loss(self) -> float:
        with self.monitor.during("evaluation"):
            return evaluate(self.loss_of, self.data.held_out_batches(), self.device)

    def tell(self, kind: EventKind, text: str) -> None:
        """On the screen, and in RUN/events.jsonl for whoever looks later."""
        self.view.note(text)
        self.folder.append_event(Event.now(kind, text, self.step))
