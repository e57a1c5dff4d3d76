"""probe(): every backend and every kind of broken driver, on fake cards and on the machine itself."""

from __future__ import annotations

import builtins
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes  # noqa: F401  it must be loaded before torch.cuda is faked
import psutil
import pynvml  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram import gpu_driver, gpu_problems, hardware
from lowvram.hardware import DEFAULT_CONTEXT_BYTES, DEFAULT_HELD_BYTES, Hardware, card_of_size, probe
from lowvram.units import GiB, MiB
from tests.fake_gpu import STRANGER, FakeCard, fake_driver


def fake_torch(monkeypatch: pytest.MonkeyPatch, module: Any, *cards: FakeCard) -> None:
    """torch.cuda or torch.xpu with `cards`, in this order; its tensors live in host memory."""
    first = cards[0]

    def mem_get_info(_: int) -> tuple[int, int]:
        first.use()
        return first.free, first.offered  # free first, as torch documents

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: first.has_context,
        "device_count": lambda: len(cards),
        "get_device_properties": lambda index: cards[index].properties(),
        "mem_get_info": mem_get_info,
        "memory_reserved": lambda _: first.pool,
    }
    if module is torch.cuda:
        answers["get_device_capability"] = lambda index: cards[index].capability
        answers["get_arch_list"] = lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in answers.items():
        monkeypatch.setattr(module, name, answer)
    real_ones = torch.ones

    def ones(*size: int, device: str, **kwargs: Any) -> torch.Tensor:
        if device != "cpu":
            first.use()
        return real_ones(*size, **kwargs)

    monkeypatch.setattr(torch, "ones", ones)


