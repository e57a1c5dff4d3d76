"""The time model: seconds of one optimizer step, part by part, from counts and a device's rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowvram.data.stats import DataStats
from lowvram.device_rates import DeviceRates
from lowvram.engine.config import PAGED, StepConfig
from lowvram.engine.shape import ModelShape
from lowvram.planner.schedule import Schedule
from lowvram.planner.workload import Tokens, Workload

_STORED_BYTES = {"nf4": 0.5, "int8": 1.0}  # a weight of a quantised base or head
_WRITTEN_AND_READ = 4.0  # bytes a dequantised weight travels: out of one kernel, into the next
_NESTED_SCALES = 1.01  # double quantisation's second look-up
_TILED_PASSES = 0.25  # of 2ND: keys and values once more, an eighth of a forward
_CPU_TILED_PASSES = 2.4  # no kernel knows a tile's mask: 1.44 times the step (benchmarks/levers.csv)
_BESIDE_SHARE = 0.03  # of the arithmetic: copies beside it take some of the memory's rate
# copies that it waits for cost more than their bytes, and no GPU has told yet how much more
_EMBEDDING_SHARE, _STREAMED_SHARE, _PAGED_SHARE = 0.005, 0.03, 0.005
_ROWS_BUSY = 32  # a matrix product of n rows reaches n / (n + 32) of the rate
_LAUNCH_SECONDS = 1.5e-3  # dispatch of one layer's operators in one pass, forward and backward
_CPU_LAUNCH_SECONDS = 0.5e-3
_FORWARD_SHARE = 0.5  # of a step without recomputing
_EMPTY_CACHE_SECONDS = 0.05  # some dozens of cudaFree and cudaMalloc, each of which waits for the device
_OPTIMIZER_BYTES = {  # read and written a parameter: weight, gradient and two moments, in float32 or 8 bits
    "adamw": 28.0,
    "adamw8bit": 30.0,  # fewer bytes, and a search in a table of 256 for each new moment
    "paged_adamw": 28.0,
    "paged_adamw8bit": 30.0,
}
# over PCIe and back, a parameter: two moments of four bytes or of one, where memory is short
_PAGED_BYTES = {"paged_adamw": 16.0, "paged_adamw8bit": 4.0}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Modelled, never measured."""

    arithmetic: float
    dequantisation: float
    transfers: float  # between host and device: what does not hide behind arithmetic
    optimizer: float
    launches: float  # what does not hide behind arithmetic

    @property
    def total(self) -> float:
        return self.arithmetic + self.dequantisation + self.transfers + self.optimizer + self.launches


