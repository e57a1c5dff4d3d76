"""Levers: every switch of the engine as the planner sees it: its settings, and why it has none here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowvram.engine.config import PAGED, BasePrecision, ComputeDtype, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.hardware import Hardware
from lowvram.planner.variants import TILE_TOKENS, tile_for

_LARGEST_MICRO_BATCH = 16  # beyond, a consumer GPU's multiprocessors have been busy for long


@dataclass(frozen=True)
class Setting:
    """What the levers' settings depend on."""

    base: StepConfig
    shape: ModelShape
    hardware: Hardware
    layer_period: int  # layers after which they repeat; 0 where a trace has to run them all
    uses_host: bool = True  # host memory may be used beside a GPU's

    @property
    def on_cpu(self) -> bool:
        return self.hardware.backend == "cpu"

    @property
    def decodes_only(self) -> bool:
        return self.shape.task_type == "CAUSAL_LM"


Values = tuple[Any, ...]


@dataclass(frozen=True)
class Lever:
    """One switch.

    What a setting saves is traced (`Search.estimate`), what it costs is modelled (`TimeModel`).
    """

    name: str  # of StepConfig's or Levers' field
    does: str
    values: Callable[[Setting], Values]  # from the fastest to the one that takes least memory
    why_not: Callable[[Setting], str] = lambda _: ""  # why it cannot be moved here; "" where it can
    on_host: Values = ()  # settings that keep something in host memory beside a GPU
    rests_last: bool = False  # unused it is at its last setting, not at its first

    def unused(self, setting: Setting) -> Any:
        """Its setting where nobody moves it."""
        return self.values(setting)[-1 if self.rests_last else 0]

    def settings(self, setting: Setting) -> Values:
        """Those that the model, the device and the user allow."""
        if self.why_not(setting):
            return (self.unused(setting),)
        values = self.values(setting)
        return values if setting.uses_host else tuple(v for v in values if v not in self.on_host)


def sixteen_bit(hardware: Hardware) -> ComputeDtype:
    """What the device computes in, and an unquantised base is stored in."""
    if hardware.bf16:
        return "bf16"
    return "fp32" if hardware.backend in ("cpu", "mps") else "fp16"


def compute_dtype(precision: BasePrecision, hardware: Hardware) -> ComputeDtype:
    """What is computed in: an unquantised base's own, else what the device has in hardware."""
    return sixteen_bit(hardware) if precision == "nf4" or precision == "int8" else precision


def _micro_batches(setting: Setting) -> Values:
    """Powers of two that divide the effective batch, up to 16, and the whole batch when it is small."""
    whole = setting.base.effective_batch
    sizes = {n for n in (1, 2, 4, 8, 16) if whole % n == 0}
    return tuple(sorted(sizes | ({whole} if whole <= _LARGEST_MICRO_BATCH else set()), reverse=True))


def _kept_layers(setting: Setting) -> Values:
    """All but one of the layers at most, in whole periods, so that a trace need not run every layer."""
    period, n_layers = setting.layer_period, setting.shape.n_layers
    if not setting.decodes_only or not period:
        return (0,)
    return tuple(range((n_layers - 1) // period * period, -1, -period))


def _tiles(setting: Setting) -> Values:
    smallest = tile_for(setting.base.seq_len)
    sizes = [n for n in TILE_TOKENS if smallest and smallest <= n < setting.base.seq_len]
    return (0, *reversed(sizes))


def _not_beside(setting: Setting) -> str:
    return "a CPU has no other memory to move it to" if setting.on_cpu else ""


def _vocabulary(setting: Setting) -> str:
    return _not_beside(setting) or ("" if setting.decodes_only else "encoder and decoder share one embedding")


LEVERS: tuple[Lever, ...] = (
    Lever(
        "base_precision",
        "the frozen base in 16 bits, or quantised to 8 or 4 bits a weight",
        lambda s: (sixteen_bit(s.hardware), "int8", "nf4"),
    ),
    Lever("double_quantization", "NF4's block scales are quantised as well", lambda _: (False, True)),
    Lever(
        "micro_batch",
        "examples in one forward pass; the effective batch stays",
        _micro_batches,
        rests_last=True,
    ),
    Lever(
        "gradient_checkpointing",
        "layers keep their input only and are computed again in backward",
        lambda _: (False, True),
    ),
    Lever("kept_layers", "so many of the last layers are not computed again", _kept_layers, rests_last=True),
    Lever(
        "loss_chunk_tokens",
        "the logits of so many trained tokens exist at one time",
        lambda _: (1024, 256, 64),
    ),
    Lever(
        "embedding_on_host",
        "the embedding's table is in host memory, the batch's rows travel",
        lambda _: (False, True),
        _vocabulary,
        on_host=(True,),
    ),
    Lever(
        "optimizer",
        "the state of AdamW in float32, or in 8 bits",
        lambda s: ("adamw", "paged_adamw8bit" if s.uses_host else "adamw8bit"),
        lambda s: "a CPU's 8-bit state is slow, and small beside the model" if s.on_cpu else "",
        on_host=PAGED,
    ),
    Lever(
        "offload_checkpoints",
        "the layers' inputs wait in host memory",
        lambda _: (False, True),
        lambda s: _not_beside(s) or s.shape.untiled,
        on_host=(True,),
    ),
    Lever(
        "tile_tokens",
        "a layer runs on so many tokens at a time",
        _tiles,
        lambda s: s.shape.untiled or ("" if tile_for(s.base.seq_len) else "a sequence is one tile"),
    ),
    Lever(
        "head",
        "the head is whole, quantised, or streamed from host memory",
        lambda _: ("16bit", "int8", "nf4", "streamed"),
        _vocabulary,
        on_host=("streamed",),
    ),
    # decided before the search, which leaves them as they are
    Lever("packing", "examples lie one after another in a row, without padding", lambda s: (s.base.packing,)),
    Lever("liger", "Liger's kernels for norms and gated MLPs", lambda s: (s.base.levers.liger,)),
    Lever(
        "expandable_segments",
        "the CUDA allocator grows its segments",
        lambda s: (s.base.levers.expandable_segments,),
    ),
    Lever("empty_cache", "what the allocator caches goes back after each step", lambda _: (False,)),
)