def no_driver(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """NVML that does not start: by default because its library is not there."""

    def init() -> None:
        raise error or pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", init)


@pytest.fixture(autouse=True)
def plain_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests run: Linux, no WSL, no container, no sign of a GPU, none chosen."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_problems, "nvidia_seen", lambda: False)
    monkeypatch.setattr(gpu_driver, "nvidia_seen", lambda: False)
    monkeypatch.setattr(gpu_driver, "CONTAINER_MARKS", ())
    for module in (gpu_driver, gpu_problems, hardware):
        monkeypatch.setattr(module, "in_wsl", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """A healthy RTX 4060 whose desktop holds 400 MiB."""
    card = FakeCard()
    fake_driver(monkeypatch, card)
    fake_torch(monkeypatch, torch.cuda, card)
    return card


def text(found: Hardware) -> str:
    return "\n".join(f"{problem.what} -> {problem.remedy}" for problem in found.problems)


# --- a healthy card ---


def test_healthy_card(card: FakeCard) -> None:
    found = probe()
    assert (found.backend, found.device, found.name) == ("cuda", "cuda", "NVIDIA GeForce RTX 4060")
    assert (found.capability, found.bf16, found.driver) == ((8, 9), True, "580.95.05")
    assert found.total_bytes == 7938 * MiB
    assert found.held_bytes == 400 * MiB
    assert found.free_bytes == (7938 - 400) * MiB
    assert (found.context_bytes, found.context_measured) == (180 * MiB, True)
    assert [(p.pid, p.name, p.used_bytes) for p in found.processes] == [(STRANGER, "gnome-shell", 400 * MiB)]
    assert found.problems == ()
    # What the planner is left with is what the card has left, plus the pool that it can reuse.
    assert found.free_bytes - found.context_bytes == card.free + card.pool


def test_json_round_trip(card: FakeCard) -> None:
    card.others[STRANGER + 1] = None
    found = probe()
    assert Hardware.model_validate_json(found.model_dump_json()) == found
    assert found.processes[1].used_bytes is None


def test_another_process_arriving_meanwhile_is_not_our_context(card: FakeCard) -> None:
    card.newcomer = GiB
    found = probe()
    assert found.context_bytes == 180 * MiB
    assert found.held_bytes == 400 * MiB + GiB


def test_context_is_measured_where_the_driver_hides_process_sizes(card: FakeCard) -> None:
    card.shows_own = False  # Windows, WSL, containers
    card.others = {STRANGER: None}
    found = probe()
    assert (found.context_bytes, found.context_measured) == (180 * MiB, True)
    assert found.held_bytes == 400 * MiB


def test_a_stranger_with_our_process_number_is_not_us(card: FakeCard) -> None:
    card.shows_own = False
    card.others = {os.getpid(): 300 * MiB}  # a container's number, the host's process
    found = probe()
    assert (found.context_bytes, found.context_measured) == (180 * MiB, True)
    assert found.held_bytes == 400 * MiB


def test_a_second_probe_says_the_same(card: FakeCard) -> None:
    moving = {"host_free_bytes", "disk_free_bytes"}
    first = probe().model_dump(exclude=moving)
    assert card.has_context
    assert probe().model_dump(exclude=moving) == first


def test_context_is_assumed_where_nothing_tells_it(card: FakeCard) -> None:
    card.use()
    card.shows_own = False
    found = probe()
    assert not found.context_measured
    assert found.context_bytes == card.held + card.context  # less than the default: more is not in use
    assert found.free_bytes + found.held_bytes == found.total_bytes
    assert found.free_bytes - found.context_bytes == card.free + card.pool
    card.held += GiB
    again = probe()
    assert again.context_bytes == DEFAULT_CONTEXT_BYTES
    assert again.free_bytes - again.context_bytes == card.free + card.pool


def test_a_share_of_a_card_that_the_driver_counts_otherwise(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: "NVIDIA A100")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda _: "GPU-other")
    found = probe()
    assert found.name == card.name
    assert not found.context_measured
    assert found.processes == ()


def test_driver_and_torch_count_the_cards_in_different_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    used, roomy = FakeCard(), FakeCard(uuid="ffff", held=0)
    fake_driver(monkeypatch, roomy, used)
    fake_torch(monkeypatch, torch.cuda, used, roomy)
    found = probe()
    assert found.held_bytes == 400 * MiB
    assert found.device_count == 2
    assert "2 GPUs; the first is used" in text(found)
    assert "has more free: 7.75 GiB" in text(found)
    assert "CUDA_VISIBLE_DEVICES=GPU-ffff lowvram" in text(found)


def test_turing_has_no_bf16(card: FakeCard) -> None:
    card.capability = (7, 5)
    assert not probe().bf16


# --- a broken or missing driver ---


@pytest.mark.parametrize(
    ("code", "what", "remedy"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "do not match", "sudo reboot"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not use", "usermod -aG video,render"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not use", "--gpus all"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "kernel module is not loaded", "sudo modprobe nvidia"),
        (pynvml.NVML_ERROR_OPERATING_SYSTEM, "blocks", "wsl --update"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "fallen off the bus", "Reboot"),
        (pynvml.NVML_ERROR_RESET_REQUIRED, "reset", "Reboot"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "No NVIDIA driver found", "ubuntu-drivers install"),
        (pynvml.NVML_ERROR_UNKNOWN, "Unknown Error", "nvidia-smi"),
    ],
)
def test_driver_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, code: int, what: str, remedy: str
) -> None:
    no_driver(monkeypatch, pynvml.NVMLError(code))
    found = probe()
    assert (found.backend, found.driver, found.held_bytes) == ("cpu", None, 0)
    assert what in found.problems[0].what
    assert remedy in found.problems[0].remedy
    assert "Training will run on the CPU" in found.problems[-1].what
    assert "--vram 8GB" in found.problems[-1].remedy


