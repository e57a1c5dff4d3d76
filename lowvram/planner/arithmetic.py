"""Arithmetic: about what a step takes, from counts and widths; a trace is the judge."""

from __future__ import annotations

from lowvram.engine.config import TILE_ROWS, StepConfig
from lowvram.engine.shape import ModelShape

_BYTES = {"nf4": 0.5158, "int8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}  # a weight
_PLAIN_SCALES = 0.0466  # bytes a weight that double quantisation saves: 0.37 bits
_LOGIT_BYTES = 10  # of one token and one word: 16-bit logits, and their softmax and gradient in float32
_HEAD_BYTES = {"int8": 1.0, "nf4": 0.5158, "streamed": 0.0}
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw": 8, "paged_adamw8bit": 2}


def resident_bytes(step: StepConfig, shape: ModelShape) -> float:
    """What is on the device all through a step: never more than its peak."""
    a_weight = _BYTES[step.base_precision]
    if step.base_precision == "nf4" and not step.levers.double_quantization:
        a_weight += _PLAIN_SCALES
    wide = 4 if step.compute_dtype == "fp32" else 2
    head = wide if step.levers.head == "16bit" else _HEAD_BYTES[step.levers.head]
    ends = 0.0 if step.levers.embedding_on_host else shape.table_parameters * wide
    if not (shape.tied and step.levers.head == "16bit"):
        ends += shape.table_parameters * head
    adapters = shape.n_trainable(step) * (8 + _STATE_BYTES[step.optimizer])
    return shape.linear_parameters * a_weight + shape.stacked_parameters * wide + ends + adapters


def kept_bytes(step: StepConfig, shape: ModelShape) -> float:
    """Of one layer's activations when they are kept: its linear layers' inputs and outputs, in 16 bits."""
    widths = sum((one.n_in + one.n_out) * one.count for one in shape.linears) / shape.n_layers
    return 2 * widths * step.micro_batch * step.seq_len


def floor_bytes(step: StepConfig, shape: ModelShape) -> float:
    """What is resident, and the inputs of all layers, which are there at the end of the forward pass."""
    inputs = 2 * shape.hidden_size * shape.n_layers * step.micro_batch * step.seq_len
    kept = not (step.levers.offload_checkpoints or step.inference_mode)
    return resident_bytes(step, shape) + (inputs if kept else 0)


def working_bytes(step: StepConfig, shape: ModelShape) -> tuple[float, float]:
    """One layer's, and the logits': by turns."""
    levers, tokens = step.levers, step.micro_batch * step.seq_len
    at_once = min(levers.tile_tokens or step.seq_len, step.seq_len) * step.micro_batch
    layer = 1.5 * kept_bytes(step, shape) * at_once / tokens
    return layer, logit_bytes(min(levers.loss_chunk_tokens, at_once), shape, levers.head)


def logit_bytes(chunk_tokens: int, shape: ModelShape, head: str) -> float:
    """Of so many tokens, with all words of a whole head or one tile of another."""
    words = shape.vocab_size if head == "16bit" else min(TILE_ROWS, shape.vocab_size)
    return _LOGIT_BYTES * words * chunk_tokens


def saved_by_head(shape: ModelShape, head: str) -> float:
    """What a head that is not whole leaves of its 16 bits."""
    return shape.table_parameters * (2 - _HEAD_BYTES[head])
