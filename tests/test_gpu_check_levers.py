"""gpu_check's comparison of levers, on the CPU: what it calls wrong, and that a broken lever is called so."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check_answers  # noqa: E402
import gpu_check_levers as levers  # noqa: E402
import gpu_check_step  # noqa: E402
from gpu_check_rows import Row  # noqa: E402

from lowvram.engine import tile_attention, tiles  # noqa: E402
from lowvram.engine.shelf import Shelf  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_every_lever_of_the_step_is_compared() -> None:
    """A lever that is added to `Levers` must be added here, too."""
    plain = levers.NO_LEVERS.model_dump()
    tried = {
        name
        for made in levers.lever_sets(8).values()
        for name in plain
        if made.model_dump()[name] != plain[name]
    }
    no_arithmetic = {"double_quantization", "expandable_segments", "empty_cache"}
    assert tried | {"liger"} == set(plain) - no_arithmetic  # where it is installed, which it is not here


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(0.0, "ran"), (0.1, "ran"), (0.11, "differs"), (1.0, "differs"), (float("nan"), "differs")],
)
def test_what_differs(error: float, outcome: str) -> None:
    assert levers.compared(levers.parity_step("fp32", CPU), "x", error, 0.1).outcome == outcome


def test_no_gradient_is_as_far_as_it_gets() -> None:
    exact = {"a": torch.ones(3), "b": torch.full((2,), 2.0)}
    assert levers.deviation({n: torch.zeros_like(g) for n, g in exact.items()}, exact) == pytest.approx(1.0)
    assert levers.deviation({n: 1.1 * g for n, g in exact.items()}, exact) == pytest.approx(0.1)


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("misaligned address\nat 0x0")

    for name in ("_shelf", "_dropout", "_levers"):
        monkeypatch.setattr(levers, name, broken)
    rows: list[Row] = []
    levers.parity_checks(rows.append, "cpu")
    failed = [row for row in rows if row.outcome == "failed"]
    assert [row.note for row in failed] == ["RuntimeError: misaligned address"] * 3
    assert len(rows) == 3 + 6  # and attention in three sizes and two dtypes


def test_a_wrong_tile_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of keys and values that later tiles contribute, forgotten."""
    monkeypatch.setattr(levers, "lever_sets", lambda t: {"tile_tokens": _sets(t)["tile_tokens"]})
    rows: list[Row] = []
    levers._levers("fp32", rows.append, CPU)
    assert [row.outcome for row in rows] == ["ran"]
    monkeypatch.setattr(tile_attention.KeysAndValues, "sums", _forgetful)
    levers._levers("fp32", rows.append, CPU)
    assert [row.outcome for row in rows] == ["ran", "differs"]


_sets, _sums = levers.lever_sets, tile_attention.KeysAndValues.sums


def _forgetful(cache: tile_attention.KeysAndValues) -> tuple[torch.Tensor, torch.Tensor]:
    key_sums, value_sums = _sums(cache)
    return torch.zeros_like(key_sums), value_sums


def test_other_masks_in_recomputation_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = levers.parity_step("fp32", CPU, dropout=0.3, levers=levers.lever_sets(14)["tile_tokens"])
    batch = levers._batch(step)
    assert levers.slope_error(step, CPU, batch) < levers.SLOPE_LIMIT
    monkeypatch.setattr(tiles, "_seeded", lambda *_: nullcontext())
    assert levers.slope_error(step, CPU, batch) > levers.SLOPE_LIMIT


def test_a_query_that_sees_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "_causal", torch.nn.functional.scaled_dot_product_attention)
    rows: list[Row] = []
    levers._last_queries(rows.append, CPU)
    assert {row.outcome for row in rows} == {"differs"}


def test_what_comes_back_wrong_from_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = []
    levers._shelf(rows.append, CPU)
    get = Shelf.get
    monkeypatch.setattr(Shelf, "get", lambda shelf, key, *soon: get(shelf, key, *soon) + (key == 3))
    levers._shelf(rows.append, CPU)
    assert [(row.outcome, row.gradient_error) for row in rows] == [("ran", 0.0), ("differs", 1 / 24)]


def test_a_chat_and_a_batch_really_answer() -> None:
    """The path of the GPU's rows, on the CPU, which has no counters."""
    chat = gpu_check_answers.CHAT.model_copy(update={"compute_dtype": "fp32", "context": 64})
    batch = chat.model_copy(update={"batch": 3})
    rows: list[Row] = []
    gpu_check_answers.answer_rows(rows.append, "cpu", (("tiny", chat), ("tiny", batch)))
    assert [(row.check, row.seq_len, row.micro_batch, row.outcome) for row in rows] == [
        ("answers", 64, 1, "ran"),
        ("answers", 64, 3, "ran"),
    ]
    assert all(row.tokens_per_second and row.predicted_reserved_bytes for row in rows)


def test_a_long_step_is_told_for_each_head() -> None:
    """The path of the GPU's rows, on the CPU, which has no counters."""
    step = gpu_check_step.LONG_STEP.model_copy(update={"seq_len": 96, "compute_dtype": "fp32"})
    step = step.model_copy(update={"levers": step.levers.model_copy(update={"tile_tokens": 40})})
    rows: list[Row] = []
    gpu_check_step.tiled_rows(rows.append, "tiny", "cpu", step)
    whole = [row for row in rows if row.phase == "all"]
    assert [(row.check, row.note, row.outcome) for row in whole] == [
        ("tiles", f"head={head}", "ran") for head in ("streamed", "nf4", "int8")
    ]
    assert all(row.tokens_per_second and row.predicted_reserved_bytes for row in whole)
    assert {row.phase for row in rows} >= {"all", "evaluation", "forward", "backward", "clip", "optimizer"}
