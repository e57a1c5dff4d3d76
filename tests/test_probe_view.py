"""The probe's screen: every number that a user needs is there, and nothing is taken for markup."""

from __future__ import annotations

import io

from rich.console import Console

from lowvram.hardware import GpuProcess, Hardware, Problem
from lowvram.probe_view import show
from lowvram.units import GiB, MiB

CARD = Hardware(
    backend="cuda",
    name="NVIDIA [bold]RTX[/bold] 4060",
    total_bytes=8188 * MiB,
    free_bytes=7788 * MiB,
    held_bytes=400 * MiB,
    context_bytes=180 * MiB,
    context_measured=True,
    capability=(8, 9),
    bf16=True,
    driver="580.95.05",
    device_count=2,
    processes=(
        GpuProcess(pid=7, name="[red]", used_bytes=None),
        GpuProcess(pid=812, name="gnome-shell", used_bytes=300 * MiB),
    ),
    host_total_bytes=32 * GiB,
    host_free_bytes=20 * GiB,
    disk_free_bytes=77 * GiB,
    cpu_count=12,
    platform="Linux-6.1-x86_64",
    versions={"python": "3.12.1", "torch": "2.13.0+cu130", "peft": "missing"},
    problems=(
        Problem(what="peft is not [installed].", remedy="pip install peft " + "x" * 120),
        Problem(what="The disk is small.", remedy="Choose another with --output."),
    ),
)


def shown(hardware: Hardware, encoding: str = "utf-8") -> str:
    console = Console(record=True, width=100, file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    show(hardware, console)
    return console.export_text()


def row(screen: str, label: str) -> str:
    return next(line.strip() for line in screen.splitlines() if line.strip().startswith(label))


def test_card() -> None:
    screen = shown(CARD)
    assert "NVIDIA [bold]RTX[/bold] 4060  NVIDIA CUDA 8.9, the first of 2" in row(screen, "device")
    assert row(screen, "memory").endswith("7.61 GiB free of 8.00 GiB, 400 MiB held by others")
    assert row(screen, "context").endswith("180 MiB for one process, measured")
    assert row(screen, "held by").endswith("gnome-shell (812) 300 MiB, [red] (7)")
    assert row(screen, "bf16").split() == ["bf16", "yes"]
    assert row(screen, "driver").split() == ["driver", "580.95.05"]
    assert row(screen, "RAM").endswith("20.00 GiB free of 32.00 GiB")
    assert row(screen, "disk").endswith("77.00 GiB free")
    assert row(screen, "system").endswith("Linux-6.1-x86_64, 12 cores")
    assert row(screen, "versions").endswith("python 3.12.1, torch 2.13.0+cu130, peft missing")


def test_each_problem_is_followed_by_a_remedy_that_can_be_copied() -> None:
    lines = [line.rstrip() for line in shown(CARD).splitlines()]
    assert lines[-4:] == [
        " ! peft is not [installed].",
        "   pip install peft " + "x" * 120,
        " ! The disk is small.",
        "   Choose another with --output.",
    ]
    assert "Nothing is missing" not in shown(CARD)


def test_processor_without_problems() -> None:
    processor = CARD.model_copy(
        update={
            "backend": "cpu",
            "name": "AMD EPYC",
            "capability": None,
            "device_count": 1,
            "processes": (),
            "problems": (),
            "driver": None,
            "context_bytes": 0,
            "held_bytes": 0,
            "bf16": False,
            "cpu_count": 1,
        }
    )
    screen = shown(processor)
    assert row(screen, "device").endswith("AMD EPYC  CPU")
    assert row(screen, "bf16").split() == ["bf16", "no"]
    assert row(screen, "system").endswith("1 core")
    assert "Nothing is missing." in screen
    for absent in ("memory", "context", "held by", "driver"):
        assert absent not in screen


def test_many_processes_are_cut_at_the_largest() -> None:
    many = tuple(GpuProcess(pid=pid, name=f"p{pid}", used_bytes=pid * MiB) for pid in range(1, 8))
    screen = shown(CARD.model_copy(update={"processes": many}))
    assert row(screen, "held by").endswith(
        "p7 (7) 7 MiB, p6 (6) 6 MiB, p5 (5) 5 MiB, p4 (4) 4 MiB, and 3 more"
    )


def test_a_console_without_unicode() -> None:
    shown(CARD, encoding="ascii").encode("ascii")
