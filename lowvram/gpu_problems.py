"""What keeps PyTorch or bitsandbytes from using the GPU, each with the command that fixes it."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowvram.errors import first_line
from lowvram.gpu_driver import Card, Driver, Problem, in_wsl, nvidia_seen, torch_command
from lowvram.units import format_bytes

NO_SPILL_STEPS = (
    "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy, Prefer No Sysmem Fallback"
)


def broken_torch(driver: Driver, torch_version: str, error: Exception) -> Problem:
    """PyTorch is missing, or importing or using it raised `error`."""
    if torch_version == "missing":
        what = "PyTorch is not installed: nothing can be trained."
        has_nvidia = driver.cards or nvidia_seen()
        return Problem(what=what, remedy=torch_command(driver) if has_nvidia else "pip install torch")
    what = f"PyTorch or its GPU driver is broken: {first_line(error)}"
    return Problem(what=what, remedy=f"Reboot, and if that does not help: {torch_command(driver)}")


def why_no_gpu(driver: Driver, warned: list[str]) -> list[Problem]:
    """Why training will run on the CPU, the last entry saying that it will; `warned` is what torch said."""
    import torch

    problems = list(driver.problems)
    if torch.version.cuda and driver.version:
        problems += hidden_problems(driver, 0) or [_no_cuda(driver, warned)]
    elif not (torch.version.cuda or torch.version.hip):
        problems = _cpu_build(driver) + problems
    what = "Training will run on the CPU, which suits small models only."
    remedy = "To plan for a card that is not here: lowvram plan --model MODEL --vram 8GB"
    return [*problems, Problem(what=what, remedy=remedy)]


def use_problems(device: str, driver: Driver) -> list[Problem]:
    """Uses the GPU once, as training will: a matrix product and a 4-bit weight."""
    import torch

    if device == "cuda" and torch.version.cuda and (unfit := _capability_problems(driver)):
        return unfit
    try:
        # Loads the matrix library too: without it the context would be measured too small.
        square = torch.ones(64, 64, dtype=torch.float16, device=device)
        (square @ square).sum().item()
    except Exception as error:  # a broken or full GPU raises many kinds
        what = f"The GPU is visible, but using it fails: {first_line(error)}"
        return [Problem(what=what, remedy="See who holds it with nvidia-smi (rocm-smi, xpu-smi), or reboot.")]
    return four_bit_problems(device)


def four_bit_problems(device: str) -> list[Problem]:
    """Quantises 64 numbers to NF4 on `device` and back."""
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        return []  # the list of missing packages has it
    upgrade = "pip install --upgrade bitsandbytes; python -m bitsandbytes tells more"
    try:
        with _silent("bitsandbytes"):
            # The two names that `python -m bitsandbytes` looks at; a failed load leaves a stand-in.
            from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            if device == "cuda" and isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
                what = f"bitsandbytes has no library for this GPU: {first_line(lib.error_msg)}"
                return [Problem(what=what, remedy=upgrade)]
            packed, state = quantize_4bit(torch.ones(64, device=device), quant_type="nf4")
            dequantize_4bit(packed, state)
    except Exception as error:  # its import and its native code run into whatever is broken below
        what = f"bitsandbytes cannot do 4-bit weights on {device}: {first_line(error)}"
        return [Problem(what=what, remedy=upgrade)]
    if device == "xpu" and importlib.util.find_spec("triton") is None:
        what = "Without triton, bitsandbytes is slow on Intel GPUs and has no 8-bit optimizer there."
        remedy = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/xpu"
        return [Problem(what=what, remedy=remedy)]
    return []


def hidden_problems(driver: Driver, visible: int) -> list[Problem]:
    """CUDA_VISIBLE_DEVICES hides every GPU, or names one that is not among the driver's cards."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    asked = len([name for name in (value or "").split(",") if name.strip()])
    if value is None or not driver.cards or visible >= max(1, asked):
        return []
    what = "CUDA_VISIBLE_DEVICES is empty, which hides every GPU."
    if asked:
        cards = ", ".join(f"{index} ({card.name})" for index, card in enumerate(driver.cards))
        what = f"CUDA_VISIBLE_DEVICES={value} names a GPU that is not here. Here: {cards}."
    clear = "set CUDA_VISIBLE_DEVICES=" if platform.system() == "Windows" else "unset CUDA_VISIBLE_DEVICES"
    return [Problem(what=what, remedy=clear)]


