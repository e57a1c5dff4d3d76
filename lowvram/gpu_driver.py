"""The NVIDIA driver as nvidia-ml-py sees it: each card, who uses it, and what is wrong with the driver."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lowvram.errors import first_line
from lowvram.frozen import Frozen
from lowvram.units import GiB, MiB

UNKNOWN_NAME = "unknown"
DRIVER_FOLDER = Path("/proc/driver/nvidia")
PCI_FOLDER = Path("/sys/bus/pci/devices")
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")  # Docker's and Podman's
DRIVER_REMEDY = (
    "sudo ubuntu-drivers install (Ubuntu), sudo apt install nvidia-driver (Debian), "
    "https://www.nvidia.com/drivers (others)"
)


class Problem(Frozen):
    """Something missing or broken in plain words, and the command or step that fixes it."""

    what: str
    remedy: str


class GpuProcess(Frozen):
    """Another process on the GPU; `used_bytes` is None where the driver will not say."""

    pid: int
    name: str
    used_bytes: int | None


class Card(Frozen):
    """One NVIDIA card at the moment it was read; sizes in bytes."""

    uuid: str  # "GPU-1b2c..."; unlike the index it is the same for the driver, for CUDA and after a reboot
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None
    own_bytes: int | None  # what this process holds; None where the driver will not say
    processes: tuple[GpuProcess, ...]


class Driver(Frozen):
    """The NVIDIA driver; without `version` it does not answer, and `problems` says why."""

    version: str | None = None
    cuda: tuple[int, int] | None = None  # the newest CUDA that this driver runs
    cards: tuple[Card, ...] = ()
    problems: tuple[Problem, ...] = ()

    def card(self, uuid: str, name: str) -> Card | None:
        """The card with this CUDA `uuid` ("GPU-" or not), else the only card, if it has this `name`."""
        for card in self.cards:
            if uuid and card.uuid.removeprefix("GPU-") == uuid.removeprefix("GPU-"):
                return card
        return self.cards[0] if len(self.cards) == 1 and self.cards[0].name == name else None


def read_driver() -> Driver:
    """The driver and all its cards now. Never raises: whatever fails becomes a problem."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        what = "nvidia-ml-py is not installed: lowvram cannot see who uses the GPU's memory."
        return Driver(problems=(Problem(what=what, remedy="pip install nvidia-ml-py"),))
    except Exception as error:  # a broken driver fails in ctypes, in decoding a string, anywhere
        return Driver(problems=_why_no_driver(error))
    try:
        return _read(nvml)
    except Exception as error:  # as above
        return Driver(problems=(_failure("The NVIDIA driver does not answer", error),))
    finally:
        with suppress(Exception):  # a driver that broke in between breaks here again
            nvml.nvmlShutdown()


def own_bytes(before: Card | None, after: Card | None, fresh: bool) -> int:
    """What this process has on the card, tensors included; 0 where nothing tells.

    Args:
        fresh: this process had nothing on the card at `before`.
    """
    if before is None or after is None:
        return 0
    told = told_bytes(before, after, fresh)
    if told is not None:
        return told
    return before.free_bytes - after.free_bytes if fresh else 0


def told_bytes(before: Card, after: Card, fresh: bool) -> int | None:
    """What the driver itself says that this process has; None in containers and on Windows."""
    # A process number that was on the card before this process was belongs to a stranger: inside a
    # container the driver counts in the host's numbers.
    return None if fresh and before.own_bytes is not None else after.own_bytes


def is_context(n_bytes: int) -> bool:
    """Whether this can be one context's size: outside, somebody else's memory came or went in between."""
    return 16 * MiB <= n_bytes <= 2 * GiB


class OwnMemory:
    """This process's memory on one card as the driver counts it: tensors, cached blocks, context, libraries.

    Args:
        before: the driver when the measuring began.
        uuid, name: of the card, as CUDA tells them.
        fresh: this process had nothing on the card at `before`.
    """

    def __init__(self, before: Driver, uuid: str, name: str, fresh: bool) -> None:
        self._before = before.card(uuid, name)
        self.uuid, self.name, self._fresh = uuid, name, fresh

    def now_bytes(self) -> int | None:
        """None where the driver does not tell this process's share."""
        if self._before is None:
            return None
        return own_bytes(self._before, read_driver().card(self.uuid, self.name), self._fresh) or None

    def told_bytes(self, card: Card) -> int | None:
        """The driver's word in `card`, read later; None where it does not tell."""
        return told_bytes(self._before, card, self._fresh) if self._before else None

    @property
    def held_by_others_bytes(self) -> int | None:
        """What the desktop and other processes held when the measuring began."""
        card = self._before
        own = 0 if self._fresh else card.own_bytes if card else None
        if card is None or own is None:
            return None
        return max(0, card.total_bytes - card.free_bytes - own)


def nvidia_seen() -> bool:
    """Whether this machine shows any sign of an NVIDIA GPU, even with a broken or missing driver."""
    if DRIVER_FOLDER.exists() or shutil.which("nvidia-smi"):
        return True
    for device in PCI_FOLDER.glob("*"):
        with suppress(OSError):
            is_nvidia = (device / "vendor").read_text().strip() == "0x10de"
            if is_nvidia and (device / "class").read_text().startswith("0x03"):  # 0x03: a display device
                return True
    return False


