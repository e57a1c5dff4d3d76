"""Plans: what fits and what does not, wishes, and the YAML contract."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from lowvram import hardware, plan_view
from lowvram.engine.config import Levers
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.memory.cache import RememberedModel
from lowvram.planner.build import make_plan
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import load_profile, profile_for
from lowvram.planner.recheck import checked
from lowvram.planner.variants import with_kept
from lowvram.planner.wishes import Wishes, wishes_from
from lowvram.units import GiB, format_bytes
from tests.conftest import QWEN2_7B
from tests.tiny import stats_of

SMALL = {
    **QWEN2_7B,
    "num_hidden_layers": 4,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
}
SMALL |= {"num_key_value_heads": 2}
Config = Callable[[dict[str, object]], Path]


def _card(gib: int) -> hardware.Hardware:
    return hardware.card_of_size(gib * GiB, hardware.probe())


def test_qwen2_7b_fits_8_gb_and_the_readme_says_how(config_only: Config) -> None:
    """The reference row: 7B at rank 4, 2,048 tokens, desktop card; the README shows this plan."""
    source, card = ModelSource(str(config_only(QWEN2_7B))), _card(8)
    plan = make_plan(source, card, profile_for(card), Wishes())
    assert plan.fits
    assert (plan.rank, plan.seq_len, plan.profile) == (4, 2048, "8gb")
    assert plan.n_parameters == 7_615_616_512
    assert plan.n_trainable == 28 * 4 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert plan.estimate.peak_reserved_bytes <= 8 * GiB - card.context_bytes - card.held_bytes
    more = with_kept(plan.step, plan.levers.kept_layers + 2)  # one layer is the closest that is looked for
    too_much = RememberedModel(source).estimate(more, "cuda", card.capability)
    assert plan.levers.kept_layers > 0
    assert too_much.peak_reserved_bytes > plan.budget_bytes
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = {**plan.estimate.components_bytes, "reserved": plan.estimate.peak_reserved_bytes}
    for name, n_bytes in shown.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"│  {name.replace('_', ' ')} "))
        assert row.split("│")[1].rstrip().endswith(f" {format_bytes(n_bytes)}"), row
    assert f"{plan.largest_seq_len:,} tokens with all layers recomputed" in readme


def test_refuses_with_the_nearest_plan_that_fits(config_only: Config) -> None:
    source, card = ModelSource(str(config_only(SMALL))), _card(3)
    whole = "tile_tokens=0,offload_checkpoints=off,embedding_on_host=off,head=16bit"
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(source, card, load_profile("8gb"), Wishes(seq_len=32768, batch=1, levers=whole))
    assert "budget" in caught.value.message
    nearest, size = map(int, re.findall(r"--seq-len (\d+).*--vram (\d+)GB", caught.value.remedy)[0])
    assert "without --levers" in caught.value.remedy
    wanted = Wishes(seq_len=32768, batch=1, levers=whole)
    assert make_plan(source, _card(size), load_profile("8gb"), wanted).fits
    assert 64 <= nearest < 32768
    assert make_plan(source, card, load_profile("8gb"), Wishes(seq_len=nearest, batch=1, levers=whole)).fits
    unpinned = make_plan(source, card, load_profile("8gb"), Wishes(seq_len=32768, batch=1))
    assert unpinned.levers.tile_tokens  # left to itself the planner goes on to it


def test_wishes_are_kept_and_yaml_round_trips(config_only: Config, tmp_path: Path) -> None:
    wishes = Wishes(rank=7, alpha=9, targets="qv", seq_len=128, batch=6, optimizer="adamw8bit", seed=3)
    plan = make_plan(ModelSource(str(config_only(SMALL))), _card(24), load_profile("24gb"), wishes)
    assert (plan.rank, plan.alpha, plan.target_modules, plan.seq_len) == (7, 9, ("q_proj", "v_proj"), 128)
    assert (plan.micro_batch * plan.accumulation, plan.optimizer, plan.seed) == (6, "adamw8bit", 3)
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    assert all("#" in line for line in plan.to_yaml().splitlines())  # every line says what it is
    assert Plan.from_yaml(file) == plan
    assert Plan.from_yaml(file).sha256 == plan.sha256
    file.write_text(plan.to_yaml().replace("\nrank:", "\nrnak:"), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean rank"):
        Plan.from_yaml(file)


@pytest.mark.parametrize("name", ["8gb", "12gb", "16gb", "24gb", "cpu"])
def test_every_shipped_profile_is_valid(name: str) -> None:
    assert load_profile(name).name == name


def test_bad_wishes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--rank -1: .*; --seq-len 0: "):
        wishes_from(rank=-1, seq_len=0)
    with pytest.raises(ConfigError, match="contradict"):
        wishes_from(steps=3, epochs=1.0)
    nan = float("nan")
    for bad in ({"alpha": nan}, {"dropout": nan}, {"epochs": float("inf")}, {"seed": -1}, {"targets": ""}):
        with pytest.raises(ConfigError, match=f"--{next(iter(bad))} "):
            wishes_from(**bad)
    with pytest.raises(ConfigError, match="no lever 'checkpointing'") as caught:
        wishes_from(levers="checkpointing=on").pinned_levers()
    assert "gradient_checkpointing" in caught.value.remedy
    with pytest.raises(ConfigError, match="There is no profile"):
        load_profile("9gb")


def test_levers_are_pinned(config_only: Config) -> None:
    source = ModelSource(str(config_only(SMALL)))

    def levers_of(asked: str) -> Levers:
        wishes = wishes_from(levers=asked, seq_len=64, batch=1)
        return make_plan(source, _card(24), load_profile("24gb"), wishes).levers

    levers = levers_of("gradient_checkpointing=on,loss_chunk_tokens=128")
    assert levers.gradient_checkpointing
    assert levers.kept_layers == 0  # left to itself the planner keeps every layer's activations
    assert levers.loss_chunk_tokens == 128
    levers = levers_of("kept_layers=2,empty_cache")
    assert (levers.kept_layers, levers.gradient_checkpointing, levers.empty_cache) == (2, True, True)
    with pytest.raises(ConfigError, match="leaves none of the 4 layers"):
        levers_of("kept_layers=4")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds nothing"),
        ("- a\n", "holds a list"),
        ("text", "holds a str"),
        ("a: [", "cannot be read as YAML"),
        (None, "There is no "),
    ],
)
def test_a_file_that_is_no_plan_is_told_from_a_broken_one(
    tmp_path: Path, content: str | None, says: str
) -> None:
    file = tmp_path / "plan.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        Plan.from_yaml(file)
    assert ("Repair" in caught.value.remedy) == (content == "a: [")


def test_yaml_without_permission(locked: Path) -> None:
    for read in (lambda: load_profile(str(locked / "p.yaml")), lambda: Plan.from_yaml(locked / "p.yaml")):
        with pytest.raises(ConfigError, match=r"p\.yaml cannot be read \(Permission denied\)"):
            read()


def test_names_and_numbers_are_shown_at_any_width(config_only: Config) -> None:
    wishes = wishes_from(seq_len=64, batch=1)
    plan = make_plan(ModelSource(str(config_only(SMALL))), _card(24), load_profile("24gb"), wishes)
    for width in (40, 56, 80, 200):
        console = Console(width=width, record=True, quiet=False, file=io.StringIO())
        plan_view.show_plan(plan, console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert ("██" in text) == (width > 40)
        assert "context" in text
        rows = {**plan.estimate.components_bytes, "budget": plan.budget_bytes}
        for name, n_bytes in rows.items():
            line = next(
                line for line in text.splitlines() if line.startswith(f"│  {name.replace('_', ' ')} ")
            )
            assert format_bytes(n_bytes) in line


def test_a_rank_above_full_rank_is_refused(config_only: Config) -> None:
    with pytest.raises(ConfigError, match="full rank 896"):
        make_plan(ModelSource(str(config_only(SMALL))), _card(24), load_profile("24gb"), Wishes(rank=1000))


def test_the_card_of_a_refusal_fits(config_only: Config) -> None:
    """What the remedy names is neither too small nor larger than it must be."""
    source = ModelSource(str(config_only(SMALL | {"num_hidden_layers": 40, "hidden_size": 1792})))
    wishes = Wishes(seq_len=512, batch=1)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(source, _card(1), load_profile("8gb"), wishes)
    size = int(caught.value.remedy.split("on a ")[1].split(" ")[0])
    assert make_plan(source, _card(size), load_profile("8gb"), wishes).fits
    with pytest.raises(DoesNotFitError):
        make_plan(source, _card(size - 1), load_profile("8gb"), wishes)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"target_modules": ("q_proj", "zzz")}, ConfigError, "zzz"),
        ({"seq_len": 200_000}, ConfigError, "131072 positions"),
        ({"budget_bytes": 1}, DoesNotFitError, "its budget is 1 B"),
        ({"micro_batch": 4096}, DoesNotFitError, "its budget is"),
    ],
)
def test_an_edited_plan_is_checked_before_it_runs(
    config_only: Config, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    source = ModelSource(str(config_only(SMALL)))
    card = _card(24)
    plan = make_plan(source, card, load_profile("24gb"), Wishes(seq_len=64, batch=1))
    assert checked(plan, source, card) == plan
    with pytest.raises(error, match=says):
        checked(plan.model_copy(update=change), source, card)


def test_warm_up_must_end_before_the_run() -> None:
    with pytest.raises(ValidationError, match="warmup_steps 9 must be below"):
        _plan_with(warmup_steps=9, total_steps=5)


def _plan_with(**changes: int) -> Plan:
    device = {"backend": "cpu", "name": "x", "total_bytes": 1, "free_bytes": 1, "context_bytes": 0}
    estimate = {
        "peak_allocated_bytes": 1,
        "peak_reserved_bytes": 1,
        "peak_moment": "",
        "components_bytes": {},
    }
    fixed = {"budget_bytes": 1, "largest_seq_len": 8, "host_ram_bytes": 1, "seconds_per_step": 1}
    fixed["seconds_in_all"] = 1
    counts = {"n_parameters": 1, "n_trainable": 1}
    whole = {
        **fixed,
        **counts,
        "estimate": {**estimate, "n_events": 1},
        "device": {**device, "held_bytes": 0},
    }
    return Plan.model_validate({"model": "m", "profile": "cpu", **whole, **changes})


def test_examples_without_an_answer_in_reach_are_told_and_not_counted(config_only: Config) -> None:
    """100 examples of 50 tokens whose answers begin at 1, 2, ... 100 % of 40."""
    source = ModelSource(str(config_only(SMALL)))
    starts = tuple(round(40 * percent / 100) for percent in range(101))
    stats = stats_of((50,) * 101, 100, 0.4, n_held_out=5, starts=starts)
    assert [stats.n_lost_at(n) for n in (50, 41, 31, 21)] == [0, 0, 24, 49]
    wishes = Wishes(seq_len=32, batch=1, epochs=1.0)
    plan = make_plan(source, _card(24), load_profile("24gb"), wishes, stats)
    assert "left out" in " ".join(plan.reasons)
    assert plan.total_steps == 100 - stats.n_lost_at(32)
    with pytest.raises(ConfigError, match="begins after 16 tokens"):
        make_plan(source, _card(24), load_profile("24gb"), Wishes(seq_len=16), stats)
