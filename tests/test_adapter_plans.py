"""Plans of adapters that are not plain LoRA: conflicts, reasons, counts, time, and what is not trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lowvram import pipeline
from lowvram.cli import main
from lowvram.device_rates import DeviceRates
from lowvram.engine.config import StepConfig
from lowvram.engine.shape import ModelShape, shape_of
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.hardware import card_of_size, probe
from lowvram.planner.build import make_plan
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import load_profile
from lowvram.planner.recheck import checked
from lowvram.planner.time_model import TimeModel
from lowvram.planner.wishes import Wishes
from lowvram.planner.workload import Workload
from lowvram.units import GiB

Config = Callable[[dict[str, object]], Path]
WIDTHS = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}
LLAMA = {**WIDTHS, "model_type": "llama", "intermediate_size": 256, "max_position_embeddings": 512}
OPT = {
    **WIDTHS,
    "model_type": "opt",
    "ffn_dim": 256,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 512,
}
PHI = {**WIDTHS, "model_type": "phi", "intermediate_size": 256, "max_position_embeddings": 512}


def _plan(folder: Path, **wishes: Any) -> Plan:
    hardware = card_of_size(8 * GiB, probe(trial=False))
    return make_plan(ModelSource(str(folder)), hardware, load_profile("8gb"), Wishes(**wishes))


def _reason(plan: Plan, start: str) -> str:
    (found,) = [reason for reason in plan.reasons if reason.startswith(start)]
    return found


def test_each_choice_has_its_reason(config_only: Config) -> None:
    plan = _plan(config_only(OPT), bias="lora_only", dora=True, lora_plus=16)
    assert (plan.bias, plan.use_dora, plan.lora_plus_ratio) == ("lora_only", True, 16)
    assert "train in float32" in _reason(plan, "bias: lora_only, as you asked")
    assert "magnitude" in _reason(plan, "DoRA, as you asked")
    assert "16 times" in _reason(plan, "LoRA+, as you asked")
    plan = _plan(config_only(LLAMA), lora_fa=True)
    assert plan.freeze_a
    assert "A stays as it was drawn" in _reason(plan, "LoRA-FA, as you asked")
    assert not [r for r in plan.reasons if r.startswith(("bias", "DoRA", "LoRA+", "inference"))]


@pytest.mark.parametrize(
    ("bias", "said"), [("all", "this model has none"), ("lora_only", "the adapted layers have none")]
)
def test_a_model_without_biases_is_told_so(config_only: Config, bias: str, said: str) -> None:
    folder = config_only(LLAMA)
    plan = _plan(folder, bias=bias)
    assert f"{said}, so nothing is added" in _reason(plan, "bias:")
    assert plan.n_trainable == _plan(folder).n_trainable


@pytest.mark.parametrize(
    ("model", "wishes", "message"),
    [
        (PHI, {"bias": "all"}, "its head has a bias"),
        (LLAMA, {"lora_plus": 4, "lora_fa": True}, "--lora-fa leaves A none"),
        (LLAMA, {"dora": True, "init": "pissa"}, "--dora and --init pissa"),
        (LLAMA, {"inference_mode": True, "optimizer": "adamw8bit"}, "--optimizer and --inference-mode"),
        (LLAMA, {"inference_mode": True, "lora_plus": 4}, "--lora-plus and --inference-mode"),
        (LLAMA, {"inference_mode": True, "steps": 4}, "--steps and --inference-mode"),
    ],
)
def test_what_cannot_be_had_is_refused(
    config_only: Config, model: dict[str, object], wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(config_only(model), **wishes)


def test_an_edited_plan_is_refused_too(config_only: Config) -> None:
    folder = config_only(PHI)
    plan = _plan(folder)
    with pytest.raises(ConfigError, match="bias all is not for this model, its head"):
        checked(plan.model_copy(update={"bias": "all"}), ModelSource(str(folder)), probe(trial=False))
    with pytest.raises(ValidationError, match="freeze_a leaves A none"):
        StepConfig(freeze_a=True, lora_plus_ratio=2)


def test_inference_mode_is_planned_and_not_trained(config_only: Config, tmp_path: Path) -> None:
    folder = config_only(LLAMA)
    plan = _plan(folder, inference_mode=True)
    assert plan.inference_mode
    assert plan.n_trainable == 0
    assert "nothing trains" in _reason(plan, "inference mode, as you asked")
    assert not plan.levers.gradient_checkpointing
    assert "no backward pass" in _reason(plan, "gradient_checkpointing")
    assert plan.estimate.peak_allocated_bytes < _plan(folder).estimate.peak_allocated_bytes
    assert plan.seconds_per_step < 0.5 * _plan(folder).seconds_per_step
    with pytest.raises(ConfigError, match="nothing to train"):
        pipeline.from_saved(plan, "lowvram train plan.yaml")
    with pytest.raises(ConfigError, match="nothing to train"):
        pipeline.preflight(ModelSource(str(folder)), tmp_path / "run", (), inference_mode=True)


def _seconds(shape: ModelShape, **changes: Any) -> float:
    rates = DeviceRates(
        flops=1e13, memory_bytes_per_second=1e11, host_bytes_per_second=1e10, measured=False, source="round"
    )
    step = StepConfig(seq_len=512, accumulation=2, target_modules=("q_proj", "v_proj"), **changes)
    return TimeModel(shape, rates, on_cpu=False).of(step, Workload((512, 512), 512, 2)).arithmetic


def test_dora_s_products_cost_their_time(config_only: Config) -> None:
    """One more in backward; with dropout W d forward, again, and twice in backward."""
    shape = shape_of(ModelSource(str(config_only(LLAMA))).config)
    adapted = 2 * (128 * 128 + 128 * 128)
    a_product, vectors = 2 * adapted * 1024 / 1e13, 8 * 2 * 256 * 1024 / 1e13
    without = _seconds(shape, dropout=0.0)
    assert _seconds(shape, dropout=0.0, use_dora=True) == pytest.approx(without + a_product + vectors)
    assert _seconds(shape, use_dora=True) == pytest.approx(without + 4 * a_product + vectors)


def _command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr("sys.argv", ["lowvram", *map(str, args)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_classic_example_through_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """facebook/opt-1.3b from the shipped table, r=4, alpha 16, q_proj and v_proj, dropout 0.05."""
    classic = ("--rank", 4, "--alpha", 16, "--targets", "q_proj,v_proj", "--dropout", 0.05)
    common = ("plan", "--model", "facebook/opt-1.3b", "--vram", "8GB", *classic, "--json")
    for more, n_trainable in (((), 786432), (("--bias", "lora_only", "--dora"), 786432 + 4 * 24 * 2048)):
        assert _command(monkeypatch, *common, *more) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["fits"]
        assert shown["plan"]["n_trainable"] == n_trainable
        assert (shown["plan"]["alpha"], shown["plan"]["dropout"]) == (16, 0.05)
        assert shown["plan"]["target_modules"] == ["q_proj", "v_proj"]


def test_auto_refuses_to_train_in_inference_mode(
    config_only: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "hello"}\n')
    asked = ("auto", "--model", config_only(LLAMA), "--data", data, "--inference-mode")
    assert _command(monkeypatch, *asked, "--output", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "nothing to train" in told
    assert "--inference-mode" in told
    assert not (tmp_path / "run").exists()
