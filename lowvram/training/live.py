"""Training on the screen: one updating panel in a terminal, one plain line a step anywhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowvram.training.machine import MachineSample
from lowvram.training.metrics import StepRecord
from lowvram.units import GiB, format_bytes, format_seconds, printable

BAR_WIDTH = 40
HISTORY = 40  # characters of the loss curve
BLOCKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """What the loop shows itself on."""

    def start(self) -> None: ...
    def catch_up(self, records: Sequence[StepRecord]) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


def make_view(console: Console, title: str) -> View:
    """A panel where the console can redraw, lines where it cannot: a pipe, a file, a dumb terminal."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, title)
    return LineView(console, title)


class LineView:
    """`step 12/60  loss 1.2345  lr 1.8e-04  412 tok/s  mem 0.61/0.64 GiB peak, predicted 0.65  ETA 5 s`"""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title

    def start(self) -> None:
        self.note(self._title)

    def catch_up(self, records: Sequence[StepRecord]) -> None:
        """Of a run that is under way only the newest step; nothing shown before is shown again."""
        for record in records[-1:]:
            self.step(record)

    def step(self, record: StepRecord) -> None:
        place = f"step {record.step}/{record.total_steps}"
        memory = f"mem {_gib(record.memory_now_bytes)}/{_gib(record.memory_peak_bytes)} GiB peak"
        if record.memory_predicted_bytes:
            memory += f", predicted {_gib(record.memory_predicted_bytes)}"
        rate = f"lr {record.learning_rate:.1e}  {record.tokens_per_second:.0f} tok/s"
        self.note(f"{place}  loss {record.loss:.4f}  {rate}  {memory}  ETA {_duration(record.eta_seconds)}")
        if record.held_out_loss is not None:
            self.note(f"{place}  held-out loss {_held_out(record)}")

    def note(self, text: str) -> None:
        # A line that the console broke at its width could not be searched for.
        self._console.print(Text(printable(text)), soft_wrap=True)

    def stop(self) -> None:
        pass


