"""`lowvram probe` on the screen: the machine in one table, then each problem with its remedy."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowvram.hardware import GpuProcess, Hardware
from lowvram.units import format_bytes

BACKENDS = {"cuda": "NVIDIA CUDA", "rocm": "AMD ROCm", "xpu": "Intel XPU", "mps": "Apple MPS", "cpu": "CPU"}
SHOWN_PROCESSES = 4


def show(hardware: Hardware, console: Console) -> None:
    """Prints `hardware`. Names and errors are printed as they are, whatever markup they resemble."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for label, value in _rows(hardware):
        table.add_row(label, value)
    console.print(Padding(table, (1, 1)))
    if not hardware.problems:
        console.print(Text(" Nothing is missing.", style="bold green"))
    for problem in hardware.problems:
        console.print(_indented("!", Text(problem.what, style="yellow")))
        # soft_wrap: a command that the console broke into lines could not be copied
        console.print(Text(f"   {problem.remedy}", style="bold"), soft_wrap=True)


def _rows(hardware: Hardware) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = [("device", _device(hardware))]
    if hardware.backend != "cpu":
        rows.append(("memory", _memory(hardware)))
    if hardware.context_bytes:
        rows.append(("context", _context(hardware)))
    if hardware.processes:
        rows.append(("held by", _processes(hardware.processes)))
    rows.append(("bf16", Text("yes" if hardware.bf16 else "no")))
    if hardware.driver:
        rows.append(("driver", Text(hardware.driver)))
    cores = "core" if hardware.cpu_count == 1 else "cores"
    rows.append(("RAM", _share(hardware.host_free_bytes, hardware.host_total_bytes)))
    rows.append(("disk", Text(f"{format_bytes(hardware.disk_free_bytes)} free")))
    rows.append(("system", Text(f"{hardware.platform}, {hardware.cpu_count} {cores}")))
    rows.append(("versions", _versions(hardware.versions)))
    return rows


def _device(hardware: Hardware) -> Text:
    text = Text(hardware.name, style="bold")
    details = BACKENDS[hardware.backend]
    if hardware.capability:
        details += f" {hardware.capability[0]}.{hardware.capability[1]}"
    if hardware.device_count > 1:
        details += f", the first of {hardware.device_count}"
    return text.append(f"  {details}", style="not bold dim")


def _memory(hardware: Hardware) -> RenderableType:
    held = f", {format_bytes(hardware.held_bytes)} held by others" if hardware.held_bytes else ""
    used = hardware.total_bytes - hardware.free_bytes
    bar = ProgressBar(total=max(1, hardware.total_bytes), completed=used, width=40)
    return Group(_share(hardware.free_bytes, hardware.total_bytes).append(held), bar)


def _context(hardware: Hardware) -> Text:
    how = "measured" if hardware.context_measured else "assumed"
    return Text(f"{format_bytes(hardware.context_bytes)} for one process, {how}")


def _processes(processes: tuple[GpuProcess, ...]) -> Text:
    largest = sorted(processes, key=lambda process: process.used_bytes or 0, reverse=True)
    lines = [
        f"{process.name} ({process.pid})"
        + ("" if process.used_bytes is None else f" {format_bytes(process.used_bytes)}")
        for process in largest[:SHOWN_PROCESSES]
    ]
    if len(largest) > SHOWN_PROCESSES:
        lines.append(f"and {len(largest) - SHOWN_PROCESSES} more")
    return Text(", ".join(lines))


def _share(free: int, total: int) -> Text:
    return Text(f"{format_bytes(free)} free of {format_bytes(total)}")


def _versions(versions: dict[str, str]) -> Text:
    text = Text()
    for name, version in versions.items():
        text.append(", " if text else "")
        text.append(f"{name} {version}", style="bold red" if version == "missing" else "")
    return text


def _indented(mark: str, text: Text) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(f" {mark}", style="bold yellow"), text)
    return grid
