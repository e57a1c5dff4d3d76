"""The engine's model on the meta device: every tensor has its shape and a storage, none has bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from lowvram.engine.adapters import add_adapters
from lowvram.engine.batch import Batch
from lowvram.engine.config import StepConfig
from lowvram.engine.model import NESTED_BLOCK, NF4_BLOCK, skeleton
from lowvram.memory.kernels import choose_kernels
from lowvram.memory.trace import Backend, Capability

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def meta_model(
    config: PretrainedConfig, step: StepConfig, backend: Backend, capability: Capability = None
) -> PeftModel:
    """The model that would be trained, adapters included, with the kernels of `backend`.

    Meta and not fake tensors: an operator costs about 30 us instead of 500.
    """
    with torch.device("meta"):
        model = add_adapters(skeleton(config, step), step)
    make_traceable(model, backend, capability)
    return model.train()


def make_traceable(model: nn.Module, backend: Backend, capability: Capability) -> None:
    """Packed weights where layers quantise, all on the meta device, the kernels of `backend`."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            quantize_weight(module)
    onto_meta(model)
    choose_kernels(model, backend, capability)


def onto_meta(model: nn.Module) -> None:
    """What a constructor computes on the CPU whatever it is told is real until here; ties are kept."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                moved = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
                setattr(module, name, moved)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                setattr(module, name, buffer.to("meta"))


def quantize_weight(module: Any) -> None:
    """Packed weight, scales and (double quantisation) scales of scales, as bitsandbytes stores them."""
    from bitsandbytes.functional import QuantState

    old = module.weight
    n_weights = old.shape[0] * old.shape[1]
    n_blocks = math.ceil(n_weights / NF4_BLOCK)
    nested = old.compress_statistics
    state2 = None
    if nested:
        state2 = QuantState(
            absmax=_empty((math.ceil(n_blocks / NESTED_BLOCK),), torch.float32),
            code=_empty((256,), torch.float32),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    packed: Any = nn.Parameter(_empty(((n_weights + 1) // 2, 1), torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=_empty((n_blocks,), torch.uint8 if nested else torch.float32),
        shape=old.shape,
        code=_empty((16,), torch.float32),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=module.compute_dtype,
        offset=_empty((), torch.float32) if nested else None,
        state2=state2,
    )
    module.weight = packed


def source_bytes(parameter: Any) -> int:
    """Of a quantised weight as it was before."""
    state = parameter.quant_state
    return int(math.prod(state.shape) * state.dtype.itemsize)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_batches(step: StepConfig, window: int | None) -> list[Batch]:
    """The micro-batches whose worst is the worst of all: one, or two if packed examples may exceed a window.

    Where none does, attention needs no mask and is another kernel's: before Ampere, where heads are grouped,
    one that takes more for a row of examples as long as the window than the masked one for longer ones.
    """
    batches = [meta_batch(step)]
    if step.packing and window is not None and window < step.seq_len:
        full = step.micro_batch * step.seq_len
        rest = (full % window,) if full % window else ()
        batches.append(_packed_batch((window,) * (full // window) + rest))
    return batches


def meta_batch(step: StepConfig) -> Batch:
    """A micro-batch of the plan's full shape in which every token is trained: the worst case.

    Of packed rows that is the full row of `micro_batch` examples, each as long as can be: what attention
    makes for one example, and what grows with its square, is at its largest. Shorter examples are more, and
    each has small tensors of its own, rounded up to 512 bytes; for that data/packed_order.py takes a token
    off the row for each of them.
    """
    rows = step.micro_batch
    if step.packing:
        return _packed_batch((step.seq_len,) * rows)
    if step.target_len is None:
        trained = rows * (step.seq_len - 1)
        shapes: list[tuple[int, ...]] = [(rows, step.seq_len), (trained,), (trained,)]
    else:
        trained = rows * step.target_len
        shapes = [(rows, step.target_len), (trained,), (trained,), *[(rows, step.seq_len)] * 2]
    return Batch(*(_empty(shape, torch.int64) for shape in shapes))


def _packed_batch(lengths: tuple[int, ...]) -> Batch:
    """One row; the first token of an example is not predicted."""
    tokens, trained = sum(lengths), sum(lengths) - len(lengths)
    tensors = (_empty(shape, torch.int64) for shape in ((1, tokens), (trained,), (trained,)))
    return Batch(*tensors, lengths=lengths)
