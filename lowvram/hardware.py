"""What this machine has: GPU, its memory and who holds it, RAM, disk, versions, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

import lowvram
from lowvram.errors import first_line
from lowvram.frozen import Frozen
from lowvram.gpu_driver import (
    Card,
    Driver,
    GpuProcess,
    Problem,
    in_wsl,
    is_context,
    own_bytes,
    read_driver,
)
from lowvram.gpu_problems import (
    broken_torch,
    choice_problems,
    four_bit_problems,
    hidden_problems,
    spill_problems,
    use_problems,
    why_no_gpu,
)
from lowvram.units import GiB, format_bytes

__all__ = ["GpuProcess", "Hardware", "Problem", "card_of_size", "imagined_card", "probe"]

Backend = Literal["cuda", "rocm", "xpu", "mps", "cpu"]

DEFAULT_CONTEXT_BYTES = int(0.7 * GiB)  # RTX A2000: 0.13 GiB, RTX 5090: 0.6 to 0.7 GiB
DEFAULT_HELD_BYTES = int(0.4 * GiB)
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "gguf",
    "nvidia-ml-py",
)
AMD_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # MI100 and RX 7000, and newer
CGROUP_FOLDER = Path("/sys/fs/cgroup")
LOW_HOST_BYTES = 2 * GiB
LOW_DISK_BYTES = 5 * GiB
GPU_FILES = tuple(map(Path, ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dri", "/dev/dxg")))


class Hardware(Frozen):
    """One machine and the device that training will use; sizes in bytes.

    On a GPU with memory of its own, free + held = total: what this process has on it counts as free.
    A planner takes `context_bytes` off `free_bytes` and has the rest for tensors.
    """

    backend: Backend
    name: str
    total_bytes: int  # what the device offers; on cpu and mps the host's RAM
    free_bytes: int
    held_bytes: int  # held by the desktop and other processes; 0 on cpu and mps, where free has it off
    context_bytes: int  # what one process's context costs beside its tensors; 0 on cpu and mps
    context_measured: bool
    capability: tuple[int, int] | None
    bf16: bool  # whether bf16 matrix products run in hardware
    driver: str | None
    device_count: int
    processes: tuple[GpuProcess, ...]  # the others on this GPU
    host_total_bytes: int
    host_free_bytes: int
    disk_free_bytes: int
    cpu_count: int
    platform: str
    versions: dict[str, str]  # "missing" where a package is not installed
    problems: tuple[Problem, ...]
    imagined: bool = False  # by card_of_size: its rates cannot be measured here

    @property
    def device(self) -> str:
        """The torch device string; torch calls ROCm "cuda" too."""
        return "cuda" if self.backend == "rocm" else self.backend


def probe(folder: Path = Path("."), trial: bool = True) -> Hardware:
    """This machine now, with the disk that holds `folder`. Never raises: see `problems`.

    On a GPU it creates this process's context, in order to measure it, and leaves it in place.

    Args:
        trial: without a GPU as well, try bitsandbytes' 4-bit kernels, which takes 3 s to import.
    """
    driver = read_driver()  # before torch makes a context: what is free now is what the others left
    host = _host(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return _with_torch(host, driver, caught, trial)
        except Exception as error:  # a broken torch or driver can raise anything
            return _add(host, [broken_torch(driver, host.versions["torch"], error), *driver.problems])


def imagined_card(total_bytes: int, folder: Path = Path(".")) -> Hardware:
    """`card_of_size` in this machine. Without any GPU, torch is not asked: it takes 2 s to import."""
    return card_of_size(total_bytes, _host(folder) if _without_gpu() else probe(folder, trial=False))


def _without_gpu() -> bool:
    """On Linux a GPU of every make is a device file."""
    return platform.system() == "Linux" and not any(file.exists() for file in GPU_FILES)


def card_of_size(total_bytes: int, host: Hardware) -> Hardware:
    """`host` with a card of `total_bytes`: an Ampere-like NVIDIA one, or its own GPU at another size."""
    size = f"{total_bytes / GiB:.4g}"
    article = "an" if size.startswith("8") or size in ("11", "18") else "a"
    card: dict[str, Any] = {
        "name": f"{article} {size} GB card",
        "total_bytes": total_bytes,
        "free_bytes": max(0, total_bytes - DEFAULT_HELD_BYTES),
        "held_bytes": min(total_bytes, DEFAULT_HELD_BYTES),
        "processes": (),
        "problems": (),  # they are about the card that is replaced
        "imagined": True,
    }
    if host.backend in ("cuda", "rocm"):
        return _replace(host, **card)
    imagined = {"backend": "cuda", "capability": (8, 6), "bf16": True, "driver": None, "device_count": 1}
    return _replace(host, **card, **imagined, context_bytes=DEFAULT_CONTEXT_BYTES, context_measured=False)


# --- the host ---


def _host(folder: Path) -> Hardware:
    """The machine as if it had no GPU."""
    total, free = host_memory()
    disk_free, problems = _disk(folder)
    versions = _versions()
    missing = [name for name in PACKAGES if versions[name] == "missing" and name != "torch"]
    if missing:
        what = f"Not installed: {', '.join(missing)}."
        problems.append(Problem(what=what, remedy=f"pip install {' '.join(missing)}"))
    if free < LOW_HOST_BYTES:
        what = f"Only {format_bytes(free)} of RAM is free: loading a model may be killed by the system."
        problems.append(Problem(what=what, remedy="Close other programs, or add swap."))
    return Hardware(
        backend="cpu",
        name=_cpu_name(),
        total_bytes=total,
        free_bytes=free,
        held_bytes=0,
        context_bytes=0,
        context_measured=False,
        capability=None,
        bf16=False,
        driver=None,
        device_count=1,
        processes=(),
        host_total_bytes=total,
        host_free_bytes=free,
        disk_free_bytes=disk_free,
        cpu_count=_cpu_count(),
        platform=_platform(),
        versions=versions,
        problems=tuple(problems),
    )


def host_memory() -> tuple[int, int]:
    """Bytes of RAM that are there and that are free: the machine's, or a container's share of them."""
    memory = psutil.virtual_memory()
    return _container_limit(memory.total, memory.available, CGROUP_FOLDER)


def _container_limit(total: int, free: int, cgroup: Path) -> tuple[int, int]:
    """RAM that is total and free, or the container's share of it where that is smaller."""
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((cgroup / limit_file).read_text())  # the word "max" where there is none
            used = int((cgroup / used_file).read_text())
            stat = (cgroup / limit_file).with_name("memory.stat").read_text().split()
            cached = int(stat[stat.index(cache) + 1])  # file cache, which the system frees on demand
        except (OSError, ValueError):
            continue
        return min(total, limit), min(free, max(0, limit - used + cached))
    return total, free