@pytest.mark.parametrize(
    "error", [OSError("bad ELF"), AttributeError("nvmlInit"), UnicodeDecodeError("x", b"", 0, 1, "")]
)
def test_driver_that_fails_in_other_ways(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    no_driver(monkeypatch, error)
    assert "does not start" in text(probe())


def test_library_missing_in_a_container_wsl_and_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    monkeypatch.setattr(gpu_driver, "nvidia_seen", lambda: True)
    assert "An NVIDIA GPU is here, but not its driver" in text(probe())
    monkeypatch.setattr(gpu_driver, "in_wsl", lambda: True)
    assert "wsl --shutdown" in text(probe())
    monkeypatch.setattr(gpu_driver, "CONTAINER_MARKS", ("/",))
    assert "docker run --gpus all" in text(probe())


def test_card_works_though_the_driver_library_is_missing(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_driver(monkeypatch)
    found = probe()
    assert (found.backend, found.name, found.context_measured) == ("cuda", card.name, False)
    assert "No NVIDIA driver found" in text(found)
    assert "on the CPU" not in text(found)


def test_mac_is_not_told_to_install_an_nvidia_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert "NVIDIA" not in text(probe())


@pytest.mark.usefixtures("card")
def test_nvidia_ml_py_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = probe()
    assert found.backend == "cuda"
    assert "pip install nvidia-ml-py" in text(found)


@pytest.mark.usefixtures("card")
def test_names_of_processes_are_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", denied)
    found = probe()
    assert [(p.name, p.used_bytes) for p in found.processes] == [("unknown", 400 * MiB)]
    assert f"process {STRANGER}" in text(found)
    assert "sudo nvidia-smi" in text(found)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", denied)
    again = probe()
    assert again.processes == ()
    assert "will not list the processes on the GPU: Insufficient Permissions" in text(again)


def test_name_of_a_process_of_this_machine(card: FakeCard) -> None:
    parent = psutil.Process(os.getppid())
    card.others = {parent.pid: None}
    assert [(p.pid, p.name) for p in probe().processes] == [(parent.pid, parent.name())]


def test_one_lost_card_does_not_hide_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, fine = FakeCard(uuid="lost"), FakeCard()
    fake_driver(monkeypatch, lost, fine)
    fake_torch(monkeypatch, torch.cuda, fine)
    real_info = pynvml.nvmlDeviceGetMemoryInfo

    def memory_info(card: FakeCard) -> Any:
        if card is lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return real_info(card)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory_info)
    found = probe()
    assert found.context_measured
    assert "GPU 0 does not answer the driver: GPU is lost" in text(found)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: unknown"), OSError(), KeyError("x"), SystemError()]
)
@pytest.mark.parametrize(
    "name",
    [
        *("is_available", "is_initialized", "get_device_properties", "get_device_capability"),
        *("get_arch_list", "mem_get_info", "memory_reserved", "device_count"),
    ],
)
@pytest.mark.usefixtures("card")
def test_never_raises_whatever_torch_does(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, name, broken)
    found = probe()
    assert found.free_bytes + found.held_bytes == found.total_bytes or found.backend == "cpu"
    assert not found.context_measured
    if found.backend == "cpu":
        assert "is broken" in text(found)


