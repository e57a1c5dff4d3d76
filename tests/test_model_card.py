"""The model card: what a run's folder says, read back as the hub's own client reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.model_card import Contents, Training, licence_of, model_card, named
from lowvram.hardware import card_of_size, probe
from lowvram.planner.build import make_plan
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import load_profile
from lowvram.planner.wishes import Wishes
from lowvram.training.result import RunResult
from lowvram.units import GiB, format_bytes
from tests.conftest import QWEN2_7B

RESULT = RunResult(
    model="/home/somebody/models/Tiny",
    data="/home/somebody/rows.jsonl",
    steps=7,
    held_out_loss_before=4.25,
    held_out_loss_after=2.5,
    trained_tokens=1000,
    tokens=2000,
    seconds=60.0,
    tokens_per_second=33.0,
    adapter_bytes=1,
    stop_reason="finished",
)


def contents(base: str = "/home/somebody/models/Tiny", **more: object) -> Contents:
    about = {"title": "Tiny-tuned", "what": "The adapter, merged.", "library": "transformers"}
    return Contents.model_validate({**about, "base_model": base, "licence": None, **more})


@pytest.fixture
def plan(config_only: Callable[[dict[str, object]], Path]) -> Plan:
    tiny = QWEN2_7B | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    source = ModelSource(str(config_only(tiny | {"num_attention_heads": 4, "num_key_value_heads": 2})))
    card = card_of_size(8 * GiB, probe(trial=False))
    made = make_plan(source, card, load_profile("8gb"), Wishes(seq_len=64, rank=2))
    return made.model_copy(update={"model": RESULT.model, "data": RESULT.data})


def test_it_tells_the_run_and_no_place_on_this_machine(tmp_path: Path, plan: Plan) -> None:
    training = Training(plan=plan, result=RESULT, receipt=None)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    about = contents(measured=("loss 2.5001 against 2.5000",), licence=licence_of(tmp_path))
    text = model_card(about, training)
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # a folder is nothing that the hub could link to
    for said in (
        *("`Tiny`", "`rows.jsonl`", "4.2500", "2.5000", "loss 2.5001 against 2.5000"),
        f"| rank | {plan.rank} |",
        f"| {format_bytes(plan.estimate.peak_reserved_bytes)} | not measured |",
    ):
        assert said in card.text
    assert "somebody" not in text


def test_a_hub_id_is_linked(tmp_path: Path) -> None:
    settings = (("r", "4"), ("lora_alpha", "8"))
    card = ModelCard(model_card(contents("Qwen/Qwen2-7B", settings=settings), None))
    assert licence_of(tmp_path) is None
    assert card.data.base_model == "Qwen/Qwen2-7B"
    assert card.data.license is None
    assert "| lora_alpha | 8 |" in card.text


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B"),
        ("/home/somebody/models/Tiny/", "Tiny"),
        ("./models/Tiny", "Tiny"),
        ("rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\somebody\\Tiny", "Tiny"),
    ],
)
def test_names_without_their_folders(place: str, told: str) -> None:
    assert named(place) == told


def test_a_base_s_broken_card_is_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        licence_of(tmp_path)
