"""What scripts/trace_others.py needs no other package for: the search, and tensors without values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
others_step = pytest.importorskip("others_step")
others_offload = pytest.importorskip("others_offload")


@pytest.mark.parametrize("budget", [10_000, 123_456, 700_000, 2_000_000])
def test_the_longest_context_is_the_one_that_a_search_by_hand_finds(budget: int) -> None:
    def bytes_of(tokens: int) -> int:
        return 5000 + 7 * tokens + (tokens // 4096) * 900  # nearly a line, with steps

    by_hand = max((n for n in range(64, 131_073, 64) if bytes_of(n) <= budget), default=0)
    found = others_step.longest(bytes_of, budget, 131_072)
    assert found <= by_hand
    assert by_hand - found <= max(64, by_hand // 100)


def test_nothing_fits_and_everything_fits() -> None:
    assert others_step.longest(lambda n: 100 + n, 100, 4096) == 0
    assert others_step.longest(lambda n: 100 + n, 10_000, 4096) == 4096


def test_a_full_mask_picks_everything() -> None:
    real = torch.arange(12.0).reshape(3, 4)
    mask = torch.ones(3, dtype=torch.bool)
    with others_step.NoValues():
        picked = real.to("meta")[mask.to("meta")]
    assert picked.shape == real[mask].shape


def test_what_is_offloaded_leaves_the_device_and_comes_back() -> None:
    recorder = others_step.StepRecorder()
    device = others_offload._Torch(recorder)
    with recorder:
        activation = torch.empty(1024, device="meta")
        pinned = device.empty_like(activation, pin_memory=True, device="cpu")
        pinned.copy_(activation)
        del activation
        there = sum(1 if event > 0 else -1 for event in recorder.trace.events)
        back = pinned.to("cuda", non_blocking=True)
        again = sum(1 if event > 0 else -1 for event in recorder.trace.events)
    assert (there, again) == (0, 1)
    assert back.shape == (1024,)
