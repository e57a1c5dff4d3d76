"""The real command line in processes that can be killed cheaply: forks of one that has imported everything.

A fresh `lowvram train` spends 10 s on importing torch, transformers and peft; a fork of a warm process begins
after that, with the same `main()`, its own pid, its own standard streams and its own signals.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_USED = (
    "lowvram.pipeline",
    "lowvram.merge_command",
    "lowvram.plan_view",
    "lowvram.result_view",
    "pandas",
    "transformers.models.llama.modeling_llama",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # minus the signal that killed it
    out: str
    err: str


class Command:
    """One command under way."""

    def __init__(self, pid: int, wait: Callable[[], int], folder: Path) -> None:
        self.pid = pid
        self._wait, self._folder = wait, folder

    def send(self, number: int) -> None:
        """A signal, from outside."""
        os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """On standard output so far."""
        return self._read("out")

    def until(self, true: Callable[[], bool], timeout: float = 120) -> None:
        """Waits for something that the command does."""
        end = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < end, self._read("err")
            assert not self._is_over(), self._read("err") + self._read("out")
            time.sleep(0.002)

    def ended(self) -> Ended:
        return Ended(self._wait(), self._read("out"), self._read("err"))

    def _is_over(self) -> bool:
        return not Path(f"/proc/{self.pid}").exists() if Path("/proc").is_dir() else False

    def _read(self, name: str) -> str:
        return " ".join((self._folder / name).read_text(errors="replace").split())


class ForkedCli:
    """Starts commands as forks of one warm process, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LOWVRAM_CACHE": str(folder / "cache"),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",  # a fork has none of its parent's threads
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_cli"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def start(self, *args: object, fault: str = "", **options: object) -> Command:
        """`lowvram *args`, with `fault(**options)` of tests/injected.py called before it."""
        order = {"args": list(map(str, args)), "fault": fault, "options": options, "to": str(self._folder)}
        self._tell(json.dumps(order))
        return Command(int(self._hear()), lambda: int(self._hear()), self._folder)

    def run(self, *args: object, fault: str = "", **options: object) -> Ended:
        return self.start(*args, fault=fault, **options).ended()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def _tell(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def _hear(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


def serve() -> None:
    """The warm process: an order a line comes in, the child's pid and later its exit code go out."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for name in _USED:
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, which take half a second
    gc.freeze()  # nobody looks at a million objects again, and their pages stay shared
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        _answer(pid)
        _answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _become(order: dict[str, Any]) -> None:
    """The child: streams of its own, the fault, and the command as a user types it."""
    from lowvram.cli import main
    from tests import injected

    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(Path(order["to"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    sys.argv = ["lowvram", *order["args"]]
    if order["fault"]:
        getattr(injected, order["fault"])(**order["options"])
    try:
        main()
    except SystemExit as ended:
        _leave(ended.code)
    except BaseException:  # as Python itself tells it
        traceback.print_exc()
        _leave(1)


def _leave(code: object) -> None:
    """Without the second that Python needs to take a million objects down."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(code) if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    serve()
