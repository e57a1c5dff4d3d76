"""A built wheel carries profiles and demo data and plans from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.conftest import QWEN2_7B

ROOT = Path(__file__).parents[1]


def test_wheel_installed_elsewhere_plans(
    tmp_path: Path, config_only: Callable[[dict[str, object]], Path]
) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {"lowvram/profiles/8gb.yaml", "lowvram/demo/answers.jsonl", "lowvram/py.typed"} <= names
    folder = config_only({**QWEN2_7B, "num_hidden_layers": 3})
    check = f"import lowvram; assert lowvram.__file__.startswith({str(site)!r}); "
    code = check + "from lowvram.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--model", str(folder), "--vram", "8GB", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