@pytest.mark.parametrize(
    "name",
    [
        *("nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"),
        *("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetUUID"),
        *("nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetComputeRunningProcesses"),
        *("nvmlDeviceGetName", "nvmlSystemGetProcessName"),
        *("nvmlSystemGetCudaDriverVersion", "nvmlSystemGetDriverVersion"),
    ],
)
@pytest.mark.parametrize("error", [OSError("access violation reading 0x0"), pynvml.NVMLError(999)])
def test_never_raises_whatever_the_driver_does(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(pynvml, name, broken)
    found = probe()
    assert (found.backend, found.name, found.total_bytes) == ("cuda", card.name, card.offered)
    assert Hardware.model_validate_json(found.model_dump_json()) == found
    quiet = ("nvmlShutdown", "nvmlDeviceGetCudaComputeCapability")
    assert bool(found.problems) is (name not in quiet or (name == quiet[1] and isinstance(error, OSError)))


# --- PyTorch and bitsandbytes ---


def test_cpu_torch_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(monkeypatch, FakeCard())
    monkeypatch.setattr(torch.version, "cuda", None)
    found = probe()
    assert found.backend == "cpu"
    assert found.problems[0].what == "PyTorch is a CPU build: it cannot use the NVIDIA GeForce RTX 4060."
    assert found.problems[0].remedy == (
        "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    )
    assert "Training will run on the CPU" in text(found)


def test_cpu_torch_beside_a_card_with_a_broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch, pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(gpu_problems, "nvidia_seen", lambda: True)
    assert "PyTorch is a CPU build" in text(probe())
    assert "sudo reboot" in text(probe())


@pytest.mark.parametrize(
    ("cuda", "capability", "build"),
    [
        (13000, (8, 9), "cu130"),
        (13000, (12, 0), "cu130"),
        (13000, (7, 0), "cu126"),  # CUDA 13 dropped Volta
        (12080, (12, 0), "cu129"),  # CUDA 12.6 does not know Blackwell
        (12020, (8, 6), "cu126"),
        (12080, (6, 1), "cu126"),
    ],
)
def test_torch_build_suits_driver_and_card(
    monkeypatch: pytest.MonkeyPatch, cuda: int, capability: tuple[int, int], build: str
) -> None:
    card = FakeCard()
    card.capability = capability
    fake_driver(monkeypatch, card, cuda=cuda)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"/whl/{build}" in probe().problems[0].remedy


def test_torch_builds_agree_with_torch_own_table() -> None:
    table = getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", None)
    if table is None:
        pytest.skip("this torch has no table of its builds")
    capabilities = {build: table[build]["x86_64"] for build in ("12.6", "12.9", "13.0")}
    assert 60 in capabilities["12.6"]
    assert 70 in capabilities["12.6"]
    assert 120 in capabilities["12.9"]
    assert 120 not in capabilities["12.6"]
    assert min(capabilities["13.0"]) == 75


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((12, 0), ["sm_80", "sm_86", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90", "sm_120"], True),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
    ],
)
def test_torch_has_code_for_the_card(
    card: FakeCard,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    built: list[str],
    runs: bool,
) -> None:
    card.capability = capability
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    found = probe()
    assert found.backend == "cuda"
    assert ("has no code for this GPU" in text(found)) is not runs
    assert ("pip install --force-reinstall torch" in text(found)) is not runs


def test_maxwell_is_too_old_for_bitsandbytes(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    card.capability = (5, 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50"])
    assert "bitsandbytes needs capability 6.0" in text(probe())


def test_driver_too_old_is_a_problem_and_not_a_warning(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def is_available() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).",
            stacklevel=1,
        )
        return False

    fake_driver(monkeypatch, FakeCard(), cuda=12040)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = probe()
    assert capfd.readouterr() == ("", "")
    assert "with NVIDIA driver 580.95.05: CUDA initialization" in found.problems[0].what
    assert "Update the driver" in found.problems[0].remedy
    assert "/whl/cu126" in found.problems[0].remedy


def test_cuda_torch_finds_no_card_and_does_not_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(monkeypatch, FakeCard())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "modprobe nvidia_uvm" in probe().problems[0].remedy


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "is empty, which hides every GPU"),
        ("-1", "CUDA_VISIBLE_DEVICES=-1 names a GPU that is not here"),
        ("3", "names a GPU that is not here. Here: 0 (NVIDIA GeForce RTX 4060)"),
    ],
)
def test_visible_devices_hides_the_card(monkeypatch: pytest.MonkeyPatch, value: str, what: str) -> None:
    fake_driver(monkeypatch, FakeCard())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    found = probe()
    assert what in found.problems[0].what
    assert found.problems[0].remedy == "unset CUDA_VISIBLE_DEVICES"


