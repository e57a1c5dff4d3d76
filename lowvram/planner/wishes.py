"""Wishes: what the user asked for; the planner obeys each or refuses, and never bends one."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import Field, ValidationError

from lowvram.engine.config import AdapterInit, BasePrecision, Bias, Levers, OptimizerName
from lowvram.errors import ConfigError
from lowvram.frozen import Frozen
from lowvram.planner.profiles import Prefer

_ALL_OFF: dict[str, Any] = {
    "double_quantization": False,
    "gradient_checkpointing": False,
    "kept_layers": 0,
    "loss_chunk_tokens": 1 << 20,
    "tile_tokens": 0,
    "offload_checkpoints": False,
    "embedding_on_host": False,
    "head": "16bit",
    "empty_cache": False,
    "liger": False,
}
_ALL_ON: dict[str, Any] = {  # but liger, which is on where it is installed
    "double_quantization": True,
    "gradient_checkpointing": True,
    "kept_layers": 0,
    "loss_chunk_tokens": 64,
    "tile_tokens": 1024,
    "offload_checkpoints": True,
    "embedding_on_host": True,
    "head": "nf4",
    "empty_cache": True,
}
_WITHOUT_TRAINING = {"gradient_checkpointing": False, "optimizer": "adamw"}  # what is not there to choose


class Wishes(Frozen):
    """None means: decide for me."""

    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    dropout: float | None = Field(None, ge=0, lt=1)
    targets: str | None = Field(None, min_length=1)
    seq_len: int | None = Field(None, ge=8)
    batch: int | None = Field(None, ge=1, le=1 << 16)
    precision: BasePrecision | None = None
    optimizer: OptimizerName | None = None
    micro_batch: int | None = Field(None, ge=1, le=1 << 16)
    packing: bool | None = None
    rslora: bool | None = None
    bias: Bias | None = None
    init: AdapterInit | None = None
    init_batches: int | None = Field(None, ge=1, le=1 << 16)
    dora: bool | None = None
    lora_plus: float | None = Field(None, ge=1, allow_inf_nan=False)
    lora_fa: bool | None = None
    inference_mode: bool = False
    no_offload: bool = False
    prefer: Prefer | None = None
    levers: str = "default"
    epochs: float | None = Field(None, gt=0, le=1e4, allow_inf_nan=False)
    steps: int | None = Field(None, ge=1, le=10**9)
    learning_rate: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=1 << 32)  # numpy's range
    keep_checkpoints: int | None = Field(None, ge=1, le=10**6)
    early_stop: int | None = Field(None, ge=0, le=10**6)

    @property
    def pinned(self) -> dict[str, Any]:
        """All settings of the step that the user fixed, and the planner would choose itself."""
        wished = {
            "base_precision": self.precision,
            "optimizer": self.optimizer,
            "micro_batch": self.micro_batch,
            "packing": self.packing,
        }
        given = self.pinned_levers() | {name: value for name, value in wished.items() if value is not None}
        return _WITHOUT_TRAINING | given if self.inference_mode else given

    def pinned_levers(self) -> dict[str, Any]:
        """Levers that the user fixed: `none`, `all`, or `name=value,name=value`.

        Raises:
            ConfigError: an unknown lever (with the nearest name) or a value it cannot take.
        """
        named = {"default": {}, "none": _ALL_OFF, "all": _ALL_ON}
        if self.levers in named:
            return named[self.levers]
        pinned: dict[str, Any] = {}
        for part in self.levers.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in Levers.model_fields:
                near = difflib.get_close_matches(name, list(Levers.model_fields), n=1, cutoff=0.3)
                raise ConfigError(
                    f"There is no lever '{name}'.",
                    f"Did you mean {near[0]}?" if near else f"Use {', '.join(Levers.model_fields)}.",
                )
            pinned[name] = value or "on"
        try:
            return {name: getattr(Levers.model_validate(pinned), name) for name in pinned}
        except ValidationError as error:
            first = error.errors()[0]
            which = f"{first['loc'][0]}={first['input']}" if first["loc"] else self.levers
            raise ConfigError(
                f"--levers {which}: {first['msg'].removeprefix('Value error, ')}.",
                "Write it like --levers gradient_checkpointing=off,loss_chunk_tokens=256.",
            ) from error


def wishes_from(**flags: Any) -> Wishes:
    """Wishes from command line flags.

    Raises:
        ConfigError: every flag that is out of range, in one message.
    """
    given = {k: v for k, v in flags.items() if v is not None}
    if "steps" in given and "epochs" in given:
        raise ConfigError(
            f"--steps {given['steps']} and --epochs {given['epochs']} contradict each other.",
            "Give one of them.",
        )
    try:
        return Wishes(**given)
    except ValidationError as error:
        lines = [f"--{str(e['loc'][0]).replace('_', '-')} {e['input']}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(lines), "Leave a flag out to let lowvram decide.") from error
