"""Rooms import only rooms above them, and the front door stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lowvram"
ORDER = [
    {
        *("errors", "units", "frozen", "cache", "alloc_conf", "gc_pause", "file_hash", "screen", "shell"),
        "__init__",
    },
    {"hardware", "gpu_driver", "gpu_sensors", "gpu_problems", "data_sheets", "device_rates"},
    {"data"},
    {"engine"},
    {"memory"},
    {"planner"},
    {"training"},
    {"export"},
    {"planning"},
    {"pipeline", "answering"},
    {"html_page", "data_report"},
    {
        *("probe_view", "plan_view", "plan_chart", "plan_page", "compare_view"),
        *(
            "survey_view",
            "data_view",
            "result_view",
            "profiles_view",
            "why_view",
            "merge_command",
            "export_command",
            "export_request",
            "phases_view",
            "watch",
            "data_page",
            "chat",
            "chat_view",
            "generate_command",
            "answer_file",
        ),
    },
    {"demo"},
    {
        *("cli", "cli_flags", "cli_profiles", "cli_data", "cli_requests", "cli_watch"),
        *("cli_merge", "cli_export", "cli_use"),
    },
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def _room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowvram."):
            rooms.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "lowvram":
            rooms |= {alias.name for alias in node.names if alias.name in LEVEL}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lowvram.")}
    return rooms


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_only_from_above(file: Path) -> None:
    own = _room(file)
    below = {room for room in _imported_rooms(file) if room != own and LEVEL[room] > LEVEL[own]}
    assert not below, f"{own} imports {below}, which stand below it"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_first_line_says_the_job(file: Path) -> None:
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""')
    assert len(first) > 20


@pytest.mark.parametrize(
    "code", ["import lowvram", "import sys; sys.argv = ['lowvram', '--help']; import lowvram.cli"]
)
def test_import_loads_neither_torch_nor_transformers(code: str) -> None:
    check = (
        "import sys; heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True)


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nsys.argv = ['lowvram', '--help']\nfrom lowvram.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "probe" in done.stdout