def test_visible_devices_names_one_card_too_many(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-{card.uuid}")
    assert probe().problems == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    assert "CUDA_VISIBLE_DEVICES=0,7 names a GPU that is not here" in text(probe())


def test_card_is_visible_and_cannot_be_used(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch, "ones", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    found = probe()
    assert (found.backend, found.total_bytes, found.held_bytes) == ("cuda", card.offered, 400 * MiB)
    assert not found.context_measured
    assert "using it fails: CUDA out of memory" in text(found)


def test_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(monkeypatch, FakeCard())
    real_version = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("torch", "peft", "datasets"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = probe()
    assert (found.backend, found.versions["torch"]) == ("cpu", "missing")
    assert found.problems[0].what == "PyTorch is not installed: nothing can be trained."
    assert "/whl/cu130" in found.problems[0].remedy
    assert "Not installed: peft, datasets. -> pip install peft datasets" in text(found)


def test_torch_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def broken(name: str, *args: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real_import(name, *args)

    no_driver(monkeypatch)
    monkeypatch.setattr(builtins, "__import__", broken)
    found = probe()
    assert found.backend == "cpu"
    assert "broken: libcudart.so.13: cannot open shared object file" in text(found)


@pytest.mark.usefixtures("card")
def test_bitsandbytes_has_no_library_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import cextension

    message = "No compatible CUDA binary found at libbitsandbytes_cuda140.so"
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary(message))
    found = probe()
    assert f"bitsandbytes has no library for this GPU: {message}" in text(found)
    assert "python -m bitsandbytes" in text(found)


def test_bitsandbytes_fails_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("\n\nno kernel image is available\nfor execution on the device")

    no_driver(monkeypatch)
    monkeypatch.setattr(functional, "quantize_4bit", broken)
    assert "cannot do 4-bit weights on cpu: no kernel image is available ->" in text(probe())


def test_bitsandbytes_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert "bitsandbytes cannot do 4-bit weights on cpu" in text(probe())


# --- other makes, other systems ---


class FakeRadeon(FakeCard):
    name = "AMD Radeon RX 7900 XTX"
    capability = (11, 0)
    offered = 24560 * MiB
    arch = "gfx1100"

    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(**vars(super().properties()), gcnArchName=self.arch)


@pytest.mark.parametrize(("arch", "bf16"), [("gfx1100", True), ("gfx90a:sramecc+", True), ("gfx1030", False)])
def test_rocm(monkeypatch: pytest.MonkeyPatch, arch: str, bf16: bool) -> None:
    card = FakeRadeon()
    card.arch = arch
    no_driver(monkeypatch)
    fake_torch(monkeypatch, torch.cuda, card)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.2.1")
    found = probe()
    assert (found.backend, found.device, found.name) == ("rocm", "cuda", "AMD Radeon RX 7900 XTX")
    assert (found.total_bytes, found.bf16, found.driver) == (24560 * MiB, bf16, None)
    assert not found.context_measured
    # The context is assumed, but what is left after it is what the card has left.
    assert found.free_bytes - found.context_bytes == card.free + card.pool
    assert "NVIDIA" not in text(found)


class FakeArc(FakeCard):
    name = "Intel(R) Arc(TM) B580 Graphics"
    offered = 11873 * MiB

    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(
            name=self.name,
            total_memory=self.offered,
            driver_version="1.6.32413",
            has_bfloat16_conversions=True,
        )


def test_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeArc()
    no_driver(monkeypatch)
    fake_torch(monkeypatch, torch.xpu, card, FakeArc())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else name)
    found = probe()
    assert (found.backend, found.device, found.name) == ("xpu", "xpu", card.name)
    assert (found.total_bytes, found.capability, found.bf16) == (11873 * MiB, None, True)
    assert found.driver == "1.6.32413"
    assert found.free_bytes - found.context_bytes == card.free + card.pool
    assert "NVIDIA" not in text(found)
    assert "Without triton" in text(found)
    assert "ZE_AFFINITY_MASK=1" in text(found)


def test_xpu_that_cannot_tell_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: int) -> None:
        raise RuntimeError("The device doesn't support querying the available free memory.")

    no_driver(monkeypatch)
    fake_torch(monkeypatch, torch.xpu, FakeArc())
    monkeypatch.setattr(torch.xpu, "mem_get_info", unsupported)
    found = probe()
    assert (found.backend, found.total_bytes, found.free_bytes) == ("xpu", 11873 * MiB, 11873 * MiB)


def test_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    real_ones = torch.ones
    no_driver(monkeypatch)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, _: major <= 15)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4", raising=False)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100 * MiB)
    monkeypatch.setattr(torch, "ones", lambda *size, device: real_ones(*size))  # noqa: ARG005
    found = probe()
    assert (found.backend, found.device, found.name, found.bf16) == ("mps", "mps", "Apple M4", True)
    assert found.total_bytes == found.host_total_bytes
    assert found.free_bytes == 100 * MiB
    assert (found.held_bytes, found.context_bytes) == (0, 0)
    assert "no 8-bit optimizer" in text(found)