def _disk(folder: Path) -> tuple[int, list[Problem]]:
    try:
        folder = folder.absolute()
        while not folder.exists() and folder != folder.parent:  # a run's folder is often not made yet
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    except OSError as error:
        what = f"The disk of {folder} cannot be read: {first_line(error)}."
        return 0, [Problem(what=what, remedy="Choose another folder with --output.")]
    if free >= LOW_DISK_BYTES:
        return free, []
    what = f"Only {format_bytes(free)} of disk is free at {folder}: a model and its checkpoints need more."
    return free, [Problem(what=what, remedy="Choose another disk with --output, or free some space.")]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "lowvram": lowvram.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _platform() -> str:
    if platform.system() == "Darwin":
        return f"macOS-{platform.mac_ver()[0]}-{platform.machine()}"
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    return f"{platform.system()}-{release}-{platform.machine()}" + (" (WSL)" if in_wsl() else "")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_count() -> int:
    # Where the system can pin a process to some cores (Linux), those are what it has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_bf16() -> bool:
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # added after torch 2.9
        return False
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: Arm


def _replace(hardware: Hardware, **changes: Any) -> Hardware:
    return Hardware(**{**dict(hardware), **changes})  # model_copy(update=...) would not validate


def _add(hardware: Hardware, problems: list[Problem]) -> Hardware:
    return _replace(hardware, problems=(*problems, *hardware.problems))


# --- the device ---


