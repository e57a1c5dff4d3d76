"""Held-out losses: a file of their own, perplexity, which is best, and that the plan's memory covers them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lowvram.data.row_store import Examples
from lowvram.engine.source import ModelSource
from lowvram.memory.weights import meta_batch
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import load_profile
from lowvram.planner.schedule import schedule_for
from lowvram.planner.wishes import Wishes
from lowvram.training.data import PreparedData, prepare, training_data
from lowvram.training.evaluation import Evaluations, perplexity
from tests import tiny_runs
from tests.tiny import plain_loss
from tests.tiny_runs import ASKED, Cli, metrics, result, write_rows

byte_model, command = tiny_runs.byte_model, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--steps", "2", "--precision", "fp32", *ASKED)


# Numbers


@pytest.mark.parametrize("loss", [0.0, 1.0, 11.5, 700.0])
def test_perplexity_is_the_power_of_e(loss: float) -> None:
    assert perplexity(loss) == math.e**loss or perplexity(loss) == pytest.approx(math.e**loss, rel=1e-12)


@pytest.mark.parametrize("loss", [None, 710.0, 1e300, math.inf, math.nan])
def test_a_perplexity_beyond_all_floats_is_none(loss: float | None) -> None:
    assert perplexity(loss) is None


def evaluations(*losses: float) -> Evaluations:
    found = Evaluations()
    for number, loss in enumerate(losses, start=1):
        found.add(10 * number, loss)
    return found


def test_the_best_is_the_first_of_the_lowest() -> None:
    found = evaluations(3.0, 2.0, 2.0, 2.5)
    assert (found.best_step, found.best_loss, found.n_since_best) == (20, 2.0, 2)
    assert (found.last_step, found.last_loss) == (40, 2.5)
    assert [found.ends_run(n) for n in (0, 1, 2, 3)] == [False, True, True, False]


def test_a_better_one_starts_the_count_again() -> None:
    assert evaluations(3.0, 4.0, 4.0, 2.0).n_since_best == 0
    assert not Evaluations().ends_run(1)


def test_no_number_is_never_the_best() -> None:
    found = evaluations(math.nan, math.inf)
    assert (found.best_step, found.best_loss, found.n_since_best) == (0, None, 2)
    found.add(30, 9.0)
    assert (found.best_step, found.n_since_best) == (30, 0)


def test_a_run_that_may_stop_early_looks_twice_as_often_as_it_waits() -> None:
    profile = load_profile("cpu")
    paces = [schedule_for(profile, Wishes(steps=60, early_stop=n), None, 4, 64) for n in (0, 2, 6, 50)]
    assert [pace.evaluate_every for pace in paces] == [12, 12, 5, 1]
    assert [pace.early_stop for pace in paces] == [0, 2, 6, 50]
    assert schedule_for(profile, Wishes(steps=60), None, 4, 64).keep_checkpoints == 2


# A file of their own


@pytest.fixture
def given(byte_model: Path, tmp_path: Path) -> tuple[object, ...]:
    """Flags with 30 rows to train on, and 14 held-out ones: 12 longer ones, and two of those 30."""
    data = write_rows(tmp_path / "rows.jsonl", range(30))
    held_out = write_rows(tmp_path / "eval.jsonl", range(30, 42), words=24)
    held_out.write_text(held_out.read_text() + "".join(data.read_text().splitlines(keepends=True)[:2]))
    return ("--model", byte_model, "--data", data, "--eval-data", held_out)


def held_out_of(plan: Plan) -> Examples:
    prepared = prepare(
        str(plan.data), ModelSource(plan.model), reading=plan.reading, eval_name=plan.eval_data
    )
    return prepared.held_out.cut(plan.seq_len)


def test_a_run_is_judged_by_its_own_held_out_file(
    given: tuple[object, ...], tmp_path: Path, command: Cli
) -> None:
    """By the loss of plain transformers and peft; all of the training file is trained on."""
    run = tmp_path / "run"
    code, out, err = command("auto", *given, *SHORT, "-o", run)
    assert code == 0, err
    plan = Plan.from_yaml(run / "plan.yaml")
    held_out = held_out_of(plan)
    assert 0 < len(held_out) < 14
    n_long = int((held_out.store.lengths > plan.seq_len).sum())
    n_lost = 14 - len(held_out)
    assert n_long - n_lost > 0
    assert f"{n_long - n_lost} of 14 held-out examples are longer than 128 tokens and are cut there" in out
    assert f"{n_lost} of 14 held-out examples are left out: their answers begin after 128 tokens" in out
    assert "2 of 14 held-out examples are among the training data too" in out
    assert "nothing of" in out
    assert [row["epoch"] for row in metrics(run)] == [1 / 8, 2 / 8]  # 30 examples, 4 a step
    base = AutoModelForCausalLM.from_pretrained(plan.model, dtype=torch.float32)
    rows = [held_out[at] for at in range(len(held_out))]
    with torch.no_grad():
        before = float(plain_loss(base, rows))
        after = float(plain_loss(PeftModel.from_pretrained(base, run / "adapter").eval(), rows))
    said = result(run)
    assert said["held_out_loss_before"] == pytest.approx(before, rel=1e-5)
    assert said["held_out_loss_after"] == pytest.approx(after, rel=1e-5)
    assert abs(after - before) > 1e-3
    assert said["held_out_perplexity_after"] == pytest.approx(math.exp(after), rel=1e-4)
    assert metrics(run)[-1]["held_out_perplexity"] == said["held_out_perplexity_after"]
    assert f"(perplexity {math.exp(after):.4g})" in out


def test_a_changed_held_out_file_is_noticed(given: tuple[object, ...], tmp_path: Path, command: Cli) -> None:
    run = tmp_path / "run"
    assert command("auto", *given, *SHORT, "-o", run)[0] == 0
    (run / "result.json").unlink()
    write_rows(tmp_path / "eval.jsonl", range(28, 41), words=24)
    code, _, err = command("resume", run)
    assert (code, "eval_data: " in err, "(14 examples) -> " in err) == (2, True, True), err
    code, _, err = command("train", run / "plan.yaml", "-o", tmp_path / "other")
    assert (code, "eval.jsonl' is not the data that this plan was made for" in err) == (2, True), err


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        ([{"prompt": "a", "completion": "b"}], 5, "it is read as the shape 'question-answer'"),
        ([{"question": "x" * 500, "answer": "b"}], 5, "no trained token is left within 128 tokens"),
        ([], 5, "eval.jsonl"),
    ],
    ids=["another shape", "too long", "empty"],
)
def test_a_held_out_file_that_cannot_be_used_is_refused(
    rows: list[Any], code: int, says: str, given: tuple[object, ...], tmp_path: Path, command: Cli
) -> None:
    """It is read as the training data is, and named."""
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got, _, err = command("auto", *given, *SHORT, "-o", tmp_path / "run")
    assert (got, says in err, "eval.jsonl" in err, "What to do" in err) == (code, True, True, True), err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--early-stop", "3", "--steps", "3"), "--early-stop 3 waits for longer than --steps 3"),
        (("--keep-checkpoints", "0"), "--keep-checkpoints 0"),
        (("--early-stop", "-1"), "--early-stop -1"),
        (("--eval-data", "eval.jsonl"), "--eval-data is held out beside data that trains"),
    ],
    ids=["waits longer than it runs", "none kept", "negative", "no data"],
)
def test_what_cannot_be_obeyed_is_refused(
    flags: tuple[str, ...], says: str, byte_model: Path, command: Cli
) -> None:
    code, _, err = command("plan", "--model", byte_model, *flags)
    assert (code, says in err, "What to do" in err) == (2, True, True), err


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_the_planned_step_covers_the_longest_evaluation_batch(
    packing: str, given: tuple[object, ...], tmp_path: Path, command: Cli
) -> None:
    """No batch of longer held-out examples is larger than the one whose evaluation was traced."""
    file = tmp_path / "plan.yaml"
    assert command("plan", *given, *ASKED, packing, "-o", file)[0] == 0
    plan = Plan.from_yaml(file)
    assert plan.estimate.phases_bytes["evaluation"] > 0
    source = ModelSource(plan.model)
    prepared: PreparedData = prepare(str(plan.data), source, reading=plan.reading, eval_name=plan.eval_data)
    assert prepared.stats.longest_held_out_tokens > plan.seq_len
    data = training_data(plan, prepared, pad_token_id=0)
    batches = [data.collate(some, packed=plan.packing) for some in data.held_out_micro_batches()]
    traced = meta_batch(plan.step)
    assert max(batch.limited_tokens for batch in batches) <= traced.limited_tokens
    assert max(batch.trained_tokens for batch in batches) <= traced.trained_tokens
    assert max(len(batch.lengths or batch.input_ids) for batch in batches) >= 2
    assert max(max(batch.lengths or (batch.input_ids.shape[1],)) for batch in batches) == plan.seq_len
    assert sum(batch.trained_tokens for batch in batches) > 0
