"""Guess: a candidate's memory by arithmetic, set right by each trace; it only decides what is traced next."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.space import ALL, Candidate

_BYTES = {"nf4": 0.516, "int8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}  # a weight
_PLAIN_SCALES = 0.0465  # bytes a weight that double quantisation saves: 0.37 bits
_LOGIT_BYTES = 10  # of one token and one word: 16-bit logits, and their softmax and gradient in float32
_TILE_ROWS = 8192  # of a head that is read in tiles
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}
_MIB = 1 << 20
_LEAST_SHARE = 0.1


def resident_bytes(step: StepConfig, shape: ModelShape) -> float:
    """What is on the device all through a step: never more than its peak."""
    a_weight = _BYTES[step.base_precision]
    if step.base_precision == "nf4" and not step.levers.double_quantization:
        a_weight += _PLAIN_SCALES
    wide = 4 if step.compute_dtype == "fp32" else 2
    linear = sum(one.n_in * one.n_out * one.count for one in shape.linears)
    table = shape.vocab_size * shape.hidden_size
    head = {"16bit": wide, "int8": 1.0, "nf4": 0.516, "streamed": 0.0}[step.levers.head]
    ends = 0.0 if step.levers.embedding_on_host else table * wide
    if not (shape.tied and step.levers.head == "16bit"):
        ends += table * head
    adapters = shape.n_trainable(step.target_modules, step.rank) * (8 + _STATE_BYTES[step.optimizer])
    return linear * a_weight + shape.stacked_parameters * wide + ends + adapters


def kept_bytes(step: StepConfig, shape: ModelShape) -> float:
    """Of one layer's activations when they are kept: its linear layers' inputs and outputs, in 16 bits."""
    widths = sum((one.n_in + one.n_out) * one.count for one in shape.linears) / shape.n_layers
    return 2 * widths * step.micro_batch * step.seq_len


def passing_bytes(step: StepConfig, shape: ModelShape) -> float:
    """Inputs of all layers, and the larger of one layer's work and the logits."""
    levers, tokens = step.levers, step.micro_batch * step.seq_len
    inputs = 0 if levers.offload_checkpoints else 2 * shape.hidden_size * shape.n_layers * tokens
    at_once = min(levers.tile_tokens or step.seq_len, step.seq_len) * step.micro_batch
    layer = 1.5 * kept_bytes(step, shape) * at_once / tokens
    words = shape.vocab_size if levers.head == "16bit" else min(_TILE_ROWS, shape.vocab_size)
    return inputs + max(layer, _LOGIT_BYTES * words * min(levers.loss_chunk_tokens, at_once))


@dataclass
class Guess:
    """Bytes = resident + passing + layers kept * share + offset; traces tell share and offset."""

    shape: ModelShape
    share: float = 1.1  # of `kept_bytes`
    offset: float = 50 * _MIB

    def fixed(self, step: StepConfig) -> float:
        return resident_bytes(step, self.shape) + passing_bytes(step, self.shape)

    def layers(self, candidate: Candidate, index: int) -> int:
        kept = candidate.kept[index]
        return self.shape.n_layers if kept == ALL else int(kept)

    def most_kept(self, candidate: Candidate, fixed: float, top: int, budget_bytes: float) -> int:
        """The largest choice of kept layers up to `top` that seems to fit; -1 when none does."""
        a_layer = self.share * kept_bytes(candidate.step, self.shape)
        room = budget_bytes - fixed - self.offset
        return next((i for i in range(top, -1, -1) if self.layers(candidate, i) * a_layer <= room), -1)

    def bytes_of(self, candidate: Candidate, fixed: float, index: int) -> float:
        layers = self.layers(candidate, index)
        return fixed + self.offset + layers * self.share * kept_bytes(candidate.step, self.shape)

    def learn(self, candidate: Candidate, fixed: float, index: int, traced_bytes: int) -> None:
        """What a trace said; the next ones are like it."""
        layers = self.layers(candidate, index)
        if not layers:
            self.offset = traced_bytes - fixed
            return
        by_formula = layers * kept_bytes(candidate.step, self.shape)
        self.share = max((traced_bytes - fixed - self.offset) / by_formula, _LEAST_SHARE)