def in_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    return "microsoft" in platform.release().lower()


def torch_command(driver: Driver) -> str:
    """The pip command for a PyTorch that this driver, and its first card, can run."""
    capability = driver.cards[0].capability if driver.cards else None
    # CUDA 13 needs driver 580 and has nothing for cards before Turing (7.5). CUDA 12 needs driver 525:
    # its 12.6 build is the one that still serves Pascal and Volta, its 12.9 build the one for Blackwell.
    build = "cu126"
    if driver.cuda and driver.cuda >= (13, 0) and (capability is None or capability >= (7, 5)):
        build = "cu130"
    elif capability and capability >= (10, 0):
        build = "cu129"
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def _read(nvml: Any) -> Driver:
    problems: list[Problem] = []
    cards: list[Card] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            cards.append(read_card(nvml, nvml.nvmlDeviceGetHandleByIndex(index), problems))
        except Exception as error:  # one lost card must not hide the others, and may raise anything
            problems.append(_failure(f"GPU {index} does not answer the driver", error))
    number = nvml.nvmlSystemGetCudaDriverVersion()  # 12080 for CUDA 12.8
    return Driver(
        version=nvml.nvmlSystemGetDriverVersion(),
        cuda=(number // 1000, number % 1000 // 10),
        cards=tuple(cards),
        problems=tuple(problems),
    )


def read_card(nvml: Any, handle: Any, problems: list[Problem]) -> Card:
    """The card behind NVML's `handle`; what is not answered is added to `problems`.

    Raises:
        NVMLError: the card itself does not answer.
    """
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability: tuple[int, int] | None = None
    with suppress(nvml.NVMLError):
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = (major, minor)
    users: dict[int, int | None] = {}
    try:
        for list_running in (
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
            nvml.nvmlDeviceGetComputeRunningProcesses,
        ):
            users |= {process.pid: process.usedGpuMemory for process in list_running(handle)}
    except nvml.NVMLError as error:
        problems.append(_failure("The driver will not list the processes on the GPU", error))
    own = users.pop(os.getpid(), None)
    processes = tuple(GpuProcess(pid=p, name=_process_name(nvml, p), used_bytes=n) for p, n in users.items())
    nameless = [str(process.pid) for process in processes if process.name == UNKNOWN_NAME]
    if nameless:
        what = f"The name of process {', '.join(nameless)} on the GPU is hidden from this user or container."
        problems.append(Problem(what=what, remedy="sudo nvidia-smi, outside the container, names it."))
    return Card(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=memory.total,
        free_bytes=memory.free,
        capability=capability,
        own_bytes=own,
        processes=processes,
    )


def _process_name(nvml: Any, pid: int) -> str:
    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    with suppress(nvml.NVMLError, UnicodeDecodeError):
        return Path(nvml.nvmlSystemGetProcessName(pid)).name
    return UNKNOWN_NAME


def _failure(what: str, error: Exception) -> Problem:
    remedy = _REMEDIES.get(getattr(error, "value", 0), ("", "nvidia-smi shows more; a reboot often helps."))[
        1
    ]
    return Problem(what=f"{what}: {first_line(error)}.", remedy=remedy)


def _why_no_driver(error: Exception) -> tuple[Problem, ...]:
    code = getattr(error, "value", 0)
    if code == _LIBRARY_NOT_FOUND:
        return () if platform.system() == "Darwin" else (_no_library(),)
    if code in _REMEDIES:
        what, remedy = _REMEDIES[code]
        return (Problem(what=what, remedy=remedy),)
    return (_failure("The NVIDIA driver does not start", error),)


def _no_library() -> Problem:
    if any(Path(mark).exists() for mark in CONTAINER_MARKS):
        what = "No NVIDIA driver library (libnvidia-ml) in this container."
        remedy = (
            "With an NVIDIA card on the host: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all ..."
        )
    elif in_wsl():
        what = "No NVIDIA driver reaches WSL."
        remedy = "Install it on Windows, not in WSL (https://www.nvidia.com/drivers), then: wsl --shutdown"
    elif nvidia_seen():
        what = "An NVIDIA GPU is here, but not its driver (libnvidia-ml is missing)."
        remedy = DRIVER_REMEDY
    else:
        what = "No NVIDIA driver found."
        remedy = f"With an NVIDIA card, install it: {DRIVER_REMEDY}"
    return Problem(what=what, remedy=remedy)


_LIBRARY_NOT_FOUND = 12  # these numbers are NVML's binary interface: they do not change
_REMEDIES = {
    4: (
        "This user may not use the NVIDIA driver.",
        "sudo usermod -aG video,render $USER and log in again; in a container: docker run --gpus all",
    ),
    9: (
        "The NVIDIA driver is installed, but its kernel module is not loaded.",
        "sudo modprobe nvidia; if that fails, reinstall the driver (with Secure Boot, enrol its key).",
    ),
    15: ("The GPU has fallen off the bus.", "Reboot; if it happens again, check its power cables."),
    16: ("The GPU waits for a reset.", "Reboot."),
    17: (
        "The operating system blocks the NVIDIA driver.",
        "On WSL, in Windows: wsl --update, then wsl --shutdown. Elsewhere: reboot.",
    ),
    18: (
        "The NVIDIA driver was updated, but the old one is still loaded: driver and library do not match.",
        "sudo reboot",
    ),
}