class LiveView:
    """A panel that is redrawn in place and stays as it was when training ends."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = Text(printable(title), style="bold")
        self._losses = LossHistory()
        self._held_out: Text | None = None
        self._live = Live(self._waiting(), console=console, refresh_per_second=4, transient=False)

    def start(self) -> None:
        self._live.start(refresh=True)

    def catch_up(self, records: Sequence[StepRecord]) -> None:
        """All steps so far of a run that is under way, or was set back; what was shown is forgotten."""
        self._losses, self._held_out = LossHistory(), None
        for record in records:
            self._add(record)
        self._live.update(self._panel(records[-1]) if records else self._waiting())

    def step(self, record: StepRecord) -> None:
        self._add(record)
        self._live.update(self._panel(record))

    def _add(self, record: StepRecord) -> None:
        self._losses.add(record.loss)
        if record.held_out_loss is not None:
            held_out = f"  held-out {_held_out(record)} at step {record.step}"
            self._held_out = Text(held_out, style="not bold cyan")

    def _waiting(self) -> RenderableType:
        return Group(self._title, Text("  The first step is under way.", style="dim"))

    def note(self, text: str) -> None:
        # rich prints it above the panel; unbroken, so that a command in it can be copied
        self._console.print(Text(printable(text)), soft_wrap=True)

    def stop(self) -> None:
        self._live.stop()

    def _panel(self, record: StepRecord) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column()
        table.add_row("progress", ProgressBar(max(1, record.total_steps), record.step, width=BAR_WIDTH))
        table.add_row("", _progress(record))
        table.add_row("loss", self._loss(record))
        rate = f"{record.learning_rate:.2e}   {record.tokens_per_second:,.0f} tokens/s"
        table.add_row("learning rate", Text(rate))
        table.add_row("memory", memory_bar(record, unicode=self._draws_blocks()))
        table.add_row("", _memory(record))
        if record.machine is not None and (told := machine_line(record.machine)):
            table.add_row("machine", Text(told))
        return Group(self._title, table)

    def _loss(self, record: StepRecord) -> Text:
        text = Text(f"{record.loss:.4f}", style="bold" if math.isfinite(record.loss) else "bold red")
        if self._held_out is not None:
            text.append_text(self._held_out)
        if self._draws_blocks():
            text.append(f"  {self._losses.curve()}", style="not bold green")
        return text

    def _draws_blocks(self) -> bool:
        return self._console.encoding.lower().startswith("utf")


class LossHistory:
    """The whole run's losses in at most HISTORY means: when they are full, neighbours are joined.

    >>> history = LossHistory()
    >>> for loss in (3.0, 2.0, 1.0): history.add(loss)
    >>> history.curve()
    '█▅▁'
    """

    def __init__(self) -> None:
        self._means: list[float] = []
        self._size = 1  # losses in one mean
        self._open: list[float] = []

    def add(self, loss: float) -> None:
        self._open.append(loss)
        if len(self._open) < self._size:
            return
        self._means.append(sum(self._open) / self._size)
        self._open = []
        if len(self._means) == 2 * HISTORY:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._size *= 2

    def curve(self) -> str:
        """One block a mean, from the lowest to the highest loss; a mean that is no number is an x."""
        values = self._halved() if len(self._means) > HISTORY else self._means
        finite = [value for value in values if math.isfinite(value)]
        low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
        return "".join(_block((value - low) / span if span else 0.0, value) for value in values)

    def _halved(self) -> list[float]:
        groups = [self._means[index : index + 2] for index in range(0, len(self._means), 2)]
        return [sum(group) / len(group) for group in groups]


def memory_bar(record: StepRecord, unicode: bool = True) -> Text:
    """Now, peak and prediction on one scale that ends at the budget, or behind it when it is exceeded.

    With a budget of 8 GiB, now 4, peak 6 and predicted 7:  ████████████▓▓▓▓▓▓──┃──
    """
    full, peak_fill, empty, mark = "█▓─┃" if unicode else "#=-|"
    known = (record.memory_budget_bytes, record.memory_peak_bytes, record.memory_predicted_bytes)
    scale = max(1, *known)
    now, peak = (_cells(n, scale) for n in (record.memory_now_bytes, record.memory_peak_bytes))
    bar = Text(full * now, style="green")
    bar.append(peak_fill * (peak - now), style=_alarm(record) or "green")
    bar.append(empty * (BAR_WIDTH - max(now, peak)), style="dim")
    if record.memory_predicted_bytes:
        at = min(BAR_WIDTH - 1, _cells(record.memory_predicted_bytes, scale))
        bar = Text.assemble(bar[:at], (mark, "bold magenta"), bar[at + 1 :])
    return bar


def _progress(record: StepRecord) -> Text:
    text = f"step {record.step}/{record.total_steps}   epoch {record.epoch:.2f}   "
    return Text(text + f"ETA {_duration(record.eta_seconds)}")


def _memory(record: StepRecord) -> Text:
    text = Text(f"now {format_bytes(record.memory_now_bytes)}   ")
    text.append(f"peak {format_bytes(record.memory_peak_bytes)}", style=_alarm(record))
    if record.memory_predicted_bytes:
        text.append(f"   predicted {format_bytes(record.memory_predicted_bytes)}")
    if record.memory_budget_bytes:
        text.append(f"   budget {format_bytes(record.memory_budget_bytes)}")
    return text


def machine_line(sample: MachineSample) -> str:
    """`GPU 71 °C, 160 of 170 W, 1700 of 2100 MHz, others 0.41 GiB   RAM 9.20 GiB left`, as far as told."""
    told = {
        "{} °C": (sample.gpu_temperature_celsius,),
        "{:.0f} of {:.0f} W": (sample.gpu_power_watts, sample.gpu_power_limit_watts),
        "{} of {} MHz": (sample.gpu_clock_mhz, sample.gpu_max_clock_mhz),
    }
    gpu = [text.format(*values) for text, values in told.items() if None not in values]
    if sample.gpu_others_bytes is not None:
        gpu.append(f"others {format_bytes(sample.gpu_others_bytes)}")
    if sample.gpu_throttle:
        gpu.append(f"held back: {', '.join(sample.gpu_throttle)}")
    left = sample.host_available_bytes
    parts = [f"GPU {', '.join(gpu)}" if gpu else "", f"RAM {format_bytes(left)} left" if left else ""]
    return "   ".join(part for part in parts if part)


def _alarm(record: StepRecord) -> str:
    """Red behind the budget, yellow behind the prediction."""
    if 0 < record.memory_budget_bytes < record.memory_peak_bytes:
        return "bold red"
    return "yellow" if 0 < record.memory_predicted_bytes < record.memory_peak_bytes else ""


def _cells(n: int, scale: int) -> int:
    return min(BAR_WIDTH, round(BAR_WIDTH * n / scale))


def _block(height: float, value: float) -> str:
    if not math.isfinite(value):
        return "x"
    return BLOCKS[round(height * (len(BLOCKS) - 1))]


def _held_out(record: StepRecord) -> str:
    """`1.2345 (perplexity 3.44)`"""
    known = record.held_out_perplexity
    return f"{record.held_out_loss:.4f}" + ("" if known is None else f" (perplexity {known:.4g})")


def _gib(n: int) -> str:
    return f"{n / GiB:.2f}"


def _duration(seconds: float) -> str:
    return format_seconds(seconds) if math.isfinite(seconds) else "?"
