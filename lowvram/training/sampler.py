"""Sampler: the one thread that watches while training; it only looks and queues, others speak and write."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from lowvram.training.machine import Machine, MachineSample
from lowvram.training.machine_warnings import MachineRules

LOOK_SECONDS = 1.0  # a look costs 0.4 to 1 ms of a core: scripts/bench_monitor.py
_JOIN_SECONDS = 2.0  # a driver that hangs must not keep a finished run


class Sampler:
    """Calls `tick` every `tick_seconds` and looks at the machine once a second.

    Args:
        rules: turn looks into warnings; without them there are none.
        clock: seconds that do not jump.
    """

    def __init__(
        self,
        machine: Machine,
        rules: MachineRules | None,
        tick: Callable[[], None] = lambda: None,
        tick_seconds: float = LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine, self._rules, self._tick, self._clock = machine, rules, tick, clock
        self._tick_seconds = tick_seconds
        self._queue: deque[str] = deque()  # appending and taking are atomic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="lowvram-monitor")
        self.latest: MachineSample | None = None
        self.cpu_seconds = 0.0  # what the thread has cost so far

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def warnings(self) -> list[str]:
        """What is new since this was asked last."""
        return [self._queue.popleft() for _ in range(len(self._queue))]

    def _work(self) -> None:
        self._machine.open()
        due: float | None = self._clock()
        while not self._stop.is_set():
            if due is not None and self._clock() >= due:
                due = self._look(due)
            self._tick()
            self.cpu_seconds = time.thread_time()
            self._stop.wait(self._tick_seconds)
        self._machine.close()

    def _look(self, due: float) -> float | None:
        """When to look next; never again after a mistake of ours, which is said and ends no run."""
        try:
            look = self._machine.look(self._clock())
            self.latest = look.sample
            self._queue.extend(self._rules.warnings(look) if self._rules else ())
        except Exception as error:
            self._queue.append(f"The machine is not watched any more: {type(error).__name__}: {error}.")
            return None
        return max(due + LOOK_SECONDS, self._clock())
