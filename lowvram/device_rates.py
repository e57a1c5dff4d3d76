"""How fast a device is at products, in its memory and from the host: from tables, or measured once."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lowvram import data_sheets
from lowvram.cache import rates_folder
from lowvram.data_sheets import Sheet
from lowvram.frozen import Frozen, write_atomically
from lowvram.hardware import Hardware
from lowvram.units import GiB, MiB

# What a benchmark reaches of the data sheet. Products: 80 to 86 % on A100, H100 and GH200, 60 % on MI300X
# (github.com/stas00/ml-engineering, "Maximum Achievable Matmul FLOPS"). Copies on the device: 750 of V100's
# 900 GB/s (ginkgo-project/ginkgo#164). Pinned copies: 25.5 of RTX 4090's 31.5 GB/s (NVIDIA/nvbandwidth#15).
_REACHED = 0.8
_REACHED_ELSEWHERE = 0.6  # products on AMD's, Intel's and Apple's
# What a training step reaches of a pure product: 150 of A100's 312 TFLOP/s before FlashAttention, 180 with it
# (the same book), of which this project's layers, adapters and 4-bit weights take a part: 40 % of the sheet.
_TRAINING = 0.5
# One AVX-512 core with bf16 (AMD EPYC, this project's CI), as training reaches them; half of it without.
_CPU_CORE_FLOPS = 6e10
# Copies by two cores of a Xeon (this project's CI) read and write 20e9 bytes/s; a desktop's two channels of
# DDR4-3200 have 51e9, of which it keeps 80 %.
_CPU_CORE_BYTES, _CPU_MOST_BYTES = 10e9, 40e9
# A card that is only imagined: the slower common one of its size, in GiB.
_TYPICAL = (
    (4, "RTX 3050 Laptop"),
    (6, "RTX 3050"),
    (8, "RTX 4060"),
    (12, "RTX 3060"),
    (16, "RTX 4060 Ti"),
    (24, "RTX 3090"),
    (32, "RTX 5090"),
    (80, "A100"),
    (141, "H200"),
)
_NEARLY = 0.9  # an 8 GB card shows 7.6 to 8 GiB of memory
_OTHER_MAKES = {  # their sheets, and the row of an unknown card
    "rocm": (data_sheets.AMD, "RX 7600"),
    "xpu": (data_sheets.INTEL, "A380"),
    "mps": (data_sheets.APPLE, "M1"),
}

_VERSION = 1  # of the benchmark: what an older one has measured is measured anew
_ROUNDS = 5  # of which the median counts: the first may still find the clocks low
_MEMORY_SHARE = 0.05
_LARGEST_EDGE = 4096  # a 7B layer's width, and as many tokens
_LARGEST_COPY = 256 * MiB  # beyond the largest cache, RTX 5090's 96 MiB
_HOST_COPY = 32 * MiB

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DeviceRates(Frozen):
    """What a device sustains: numbers that a training step reaches, not peaks."""

    flops: Rate  # FLOP/s of 16-bit matrix products; on a CPU of those in the compute dtype
    memory_bytes_per_second: Rate  # the device's, read and written
    host_bytes_per_second: Rate  # to the device through pinned memory; of a CPU its own memory's
    measured: bool  # by the micro-benchmark; else from tables
    source: str  # "data sheet of RTX 4090", "compute capability 8.9", "measured on this machine in 1.8 s"


def known_rates(hardware: Hardware) -> DeviceRates:
    """Measured once and remembered on a CUDA or ROCm device that is here, else `rates_of`."""
    if hardware.imagined or hardware.backend not in ("cuda", "rocm"):
        return rates_of(hardware)
    device = _Measured.device_of(hardware)
    with suppress(OSError, ValueError, RuntimeError):  # nothing there, not ours, or a user without a home
        remembered = _Measured.model_validate_json(_file(device).read_bytes())
        if remembered.device == device and remembered.rates.measured:
            return remembered.rates
    rates = measured_rates(hardware)
    if rates.measured:
        with suppress(OSError, RuntimeError):  # a full or read-only disk costs two seconds, not the plan
            rates_folder().mkdir(parents=True, exist_ok=True)
            write_atomically(_file(device), _Measured(device=device, rates=rates).model_dump_json(indent=2))
    return rates


class _Measured(Frozen):
    """What is remembered, with everything that it holds for."""

    device: tuple[str, ...]
    rates: DeviceRates

    @staticmethod
    def device_of(hardware: Hardware) -> tuple[str, ...]:
        torch = hardware.versions.get("torch")
        told = (_VERSION, hardware.backend, hardware.name, hardware.total_bytes, hardware.driver, torch)
        return tuple(map(str, told))


def _file(device: tuple[str, ...]) -> Path:
    return rates_folder() / f"{hashlib.sha256(repr(device).encode()).hexdigest()[:40]}.json"


# --- from tables ---


def rates_of(hardware: Hardware) -> DeviceRates:
    """From the data sheet of the card's name, else of a small card of its compute capability or make.

    An imagined card is a common one of its size, and in nothing slower than a smaller imagined card.
    """
    if hardware.backend == "cpu":
        return _cpu(hardware)
    if hardware.imagined:
        told = f"common cards up to {hardware.total_bytes / GiB:.4g} GB"
        return _sustained(_typical(hardware.total_bytes), _REACHED, told)
    if hardware.backend == "cuda":
        return _nvidia(hardware)
    sheets, unknown = _OTHER_MAKES[hardware.backend]
    name, sheet = data_sheets.find(hardware.name, sheets) or (unknown, sheets[unknown])
    return _sustained(sheet, _REACHED_ELSEWHERE, f"data sheet of {name}")


def _nvidia(hardware: Hardware) -> DeviceRates:
    found = data_sheets.find(hardware.name, data_sheets.NVIDIA)
    if found is not None:
        return _sustained(found[1], _REACHED, f"data sheet of {found[0]}")
    capability = hardware.capability or (0, 0)
    name = next(name for least, name in data_sheets.BY_CAPABILITY if capability >= least)
    told = f"compute capability {capability[0]}.{capability[1]}"
    return _sustained(data_sheets.NVIDIA[name], _REACHED, told)


def _typical(total_bytes: int) -> Sheet:
    """The best figures among the common cards up to this size: RTX 3060 computes less than RTX 4060."""
    smaller = [name for gib, name in _TYPICAL if total_bytes >= _NEARLY * gib * GiB] or [_TYPICAL[0][1]]
    return Sheet(*map(max, zip(*(data_sheets.NVIDIA[name] for name in smaller), strict=True)))


def _sustained(sheet: Sheet, products: float, source: str) -> DeviceRates:
    return DeviceRates(
        flops=products * _TRAINING * sheet.teraflops * 1e12,
        memory_bytes_per_second=_REACHED * sheet.memory * 1e9,
        host_bytes_per_second=_REACHED * sheet.bus * 1e9,
        measured=False,
        source=source,
    )


def _cpu(hardware: Hardware) -> DeviceRates:
    memory = min(_CPU_CORE_BYTES * hardware.cpu_count, _CPU_MOST_BYTES)
    return DeviceRates(
        flops=_CPU_CORE_FLOPS * hardware.cpu_count * (1.0 if hardware.bf16 else 0.5),
        memory_bytes_per_second=memory,
        host_bytes_per_second=memory,
        measured=False,
        source=f"CPU cores: {hardware.cpu_count}, {'with' if hardware.bf16 else 'without'} bf16",
    )


# --- measured ---


def measured_rates(hardware: Hardware, seconds: float = 2.0, device: str | None = None) -> DeviceRates:
    """A micro-benchmark of about `seconds`; where it fails, whatever the reason, `rates_of`.

    It takes at most 5 % of the device's memory and gives it back; cuBLAS keeps its workspace, for training.

    Args:
        device: torch's name of it, when it is not the one that training would use.
    """
    where = device or hardware.device
    started = time.perf_counter()
    try:
        flops, memory, host = _measure(hardware, seconds / 3, where)
        taken = time.perf_counter() - started
        rates = DeviceRates(
            flops=_TRAINING * flops,
            memory_bytes_per_second=memory,
            host_bytes_per_second=host,
            measured=True,
            source=f"measured on this machine in {taken:.1f} s",
        )
    except Exception:  # out of memory, no such device, a broken driver: anything, and none of it matters here
        rates = rates_of(hardware)
    _give_back(where)  # not before the error is gone, whose traceback holds the tensors
    return rates


def _measure(hardware: Hardware, seconds: float, device: str) -> tuple[float, float, float]:
    """FLOP/s of a product, bytes/s of the memory and from the host; each takes about `seconds`."""
    import torch

    sixteen = torch.bfloat16 if hardware.bf16 else torch.float16
    dtype = torch.float32 if device == "cpu" and not hardware.bf16 else sixteen
    bench = _Benchmark(torch, device, seconds, int(_MEMORY_SHARE * hardware.total_bytes))
    flops = bench.product(dtype, rates_of(hardware).flops)
    _give_back(device)  # or torch would keep the small blocks beside the large ones that come
    memory = bench.copy()
    _give_back(device)
    host = bench.from_host()
    return flops, memory, memory if device == "cpu" else host


@dataclass(frozen=True)
class _Benchmark:
    torch: Any
    device: str
    seconds: float
    most_bytes: int

    def product(self, dtype: Any, expected_flops: float) -> float:
        """FLOP/s of a square product: as large as the memory allows and as forty take the time."""
        fitting = (self.most_bytes / (3 * dtype.itemsize)) ** (1 / 2)
        quick = (expected_flops * self.seconds / 40 / 2) ** (1 / 3)
        edge = max(256, int(min(_LARGEST_EDGE, fitting, quick)) // 256 * 256)
        # random: products of zeros draw less power and are faster
        left, right = (self.torch.randn(edge, edge, device=self.device, dtype=dtype) for _ in range(2))
        result = self.torch.empty_like(left)
        return self._rate(lambda: self.torch.mm(left, right, out=result), 2 * edge**3)

    def copy(self) -> float:
        """Bytes/s that are read and written."""
        source = self._bytes(min(_LARGEST_COPY, self.most_bytes // 2), device=self.device)
        target = self.torch.empty_like(source)
        return self._rate(lambda: target.copy_(source), 2 * source.nbytes)

    def from_host(self) -> float:
        """Bytes/s from pinned memory on a stream of their own, as offloaded activations come back."""
        source = self._bytes(min(_HOST_COPY, self.most_bytes), pin_memory=self.device != "cpu")
        target = self._bytes(source.nbytes, device=self.device)
        with self._module.stream(self._module.Stream()):
            return self._rate(lambda: target.copy_(source, non_blocking=True), source.nbytes)

    @property
    def _module(self) -> Any:
        return self.torch.get_device_module(self.device)

    def _bytes(self, n_bytes: int, **where: Any) -> Any:
        """Memory that was written: of what never was, the system has no pages."""
        return self.torch.empty(n_bytes, dtype=self.torch.uint8, **where).fill_(1)

    def _rate(self, work: Callable[[], object], amount: int) -> float:
        for _ in range(2):  # libraries are loaded, pages are found
            work()
        repeats = max(1, int(self.seconds / _ROUNDS / self._time(work, 1)))
        return amount * repeats / statistics.median(self._time(work, repeats) for _ in range(_ROUNDS))

    def _time(self, work: Callable[[], object], repeats: int) -> float:
        self._module.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        self._module.synchronize()
        return time.perf_counter() - started


def _give_back(device: str) -> None:
    """What torch keeps for its next tensors goes back to the device and to the host."""
    if device == "cpu":
        return
    with suppress(Exception):  # as above
        import torch

        torch.accelerator.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.9 lacks it, and keeps 32 MiB
            torch.accelerator.empty_host_cache()
