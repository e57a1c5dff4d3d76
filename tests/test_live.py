"""The live panel and its plain lines: every number is there, and nothing that a note says is obeyed."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from lowvram.engine.step import StepResult
from lowvram.training import loop
from lowvram.training.live import BAR_WIDTH, HISTORY, LineView, LiveView, LossHistory, make_view, memory_bar
from lowvram.training.metrics import StepRecord
from lowvram.training.run import Run
from lowvram.units import GiB, MiB

HOSTILE = "[red]50%[/red] [/] \x1b[2J\x07\r out of memory"


def record(step: int = 12, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "total_steps": 60,
        "epoch": 0.2,
        "loss": 1.23449,
        "learning_rate": 1.8e-4,
        "grad_norm": 0.5,
        "trained_tokens": 300,
        "tokens": 800,
        "seconds": 1.25,
        "tokens_per_second": 412.4,
        "eta_seconds": 185.0,
        "memory_now_bytes": 4 * GiB,
        "memory_peak_bytes": 6 * GiB,
        "memory_predicted_bytes": 7 * GiB,
        "memory_budget_bytes": 8 * GiB,
    }
    return StepRecord(**{**values, **changes})


def terminal(**changes: Any) -> Console:
    values: dict[str, Any] = {"file": io.StringIO(), "force_terminal": True, "width": 100, "record": True}
    return Console(**{**values, "_environ": {"TERM": "xterm-256color"}, **changes})


def plain() -> Console:
    return Console(file=io.StringIO(), width=40, _environ={})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_panel(console: Console) -> str:
    """What the panel last looked like, as text."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console)).rpartition("SmolLM2")[2]


def test_the_console_decides() -> None:
    assert isinstance(make_view(terminal(), "t"), LiveView)
    assert isinstance(make_view(plain(), "t"), LineView)
    assert isinstance(make_view(terminal(_environ={"TERM": "dumb"}), "t"), LineView)


# Lines


def test_a_step_is_one_line_with_every_number() -> None:
    console = plain()
    view = make_view(console, "SmolLM2 [8gb]")
    view.start()
    small = {"now": 625 * MiB, "peak": 655 * MiB, "predicted": 666 * MiB}
    view.step(record(**{f"memory_{name}_bytes": n for name, n in small.items()}))
    view.step(record(13, held_out_loss=1.5))
    view.stop()
    assert written(console).splitlines() == [
        "SmolLM2 [8gb]",
        "step 12/60  loss 1.2345  lr 1.8e-04  412 tok/s  "
        "mem 0.61/0.64 GiB peak, predicted 0.65  ETA 3 min 5 s",
        "step 13/60  loss 1.2345  lr 1.8e-04  412 tok/s  "
        "mem 4.00/6.00 GiB peak, predicted 7.00  ETA 3 min 5 s",
        "step 13/60  held-out loss 1.5000",
    ]


def test_lines_hold_no_control_characters() -> None:
    console = plain()
    view = make_view(console, HOSTILE)
    view.start()
    view.note(HOSTILE)
    view.step(record(loss=math.nan, eta_seconds=math.inf, memory_predicted_bytes=0))
    text = written(console)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert text.count("[red]50%[/red] [/]") == 2
    assert "loss nan" in text
    assert "ETA ?" in text
    assert "predicted" not in text


# The panel


def test_the_panel_shows_every_number() -> None:
    console = terminal()
    view = make_view(console, "SmolLM2")
    view.start()
    assert "first step" in last_panel(console)
    view.step(record(10, loss=3.0))
    view.step(record(11, loss=2.0, held_out_loss=1.75))
    view.step(record(12, loss=1.0))
    view.stop()
    text = last_panel(console)
    for shown in ("step 12/60", "epoch 0.20", "ETA 3 min 5 s", "1.0000", "█▅▁", "1.80e-04", "412 tokens/s"):
        assert shown in text
    for shown in ("now 4.00 GiB", "peak 6.00 GiB", "predicted 7.00 GiB", "budget 8.00 GiB"):
        assert shown in text
    assert "held-out 1.7500 at step 11" in text  # still known one step later


def test_the_panel_stays_and_the_cursor_comes_back() -> None:
    console = terminal()
    view = make_view(console, "SmolLM2")
    view.start()
    view.step(record())
    view.stop()
    view.stop()  # a loop that failed stops once more
    assert written(console).endswith("\x1b[?25h")  # shows the cursor, erases nothing after the last drawing
    assert "budget" in last_panel(console)


