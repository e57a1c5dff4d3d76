"""LoRA+'s two rates and what decays, against peft's own optimizer; and the trace of these settings' steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel, Qwen2Config, get_scheduler

from lowvram.engine.adapter_start import adapter_parameters
from lowvram.engine.adapters import LoraLinear, add_adapters, trainable
from lowvram.engine.batch import collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import load
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.shape import shape_of
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, train_step
from lowvram.memory.estimate import estimate, peak_of, trace_all_layers
from lowvram.memory.layers import blocks_of
from lowvram.memory.profiled import executed_step_bytes, profiled_peak_bytes
from lowvram.memory.run import trace_step
from lowvram.training import checkpoint
from tests.test_memory import ALL, WEIGHTS, _batch
from tests.tiny import examples
from tests.tiny_models import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

BIASED = {"bias": "all", "use_dora": True}


def _adapted(step: StepConfig) -> Any:
    torch.manual_seed(0)
    model = add_adapters(MODELS["opt"](), step).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def _step(**changes: Any) -> StepConfig:
    fixed: dict[str, Any] = {"base_precision": "fp32", "compute_dtype": "fp32", "dropout": 0.0}
    return StepConfig(**{**fixed, **changes})


@pytest.mark.parametrize("settings", [{}, {"bias": "lora_only"}, BIASED])
def test_one_step_equals_peft_s_lora_plus(settings: dict[str, Any]) -> None:
    """Every parameter: A at the rate, B at 16 times the rate, and vectors as peft and LoRA+'s authors do."""
    step = _step(lora_plus_ratio=16, **settings)
    ours = _adapted(step)
    theirs = copy.deepcopy(ours)
    for name, parameter in trainable(theirs).items():
        parameter.grad = trainable(ours)[name].grad.clone()
    make_optimizer(trainable(ours), step, 1e-3).step()
    create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16).step()
    start = trainable(_adapted(step))
    for name, parameter in trainable(ours).items():
        torch.testing.assert_close(parameter, trainable(theirs)[name], rtol=1e-6, atol=1e-8, msg=name)
        moved = float((parameter - start[name]).abs().median())
        slow = ".lora_A." in name
        assert moved == pytest.approx(1e-3 if slow else 1.6e-2, rel=0.01), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_schedule_keeps_the_ratio_and_tells_the_plan_s_rate(optimizer: str) -> None:
    step = _step(lora_plus_ratio=16, optimizer=optimizer, **BIASED)
    made = make_optimizer(trainable(_adapted(step)), step, 1e-3)
    schedule = get_scheduler("cosine", made, 2, 10)
    for _ in range(5):
        made.step()
        schedule.step()
        slow, fast = schedule.get_last_lr()
        assert 0 < slow <= 1e-3
        assert fast == pytest.approx(16 * slow, rel=1e-12)


def test_only_matrices_decay() -> None:
    step = _step(weight_decay=0.1, lora_plus_ratio=4, **BIASED)
    model = _adapted(step)
    for parameter in trainable(model).values():
        assert parameter.grad is not None
        parameter.grad.zero_()
        nn.init.ones_(parameter)
    make_optimizer(trainable(model), step, 1e-2).step()
    for name, parameter in trainable(model).items():
        rate = 4e-2 if ".lora_B." in name else 1e-2
        expected = 1 - 0.1 * rate if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected), msg=name)


def test_plain_lora_is_one_group() -> None:
    """As before there were two rates: checkpoints of that time go on."""
    step = _step()
    assert len(make_optimizer(trainable(_adapted(step)), step, 1e-3).param_groups) == 1


SHAPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "qwen2": (
        Qwen2Config(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=200,
        ),
        ALL,
    ),
    "opt": (
        OPTConfig(
            hidden_size=128,
            ffn_dim=512,
            num_hidden_layers=3,
            num_attention_heads=8,
            vocab_size=200,
            word_embed_proj_dim=128,
            max_position_embeddings=512,
            dropout=0.0,
        ),
        ("q_proj", "v_proj", "fc1", "fc2"),
    ),
}
STEPS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora by tiles": {"use_dora": True, "levers": Levers(tile_tokens=64), "dropout": 0.0},
    "dora, all kept": {"use_dora": True, "levers": Levers(gradient_checkpointing=False), "dropout": 0.0},
    "bias all": {"bias": "all", "levers": Levers(tile_tokens=64)},
    "lora-fa": {"freeze_a": True, "levers": Levers(gradient_checkpointing=False)},
    "all": {"freeze_a": True, "use_dora": True, "bias": "all", "base_precision": "int8"},
}


def _source(config: Any, folder: Path) -> ModelSource:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return ModelSource(str(folder))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_trace_equals_the_executed_step(tmp_path: Path, name: str, kind: str) -> None:
    """Within 1 % of what the real step allocates on CPU, and never more than 0.5 % under it."""
    config, targets = SHAPES[kind]
    common: dict[str, Any] = {"seq_len": 256, "rank": 8, "target_modules": targets, "accumulation": 1}
    step = StepConfig(**{**common, "compute_dtype": "fp32", **STEPS[name]})
    source = _source(config, tmp_path)
    trace = trace_step(source.config, step, "cpu")
    held = sum(a.n_bytes for a in trace.allocations if a.component in WEIGHTS)
    model = add_adapters(load(source, step, "cpu"), step).train()
    measured = held + executed_step_bytes(model, step, lambda: [_batch(step)])
    predicted = peak_of(trace)[0]
    assert -0.005 < predicted / measured - 1 < 0.01, (predicted, measured)


