"""The survey around a plan, and the memory of traced estimates, on a small architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lowvram.engine.config import StepConfig
from lowvram.engine.known_models import known_config
from lowvram.engine.model import skeleton
from lowvram.engine.source import ModelSource
from lowvram.hardware import Hardware, card_of_size, probe
from lowvram.memory import cache
from lowvram.memory.estimate import estimate
from lowvram.planner.build import decide, make_plan
from lowvram.planner.first_step import Request
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import Profile, load_profile, profile_for
from lowvram.planner.survey import LENGTHS, Survey, survey
from lowvram.planner.wishes import Wishes
from lowvram.units import GiB

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 9000,
}


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Survey, Hardware]:
    folder = tmp_path_factory.mktemp("llama")
    AutoConfig.for_model(**SMALL).save_pretrained(folder)
    card = card_of_size(8 * GiB, probe())
    return *_planned(ModelSource(str(folder)), card, profile_for(card)), card


def _planned(source: ModelSource, device: Hardware, profile: Profile) -> tuple[Plan, Survey]:
    plan, search = decide(Request(source, device, profile, Wishes()))
    return plan, survey(plan, device, search)


def test_lengths_end_at_the_model_s_limit_and_grow(around: tuple[Plan, Survey, Hardware]) -> None:
    _, found, _ = around
    assert [n.seq_len for n in found.lengths] == [n for n in LENGTHS if n <= 9000]
    assert all(a.reserved_bytes <= b.reserved_bytes for a, b in pairwise(found.lengths))


def test_the_line_between_traced_lengths_is_never_below_the_trace(
    around: tuple[Plan, Survey, Hardware],
) -> None:
    plan, found, card = around
    between = [n for n in found.lengths if not n.traced]
    assert between
    _, search = decide(Request(ModelSource(plan.model), card, profile_for(card), Wishes()))
    model = cache.RememberedModel(ModelSource(plan.model))
    base = plan.step.model_copy(update={"micro_batch": 1, "accumulation": 2})
    for need in between:
        step = base.model_copy(update={"seq_len": need.seq_len})
        smallest = search.leanest(step)
        assert smallest.levers.offload_checkpoints
        assert smallest.base_precision == "nf4"
        assert (
            estimate(model.source.config, smallest, "cuda", (8, 6)).peak_reserved_bytes <= need.reserved_bytes
        )


def test_cards_hold_more_the_larger_they_are(around: tuple[Plan, Survey, Hardware]) -> None:
    _, found, _ = around
    assert [round(c.total_bytes / GiB) for c in found.cards] == [8, 10, 11, 12, 16, 24]
    assert all(a.largest_seq_len <= b.largest_seq_len for a, b in pairwise(found.cards))
    for card in found.cards:
        fitting = [n.seq_len for n in found.lengths if n.reserved_bytes <= card.budget_bytes]
        assert max(fitting) <= card.largest_seq_len <= 9000


def test_largest_rank_fits_and_is_within_the_full_rank(around: tuple[Plan, Survey, Hardware]) -> None:
    plan, found, _ = around
    assert found.largest_rank == 256  # the full rank: this model is small for its card
    assert found.lora_16bit_bytes > plan.estimate.peak_reserved_bytes / 2


def test_an_estimate_is_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it comes from disk; another step or a broken file is traced."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    traced: list[StepConfig] = []
    whole = cache.estimate

    def counted(config: Any, step: StepConfig, *where: Any) -> Any:
        traced.append(step)
        return whole(config, step, *where)

    monkeypatch.setattr(cache, "estimate", counted)
    step = StepConfig(seq_len=64)

    def ask(step: StepConfig, **facts: Any) -> Any:
        return cache.RememberedModel(_source(tmp_path, **facts)).estimate(step, "cuda", (8, 6))

    first = ask(step)
    assert ask(step) == first
    assert len(traced) == 1
    assert ask(step.model_copy(update={"seq_len": 128})) != first
    for file in (tmp_path / "traces").iterdir():
        file.write_text("{}")
    assert ask(step) == first
    assert len(traced) == 3
    assert ask(step, vocab_size=2 * SMALL["vocab_size"]) != first  # the folder's config.json was edited
    assert len(traced) == 4


def test_a_model_that_may_bring_code_is_traced_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    source = ModelSource(_source(tmp_path).name, trust_remote_code=True)
    assert cache.RememberedModel(source).shape.n_layers == SMALL["num_hidden_layers"]
    assert not (tmp_path / "traces").exists()


def test_a_known_plan_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the same command imports neither torch nor transformers, and says the same."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    words = ["lowvram", "plan", "--model", _source(tmp_path).name, "--vram", "8GB", "--json"]
    code = (
        "import sys, lowvram.hardware\nlowvram.hardware.GPU_FILES = ()\n"
        f"from lowvram.cli import main\nsys.argv = {words}\ntry:\n    main()\n"
        "finally:\n    print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )

    def run() -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout, done.stderr.splitlines()[-1]

    first, second = run(), run()
    assert first == (second[0], "['torch', 'transformers']")
    assert second[1] == "[]"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("LOWVRAM_CACHE", str(blocker))
    model = cache.RememberedModel(_source(tmp_path))
    assert model.estimate(StepConfig(seq_len=64), "cuda", None).peak_allocated_bytes > 0


def _source(folder: Path, **facts: Any) -> ModelSource:
    """SMALL in a folder, with other facts where given."""
    model = folder / "small"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(SMALL | facts))
    return ModelSource(str(model))


@pytest.mark.parametrize("name", ["google-t5/t5-base", "openai-community/gpt2", "google/gemma-2-2b"])
def test_other_families_are_planned_by_name(name: str) -> None:
    """From the shipped table, without the hub: T5 with its target, GPT-2's Conv1D, Gemma 2's soft cap."""
    card = card_of_size(8 * GiB, probe())
    plan = make_plan(ModelSource(name), card, profile_for(card), Wishes(seq_len=256, batch=1))
    assert plan.fits
    assert plan.task_type == ("SEQ2SEQ_LM" if "t5" in name else "CAUSAL_LM")
    assert plan.n_trainable > 1e5
    assert sum(plan.estimate.components_bytes.values()) == plan.estimate.peak_allocated_bytes
    phases = plan.estimate.phases_bytes
    assert {"load", "evaluation", "forward", "backward", "clip", "optimizer"} <= set(phases)
    assert max(phases.values()) == plan.estimate.peak_allocated_bytes


def test_flan_t5_has_a_head_of_its_own() -> None:
    """google/flan-t5-base: 247,577,856 parameters on its card; T5's own base shares its head: 222,903,552."""
    steps = StepConfig(task_type="SEQ2SEQ_LM", base_precision="bf16")
    for name, parameters in (("google/flan-t5-base", 247_577_856), ("google-t5/t5-base", 222_903_552)):
        config = known_config(name)
        assert config is not None
        assert sum(p.numel() for p in skeleton(config, steps).parameters()) == parameters


def test_a_cpu_s_plan_has_the_table_of_cards_too(around: tuple[Plan, Survey, Hardware]) -> None:
    """As a card would run it: the same needs as in a card's own survey."""
    plan, found, _ = around
    none = {"backend": "cpu", "capability": None, "context_bytes": 0, "held_bytes": 0, "bf16": False}
    here = probe().model_copy(update=none)
    _, cpu = _planned(ModelSource(plan.model), here, load_profile("8gb"))
    assert [n.reserved_bytes for n in cpu.lengths] == [n.reserved_bytes for n in found.lengths]
    assert [c.largest_seq_len for c in cpu.cards] == [c.largest_seq_len for c in found.cards]
