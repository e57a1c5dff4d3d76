#!/usr/bin/env python3
"""Merges a run's adapter into its base and exports it, without installing lowvram itself.

    python scripts/merge_and_export.py RUN [merge's flags] [--to gguf [export's flags]]

The same as `lowvram merge RUN ..`, then, with --to, `lowvram export RUN --to ..` with all flags from
there on and merge's --base. An export that would be refused is refused before the merge. If the merge is
refused, as where RUN/merged is there already, the command that exports alone is said: an export reads base
and adapter, no merged folder. RUN is a run's folder or a peft adapter's. Needs what pyproject.toml lists.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowvram.cli import main
from lowvram.shell import typed


def calls(given: list[str]) -> list[list[str]]:
    """The command lines that `given` stands for."""
    to = next((at for at, word in enumerate(given) if word.split("=")[0] == "--to"), len(given))
    merge, asked = ["merge", *given[:to]], given[to:]
    if not asked:
        return [merge]
    if not any(word.split("=")[0] == "--base" for word in asked):
        asked += _base(merge)
    export = ["export", given[0], *asked]
    return [[*export, "--dry-run"], merge, export]


def _base(merge: list[str]) -> list[str]:
    """merge's --base with its value, as one word or two."""
    for at, word in enumerate(merge):
        if word.startswith("--base="):
            return [word]
        if word == "--base":
            return merge[at : at + 2]
    return []


def _run(call: list[str]) -> int:
    """The exit code of one command line."""
    sys.argv[1:] = call
    try:
        main()
    except SystemExit as ended:  # which a command that went well raises too
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    planned = calls(sys.argv[1:])
    for call in planned:
        if code := _run(call):
            if call[0] == "merge" and len(planned) > 1 and code < 128:  # from 128 on it was stopped
                alone = " ".join(map(typed, ["lowvram", *planned[-1]]))
                print(f"The export needs no merged folder; alone it is: {alone}", file=sys.stderr)
            sys.exit(code)
