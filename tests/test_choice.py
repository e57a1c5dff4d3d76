"""What is preferred: speed, quality or context; which precision and why; what `--why` says of each lever."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lowvram import hardware, why_view
from lowvram.cli import app
from lowvram.data.stats import DataStats
from lowvram.engine.config import StepConfig
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.planner.build import decide
from lowvram.planner.first_step import Request
from lowvram.planner.levers import LEVERS
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import Profile, load_profile
from lowvram.planner.search import Search
from lowvram.planner.variants import value_of, with_value
from lowvram.planner.why import LeverWhy, why
from lowvram.planner.wishes import Wishes, wishes_from
from lowvram.units import GiB, said
from tests.conftest import QWEN2_7B
from tests.tiny import stats_of

SMALL: dict[str, object] = {
    **QWEN2_7B,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return ModelSource(str(folder))


def _card(gib: float) -> hardware.Hardware:
    return hardware.card_of_size(int(gib * GiB), hardware.probe(trial=False))


def _with_budget(budget_bytes: int, profile: Profile) -> hardware.Hardware:
    """A card whose budget is that, to a byte or two."""
    like = _card(8)
    taken = budget_bytes + like.held_bytes + like.context_bytes
    return hardware.card_of_size(int(taken / (1 - profile.margin_share)) + 2, like)


def _decided(
    source: ModelSource,
    card: hardware.Hardware,
    stats: DataStats | None = None,
    profile: Profile | None = None,
    **wishes: Any,
) -> tuple[Plan, Search, Request]:
    request = Request(source, card, profile or load_profile("8gb"), wishes_from(**wishes), stats)
    return *decide(request), request


def _stats(*quantiles: int, n_examples: int = 4000) -> DataStats:
    lengths = tuple(quantiles[min(i * len(quantiles) // 101, len(quantiles) - 1)] for i in range(101))
    return stats_of(lengths, n_examples, 0.5, n_held_out=64, starts=(1,) * 101)


# --- preferences ---


def test_sixteen_bits_where_they_fit_eight_between_four_when_needed(source: ModelSource) -> None:
    """`quality` takes the least quantised base that fits; the card shrinks until each is what is left."""
    ladder = ("micro_batch", "gradient_checkpointing", "base_precision", "double_quantization")
    profile = load_profile("8gb").model_copy(update={"ladder": ladder})
    asked: dict[str, Any] = {"prefer": "quality", "rank": 4, "seq_len": 512, "profile": profile}
    whole, search, _ = _decided(source, _card(8), **asked)
    assert (whole.base_precision, whole.levers.head) == ("bf16", "16bit")
    seen = []
    for precision in ("bf16", "int8", "nf4"):
        only = replace(search, freedom=replace(search.freedom, pinned={"base_precision": precision}))
        leanest = only.leanest(whole.step)
        card = _with_budget(search.reserved_bytes(leanest), profile)
        plan, _, _ = _decided(source, card, **asked)
        seen.append(plan.base_precision)
        assert plan.fits
    assert seen == ["bf16", "int8", "nf4"]


def test_quality_raises_the_rank_and_keeps_the_scaling(source: ModelSource) -> None:
    profile = load_profile("8gb")
    plan, _, _ = _decided(source, _card(8), prefer="quality", seq_len=512)
    assert plan.rank == profile.largest_rank == 64
    assert plan.use_rslora
    assert plan.scaling == pytest.approx(profile.alpha / profile.rank * (profile.rank / 64) ** 0.5, rel=1e-3)
    assert any("r=64 (the highest that fits)" in reason for reason in plan.reasons)
    asked, _, _ = _decided(source, _card(8), prefer="quality", seq_len=512, rank=2)
    assert asked.rank == 2


def test_context_takes_the_longest_sequence_that_fits(source: ModelSource) -> None:
    tight = _with_budget(330 * 1024**2, load_profile("8gb"))
    fast, _, _ = _decided(source, tight)
    plan, search, _ = _decided(source, tight, prefer="context")
    assert plan.seq_len > fast.largest_seq_len
    assert plan.seq_len == plan.largest_seq_len
    assert plan.fits
    longer = with_value(plan.step, "seq_len", plan.seq_len + max(plan.seq_len // 25, 128))
    assert plan.seq_len == 8192 or search.reserved_bytes(longer) > plan.budget_bytes
    given, _, _ = _decided(source, tight, _stats(100, 200, 400), prefer="context")
    assert given.seq_len == 400  # the data says how long


def test_speed_is_not_slower_than_the_others(source: ModelSource) -> None:
    card = _with_budget(400 * 1024**2, load_profile("8gb"))
    seconds = {
        prefer: _decided(source, card, prefer=prefer, rank=4, seq_len=1024)[0].seconds_per_step
        for prefer in ("speed", "context", "quality")
    }
    assert seconds["speed"] <= min(seconds.values())
    assert seconds["speed"] < seconds["context"]


def test_a_card_without_bf16_computes_in_fp16(source: ModelSource) -> None:
    turing = _card(8).model_copy(update={"capability": (7, 5), "bf16": False})
    plan, _, _ = _decided(source, turing, seq_len=64)
    assert (plan.base_precision, plan.compute_dtype) == ("fp16", "fp16")
    assert "so the loss is scaled and adapters are float32" in plan.reasons[0]
    quantised, _, _ = _decided(source, turing, seq_len=64, precision="nf4")
    assert (quantised.base_precision, quantised.compute_dtype) == ("nf4", "fp16")


# --- data ---


def test_short_rows_among_long_ones_are_packed_and_none_is_cut(source: ModelSource) -> None:
    plan, _, _ = _decided(source, _card(8), _stats(100, 120, 150, 1000))
    assert plan.packing
    assert plan.seq_len == 1000
    assert any(reason.startswith("packing: on, an update takes") for reason in plan.reasons)
    alike, _, _ = _decided(source, _card(8), _stats(500, 501))
    assert not alike.packing
    assert any("examples are of like length" in reason for reason in alike.reasons)
    asked, search, _ = _decided(source, _card(8), _stats(100, 120, 150, 1000), packing=False)
    assert not asked.packing
    assert search.seconds(asked.step) > search.seconds(plan.step)


def test_what_cannot_fit_is_cut_as_little_as_may_be_and_told(source: ModelSource) -> None:
    stats = _stats(200, 400, 600, 1600)
    ladder = ("micro_batch", "gradient_checkpointing", "loss_chunk_tokens", "base_precision")
    profile = load_profile("8gb").model_copy(update={"ladder": ladder})  # tiles would hold all of it
    _, search, _ = _decided(source, _card(8), stats, profile)
    leanest = search.leanest(StepConfig(target_modules=TARGETS, rank=4, seq_len=1000, accumulation=16))
    card = _with_budget(search.reserved_bytes(leanest) + 8 * 1024**2, profile)  # pages
    plan, _, _ = _decided(source, card, stats, profile)
    assert plan.fits
    assert 800 < plan.seq_len < 1600
    assert any(
        f"about {stats.n_longer_than(plan.seq_len)} of 4000 examples are longer" in r for r in plan.reasons
    )
    with pytest.raises(DoesNotFitError):  # but nobody's own length is bent
        _decided(source, card, stats, profile, seq_len=1600)


def test_eta_counts_real_tokens_and_evaluations(source: ModelSource) -> None:
    short, _, _ = _decided(source, _card(8), _stats(100, n_examples=4000), seq_len=1000, epochs=1.0)
    longer, _, _ = _decided(source, _card(8), _stats(200, n_examples=4000), seq_len=1000, epochs=1.0)
    assert short.total_steps == longer.total_steps == 4000 // 16
    assert longer.seconds_per_step > 1.5 * short.seconds_per_step
    steps = short.total_steps * short.seconds_per_step
    assert steps < short.seconds_in_all < 1.2 * steps


# --- why ---


@pytest.fixture(scope="module")
def told(source: ModelSource) -> tuple[Plan, Search, dict[str, LeverWhy]]:
    card = _with_budget(300 * 1024**2, load_profile("8gb"))
    plan, search, request = _decided(source, card, seq_len=2048, batch=4)
    return plan, search, {one.name: one for one in why(search, plan.step, request)}


def test_every_lever_is_told_with_traced_and_modelled_numbers(
    told: tuple[Plan, Search, dict[str, LeverWhy]],
) -> None:
    plan, search, rows = told
    assert list(rows) == [lever.name for lever in LEVERS]
    for name, row in rows.items():
        assert row.setting == said(value_of(plan.step, name))
        assert row.flips
    chunk = rows["loss_chunk_tokens"]
    other = with_value(plan.step, "loss_chunk_tokens", int(chunk.beside or 0))
    assert chunk.saves_bytes == search.reserved_bytes(other) - search.reserved_bytes(plan.step)
    assert chunk.costs_share == pytest.approx(search.seconds(plan.step) / search.seconds(other) - 1, abs=1e-4)
    assert rows["liger"].beside is None


def test_what_would_flip_a_lever_flips_it(
    source: ModelSource, told: tuple[Plan, Search, dict[str, LeverWhy]]
) -> None:
    """With the memory that the row asks for, the plan has at least as fast a setting."""
    plan, search, rows = told
    checked = 0
    for name, row in rows.items():
        if "more memory" in row.flips and row.saves_bytes:
            budget = search.reserved_bytes(plan.step) + row.saves_bytes
            richer, _, _ = _decided(source, _with_budget(budget, load_profile("8gb")), seq_len=2048, batch=4)
            assert richer.seconds_per_step <= plan.seconds_per_step
            assert richer.step != plan.step, name
            checked += 1
    assert checked >= 2


def test_why_is_shown_and_in_json(
    source: ModelSource, told: tuple[Plan, Search, dict[str, LeverWhy]]
) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    why_view.show_why(tuple(told[2].values()), console)
    text = console.export_text()
    assert all(name in text for name in told[2])
    ran = CliRunner().invoke(
        app, ["plan", "--model", source.name, "--vram", "8GB", "--seq-len", "64", "--why", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert [row["name"] for row in found["why"]] == [lever.name for lever in LEVERS]


@pytest.mark.parametrize("levers", ["default", "embedding_on_host=on,head=streamed"])
def test_a_tied_model_s_ends_are_moved_together(tmp_path: Path, levers: str) -> None:
    """The engine has no embedding on the host beside a whole head of the same weight."""
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "tie_word_embeddings": True}))
    plan, search, request = _decided(ModelSource(str(tmp_path)), _card(8), seq_len=64, levers=levers)
    rows = {one.name: one for one in why(search, plan.step, request)}
    ends = [rows[name] for name in ("embedding_on_host", "head")]
    placed = levers != "default"
    assert [one.setting for one in ends] == (["on", "streamed"] if placed else ["off", "16bit"])
    assert [one.beside for one in ends] == (["off", "nf4"] if placed else ["on", "int8"])
    assert all(one.saves_bytes is not None for one in ends)


def test_new_flags_reach_the_plan(source: ModelSource) -> None:
    flags = [
        "--micro-batch",
        "2",
        "--batch",
        "4",
        "--no-packing",
        "--prefer",
        "quality",
        "--no-offload",
        "--rslora",
    ]
    asked = ["plan", "--model", source.name, "--vram", "8GB", "--seq-len", "64", "--json", *flags]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    plan = json.loads(ran.stdout)["plan"]
    assert (plan["micro_batch"], plan["accumulation"], plan["packing"]) == (2, 2, False)
    assert plan["use_rslora"]
    wrong = CliRunner().invoke(app, [*asked, "--prefer", "sped"])
    assert isinstance(wrong.exception, ConfigError)
    assert "--prefer sped" in wrong.exception.message


def test_wishes_hold_no_unknown_preference() -> None:
    with pytest.raises(ConfigError, match="--prefer fast"):
        wishes_from(prefer="fast")
    assert Wishes().prefer is None
