"""Compares the step with and without the lever liger: Liger's own kernels, under Triton's interpreter.

    python scripts/check_liger.py [WORK]

Makes an environment of its own in WORK (Liger, and Triton's 286 MB; everything else is this one's), runs
`liger_comparisons.py` there and exits with 1 where a comparison fails. No GPU; three minutes on one core, for
each row of each kernel is Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REQUIREMENTS = ("liger-kernel==0.8.5", "triton==3.9.0")  # Triton for Linux; the versions that were compared
HERE = Path(__file__).parent


def environment(work: Path) -> Path:
    """Its Python; packages of this environment are seen through a path file."""
    python = work / "bin" / "python"
    if not (work / "installed").exists():
        print(f"Installing {' and '.join(REQUIREMENTS)} into {work}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(work)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        outer = [sysconfig.get_path("purelib"), str(HERE.parent)]
        (work / "lib" / version / "site-packages" / "outer.pth").write_text("\n".join(outer))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]  # no other torch
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        (work / "installed").touch()
    return python


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        command = [str(environment(work)), "-W", "ignore", str(HERE / "liger_comparisons.py")]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