@pytest.mark.parametrize("system", ["Windows", "WSL"])
@pytest.mark.usefixtures("card")
def test_windows_spills_to_ram(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    assert "Sysmem Fallback" not in text(probe())
    if system == "Windows":
        monkeypatch.setattr(platform, "system", lambda: "Windows")
    else:
        monkeypatch.setattr(gpu_problems, "in_wsl", lambda: True)
        monkeypatch.setattr(hardware, "in_wsl", lambda: True)
    found = probe()
    assert "Prefer No Sysmem Fallback" in text(found)
    assert system in found.platform


def test_amd_card_beside_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    real_exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/kfd" or real_exists(path))
    assert "cannot use the AMD GPU" in probe().problems[0].what


def test_traces_of_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # the autouse fixture hides the function under test
    monkeypatch.setattr(gpu_driver, "DRIVER_FOLDER", tmp_path / "none")
    monkeypatch.setattr(gpu_driver, "PCI_FOLDER", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    device = tmp_path / "0000:01:00.1"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x040300\n")  # the sound part of a card
    assert not gpu_driver.nvidia_seen()
    (device / "class").write_text("0x030000\n")
    assert gpu_driver.nvidia_seen()
    monkeypatch.setattr(gpu_driver, "PCI_FOLDER", tmp_path / "none")
    assert not gpu_driver.nvidia_seen()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu_driver.nvidia_seen()


# --- this machine ---


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux' own counters")
def test_real_machine(tmp_path: Path) -> None:
    found = probe(tmp_path)
    disk = os.statvfs(tmp_path)
    assert found.disk_free_bytes == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.01)
    assert found.cpu_count == len(os.sched_getaffinity(0))
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.versions["torch"] == torch.__version__
    assert found.versions["peft"] == importlib.metadata.version("peft")
    assert found.platform.startswith(f"Linux-{os.uname().release.split('.')[0]}.")
    assert Hardware.model_validate_json(found.model_dump_json()) == found


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux' own counters")
def test_real_memory_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    monkeypatch.setattr(hardware, "CGROUP_FOLDER", Path("/nowhere"))
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    found = probe()
    assert (found.backend, found.device) == ("cpu", "cpu")
    assert found.total_bytes == found.host_total_bytes == kib["MemTotal"] * 1024
    assert found.free_bytes == found.host_free_bytes == pytest.approx(kib["MemAvailable"] * 1024, rel=0.05)
    assert (found.held_bytes, found.context_bytes, found.capability) == (0, 0, None)
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert found.name in cpuinfo or platform.machine() != "x86_64"
    assert found.bf16 == any(f" {flag}" in cpuinfo for flag in ("avx512_bf16", "amx_bf16", "bf16"))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_has_less_ram_than_its_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    names = (
        ("memory.max", "memory.current")
        if version == "v2"
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    folder = tmp_path if version == "v2" else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(f"{64 * MiB}\n")
    (folder / names[1]).write_text(f"{48 * MiB}\n")
    prefix = "" if version == "v2" else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {8 * MiB}\n{prefix}active_file 3\n")
    no_driver(monkeypatch)
    monkeypatch.setattr(hardware, "CGROUP_FOLDER", tmp_path)
    found = probe()
    assert (found.host_total_bytes, found.host_free_bytes) == (64 * MiB, 24 * MiB)
    assert "Only 24 MiB of RAM is free" in text(found)
    (folder / names[0]).write_text("max\n" if version == "v2" else f"{2**63 - 4096}\n")
    assert probe().host_total_bytes == psutil.virtual_memory().total


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    deep = probe(tmp_path / "runs" / "1").disk_free_bytes
    assert deep == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)


def test_little_disk_and_unreadable_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=GiB))
    assert "Only 1.00 GiB of disk is free at " + str(tmp_path) in text(probe(tmp_path))

    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", denied)
    found = probe(tmp_path)
    assert found.disk_free_bytes == 0
    assert "cannot be read: [Errno 13] Permission denied" in text(found)


