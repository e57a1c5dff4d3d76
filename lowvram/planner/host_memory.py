"""Host memory beside a GPU: the process and what levers keep there."""

from __future__ import annotations

from lowvram.alloc_conf import rounds_pinned_memory
from lowvram.engine.config import GRADIENT_INITS, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.variants import with_length
from lowvram.units import GiB

_ANY_LENGTH = 1 << 24
_PROCESS_BYTES = 2 * GiB  # Python, torch, transformers and the device's libraries


def host_bytes(step: StepConfig, shape: ModelShape) -> int:
    """Host memory beside a GPU."""
    bytes_each = 4 if step.compute_dtype == "fp32" else 2
    kept, levers = _PROCESS_BYTES, step.levers
    if levers.offload_checkpoints:  # every layer's input but the first, and the gradients of one layer's
        token_bytes = step.micro_batch * shape.hidden_size * bytes_each
        whole, rest = divmod(step.seq_len, levers.tile_tokens or step.seq_len)
        tile_bytes = _pinned((levers.tile_tokens or step.seq_len) * token_bytes)
        kept += shape.n_layers * (whole * tile_bytes + _pinned(rest * token_bytes))
    if levers.embedding_on_host or levers.head == "streamed":
        kept += _pinned(shape.table_parameters * bytes_each)
    if step.init in GRADIENT_INITS:  # the largest weight's gradient, and the sum that it is added to
        largest = max(one.n_in * one.n_out for one in shape.linears if one.name in step.target_modules)
        kept += 2 * 4 * largest
    return kept


def _pinned(n_bytes: int) -> int:
    """What a block takes. Rounded, 40 MiB of a tile of 4,096 tokens of 5,120 numbers are 64."""
    return 1 << (n_bytes - 1).bit_length() if n_bytes and rounds_pinned_memory() else n_bytes


def longest_on_host(step: StepConfig, shape: ModelShape, free_bytes: int) -> int:
    """The most tokens of a sequence whose checkpoints the host can take, in whole tiles that suit it."""
    if not step.levers.offload_checkpoints:
        return _ANY_LENGTH
    unit = step.levers.tile_tokens or 64
    least, most = 0, _ANY_LENGTH // unit
    while most - least > 1:
        middle = (least + most) // 2
        fits = host_bytes(with_length(step, middle * unit), shape) <= free_bytes
        least, most = (middle, most) if fits else (least, middle)
    return least * unit