def test_a_note_is_printed_above_and_obeyed_by_nobody() -> None:
    console = terminal()
    view = make_view(console, "SmolLM2")
    view.start()
    view.step(record())
    view.note(HOSTILE)
    view.note("lowvram resume " + "x" * 200)
    view.stop()
    text = written(console)
    assert "[red]50%[/red] [/]" in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "x" * 200 in text  # unbroken, to be copied
    assert text.rindex("[red]") < text.rindex("SmolLM2")


@pytest.mark.parametrize("width", [20, 40, 200])
def test_any_width_and_any_number_can_be_drawn(width: int) -> None:
    console = terminal(width=width)
    view = make_view(console, HOSTILE)
    view.start()
    view.step(record(loss=math.nan, eta_seconds=math.nan, tokens_per_second=math.inf, total_steps=0, step=0))
    view.step(record(**dict.fromkeys(("memory_now_bytes", "memory_peak_bytes", "memory_budget_bytes"), 0)))
    view.stop()


def test_an_old_windows_console_gets_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict")
    console = terminal(file=file, legacy_windows=False, record=False)
    view = make_view(console, "SmolLM2")
    view.start()
    view.step(record())
    view.stop()
    file.flush()
    assert "####" in file.buffer.getvalue().decode("cp1252")


# The bars


def test_the_memory_bar_is_to_scale() -> None:
    bar = memory_bar(record()).plain
    assert bar == "█" * 20 + "▓" * 10 + "─" * 5 + "┃" + "─" * 4


def test_colours_warn() -> None:
    def colours(**changes: Any) -> set[str]:
        return {str(span.style) for span in memory_bar(record(**changes)).spans}

    assert not {"yellow", "bold red"} & colours()
    assert "yellow" in colours(memory_predicted_bytes=5 * GiB)
    assert "bold red" in colours(memory_budget_bytes=5 * GiB)


@pytest.mark.parametrize("peak", [0, 6, 8, 9, 50])
@pytest.mark.parametrize("predicted", [0, 7, 8, 60])
def test_the_memory_bar_keeps_its_width(peak: int, predicted: int) -> None:
    bar = memory_bar(record(memory_peak_bytes=peak * GiB, memory_predicted_bytes=predicted * GiB))
    assert len(bar.plain) == BAR_WIDTH
    assert ("┃" in bar.plain) == (predicted > 0)


def curve_of(losses: list[float]) -> str:
    history = LossHistory()
    for loss in losses:
        history.add(loss)
    return history.curve()


def test_the_loss_curve() -> None:
    assert curve_of([]) == ""
    assert curve_of([2.0]) == "▁"
    assert curve_of([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve_of([2.0, math.nan, 1.0, math.inf]) == "█x▁x"


@pytest.mark.parametrize("count", [HISTORY, HISTORY + 1, 2 * HISTORY, 1000, 12345])
def test_the_loss_curve_covers_the_whole_run(count: int) -> None:
    curve = curve_of([float(count - index) for index in range(count)])
    assert HISTORY / 2 <= len(curve) <= HISTORY
    assert curve[0] == "█"
    assert curve[-1] == "▁"
    assert list(curve) == sorted(curve, reverse=True)


def test_the_epoch_is_a_true_fraction() -> None:
    """After 3 steps of 4 an epoch 0.75 is done; after 6, one and a half."""
    seen: list[float] = []
    estimate = SimpleNamespace(peak_reserved_bytes=1)
    plan = SimpleNamespace(total_steps=9, evaluate_every=100, estimate=estimate, budget_bytes=1)
    run = SimpleNamespace(
        plan=plan,
        predicted_bytes=1,
        data=SimpleNamespace(steps_per_epoch=4),
        tokens=1,
        seconds=1.0,
        monitor=SimpleNamespace(now_bytes=1, peak_bytes=1, machine=None),
        folder=SimpleNamespace(append_metrics=lambda shown: seen.append(shown.epoch)),
        view=SimpleNamespace(step=lambda _: None),
        accelerator=SimpleNamespace(log=lambda *_, **__: None),
        tell_machine=lambda: None,
    )
    for run.step in (3, 6):
        result = StepResult(torch.tensor(1.0), torch.tensor(1.0), 1)
        loop._report(cast(Run, run), result, 0.1, 1.0, [])
    assert seen == [0.75, 1.5]
