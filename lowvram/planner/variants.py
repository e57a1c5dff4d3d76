"""Variants: the same step in other micro-batches, with another lever, at another length; and its name."""

from __future__ import annotations

from typing import Any

from lowvram.engine.config import Levers, StepConfig

TILE_TOKENS = (1024, 2048, 4096)  # enough rows to keep a GPU's matrix products busy
_MOST_TILES = 8  # where a larger tile is to be had: a trace of many tiles takes many seconds


def with_value(step: StepConfig, name: str, value: Any) -> StepConfig:
    """The step with one setting changed; `micro_batch` keeps the effective batch."""
    if name == "micro_batch":
        return split(step, value)
    if name in Levers.model_fields:
        return step.model_copy(update={"levers": step.levers.model_copy(update={name: value})})
    return step.model_copy(update={name: value})


def value_of(step: StepConfig, name: str) -> Any:
    """A setting of the step or of its levers."""
    return getattr(step.levers if name in Levers.model_fields else step, name)


def split(step: StepConfig, micro_batch: int) -> StepConfig:
    """The same effective batch in micro-batches of another size."""
    return step.model_copy(
        update={"micro_batch": micro_batch, "accumulation": step.effective_batch // micro_batch}
    )


def with_kept(step: StepConfig, kept_layers: int) -> StepConfig:
    """So many of the last layers are not computed again."""
    return with_value(step, "kept_layers", kept_layers)


def with_length(step: StepConfig, seq_len: int) -> StepConfig:
    """Another sequence length, in tiles that suit it where there are tiles at all; all layers recompute."""
    levers = with_kept(step, 0).levers
    if levers.tile_tokens and (tile := tile_for(seq_len)) > levers.tile_tokens:
        levers = levers.model_copy(update={"tile_tokens": tile})
    return step.model_copy(update={"seq_len": seq_len, "levers": levers})


def tile_for(seq_len: int) -> int:
    """The smallest that cuts a sequence into at most eight tiles; 0 for a sequence that is a tile itself."""
    tile = next((n for n in TILE_TOKENS if n * _MOST_TILES >= seq_len), TILE_TOKENS[-1])
    return tile if tile < seq_len else 0


def describe(step: StepConfig) -> str:
    """What is traced, in a line."""
    levers = step.levers
    checkpointing = "recompute" if levers.gradient_checkpointing else "keep all activations"
    if levers.kept_layers:
        checkpointing = f"keep the last {levers.kept_layers} layers' activations"
    tiles = f", tiles of {levers.tile_tokens}" if levers.tile_tokens else ""
    tokens = f"{step.micro_batch} x {step.seq_len} tokens{tiles}"
    return f"{step.base_precision}, {tokens}, {checkpointing}, {step.optimizer}"