def test_enough_ram_and_disk_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    memory = SimpleNamespace(total=32 * GiB, available=16 * GiB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(hardware, "CGROUP_FOLDER", Path("/nowhere"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99 * GiB))
    assert "Only" not in text(probe())
    memory.available = GiB
    assert "Only 1.00 GiB of RAM is free" in text(probe())


def test_import_loads_no_torch() -> None:
    heavy = "('torch', 'transformers', 'bitsandbytes')"
    code = f"import lowvram.hardware, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- a card that is not here ---


def test_card_of_size_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver(monkeypatch)
    host = probe()
    card = card_of_size(8 * GiB, host)
    assert (card.backend, card.device, card.name) == ("cuda", "cuda", "an 8 GB card")
    assert (card.capability, card.bf16, card.device_count) == ((8, 6), True, 1)
    assert (card.total_bytes, card.held_bytes) == (8 * GiB, DEFAULT_HELD_BYTES)
    assert card.free_bytes == 8 * GiB - DEFAULT_HELD_BYTES
    assert (card.context_bytes, card.context_measured) == (int(0.7 * GiB), False)
    assert card.problems == ()
    assert card.host_total_bytes == host.host_total_bytes
    assert card_of_size(int(7.5 * GiB), host).name == "a 7.5 GB card"
    assert card_of_size(12 * GiB, host).name == "a 12 GB card"


def test_card_of_size_keeps_what_was_measured(card: FakeCard) -> None:
    card.capability = (7, 5)
    smaller = card_of_size(6 * GiB, probe())
    assert (smaller.total_bytes, smaller.held_bytes) == (6 * GiB, DEFAULT_HELD_BYTES)
    assert (smaller.context_bytes, smaller.context_measured) == (180 * MiB, True)
    assert (smaller.capability, smaller.bf16, smaller.driver) == ((7, 5), False, "580.95.05")
    assert (smaller.name, smaller.processes) == ("a 6 GB card", ())


HOST = Hardware(
    backend="cpu",
    name="CPU",
    total_bytes=16 * GiB,
    free_bytes=8 * GiB,
    held_bytes=0,
    context_bytes=0,
    context_measured=False,
    capability=None,
    bf16=False,
    driver=None,
    device_count=1,
    processes=(),
    host_total_bytes=16 * GiB,
    host_free_bytes=8 * GiB,
    disk_free_bytes=99 * GiB,
    cpu_count=8,
    platform="Linux-6.1-x86_64",
    versions={},
    problems=(),
)


@given(st.integers(min_value=1, max_value=1 << 40))
def test_card_of_any_size_adds_up(total_bytes: int) -> None:
    card = card_of_size(total_bytes, HOST)
    assert card.total_bytes == total_bytes == card.free_bytes + card.held_bytes
    assert card.free_bytes >= 0
    assert Hardware.model_validate_json(card.model_dump_json()) == card
