"""A built wheel, installed in an environment of its own, carries profiles and demo data and plans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
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
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"lowvram/profiles/8gb.yaml", "lowvram/demo/answers.jsonl", "lowvram/py.typed"} <= names
    assert "lowvram/engine/known_models.yaml" in names
    assert not any(name.startswith("tests/") for name in names)
    scripts = _installed(wheel, tmp_path / "elsewhere")
    folder = config_only({**QWEN2_7B, "num_hidden_layers": 3})
    done = subprocess.run(
        [scripts / "lowvram", "plan", "--model", str(folder), "--vram", "8GB", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    where = [scripts / "python", "-c", "import lowvram; print(lowvram.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert found.startswith(str(tmp_path / "elsewhere"))


def _installed(wheel: Path, environment: Path) -> Path:
    """The scripts folder of a new environment with the wheel; its dependencies are this environment's."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    # a path in a .pth file brings this environment's packages, but not its editable lowvram
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return environment / "bin"