@dataclass(frozen=True)
class TimeModel:
    """Of one model's steps on one device."""

    shape: ModelShape
    rates: DeviceRates
    on_cpu: bool

    def seconds(self, step: StepConfig, work: Workload) -> float:
        return self.of(step, work).total

    def run_seconds(
        self, step_seconds: float, schedule: Schedule, stats: DataStats | None, effective_batch: int
    ) -> float:
        """Of all steps and of the held-out losses between them, whose forward is at most half of a step."""
        steps = schedule.total_steps * step_seconds
        if stats is None:
            return steps
        evaluations = 1 + math.ceil(schedule.total_steps / schedule.evaluate_every)
        return steps + evaluations * _FORWARD_SHARE * step_seconds * stats.n_held_out / effective_batch

    def of(self, step: StepConfig, work: Workload) -> StepTime:
        """`work`: of the step's own sequence length and effective batch."""
        tokens = work.tokens(step.micro_batch, step.packing)
        tiles = work.tiles(step.levers.tile_tokens)
        arithmetic = self._flops(step, tokens, tiles) / self.rates.flops
        dequantisation = self._dequantised_bytes(step, tokens, tiles) / self.rates.memory_bytes_per_second
        busy = arithmetic + dequantisation
        return StepTime(
            arithmetic,
            dequantisation,
            self._transfers(step, tokens, busy),
            self._optimizer(step, busy),
            self._launches(step, tokens, tiles, busy),
        )

    def _recomputed(self, step: StepConfig) -> float:
        """Share of the layers whose forward runs twice."""
        levers = step.levers
        if step.inference_mode or not levers.gradient_checkpointing:
            return 0.0
        return 1 - levers.kept_layers / self.shape.n_layers

    def _flops(self, step: StepConfig, tokens: Tokens, tiles: float) -> float:
        """2ND forward and 2ND for the gradients of the activations: frozen weights need none of their own.

        2ND more for what is recomputed. An adapter's weights do need theirs: 6. Causal attention multiplies
        T^2/2 pairs of a layer twice, its backward takes 2.5 times that (FlashAttention-2, arXiv 2307.08691).
        """
        if step.inference_mode:
            return self._forward_flops(step, tokens)
        again = self._recomputed(step)
        tiled = (_CPU_TILED_PASSES if self.on_cpu else _TILED_PASSES) if tiles > 1 else 0.0
        body = self.body_parameters * (4 + 2 * again + tiled) * tokens.computed
        adapters = self.shape.n_trainable(step) * (6 + 2 * again) * tokens.computed
        attention = 2 * self.shape.n_layers * self.shape.hidden_size * (3.5 + again) * tokens.squares
        chunk = min(step.levers.loss_chunk_tokens, max(tokens.trained / tokens.passes, 1.0))
        head = 4 * self.shape.table_parameters * tokens.trained * (1 + _ROWS_BUSY / chunk)
        dora = 2 * self._dora_weights(step) * self._dora_products(step) * tokens.computed
        return body + adapters + attention + head + dora

    def _forward_flops(self, step: StepConfig, tokens: Tokens) -> float:
        """2ND, the pairs of attention once, and the head once."""
        attention = 2 * self.shape.n_layers * self.shape.hidden_size * tokens.squares
        head = 2 * self.shape.table_parameters * tokens.trained
        adapters = self.shape.n_trainable(step.model_copy(update={"inference_mode": False}))
        return 2 * (self.body_parameters + adapters) * tokens.computed + attention + head

    def _dora_weights(self, step: StepConfig) -> int:
        return self.shape.adapted_weights(step.target_modules) if step.use_dora else 0

    def _dora_products(self, step: StepConfig) -> float:
        """DoRA's own with an adapted weight: once more in backward; with dropout W d and its gradient."""
        return 3 + self._recomputed(step) if step.dropout else 1.0

    @property
    def body_parameters(self) -> int:
        """All but embedding and head."""
        ends = self.shape.table_parameters * (1 if self.shape.tied else 2)
        return self.shape.n_parameters - ends

    def _dequantised_bytes(self, step: StepConfig, tokens: Tokens, tiles: float) -> float:
        """Each pass over the layers makes every weight anew: forward, recomputation and backward."""
        total = 0.0
        if step.base_precision in _STORED_BYTES:
            a_weight = _STORED_BYTES[step.base_precision] + _WRITTEN_AND_READ
            nested = step.base_precision == "nf4" and step.levers.double_quantization
            a_weight *= (_NESTED_SCALES if nested else 1.0) * tokens.passes * tiles
            again = self._recomputed(step)
            total += self.shape.linear_parameters * a_weight * (1 if step.inference_mode else 2 + again)
            own = 1 if step.inference_mode else 1 + again + self._dora_products(step)  # with the norms'
            total += self._dora_weights(step) * a_weight * own
        if step.levers.head in _STORED_BYTES:
            a_weight = _STORED_BYTES[step.levers.head] + _WRITTEN_AND_READ
            sweeps = (1 if step.inference_mode else 2) * self._chunks(step, tokens)
            total += self.shape.table_parameters * a_weight * sweeps
        return total

    def _chunks(self, step: StepConfig, tokens: Tokens) -> float:
        """Of trained tokens, whose logits are made at one time."""
        return tokens.passes * max(tokens.trained / tokens.passes / step.levers.loss_chunk_tokens, 1.0)

    def _transfers(self, step: StepConfig, tokens: Tokens, busy: float) -> float:
        """Checkpoints go to the host once and come back twice, beside the arithmetic; rows and heads wait."""
        if self.on_cpu:  # whose host memory is its own
            return 0.0
        levers, row = step.levers, tokens.computed * self.shape.hidden_size * 2
        waited, share = 0.0, 0.0
        if levers.embedding_on_host:
            waited, share = waited + row, share + _EMBEDDING_SHARE
        if levers.head == "streamed":
            waited += 2 * 2 * self.shape.table_parameters * self._chunks(step, tokens)
            share += _STREAMED_SHARE
        seconds = waited / self.rates.host_bytes_per_second
        if levers.offload_checkpoints:
            beside = 3 * self.shape.n_layers * row / self.rates.host_bytes_per_second
            seconds, share = seconds + max(beside - busy, 0.0), share + _BESIDE_SHARE
        return seconds + share * busy

    def _optimizer(self, step: StepConfig, busy: float) -> float:
        n = self.shape.n_trainable(step)
        seconds = n * _OPTIMIZER_BYTES[step.optimizer] / self.rates.memory_bytes_per_second
        if step.optimizer in PAGED and not self.on_cpu:
            paged = n * _PAGED_BYTES[step.optimizer] / self.rates.host_bytes_per_second
            seconds += paged + _PAGED_SHARE * busy
        return seconds

    def _launches(self, step: StepConfig, tokens: Tokens, tiles: float, busy: float) -> float:
        """A CPU computes after it has dispatched; a GPU computes beside it."""
        per_layer = _CPU_LAUNCH_SECONDS if self.on_cpu else _LAUNCH_SECONDS
        sweeps = 1 / 3 if step.inference_mode else 1 + self._recomputed(step) / 3  # backward has two
        seconds = tokens.passes * tiles * self.shape.n_layers * per_layer * sweeps
        if self.on_cpu:
            return seconds
        emptied = _EMPTY_CACHE_SECONDS if step.levers.empty_cache else 0.0
        return emptied + max(seconds - busy, 0.0)
