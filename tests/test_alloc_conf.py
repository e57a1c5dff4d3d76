"""What malloc is told: memory that a step has freed goes back to the system, also from between what stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowvram.alloc_conf import MALLOC_VARIABLE

_HOLES = """
import psutil
from lowvram.alloc_conf import set_alloc_conf
set_alloc_conf()
import torch
torch.empty(8 << 20, dtype=torch.uint8).fill_(1)  # glibc would keep such blocks from here on
process = psutil.Process()
before = process.memory_info().rss
blocks, stays = [], []
for _ in range(20):
    blocks.append(torch.empty(8 << 20, dtype=torch.uint8).fill_(1))
    stays.append(torch.empty(64 << 10, dtype=torch.uint8).fill_(1))
full = process.memory_info().rss - before
blocks.clear()
print(full >> 20, process.memory_info().rss - before >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_blocks_between_others_are_given_back() -> None:
    """20 blocks of 8 MiB with small ones between them; a user's own setting stays, here glibc's largest."""
    full, left = _mib_in_use()
    assert full > 150
    assert left < 20
    full, left = _mib_in_use(**{MALLOC_VARIABLE: str(32 << 20)})
    assert full > 150
    assert left > 30


def _mib_in_use(**changed: str) -> tuple[int, int]:
    environment = {key: value for key, value in os.environ.items() if key != MALLOC_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", _HOLES], env=environment | changed, capture_output=True, text=True, check=True
    )
    full, left = map(int, done.stdout.split())
    return full, left