def choice_problems(backend: str, count: int, name: str, used: Card | None, driver: Driver) -> list[Problem]:
    """With `count` GPUs: which one is used, whether another has more room, and how to choose it."""
    if count < 2:
        return []
    others = [card for card in driver.cards if used and card.uuid != used.uuid]
    best = max(others, key=lambda card: card.free_bytes, default=None)
    what = f"{count} GPUs; the first is used: {name}."
    if best and used and best.free_bytes > used.free_bytes:
        what += f" {best.name} has more free: {format_bytes(best.free_bytes)}."
    # By its uuid: the driver counts by slot, CUDA by speed, so that an index can mean two cards.
    cuda = f"CUDA_VISIBLE_DEVICES={best.uuid if best else 1}"
    variable = {"rocm": "HIP_VISIBLE_DEVICES=1", "xpu": "ZE_AFFINITY_MASK=1"}.get(backend, cuda)
    return [Problem(what=what, remedy=f"To use another: {variable} lowvram ...")]


def spill_problems() -> list[Problem]:
    """Windows, and WSL with it, moves GPU memory to RAM instead of failing."""
    if platform.system() != "Windows" and not in_wsl():
        return []
    what = "When GPU memory is full, Windows moves it to RAM: training crawls instead of stopping."
    return [Problem(what=what, remedy=NO_SPILL_STEPS)]


def _cpu_build(driver: Driver) -> list[Problem]:
    if driver.cards or nvidia_seen():
        name = driver.cards[0].name if driver.cards else "NVIDIA GPU"
        what = f"PyTorch is a CPU build: it cannot use the {name}."
        return [Problem(what=what, remedy=torch_command(driver))]
    if Path("/dev/kfd").exists():  # AMD's compute driver
        what = "PyTorch is a CPU build: it cannot use the AMD GPU."
        return [Problem(what=what, remedy="Install its ROCm build: https://pytorch.org/get-started/locally")]
    return []


def _no_cuda(driver: Driver, warned: list[str]) -> Problem:
    reason = next((text for text in warned if "CUDA" in text or "driver" in text), "it gives no reason.")
    what = f"PyTorch finds no usable GPU with NVIDIA driver {driver.version}: {reason}"
    remedy = "Reboot; on Linux, sudo modprobe nvidia_uvm; then nvidia-smi must list the GPU."
    if "too old" in reason:
        remedy = f"Update the driver (https://www.nvidia.com/drivers), or: {torch_command(driver)}"
    return Problem(what=what, remedy=remedy)


def _capability_problems(driver: Driver) -> list[Problem]:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    built = torch.cuda.get_arch_list()
    if built and not any(_runs_on(arch, major, minor) for arch in built):
        what = f"This PyTorch has no code for this GPU (sm_{major}{minor}), only for {' '.join(built)}."
        return [Problem(what=what, remedy=torch_command(driver))]
    if major < 6:  # bitsandbytes' installation guide
        what = f"bitsandbytes needs capability 6.0 for 4-bit weights; this GPU has {major}.{minor}."
        return [Problem(what=what, remedy="Use a Pascal (GTX 10) or newer card.")]
    return []


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Machine code (sm_86) runs on its own generation from its minor on, PTX (compute_90) on all later."""
    kind, _, number = arch.partition("_")
    digits = number.rstrip("af")
    built = (int(digits[:-1]), int(digits[-1]))
    if number.endswith("a"):  # sm_90a: this one chip only
        return built == (major, minor)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


@contextmanager
def _silent(logger_name: str) -> Iterator[None]:
    """Keeps a library's complaints off the screen: they come back as problems."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
