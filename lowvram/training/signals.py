"""Signals: SIGINT, SIGTERM and SIGHUP let a running step be finished and saved; else they end at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupted(KeyboardInterrupt):
    """A signal that ends the run where it stands: nothing is half done, or it was asked for twice."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class StopRequest:
    """Which signal asked to stop, if any. `deferred`: it is only noted, the loop looks after each step."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._deferred = False

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts, the first signal waits for the loop; a second one ends at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def receive(self, number: int) -> bool:
        """Note the signal; False when it may not wait.

        A terminal that closes hangs up twice, the system to all in front of it and the shell to all its jobs:
        after another signal that one asks for no more haste.
        """
        if self and number == _HANG_UP:
            return True
        waits = self._deferred and not self
        self.signal_number = number
        return waits


@contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into requests or `Interrupted`; restore the old handlers at the end.

    Args:
        say: tells the user that the signal was heard, since a step may take a minute.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may install handlers
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        heard = bool(request)
        if not request.receive(number):
            raise Interrupted(number)
        if not heard:
            say("Stopping: finishing this step and saving. Once more stops at once and loses the step.")

    old = {s: signal.signal(s, handle) for s in _handled()}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _handled() -> list[int]:
    """Under `nohup` a hang-up is ignored, and stays so."""
    hangs_up = _HANG_UP is not None and signal.getsignal(_HANG_UP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([_HANG_UP] if _HANG_UP is not None and hangs_up else [])]
