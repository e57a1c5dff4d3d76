"""Signals: noted while a step runs, obeyed at once at any other time and the second time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from lowvram.training.signals import Interrupted, stop_on_signal


@pytest.fixture
def hang_up_is_heard() -> Iterator[None]:
    """Also where the tests were started with nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_waits_and_the_second_does_not(number: signal.Signals) -> None:
    said: list[str] = []
    with stop_on_signal(said.append) as stop, stop.deferred():
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_number == number
        assert len(said) == 1
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.signal_number == number


def test_outside_a_step_it_ends_at_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal(print) as stop:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("hang_up_is_heard")
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no hang-up")
def test_a_terminal_that_closes_hangs_up_twice_and_the_step_is_still_finished() -> None:
    """Once by the system and once by the shell; a Ctrl-C before it counts as the first signal."""
    for first in (signal.SIGHUP, signal.SIGINT):
        said: list[str] = []
        with stop_on_signal(said.append) as stop, stop.deferred():
            for number in (first, signal.SIGHUP, signal.SIGHUP):
                os.kill(os.getpid(), number)
            assert (stop.signal_number, len(said)) == (first, 1)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no hang-up")
def test_under_nohup_a_hang_up_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, old)
