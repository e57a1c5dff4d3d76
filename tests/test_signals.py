"""Signals: noted while a step runs, obeyed at once at any other time and the second time."""

from __future__ import annotations

import os
import signal

import pytest

from lowvram.training.signals import Interrupted, stop_on_signal


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
