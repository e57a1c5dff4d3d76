"""Ladder: the candidates of a search, from the fastest to the smallest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from lowvram.alloc_conf import rounds_pinned_memory
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.memory.trace import Backend
from lowvram.units import GiB

_ANY_LENGTH = 1 << 24
_PROCESS_BYTES = 2 * GiB  # Python, torch, transformers and the device's libraries in host memory
_TILE_TOKENS = (1024, 2048, 4096)  # enough rows to keep a GPU's matrix products busy
_MOST_TILES = 8  # where a larger tile is to be had: a trace of many tiles takes many seconds

# From fastest to smallest. Each row saves memory over the one before it.
_LADDER: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": False, "loss_chunk_tokens": 1024},
    {"gradient_checkpointing": True, "loss_chunk_tokens": 1024},
    {"gradient_checkpointing": True, "loss_chunk_tokens": 256},
)
_SMALL = {"gradient_checkpointing": True, "loss_chunk_tokens": 64, "optimizer": "paged_adamw8bit"}


def rungs(
    base: StepConfig, pinned: dict[str, Any], optimizer: str | None, backend: Backend, shape: ModelShape
) -> Iterator[StepConfig]:
    """The ladder with the user's levers and optimizer fixed, without repetitions."""
    seen: set[str] = set()
    for row in (*_LADDER, *_further(base, backend, shape)):
        wanted = dict(row)
        chosen = optimizer or (wanted.pop("optimizer", "adamw") if backend == "cuda" else "adamw")
        wanted.pop("optimizer", None)
        levers = {**base.levers.model_dump(), "kept_layers": 0, **wanted, **pinned}
        try:
            step = base.model_copy(update={"levers": Levers(**levers), "optimizer": chosen})
        except ValidationError:  # levers that exclude each other: this row is above or below what was pinned
            continue
        if step.model_dump_json() not in seen:
            seen.add(step.model_dump_json())
            yield step


def _further(base: StepConfig, backend: Backend, shape: ModelShape) -> list[dict[str, Any]]:
    """What the model and the device allow beyond recomputing; a CPU has no other memory to move things to."""
    rows: list[dict[str, Any]] = [_LADDER[-1]]
    apart = backend == "cuda" and base.task_type == "CAUSAL_LM"
    if apart and not shape.tied:
        rows.append(rows[-1] | {"embedding_on_host": True})
    rows.append(rows[-1] | _SMALL)
    if apart and not shape.untiled:
        rows.append(rows[-1] | {"offload_checkpoints": True})
    if not shape.untiled and (tile := tile_for(base.seq_len)):
        rows.append(rows[-1] | {"tile_tokens": tile})
    if apart:
        rows.append(rows[-1] | {"embedding_on_host": True, "head": "nf4", "loss_chunk_tokens": 2048})
    return rows[1:]


def tile_for(seq_len: int) -> int:
    """The smallest that cuts a sequence into at most eight tiles; 0 for a sequence that is a tile itself."""
    tile = next((n for n in _TILE_TOKENS if n * _MOST_TILES >= seq_len), _TILE_TOKENS[-1])
    return tile if tile < seq_len else 0


def host_bytes(step: StepConfig, shape: ModelShape) -> int:
    """Host memory beside a GPU: the process and what levers keep there."""
    bytes_each = 4 if step.compute_dtype == "fp32" else 2
    kept, levers = _PROCESS_BYTES, step.levers
    if levers.offload_checkpoints:  # every layer's input but the first, and the gradients of one layer's
        token_bytes = step.micro_batch * shape.hidden_size * bytes_each
        whole, rest = divmod(step.seq_len, levers.tile_tokens or step.seq_len)
        tile_bytes = _pinned((levers.tile_tokens or step.seq_len) * token_bytes)
        kept += shape.n_layers * (whole * tile_bytes + _pinned(rest * token_bytes))
    if levers.embedding_on_host or levers.head == "streamed":
        kept += _pinned(shape.vocab_size * shape.hidden_size * bytes_each)
    return kept


def _pinned(n_bytes: int) -> int:
    """What a block takes. Rounded, 40 MiB of a tile of 4,096 tokens of 5,120 numbers are 64."""
    return 1 << (n_bytes - 1).bit_length() if n_bytes and rounds_pinned_memory() else n_bytes


def longest_on_host(step: StepConfig, shape: ModelShape, free_bytes: int) -> int:
    """The most tokens of a sequence whose checkpoints the host can take, in whole tiles."""
    if not step.levers.offload_checkpoints:
        return _ANY_LENGTH
    unit = step.levers.tile_tokens or 64
    least, most = 0, _ANY_LENGTH // unit
    while most - least > 1:
        middle = (least + most) // 2
        fits = host_bytes(step.model_copy(update={"seq_len": middle * unit}), shape) <= free_bytes
        least, most = (middle, most) if fits else (least, middle)
    return least * unit


def micro_batches(effective_batch: int) -> list[int]:
    """Powers of two that divide the effective batch, up to 16, and the whole batch when it is small."""
    sizes = {n for n in (1, 2, 4, 8, 16) if effective_batch % n == 0}
    return sorted(sizes | ({effective_batch} if effective_batch <= 16 else set()))


def split(step: StepConfig, micro_batch: int) -> StepConfig:
    """The same effective batch in micro-batches of another size."""
    whole = step.micro_batch * step.accumulation
    return step.model_copy(update={"micro_batch": micro_batch, "accumulation": whole // micro_batch})


def with_kept(step: StepConfig, kept_layers: int) -> StepConfig:
    """So many of the last layers are not computed again."""
    levers = step.levers.model_copy(update={"kept_layers": kept_layers})
    return step.model_copy(update={"levers": levers})


def with_length(step: StepConfig, seq_len: int) -> StepConfig:
    """Another sequence length, in tiles that suit it where there are tiles at all; all layers recompute."""
    levers = with_kept(step, 0).levers
    if levers.tile_tokens and (tile := tile_for(seq_len)) > levers.tile_tokens:
        levers = levers.model_copy(update={"tile_tokens": tile})
    return step.model_copy(update={"seq_len": seq_len, "levers": levers})


def describe(step: StepConfig) -> str:
    """What is traced, in a line."""
    levers = step.levers
    checkpointing = "recompute" if levers.gradient_checkpointing else "keep all activations"
    if levers.kept_layers:
        checkpointing = f"keep the last {levers.kept_layers} layers' activations"
    tiles = f", tiles of {levers.tile_tokens}" if levers.tile_tokens else ""
    return f"{step.micro_batch} x {step.seq_len} tokens{tiles}, {checkpointing}, {step.optimizer}"
