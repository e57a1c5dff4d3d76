"""A resumed run equals one that was never interrupted, to the last bit, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.planner.plan import Plan
from tests import tiny_runs
from tests.tiny_runs import (
    ASKED,
    Cli,
    adapter_bytes,
    edit_plan,
    killed_after,
    learned,
    steps_kept,
    write_rows,
)

byte_model, command = tiny_runs.byte_model, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 9
MID_EPOCH, EPOCHS_END = 3, 7  # 28 examples, 4 a step


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(
    precision: str, packing: str, byte_model: Path, tmp_path: Path, command: Cli
) -> None:
    """With dropout, two micro-batches a step and evaluations between; resumed twice on the way."""
    data = write_rows(tmp_path / "rows.jsonl", range(30))
    plan, whole = tmp_path / "plan.yaml", tmp_path / "whole"
    asked = ("--steps", STEPS, "--precision", precision, packing, "--dropout", "0.2", *ASKED)
    code, _, err = command("plan", "--model", byte_model, "--data", data, *asked, "-o", plan)
    assert code == 0, err
    edit_plan(plan, save_every=1, keep_checkpoints=STEPS, evaluate_every=2)
    made = Plan.from_yaml(plan)
    assert (made.accumulation, made.dropout, made.compute_dtype) == (2, 0.2, precision)
    assert command("train", plan, "-o", whole)[0] == 0
    assert steps_kept(whole) == list(range(1, STEPS + 1))
    assert {row[1] for row in learned(whole)} >= {MID_EPOCH / EPOCHS_END, 1.0}
    assert len({row[2] for row in learned(whole)}) == STEPS  # it learns: no two losses are the same
    for step in (MID_EPOCH, EPOCHS_END):
        resumed = killed_after(step, whole, tmp_path / f"from {step}")
        code, out, err = command("resume", resumed)
        assert code == 0, err
        assert f"Continuing after step {step} of {STEPS}" in out
        assert learned(resumed) == learned(whole)
        assert adapter_bytes(resumed) == adapter_bytes(whole)


def test_the_dropout_is_what_a_resume_has_to_restore(byte_model: Path, tmp_path: Path, command: Cli) -> None:
    """Another seed for it gives other losses: the test above would see generators that start anew."""
    data = write_rows(tmp_path / "rows.jsonl", range(30))
    plan, whole = tmp_path / "plan.yaml", tmp_path / "whole"
    asked = ("--steps", "4", "--precision", "fp32", "--dropout", "0.2", *ASKED)
    assert command("plan", "--model", byte_model, "--data", data, *asked, "-o", plan)[0] == 0
    edit_plan(plan, save_every=1, keep_checkpoints=4)
    assert command("train", plan, "-o", whole)[0] == 0
    resumed = killed_after(2, whole, tmp_path / "resumed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowvram.training.checkpoint.restore_rng", lambda _: None)
        assert command("resume", resumed)[0] == 0
    before, after = learned(whole), learned(resumed)
    assert after[:2] == before[:2]
    assert after[2][2] != before[2][2]
    assert adapter_bytes(resumed) != adapter_bytes(whole)
