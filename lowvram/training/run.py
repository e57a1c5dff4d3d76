"""Run: everything that lives while a plan is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowvram.engine.config import StepConfig
from lowvram.engine.source import ModelSource
from lowvram.hardware import Hardware
from lowvram.memory.rung import Rung
from lowvram.planner.plan import Plan
from lowvram.training.data import TrainingData
from lowvram.training.evaluation import Evaluations
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
    hardware: Hardware  # before the model was loaded
    model: Any  # PeftModel
    loss_of: nn.Module
    optimizer: Any
    scheduler: Any
    data: TrainingData
    deciding: dict[str, Any]  # Plan.deciding, as it was when this process began
    counts: dict[str, int]  # of examples, of the data and of the held-out file
    step: int = 0
    measured_steps: int = 0  # of this process; `step` counts those before a resume too
    largest_batch_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    loss_before: float | None = None
    same_held_out: bool = True  # as `loss_before` was measured on
    rungs: list[Rung] = field(default_factory=list)  # taken so far; the last one is how steps run now
    evaluations: Evaluations = field(default_factory=Evaluations)
    n_checkpoints: int = 0
    checkpoint_seconds: float = 0.0  # without the one that a resume began from
    checkpoint_bytes: int = 0  # of the newest

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def now(self) -> StepConfig:
        """The step as it is run: the plan's, or the last rung's."""
        return self.rungs[-1].step if self.rungs else self.plan.step

    @property
    def predicted_bytes(self) -> int:
        """Peak reserved bytes of the step as it is run."""
        estimate = self.plan.estimate
        return self.rungs[-1].predicted_peak_reserved_bytes if self.rungs else estimate.peak_reserved_bytes

    def tell(self, kind: EventKind, text: str) -> None:
        """On the screen, and in RUN/events.jsonl for whoever looks later."""
        self.view.note(text)
        self.folder.append_event(Event.now(kind, text, self.step))

    def tell_machine(self) -> None:
        """What the monitor has to warn of since the last time."""
        for text in self.monitor.warnings():
            self.tell("machine", text)