def test_dora_takes_about_lora_s_memory_and_a_frozen_a_takes_less() -> None:
    """Traced at 3 layers of Qwen2-7B's widths, 2,048 tokens, all linear layers, all activations kept."""
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=3,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=1000,
    )
    levers = Levers(gradient_checkpointing=False)
    step = StepConfig(rank=16, target_modules=ALL, seq_len=2048, accumulation=1, levers=levers)
    lora, dora, frozen = (
        estimate(config, step.model_copy(update=changes)).peak_allocated_bytes
        for changes in ({}, {"use_dora": True}, {"freeze_a": True})
    )
    inputs = 2 * 2048 * (3 * 3584 + 18944)  # of o, gate and up (one), down and q, k, v (one), at least
    assert lora < dora < 1.08 * lora
    assert frozen < lora - 2 * inputs


def test_dora_of_a_layer_takes_a_fraction_of_peft_s() -> None:
    """Forward and backward of 64 tokens through one layer of 1,024 x 4,096 over an fp32 base, profiled."""
    peaks = []
    for ours in (True, False):
        base = nn.Linear(1024, 4096, bias=False).requires_grad_(False)
        config = LoraConfig(r=8, use_dora=True, target_modules=["0"])
        if ours:
            config._register_custom_module({nn.Linear: LoraLinear})
        layer = get_peft_model(nn.Sequential(base), config)
        x = torch.randn(1, 64, 1024, requires_grad=True)
        peaks.append(profiled_peak_bytes(lambda x=x, layer=layer: layer(x).sum().backward()))
    weight = 4 * 1024 * 4096
    assert peaks[0] < 0.6 * weight < 2 * weight < peaks[1]


def test_inference_mode_prices_loading_and_a_forward_pass() -> None:
    config, targets = SHAPES["qwen2"]
    step = StepConfig(target_modules=targets, seq_len=256)
    used, trained = (
        estimate(config, step.model_copy(update={"inference_mode": mode})) for mode in (True, False)
    )
    assert set(used.phases_bytes) == {"load", "evaluation"}
    assert not {"gradients", "optimizer_state", "saved_activations"} & set(used.components_bytes)
    assert used.components_bytes["adapters"] == trained.components_bytes["adapters"]
    assert used.phases_bytes["evaluation"] <= trained.phases_bytes["evaluation"]
    assert used.peak_allocated_bytes < trained.peak_allocated_bytes
    assert shape_of(config).n_trainable(step.model_copy(update={"inference_mode": True})) == 0


class _Trainer:
    """A model and its optimizer; A is drawn from `seed`."""

    def __init__(self, step: StepConfig, seed: int) -> None:
        torch.manual_seed(0)
        base = MODELS["opt"]()
        torch.manual_seed(seed)
        self.model = add_adapters(base, step).train()
        self.loss_of = SummedLoss(self.model, step)
        self.optimizer = make_optimizer(trainable(self.model), step, 1e-2)

    def adapter(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in adapter_parameters(self.model).items()}

    def step(self) -> float:
        batch = collate(examples((40, 33), first_id=3), 1)
        return float(train_step(self.loss_of, self.optimizer, [batch], max_grad_norm=1.0).loss)


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    """Biases, magnitudes, two rates and a frozen A: a process that drew another A takes the same steps."""
    step = _step(target_modules=("q_proj", "fc1"), freeze_a=True, **BIASED)
    straight, resumed = _Trainer(step, seed=0), _Trainer(step, seed=9)
    for _ in range(2):
        straight.step()
    rest = {"epoch": 0, "step_in_epoch": 2, "plan_sha256": "", "scheduler": {}, "rng": {}, "extra": {}}
    state = checkpoint.CheckpointState(
        step=2, adapter=straight.adapter(), optimizer=straight.optimizer.state_dict(), **rest
    )
    loaded = checkpoint.load(checkpoint.save(tmp_path, state))
    with torch.no_grad():
        for name, parameter in adapter_parameters(resumed.model).items():
            parameter.copy_(loaded.adapter[name])
    resumed.optimizer.load_state_dict(loaded.optimizer)
    losses = [(straight.step(), resumed.step()) for _ in range(3)]
    assert all(mine == other for mine, other in losses)
    assert losses[0][0] > losses[-1][0]


def test_a_few_layers_trace_stands_for_all() -> None:
    """The search's short cut: DoRA and all biases, the last norm's among them, over nine layers."""
    config = copy.deepcopy(SHAPES["opt"][0])
    config.num_hidden_layers = 9
    step = StepConfig(target_modules=("q_proj", "fc1"), seq_len=128, **BIASED)
    assert blocks_of(config) is not None
    short, whole = trace_all_layers(config, step, "cuda"), trace_step(config, step, "cuda")
    assert peak_of(short)[0] == peak_of(whole)[0]
    sizes = [[a.n_bytes for a in t.allocations if a.phase != "clip"] for t in (short, whole)]
    assert sizes[0] == sizes[1]  # of clipping's norms, 512 bytes each, a few are left out
