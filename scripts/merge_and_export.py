#!/usr/bin/env python3
"""Merges a run's adapter into its base, without installing anything: the same as `lowvram merge`.

    python scripts/merge_and_export.py RUN [--output FOLDER] [--onto nf4] [--no-verify] ..

RUN is a run folder or a peft adapter folder; `--help` lists all flags. Needs lowvram's own requirements.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowvram.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["merge"]
    main()
