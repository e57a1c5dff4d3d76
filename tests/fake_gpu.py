"""NVIDIA cards that answer nvidia-ml-py's functions from a budget of bytes, where there is none."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest

from lowvram.units import MiB

UUID = "8c1f0d2e-0000-4000-8000-000000004060"
STRANGER = 2**22 + 7  # above Linux' largest process number: nobody on this machine


class FakeCard:
    """An RTX 4060 as a budget of bytes; the first tensor on it costs a context, as on a real one."""

    name = "NVIDIA GeForce RTX 4060"
    capability = (8, 9)
    offered = 7938 * MiB  # what CUDA sees: 8188 MiB less what the driver keeps
    context = 180 * MiB

    def __init__(self, uuid: str = UUID, held: int = 400 * MiB) -> None:
        self.uuid = uuid
        self.others: dict[int, int | None] = {STRANGER: held}
        self.held = held
        self.has_context = False
        self.pool = 0
        self.shows_own = True
        self.temperature, self.milliwatts, self.clock, self.throttle = 71, 98_400, 2400, 0
        self.newcomer = 0  # what somebody else takes at the moment when our context is made

    @property
    def own(self) -> int:
        return self.context + self.pool if self.has_context else 0

    @property
    def free(self) -> int:
        return self.offered - self.held - self.own

    def use(self) -> None:
        if not self.has_context:
            self.has_context, self.pool = True, 2 * MiB
            self.held += self.newcomer

    def running(self) -> list[SimpleNamespace]:
        users = dict(self.others)
        if self.has_context and self.shows_own:
            users[os.getpid()] = self.own
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in users.items()]

    def properties(self) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name, uuid=self.uuid, major=major, minor=minor, total_memory=self.offered
        )


def fake_driver(monkeypatch: pytest.MonkeyPatch, *cards: FakeCard, cuda: int = 13000) -> None:
    """NVML that answers for `cards`, in this order. setattr raises where nvidia-ml-py lacks the name."""
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(
            total=8188 * MiB, free=card.free, used=8188 * MiB - card.free
        ),
        "nvmlDeviceGetCudaComputeCapability": lambda card: list(card.capability),
        "nvmlDeviceGetGraphicsRunningProcesses": lambda _: [],
        "nvmlDeviceGetComputeRunningProcesses": lambda card: card.running(),
        "nvmlDeviceGetUUID": lambda card: f"GPU-{card.uuid}",
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetTemperature": lambda card, _: card.temperature,
        "nvmlDeviceGetPowerUsage": lambda card: card.milliwatts,
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 115_000,
        "nvmlDeviceGetClockInfo": lambda card, _: card.clock,
        "nvmlDeviceGetMaxClockInfo": lambda *_: 3105,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda card: card.throttle,
        "nvmlSystemGetProcessName": lambda _: "/usr/bin/gnome-shell",
        "nvmlSystemGetCudaDriverVersion": lambda: cuda,
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
