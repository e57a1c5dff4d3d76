"""The README's two commands: what they install, and that what follows them reaches the program they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.skipif(os.name == "nt", reason="bash scripts")
@pytest.mark.parametrize(
    ("script", "extra", "started"),
    [("demo", "", ["demo", "--steps", "5"]), ("test", "[test]", ["--no-loadscope-reorder", "--steps", "5"])],
)
def test_flags_go_to_the_program_and_not_to_the_set_up(
    script: str, extra: str, started: list[str], tmp_path: Path
) -> None:
    """In an environment whose programs only write down how they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "lowvram", "ruff", "mypy"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>"{tmp_path}/calls"\n')
        program.chmod(0o755)
    environment = {**os.environ, "LOWVRAM_VENV": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run([SCRIPTS / script, "--steps", "5"], check=True, env=environment, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    (installed,) = (call.split()[-1] for call in calls if "--editable" in call)
    assert installed == f"{SCRIPTS.parent}{extra}"
    assert calls[-1].split()[-len(started) :] == started