def _with_torch(
    host: Hardware, driver: Driver, caught: list[warnings.WarningMessage], trial: bool
) -> Hardware:
    import torch

    # torch names its CUDA build (2.13.0+cu130), its package from PyPI does not (2.13.0).
    host = _replace(host, versions={**host.versions, "torch": str(torch.__version__)})
    if torch.cuda.is_available():
        return _gpu(host, "rocm" if torch.version.hip else "cuda", torch.cuda, driver)
    if torch.xpu.is_available():
        return _gpu(host, "xpu", torch.xpu, driver)
    if torch.backends.mps.is_available():
        return _mps(host)
    problems = why_no_gpu(driver, [first_line(warning.message) for warning in caught])
    if trial:
        problems += four_bit_problems("cpu")
    return _add(_replace(host, bf16=_cpu_bf16()), problems)


def _gpu(host: Hardware, backend: Backend, module: Any, driver: Driver) -> Hardware:
    """`host` with its first GPU; `module` is torch.cuda, which also serves ROCm, or torch.xpu."""
    fresh = not module.is_initialized()
    gpu = module.get_device_properties(0)
    uuid = str(getattr(gpu, "uuid", ""))
    before = driver.card(uuid, gpu.name) if backend == "cuda" else None
    problems = use_problems("xpu" if backend == "xpu" else "cuda", driver)
    after = read_driver().card(uuid, gpu.name) if before else None
    memory = _memory(module, gpu, before, after, fresh)
    count = module.device_count()
    problems += choice_problems(backend, count, gpu.name, before, driver)
    if backend == "cuda":
        problems += [*driver.problems, *hidden_problems(driver, count), *spill_problems()]
    found = _replace(
        host,
        backend=backend,
        name=gpu.name,
        total_bytes=memory.total,
        free_bytes=memory.free,
        held_bytes=memory.total - memory.free,
        context_bytes=memory.context,
        context_measured=memory.measured,
        device_count=count,
        processes=after.processes if after else (),
        **_abilities(backend, gpu, driver),
    )
    return _add(found, problems)


def _abilities(backend: Backend, gpu: Any, driver: Driver) -> dict[str, Any]:
    """The fields of Hardware that depend on the make; `gpu` is torch's properties of it."""
    if backend == "xpu":
        return {"bf16": bool(gpu.has_bfloat16_conversions), "driver": gpu.driver_version}
    capability = (gpu.major, gpu.minor)
    if backend == "rocm":
        return {"capability": capability, "bf16": gpu.gcnArchName.startswith(AMD_BF16)}
    return {"capability": capability, "bf16": capability >= (8, 0), "driver": driver.version}


class _Memory(NamedTuple):
    total: int
    free: int
    context: int
    measured: bool


def _memory(module: Any, gpu: Any, before: Card | None, after: Card | None, fresh: bool) -> _Memory:
    """The GPU's bytes, with this process's own counted as free; `fresh`: it had none at `before`."""
    try:
        left, total = module.mem_get_info(0)
        pool = module.memory_reserved(0)
    except Exception:  # RuntimeError on Intel cards without the management library, others on a broken driver
        total = gpu.total_memory
        free = min(total, before.free_bytes) if before else total
        return _Memory(total, free, DEFAULT_CONTEXT_BYTES, False)
    context = own_bytes(before, after, fresh) - pool
    measured = is_context(context)
    if not measured:
        context = min(DEFAULT_CONTEXT_BYTES, total - left - pool)  # no more than all that is not free
    return _Memory(total, left + pool + context, context, measured)


def _mps(host: Hardware) -> Hardware:
    import torch

    named = getattr(torch.backends.mps, "get_name", None)
    usable = torch.mps.recommended_max_memory()
    # bitsandbytes 0.50.2 registers quantize, dequantize and gemm for NF4 on mps, and no 8-bit optimizer.
    maturity = Problem(
        what="On Apple GPUs bitsandbytes has NF4 weights, slow before macOS 26, and no 8-bit optimizer.",
        remedy="Update macOS, train with a 32-bit optimizer, and try lowvram demo first.",
    )
    changed = _replace(
        host,
        backend="mps",
        name=named() if named else "Apple GPU",
        free_bytes=min(usable, host.host_free_bytes),
        bf16=torch.backends.mps.is_macos_or_newer(14, 0),
    )
    return _add(changed, [*four_bit_problems("mps"), maturity])
