"""TRL's and torchtune's own packing of the token lists in a file, within an environment that has them.

    python scripts/pack_others.py trl|torchtune FILE ROW_TOKENS

Prints one JSON line for each of the project's methods: rows, tokens in them, examples that a row begins
within, tokens lost, and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_PADDING = 10**6  # no token of any vocabulary


def main() -> None:
    project, file, row_tokens = sys.argv[1:]
    examples: list[list[int]] = json.loads(Path(file).read_text(encoding="utf-8"))
    methods = {"trl": _trl, "torchtune": _torchtune}
    for method, rows, seconds in methods[project](examples, int(row_tokens)):
        found = {"method": method, **_counted(list(rows), examples), "seconds": round(seconds, 3)}
        print(json.dumps(found))


def _counted(rows: list[list[int]], examples: list[list[int]]) -> dict[str, Any]:
    start = examples[0][:4]  # of every chat: its system turn
    filled = sum(map(len, rows))
    return {
        "rows": len(rows),
        "filled": filled,
        "cut": sum(row[: len(start)] != start for row in rows),
        "lost": sum(map(len, examples)) - filled,
    }


def _trl(examples: list[list[int]], row_tokens: int) -> Iterator[tuple[str, Iterable[list[int]], float]]:
    """As SFTTrainer calls it where packing=True, in each of its strategies."""
    import datasets
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    for strategy in ("bfd", "bfd_split", "wrapped"):
        data = datasets.Dataset.from_dict({"input_ids": examples})
        started = time.perf_counter()
        packed = pack_dataset(data, row_tokens, strategy)
        yield strategy, packed["input_ids"], time.perf_counter() - started


class _Listed:
    """What torchtune's recipes read their examples from."""

    def __init__(self, examples: list[list[int]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens = self._examples[index]
        return {"tokens": list(tokens), "labels": list(tokens)}


def _torchtune(
    examples: list[list[int]], row_tokens: int
) -> Iterator[tuple[str, Iterable[list[int]], float]]:
    """With split_across_pack off, as it is unasked, and on."""
    from torchtune.datasets import PackedDataset

    for split in (False, True):
        started = time.perf_counter()
        packed = PackedDataset(
            _Listed(examples), max_seq_len=row_tokens, padding_idx=_PADDING, split_across_pack=split
        )
        seconds = time.perf_counter() - started
        rows = ([t for t in packed[n]["tokens"].tolist() if t != _PADDING] for n in range(len(packed)))
        yield "greedy, split_across_pack" if split else "greedy", rows, seconds


if __name__ == "__main__":
    main()
