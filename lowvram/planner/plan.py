"""Plan: everything a run needs, decided, validated, and readable as YAML."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from lowvram.data.shapes import Reading
from lowvram.engine.config import StepConfig
from lowvram.frozen import Frozen
from lowvram.memory.estimate import MemoryEstimate
from lowvram.planner.profiles import parse_yaml

# What a plan tells and what decides no gradient. What was read has its own hash, wherever it lies.
_TOLD = {"reading", "data", "eval_data", "device", "budget_bytes", "estimate", "largest_seq_len"}
_TOLD |= {"host_ram_bytes", "n_parameters", "n_trainable", "reasons", "seconds_per_step", "seconds_in_all"}
_PACED = {"evaluate_every", "save_every", "keep_checkpoints", "early_stop", "log_with"}  # may change in a run


class PlannedDevice(Frozen):
    """The device as it was when the plan was made."""

    backend: Literal["cuda", "rocm", "xpu", "mps", "cpu"] = Field(description="torch's device kind")
    name: str = Field(description="as the driver calls it")
    total_bytes: int = Field(description="of the card")
    free_bytes: int = Field(description="of them, when the plan was made")
    context_bytes: int = Field(description="taken by this process's driver context")
    held_bytes: int = Field(description="held by the desktop and other programs")
    capability: tuple[int, int] | None = Field(None, description="NVIDIA's compute capability")


class Plan(StepConfig):
    """The contract of a run: printed before a weight is read, saved with it, checked on resume."""

    version: Literal[1] = Field(1, description="of this file's format")
    model: str = Field(description="folder or hub id")
    trust_remote_code: bool = Field(False, description="run Python code that the model brings along")
    data: str | None = Field(None, description="training data: file or hub id")
    data_sha256: str | None = Field(None, description="of the data's content; a changed file is refused")
    reading: Reading = Field(Reading(), description="how the data is read")
    eval_data: str | None = Field(None, description="held out instead of a share of data; read as data is")
    eval_data_sha256: str | None = Field(None, description="of its content; a changed file is refused")
    profile: str = Field(description="whose policy was used")
    learning_rate: float = Field(2e-4, gt=0, description="its peak, after the warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="of the learning rate after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="over which the learning rate rises from 0")
    total_steps: int = Field(1, ge=1, description="optimizer steps")
    held_out_share: float = Field(0.05, gt=0, lt=1, description="of the examples, kept for the held-out loss")
    evaluate_every: int = Field(1, ge=1, description="optimizer steps between held-out losses")
    save_every: int = Field(1, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest ones that stay, and the best one besides")
    early_stop: int = Field(
        0, ge=0, description="so many held-out losses in a row without a better one end the run; 0: never"
    )
    log_with: tuple[str, ...] = Field((), description="trackers that are told of every step, such as wandb")
    seed: int = Field(0, ge=0, description="of the data's order, dropout and the adapter")
    device: PlannedDevice = Field(description="for which the plan was made")
    budget_bytes: int = Field(
        description="device memory the step may reserve: card - context - held - margin"
    )
    estimate: MemoryEstimate = Field(description="predicted by running this step on meta tensors")
    largest_seq_len: int = Field(description="longest that fits, kept layers recomputed, all else as planned")
    host_ram_bytes: int = Field(description="host memory while loading and training")
    seconds_per_step: float = Field(description="modelled, not measured")
    seconds_in_all: float = Field(description="modelled: all steps, and the held-out losses between them")
    n_parameters: int = Field(description="of the base model")
    n_trainable: int = Field(description="of the adapter")
    reasons: tuple[str, ...] = Field((), description="why the plan is as it is")

    @model_validator(mode="after")
    def _warms_up_while_it_runs(self) -> Plan:
        if self.warmup_steps >= max(self.total_steps, 2):
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below total_steps {self.total_steps}")
        return self

    @property
    def step(self) -> StepConfig:
        """What one step computes, without the rest of the plan."""
        return StepConfig(**{name: getattr(self, name) for name in StepConfig.model_fields})

    @property
    def fits(self) -> bool:
        return self.estimate.peak_reserved_bytes <= self.budget_bytes

    @property
    def longest_context(self) -> str:
        """As it is shown."""
        how = "with all layers recomputed" if self.levers.kept_layers else "with all else as planned"
        return f"{self.largest_seq_len:,} tokens {how}"

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the result of training, as JSON values: all but `_TOLD` and `_PACED`."""
        return self.model_dump(mode="json", exclude=_TOLD | _PACED)

    @property
    def sha256(self) -> str:
        """Of what decides the result of training: not of the device, the estimates or the reasons."""
        text = self.model_dump_json(exclude=_TOLD | _PACED)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """One key a line, each with its meaning as a comment."""
        head = "# A lowvram plan. Run it with: lowvram train THIS_FILE\n"
        return head + "".join(_yaml_lines(self))

    @classmethod
    def from_yaml(cls, file: Path) -> Plan:
        """Read and validate; `ConfigError` lists everything that is wrong."""
        plan: Plan = parse_yaml(cls, file)
        return plan


def _yaml_lines(model: BaseModel, indent: str = "") -> list[str]:
    lines = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        comment = f"  # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:{comment}\n")
            lines += _yaml_lines(value, indent + "  ")
        else:
            lines.append(f"{indent}{name}: {_inline(value)}{comment}\n")
    return lines


def _inline(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text.removesuffix("\n...").strip()
