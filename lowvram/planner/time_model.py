"""The time model: how long a step takes, from arithmetic and launch counts. Modelled, never measured."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.engine.config import StepConfig
from lowvram.hardware import Hardware

# Sustained 16-bit training throughput, FLOP/s: about 40 % of the data sheet's dense tensor figure.
_GPU_FLOPS: tuple[tuple[str, float], ...] = (
    ("5090", 84e12),
    ("5080", 45e12),
    ("5070", 25e12),
    ("4090", 66e12),
    ("4080", 39e12),
    ("4070", 23e12),
    ("4060", 12e12),
    ("3090", 28e12),
    ("3080", 24e12),
    ("3070", 16e12),
    ("3060", 10e12),
    ("A6000", 60e12),
    ("T4", 20e12),
    ("H100", 390e12),
    ("H200", 390e12),
    ("A100", 125e12),
)
_UNKNOWN_GPU_FLOPS = 12e12
_CPU_CORE_FLOPS = 6e10  # one AVX-512 core with bf16 (AMD EPYC, this project's CI); half of it without
_LAUNCH_SECONDS_PER_LAYER = {"cpu": 0.5e-3}  # dispatch of one layer's operators, forward and backward
_GPU_LAUNCH_SECONDS_PER_LAYER = 1.5e-3
_HOST_BYTES_PER_SECOND = 12e9  # PCIe 4.0 x8, half of its figure
_EMPTY_CACHE_SECONDS = 0.05  # some dozens of cudaFree and cudaMalloc, each of which waits for the device
_PADDING_PER_ROW = 0.008  # of the tokens, for each further row in a micro-batch: GSM8K rows, sorted windows


@dataclass(frozen=True)
class _LeverCosts:
    """What levers add: in passes of 2ND arithmetic, or as a share of the step."""

    recompute_passes: float
    tile_passes: float
    small_chunk: float  # at 256 tokens; twice as much at 128
    head: dict[str, float]


# a CPU's as scripts/bench_levers.py has measured them: recompute 1.36, four tiles 1.44 times
_ON_CPU = _LeverCosts(1.45, 2.4, 0.0, {"nf4": 0.02})
# of a GPU only arithmetic is known: keys and values once more, an eighth of a forward, and every weight
# dequantised for each tile; the head's are at chunks of 64 to 256 tokens
_ON_GPU = _LeverCosts(1.45, 0.5, 0.02, {"int8": 0.05, "nf4": 0.06, "streamed": 0.5})


def flops_per_second(hardware: Hardware) -> float:
    """Sustained arithmetic rate of the device."""
    if hardware.backend == "cpu":
        return _CPU_CORE_FLOPS * hardware.cpu_count * (1.0 if hardware.bf16 else 0.5)
    return next((rate for name, rate in _GPU_FLOPS if name in hardware.name), _UNKNOWN_GPU_FLOPS)


def seconds_per_step(
    step: StepConfig,
    hardware: Hardware,
    *,
    n_parameters: int,
    n_layers: int,
    hidden_size: int,
    tokens_per_example: float,
) -> float:
    """Seconds of one optimizer step.

    2ND forward and 2ND for the activations' gradients (frozen weights need no gradient of their own); what is
    recomputed lacks the head. Checkpoints on the host travel once there and twice back beside the arithmetic:
    what takes longer counts.
    """
    costs = _ON_CPU if hardware.backend == "cpu" else _ON_GPU
    levers = step.levers
    recomputed = n_layers - levers.kept_layers if levers.gradient_checkpointing else 0
    passes = 4.0 + costs.recompute_passes * recomputed / n_layers
    passes += costs.tile_passes if levers.tile_tokens else 0.0
    tokens = step.micro_batch * step.accumulation * min(tokens_per_example, step.seq_len)
    arithmetic = passes * n_parameters * tokens / flops_per_second(hardware)
    if levers.offload_checkpoints and hardware.backend != "cpu":  # whose host memory is its own
        traffic = 3 * n_layers * tokens * hidden_size * 2 / _HOST_BYTES_PER_SECOND
        arithmetic = 1.03 * max(arithmetic, traffic)
    chunks = 1.0 + costs.small_chunk * (256 / levers.loss_chunk_tokens) + costs.head.get(levers.head, 0.0)
    chunks += 0.005 * levers.embedding_on_host
    per_layer = _LAUNCH_SECONDS_PER_LAYER.get(hardware.backend, _GPU_LAUNCH_SECONDS_PER_LAYER)
    launches = step.accumulation * n_layers * per_layer
    if levers.empty_cache and hardware.backend != "cpu":
        launches += _EMPTY_CACHE_SECONDS
    update = 1.0 if step.optimizer == "adamw" else 1.02
    padding = 1.0 + _PADDING_PER_ROW * (step.micro_batch - 1)
    return arithmetic * chunks * update * padding + launches
