"""Resuming a run whose plan or data changed: refused with what changed, or gone on with by --force."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram import cli
from lowvram.planner.plan import Plan
from lowvram.training import checkpoint
from lowvram.training.plan_changes import Known, changes
from lowvram.training.run_folder import RunFolder
from tests import tiny_runs
from tests.tiny_runs import ASKED, Cli, edit_plan, events, killed_after, learned, metrics, result, write_rows

byte_model, command = tiny_runs.byte_model, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, AT = 6, 4
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps that kept every checkpoint, beside its data."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_rows(folder / "rows.jsonl", range(30))
    asked = ("--steps", STEPS, "--precision", "fp32", "--keep-checkpoints", STEPS, *ASKED)
    given = ("auto", "--model", byte_model, "--data", data, *asked, "-o", folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lowvram", *map(str, given)])
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main()
    return folder / "run"


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """As if it had been killed after step 4, with data of its own."""
    run = killed_after(AT, whole, tmp_path / "run")
    data = tmp_path / "rows.jsonl"
    data.write_bytes((whole.parent / "rows.jsonl").read_bytes())
    edit_plan(run / "plan.yaml", data=data)
    return run


def grow_data(run: Path) -> None:
    write_rows(run.parent / "rows.jsonl", range(31))


def edited(**values: object) -> Change:
    return lambda run: edit_plan(run / "plan.yaml", **values)


def test_data_that_moved_and_a_changed_pace_are_no_changes(whole: Path, stopped: Path, command: Cli) -> None:
    """The data is elsewhere already; how often is evaluated, saved and kept may change freely."""
    edit_plan(stopped / "plan.yaml", evaluate_every=5, save_every=2, keep_checkpoints=1, early_stop=3)
    code, _, err = command("resume", stopped)
    assert code == 0, err
    assert [row[2] for row in learned(stopped)] == [row[2] for row in learned(whole)]
    assert [row["step"] for row in metrics(stopped) if row["held_out_loss"]][-2:] == [5, 6]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited(learning_rate=0.001), "learning_rate: 0.02 -> 0.001"),
        (edited(dropout=0.5, seed=7), "dropout: 0.05 -> 0.5 seed: 0 -> 7"),
        (edited(tile_tokens=64, gradient_checkpointing="true"), "levers.tile_tokens: 0 -> 64"),
        (edited(total_steps=9), "total_steps: 6 -> 9"),
        (grow_data, r"data: [0-9a-f]{12} \(30 examples\) -> [0-9a-f]{12} \(31 examples\)"),
    ],
    ids=["learning rate", "two fields", "lever", "more steps", "data"],
)
def test_a_change_is_refused_and_told(change: Change, says: str, stopped: Path, command: Cli) -> None:
    """With the old and the new value, before the model is loaded; nothing in the run is touched."""
    change(stopped)
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowvram.training.set_up.load", None)
        code, _, err = command("resume", stopped)
    assert code == 2, err
    assert re.search(says, err), err
    assert "is not as it was in the checkpoint of step 4" in err
    assert f"lowvram resume {stopped} --force" in err
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited(rank=4), "rank: 2 -> 4"),
        (edited(target_modules="[q_proj, v_proj]"), "up_proj, down_proj -> q_proj, v_proj"),
        (edited(optimizer="adamw8bit"), "optimizer: adamw -> adamw8bit"),
        (edited(bias="all"), "bias: none -> all"),
        (edited(use_dora="true"), "use_dora: False -> True"),
        (edited(lora_plus_ratio=16), "lora_plus_ratio: 1.0 -> 16.0"),
        (edited(init="pissa"), "init: default -> pissa"),
        (edited(freeze_a="true"), "freeze_a: False -> True"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_the_tensors_are_made_of_cannot_change(
    change: Change, says: str, stopped: Path, command: Cli
) -> None:
    change(stopped)
    code, _, err = command("resume", stopped, "--force")
    assert code == 2, err
    assert says in err
    assert "made for the old value" in err
    assert f"lowvram train {stopped}/plan.yaml --output" in err
    code, _, err = command("resume", stopped)
    assert (code, "--force" in err) == (2, False)


def test_a_plan_that_ends_before_its_checkpoint_is_refused(stopped: Path, command: Cli) -> None:
    edit_plan(stopped / "plan.yaml", total_steps=3)
    for force in ((), ("--force",)):
        code, _, err = command("resume", stopped, *force)
        assert (code, "total_steps is 3" in err, "of step 4" in err) == (2, True, True), err
        assert "--force" not in err


def test_a_rule_across_lines_is_told_without_the_whole_plan(stopped: Path, command: Cli) -> None:
    edit_plan(stopped / "plan.yaml", warmup_steps=100)
    code, _, err = command("resume", stopped)
    assert (code, "is not valid: warmup_steps 100 must be below total_steps 6 What" in err) == (2, True), err
    plan = stopped / "plan.yaml"
    plan.write_text("".join(line for line in plan.read_text().splitlines(True) if "profile:" not in line))
    code, _, err = command("resume", stopped)
    assert (code, "profile: Field required" in err, len(err) < 500) == (2, True, True), err


def test_force_goes_on_with_the_changed_plan(whole: Path, stopped: Path, command: Cli) -> None:
    """The new learning rate and schedule count from the next step on, and the next checkpoint has them."""
    edit_plan(stopped / "plan.yaml", learning_rate=0.001, schedule="constant", total_steps=7, save_every=1)
    code, out, err = command("resume", stopped, "--force")
    assert code == 0, err
    for text in ("learning_rate: 0.02 -> 0.001", "schedule: cosine -> constant", "total_steps: 6 -> 7"):
        assert f"Changed, as --force allows: {text}" in out
        assert f"Changed, as --force allows: {text}" in events(stopped, "resume")
    assert learned(stopped)[:AT] == learned(whole)[:AT]
    assert [row["learning_rate"] for row in metrics(stopped)[AT:]] == [0.001] * 3
    assert learned(stopped)[AT][2] == learned(whole)[AT][2]  # the same batch before the first new update
    assert learned(stopped)[AT + 1][2] != learned(whole)[AT + 1][2]
    values = checkpoint.read_values(stopped / "checkpoints" / "step-000005")
    assert values["extra"]["plan"] == Plan.from_yaml(stopped / "plan.yaml").deciding
    assert result(stopped)["steps"] == 7
    again = killed_after(5, stopped, stopped.parent / "again")
    assert command("resume", again)[0] == 0  # without --force
    assert learned(again) == learned(stopped)


def test_force_goes_on_with_changed_data(stopped: Path, command: Cli) -> None:
    """Its hash goes into plan.yaml, so that the next resume takes it for the run's own."""
    grow_data(stopped)
    old = Plan.from_yaml(stopped / "plan.yaml").data_sha256
    assert command("resume", stopped)[0] == 2
    assert Plan.from_yaml(stopped / "plan.yaml").data_sha256 == old
    code, out, err = command("resume", stopped, "--force")
    assert code == 0, err
    assert re.search(r"Changed, as --force allows: data: \w{12} \(30 examples\) -> \w{12} \(31 ", out), out
    assert "Held-out losses so far are of other examples" in out
    assert "after (on other examples: the data changed)" in out
    assert "% lower" not in out
    assert result(stopped)["same_held_out"] is False
    assert Plan.from_yaml(stopped / "plan.yaml").data_sha256 != old
    assert len(metrics(stopped)) == STEPS
    again = killed_after(STEPS, stopped, stopped.parent / "again")
    assert command("resume", again)[0] == 0  # without --force
    assert result(again)["same_held_out"] is False  # still known


