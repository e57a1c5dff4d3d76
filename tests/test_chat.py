"""`lowvram chat` through the command line: answers, commands, history, and a terminal with a Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from lowvram.errors import DataError
from lowvram.units import printable
from tests import chat_home as home
from tests import tiny_runs
from tests.chat_home import Reference
from tests.tiny_runs import Cli

byte_model, chat_home, command = tiny_runs.byte_model, home.chat_home, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
N = 10
SHORT = ("--max-new-tokens", N, "--precision", "fp32")


def _typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def _shown(*texts: str) -> str:
    """As the command line's fixture gives it back: all white space is one."""
    return " ".join(printable("\n".join(texts)).split())


def test_a_conversation_with_two_adapters_and_their_base(
    chat_home: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each answers with all that was said before, by whomever; the base is loaded once."""
    from lowvram.engine import model

    loads = []
    real = model.load
    monkeypatch.setattr(model, "load", lambda *given: (loads.append(given), real(*given))[1])
    _typed(
        monkeypatch, "hi", "/adapter poet", "and you?", "/base", "you?", "/clear", "hi", "/adapter sql", "so"
    )
    poet = f"poet={chat_home / 'poet'}"
    code, out, err = command("chat", chat_home / "sql", "--adapter", poet, *SHORT)
    assert code == 0, err
    assert len(loads) == 1
    wanted: list[str] = []
    turns: list[tuple[str, str]] = []
    for name, question in (("sql", "hi"), ("poet", "and you?"), (None, "you?"), (None, "hi"), ("sql", "so")):
        if len(wanted) == 3:
            turns = []
        turns.append(("user", question))
        text = Reference(chat_home, name).to(turns, N).text
        wanted.append(text)
        turns.append(("assistant", text))
    assert out == _shown(*wanted)
    assert len(set(wanted)) == len(wanted)
    for note in ("now answering: poet", "now answering: base", "the conversation is forgotten"):
        assert note in err
    assert "2,048 tokens of context" in err


def test_system_prompt_temperature_and_other_commands(
    chat_home: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lowvram.engine.sampling import Sampling

    reference = Reference(chat_home, "sql")
    lines = (
        "hi",
        "/clear",
        "/system be long",
        "hi",
        "/clear",
        "/system",
        "/temperature 1.4",
        "/top-p 0.9",
        "hi",
    )
    _typed(monkeypatch, *lines, "/adapter", "/help", "/quit", "never asked")
    code, out, err = command("chat", chat_home / "sql", "--system", "be brief", "--seed", "3", *SHORT)
    assert code == 0, err
    wanted = [
        reference.to([("system", "be brief"), ("user", "hi")], N),
        reference.to([("system", "be long"), ("user", "hi")], N),
        reference.to([("user", "hi")], N, Sampling(temperature=1.4, top_p=0.9, seed=3), row=2),
    ]
    assert out == _shown(*(answer.text for answer in wanted))
    for note in ("adapters: sql", "/temperature N", "temperature: 1.4", "system prompt: none"):
        assert note in err


@pytest.mark.parametrize(
    ("line", "says", "code"),
    [
        ("/nothing", "There is no /nothing", 2),
        ("/adapter nobody", "no adapter 'nobody'", 2),
        ("/temperature hot", "'hot' is no temperature", 2),
        ("/top-p 2", "'2' is no top_p", 2),
        ("x" * 700, r"tokens of context, and 128 are kept for the answer", 5),
    ],
)
def test_a_line_that_cannot_be_obeyed_ends_a_script(
    chat_home: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
    code: int,
) -> None:
    _typed(monkeypatch, line, "hi")
    given = ("chat", chat_home / "sql", "--context", "512", "--max-new-tokens", "200")
    found, out, err = command(*given)
    assert (found, out, says in err) == (code, "", True), err


def test_old_turns_are_dropped_aloud_when_the_context_is_full(
    chat_home: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Questions of 60 bytes in a context of 256; the last one is asked with what still fits."""
    questions = [f"{i} " + "y" * 58 for i in range(4)]
    _typed(monkeypatch, *questions)
    code, out, err = command("chat", chat_home / "sql", "--context", "256", *SHORT)
    assert code == 0, err
    assert "the context of 256 tokens is full; oldest turns forgotten: 1" in err
    reference, turns, wanted = Reference(chat_home, "sql"), [], []
    for question in questions:
        while True:
            from lowvram.data.conversations import Message
            from lowvram.data.prompting import prompt_ids

            asked = [*turns, ("user", question)]
            messages = [Message.model_validate({"role": r, "content": c}) for r, c in asked]
            if len(prompt_ids(messages, reference.tokenizer)) + N <= 256:
                break
            turns = turns[2:]
        text = reference.to(asked, N).text
        turns = [*asked, ("assistant", text)]
        wanted.append(text)
    assert out == _shown(*wanted)


def test_base_and_adapter_answer_side_by_side(
    chat_home: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with a history of its own."""
    monkeypatch.setenv("COLUMNS", "400")
    _typed(monkeypatch, "hi", "ho")
    code, out, err = command("chat", chat_home / "sql", "--compare", *SHORT)
    assert code == 0, err
    for name in (None, "sql"):
        turns: list[tuple[str, str]] = []
        for question in ("hi", "ho"):
            turns.append(("user", question))
            text = Reference(chat_home, name).to(turns, N).text
            turns.append(("assistant", text))
            assert all(word in out for word in _shown(text).split()), (name, text)
    code, _, err = command("chat", chat_home / "base", "--compare")
    assert (code, "no adapter to compare with" in err) == (2, True)


def test_what_cannot_be_opened_is_refused(chat_home: Path, tmp_path: Path, command: Cli) -> None:
    (tmp_path / "plan.yaml").write_text("")
    for run, flags, code, says in (
        (tmp_path, (), 2, "holds no finished adapter"),
        (tmp_path / "nowhere", (), 2, "There is no folder"),
        (chat_home / "sql", ("--adapter", "poet"), 2, "is no NAME=PATH"),
        (chat_home / "sql", ("--adapter", f"sql={chat_home / 'poet'}"), 2, "'sql' is the name of two"),
        (chat_home / "sql", ("--adapter", f"base={chat_home / 'poet'}"), 2, "means the model without any"),
        (chat_home / "base", ("--base", chat_home / "base"), 2, "is a model itself"),
        (chat_home / "sql", ("--context", "5000"), 2, "the model knows 2,048 positions"),
        (chat_home / "sql", ("--vram", "8GB"), 2, "Add --dry-run"),
        (chat_home / "sql", ("--vram", "1MB", "--dry-run"), 3, "the budget is"),
    ):
        found, out, err = command("chat", run, *flags)
        assert (found, out, says in err) == (code, "", True), (says, err)


def test_a_dry_run_loads_nothing(
    chat_home: Path,
    command: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise DataError("the model was loaded")

    monkeypatch.setattr("lowvram.engine.model.load", never)
    code, out, err = command("chat", chat_home / "sql", "--vram", "8GB", "--dry-run", "--precision", "nf4")
    assert (code, out) == (0, ""), err
    assert re.search(r"nf4 base, 2,048 tokens of context: \d+ MiB of 6\.\d+ GiB on an 8 GB card", err)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(chat_home: Path, tmp_path: Path) -> None:
    """A real process on a real pseudo-terminal; an answer that would take 60,000 tokens is cut."""
    import pty

    code = "from lowvram.cli import main; main()"
    base = Path(shutil.copytree(chat_home / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65536}))
    given = ["chat", str(chat_home / "sql"), "--base", str(base)]
    given += ["--max-new-tokens", "60000", "--context", "65536"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="200", TERM="xterm", OMP_NUM_THREADS="1")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background ignores it
        os.execv(sys.executable, [sys.executable, "-c", code, *given])
    try:
        _until(terminal, rb"> $")
        os.write(terminal, b"hi\n")
        _until(terminal, rb"sql[^\n]*\n.{20}")
        os.write(terminal, b"\x03")
        _until(terminal, rb"stopped.*> $")
        os.write(terminal, b"/nothing\n")
        _until(terminal, rb"There is no /nothing.*> $")
        os.write(terminal, b"\x04")
        deadline = time.monotonic() + 60
        done, status = os.waitpid(pid, os.WNOHANG)
        while not done and time.monotonic() < deadline:
            _read(terminal, 0.1)
            done, status = os.waitpid(pid, os.WNOHANG)
        assert done
        assert os.waitstatus_to_exitcode(status) == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def _read(terminal: int, seconds: float) -> bytes:
    ready, _, _ = select.select([terminal], [], [], seconds)
    try:
        return os.read(terminal, 65536) if ready else b""
    except OSError:  # the other end is gone
        return b""


def _until(terminal: int, pattern: bytes, seconds: float = 120) -> None:
    seen, deadline = b"", time.monotonic() + seconds
    while not re.search(pattern, seen, re.DOTALL):
        assert time.monotonic() < deadline, seen[-2000:]
        seen += _read(terminal, 1.0)