def test_changed_data_is_noticed_before_the_first_checkpoint(stopped: Path, command: Cli) -> None:
    for path in (stopped / "checkpoints").iterdir():
        path.rename(stopped.parent / path.name)
    grow_data(stopped)
    code, _, err = command("resume", stopped)
    assert (code, "is not as it was when the run began" in err) == (2, True), err
    assert re.search(r"data: \w{12} -> \w{12} \(31 examples\)", err), err
    code, _, err = command("resume", stopped, "--force")
    assert code == 0, err
    assert [row["step"] for row in metrics(stopped)] == list(range(1, STEPS + 1))


def test_a_changed_plan_that_does_not_fit_is_refused(stopped: Path, command: Cli) -> None:
    edit_plan(stopped / "plan.yaml", micro_batch=100_000)
    before = (stopped / "plan.yaml").read_text()
    code, _, err = command("resume", stopped, "--force")
    assert (code, "budget" in err) == (3, True), err
    assert (stopped / "plan.yaml").read_text() == before


def test_another_process_in_the_run_keeps_force_from_changing_its_plan(stopped: Path, command: Cli) -> None:
    edit_plan(stopped / "plan.yaml", seed=7)
    before = (stopped / "plan.yaml").read_text()
    with RunFolder(stopped).lock():
        code, _, err = command("resume", stopped, "--force")
    assert (code, "another lowvram process" in err) == (2, True), err
    assert (stopped / "plan.yaml").read_text() == before
    assert not events(stopped, "resume")


def test_a_checkpoint_of_an_earlier_version_is_told(stopped: Path, command: Cli) -> None:
    """One that does not say under which plan it was written; its manifest is as that version wrote it."""
    folder = stopped / "checkpoints" / "step-000004"
    state = folder / checkpoint.STATE
    state.write_text(state.read_text().replace('["plan", ', '["other", '))
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.STATE] = checkpoint._describe(state).model_dump()
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    code, _, err = command("resume", stopped)
    assert (code, "an earlier lowvram wrote it" in err) == (2, True), err


def test_every_difference_is_one_line(whole: Path) -> None:
    """Of a nested group only the values that differ; equal values and what is only told are none."""
    plan = Plan.from_yaml(whole / "plan.yaml")
    assert changes(Known(4, plan.deciding, {}), plan, {}) == []
    levers = plan.levers.model_copy(update={"head": "nf4", "loss_chunk_tokens": 64})
    told = {"reasons": ("other",), "budget_bytes": 1, "save_every": 9, "data": "elsewhere"}
    changed = plan.model_copy(update={"levers": levers, "alpha": 4.0, "rank": 8, **told})
    found = changes(Known(4, plan.deciding, {}), changed, {})
    assert {(change.field, change.fixed) for change in found} == {
        ("rank", True),
        ("alpha", False),
        ("levers.head", False),
        ("levers.loss_chunk_tokens", False),
    }
    assert {change.text for change in found} >= {"rank: 2 -> 8", "levers.head: 16bit -> nf4"}


@pytest.mark.parametrize(
    ("trains", "fixed"), [({}, False), ({"bias": "all"}, True), ({"use_dora": True}, True)]
)
def test_the_weight_decay_of_vectors_decides_groups(
    trains: dict[str, object], fixed: bool, whole: Path
) -> None:
    plan = Plan.from_yaml(whole / "plan.yaml").model_copy(update=trains)
    changed = plan.model_copy(update={"weight_decay": 0.1})
    (found,) = changes(Known(4, plan.deciding, {}), changed, {})
    assert (found.text, found.fixed) == ("weight_decay: 0.0 -> 0.1", fixed)
