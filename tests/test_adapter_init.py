"""Adapters that do not start at zero: step 0, training, export, resume; and the methods that peft has too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import initialize_lora_eva_weights
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lowvram.engine.adapter_init import Means, initialise
from lowvram.engine.adapter_start import adapter_state, factors_of, lora_layers, start_of
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import collate
from lowvram.engine.config import DIFFERENCE_INITS, StepConfig
from lowvram.engine.eva_init import Directions
from lowvram.engine.host import Host
from lowvram.engine.model import load
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, train_step
from lowvram.engine.weight_init import OriginalWeights, weight_of
from lowvram.export.adapter_files import read_adapter
from lowvram.memory.estimate import estimate
from lowvram.training import checkpoint, finish
from tests.tiny import SHAPE, examples
from tests.tiny_models import MODELS, TARGETS, exact_norms, exact_step

pytestmark = pytest.mark.usefixtures("one_thread")
NOT_AT_ZERO = (*DIFFERENCE_INITS, "lora_one", "loftq")
IDS = torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(4))


def _means(model: Any, **changes: Any) -> Means:
    device = next(model.parameters()).device
    return Means(**{"host": Host(device), "seed": 3, "original": lambda _: torch.empty(0), **changes})


def _initialised(base: Any, step: StepConfig, dtype: torch.dtype, **changes: Any) -> Any:
    torch.manual_seed(1)
    model = add_adapters(base, step).train()
    model = model.double() if dtype == torch.float64 else model
    batch = collate(examples((21, 9, 17), first_id=1), 0)
    initialise(model, SummedLoss(model, step), step, [batch], _means(model, **changes))
    return model


def _double(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    return exact_norms(MODELS[kind]().double())


def _folder(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=dtype).save_pretrained(tmp_path)
    return tmp_path


def _trained(model: Any, step: StepConfig, n_steps: int = 3) -> None:
    """A few steps with a learning rate that moves every factor visibly."""
    loss_of = SummedLoss(model, step)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for seed in range(n_steps):
        batches = [collate(examples((15, 11), seed, first_id=1), 0)]
        train_step(loss_of, optimizer, batches, max_grad_norm=1.0)


@pytest.mark.parametrize("init", DIFFERENCE_INITS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_step_0_is_the_base_to_the_last_bit_in_float64(init: str, kind: str, dropout: float) -> None:
    base = _double(kind)
    with torch.no_grad():
        expected = copy.deepcopy(base).eval()(input_ids=IDS).logits
    step = exact_step(kind, init=init, dropout=dropout)
    model = _initialised(base, step, torch.float64)
    assert all(float(f.abs().max()) > 1e-3 for m in lora_layers(model).values() for f in factors_of(m))
    found = model(input_ids=IDS).logits  # training: with dropout
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", DIFFERENCE_INITS)
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_step_0_is_the_base_to_the_last_bit_in_bf16(init: str, precision: Any, tmp_path: Path) -> None:
    """B A and B0 A0 themselves are 100 times what a bit of bf16 is worth; dropout is on."""
    source = ModelSource(str(_folder(tmp_path)))
    step = StepConfig(init=init, rank=3, base_precision=precision, target_modules=TARGETS_OF_LLAMA)
    base = load(source, step, "cpu")
    with torch.no_grad():
        expected = copy.deepcopy(base).train()(input_ids=IDS).logits
    model = _initialised(base, step, torch.bfloat16)
    assert {f.dtype for m in lora_layers(model).values() for f in start_of(m) if f is not None} == {
        torch.bfloat16
    }
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)
    without = copy.deepcopy(model)
    for layer in lora_layers(without).values():
        for start in start_of(layer):
            assert start is not None
            start.zero_()
    assert float((without(input_ids=IDS).logits - expected).abs().max()) > 0.05


TARGETS_OF_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_a_short_step_from_a_large_start_is_not_rounded_away() -> None:
    """In bf16 [A; A0] and [B, -B0] would lose an update of a thousandth: a bit is worth a 256th."""
    step = StepConfig(init="olora", rank=3, dropout=0.0, base_precision="bf16", target_modules=("q_proj",))
    base = _double().to(torch.bfloat16)
    model = _initialised(base, step, torch.bfloat16)
    layer = next(iter(lora_layers(model).values()))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        factors_of(layer)[1].mul_(1.001)
        found = (layer(x) - layer.base_layer(x)).double()
        a, b = (factor.double() for factor in factors_of(layer))
        a0, b0 = (start.double() for start in start_of(layer) if start is not None)
        exact = x.double() @ (b @ a - b0 @ a0).t() * step.scaling
    layer.base_layer.weight.zero_()
    with torch.no_grad():
        found = layer(x).double()
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("freeze_a", [False, True])
def test_gradients_are_those_of_the_formula(freeze_a: bool) -> None:
    """Of A, B and x in float64, against autograd of W x + s (B A - B0 A0) x written out."""
    step = exact_step("llama", init="pissa", freeze_a=freeze_a)
    model = _initialised(_double(), step, torch.float64)
    _trained(model, step)
    layer = next(iter(lora_layers(model).values()))
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    a, b = factors_of(layer)
    a0, b0 = (start for start in start_of(layer) if start is not None)
    weight = torch.linspace(-1, 1, 2 * 5 * 32, dtype=torch.float64).view(2, 5, 32)
    written = layer.base_layer(x) + step.scaling * (x @ a.t() @ b.t() - x @ a0.t() @ b0.t())
    wanted = (x, b) if freeze_a else (x, b, a)
    expected = torch.autograd.grad((written * weight).sum(), wanted)
    found = torch.autograd.grad((layer(x) * weight).sum(), wanted)
    for one, true in zip(found, expected, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("init", NOT_AT_ZERO)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_saved_adapter_in_plain_peft_equals_the_trained_model(
    init: str, use_rslora: bool, tmp_path: Path
) -> None:
    source = ModelSource(str(_folder(tmp_path / "base", torch.float32)))
    step = StepConfig(
        init=init,
        rank=3,
        alpha=5,
        use_rslora=use_rslora,
        base_precision="nf4",
        compute_dtype="fp32",
        target_modules=TARGETS_OF_LLAMA,
        dropout=0.0,
    )
    base = load(source, step, "cpu")
    plain = copy.deepcopy(base)
    model = _initialised(base, step, torch.float32, original=OriginalWeights(source))
    _trained(model, step)
    run: Any = SimpleNamespace(
        model=model,
        source=SimpleNamespace(tokenizer=SimpleNamespace(save_pretrained=lambda _: None)),
        folder=SimpleNamespace(path=tmp_path, adapter=tmp_path / "adapter"),
    )
    assert finish.save_adapter(run) > 0
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == (6 if init in DIFFERENCE_INITS else 3)
    assert model.peft_config["default"].r == 3
    model.eval()
    with torch.no_grad():
        base_says = plain(input_ids=IDS).logits
        expected = model(input_ids=IDS).logits
        found = PeftModel.from_pretrained(plain, tmp_path / "adapter")(input_ids=IDS).logits
    assert float((expected - base_says).abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    layer = next(iter(lora_layers(model).values()))
    update = read_adapter(tmp_path / "adapter").modules["model.layers.0.self_attn.q_proj"]
    assert update.a is not None
    assert update.b is not None
    a, b = factors_of(layer)
    a0, b0 = start_of(layer)
    change = b @ a if a0 is None or b0 is None else b @ a - b0 @ a0
    torch.testing.assert_close(
        update.scaling * update.b.whole() @ update.a.whole(),
        (step.scaling * change).detach(),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_checkpoint_holds_the_start_bit_for_bit(tmp_path: Path) -> None:
    source = ModelSource(str(_folder(tmp_path / "base")))
    step = StepConfig(init="lora_ga", rank=3, target_modules=("q_proj", "v_proj"))
    model = _initialised(load(source, step, "cpu"), step, torch.bfloat16)
    _trained(model, step, 1)
    state = adapter_state(model)
    assert len(state) == 4 * len(lora_layers(model))
    rest = {"step": 1, "epoch": 0, "step_in_epoch": 1, "plan_sha256": "", "optimizer": {}, "scheduler": {}}
    saved = checkpoint.CheckpointState(
        adapter={n: t.detach() for n, t in state.items()}, rng={}, extra={}, **rest
    )
    read = checkpoint.load(checkpoint.save(tmp_path / "checkpoints", saved)).adapter
    fresh = adapter_state(add_adapters(load(source, step, "cpu"), step))
    assert read.keys() == fresh.keys()
    for name, tensor in state.items():
        assert read[name].dtype == fresh[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert float(tensor.abs().max()) > 0


@pytest.mark.parametrize(("init", "kind"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_pissa_and_olora_are_peft_s(init: str, kind: str) -> None:
    """The same B A. GPT-2's weights lie the other way, which peft 0.21's OLoRA does not know."""
    base, step = _double(kind).float(), exact_step(kind, init=init)
    config = LoraConfig(
        r=step.rank,
        lora_alpha=step.alpha,
        target_modules=list(step.target_modules),
        init_lora_weights=init,
        fan_in_fan_out=kind == "gpt2",
    )
    theirs: Any = get_peft_model(copy.deepcopy(base), config)
    model = _initialised(base, step, torch.float32)
    for name, layer in lora_layers(model).items():
        a, b = factors_of(layer)
        other = theirs.get_submodule(name)
        true = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(b @ a, true, rtol=0, atol=2e-2 * float(true.abs().max()))
        if init == "olora":
            torch.testing.assert_close(a, other.lora_A["default"].weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b, other.lora_B["default"].weight, rtol=1e-4, atol=1e-5)


def test_loftq_repairs_what_peft_s_does(tmp_path: Path) -> None:
    """Against the exact decomposition of peft's replace_lora_weights_loftq, which itself needs a GPU."""
    source = ModelSource(str(_folder(tmp_path)))
    step = StepConfig(init="loftq", rank=4, alpha=12, target_modules=TARGETS_OF_LLAMA)
    original = OriginalWeights(source)
    model = _initialised(load(source, step, "cpu"), step, torch.bfloat16, original=original)
    for name, layer in lora_layers(model).items():
        lost = original(name).float() - weight_of(layer.base_layer).float()
        found = _low_rank_decomposition(lost, reduced_rank=4)
        a, b = factors_of(layer)
        exact = (lost - found["L"] @ found["R"]).norm()
        assert float((lost - step.scaling * b @ a).norm()) < 1.01 * float(exact) < 0.95 * float(lost.norm())


def test_eva_finds_peft_s_directions() -> None:
    """One batch in which every token is trained, so that both look at the same rows."""
    base, step = _double().float(), exact_step("llama", init="eva", rank=2)
    ids = IDS[:, :12]
    config = LoraConfig(r=2, target_modules=list(step.target_modules), init_lora_weights="eva")
    config.eva_config.rho = 1.0
    theirs: Any = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=False)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    initialize_lora_eva_weights(theirs, [batch] * 4, show_progress_bar=False)
    model = add_adapters(base, step).train()
    rows = SimpleNamespace(
        tensors=(ids, torch.arange(ids.numel()), ids.flatten(), None, None), lengths=None, trained_tokens=24
    )
    rows.to = lambda _: SimpleNamespace(positions=rows.tensors[1], tensors=rows.tensors, lengths=None)
    means = _means(model, seed=42)  # peft's
    initialise(model, SummedLoss(model, step), step, [rows] * 4, means)  # type: ignore[list-item]
    for name, layer in lora_layers(model).items():
        a, b = factors_of(layer)
        true = theirs.get_submodule(name).lora_A["default"].weight
        assert not b.any()
        torch.testing.assert_close(a @ a.t(), torch.eye(2), rtol=0, atol=1e-5)
        assert float((a * true).sum(dim=1).min()) > 0.98, name


def test_eva_goes_with_dora() -> None:
    """A is EVA's, B is zero, and the magnitudes are those of the base: step 0 is the base."""
    base = _double()
    with torch.no_grad():
        expected = copy.deepcopy(base).eval()(input_ids=IDS).logits
    models = [
        _initialised(copy.deepcopy(base), exact_step("llama", init="eva", use_dora=dora), torch.float64)
        for dora in (False, True)
    ]
    torch.testing.assert_close(models[1].eval()(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    for plain, dora in zip(*(lora_layers(model).values() for model in models), strict=True):
        torch.testing.assert_close(factors_of(dora)[0], factors_of(plain)[0], rtol=1e-6, atol=1e-9)


def test_directions_from_batches_are_those_of_all_rows() -> None:
    """Rows whose mean moves from batch to batch, against one exact decomposition of all less their mean."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(1, -1, 12, dtype=torch.float64)
    parts = [torch.randn(40, 12, generator=generator, dtype=torch.float64) * sizes + i for i in range(5)]
    found = Directions(8, 0)
    for part in (*parts, parts[0][:3]):  # the last is too small
        found.update(part)
    rows = torch.cat(parts)
    true = torch.linalg.svd(rows - rows.mean(dim=0))[2][:3]
    directions = found.found()
    assert directions is not None
    assert float((directions[:3] * true).sum(dim=1).abs().min()) > 0.999


def test_the_trace_prices_what_is_subtracted() -> None:
    """A0 and B0 in bf16: half of what A and B take in float32."""
    step = StepConfig(rank=4, target_modules=TARGETS_OF_LLAMA, seq_len=64)
    config = LlamaConfig(**SHAPE)
    adapters = [
        estimate(config, step.model_copy(update={"init": init}), "cpu").components_bytes["adapters"]
        for init in ("default", "pissa")
    ]
    assert adapters[1] == pytest.approx(1.5 * adapters[0], rel=0.05)


def test_what_is_not_initialised_stays_as_it_is() -> None:
    model = add_adapters(_double(), exact_step("llama"))
    before = {n: t.clone() for n, t in adapter_state(model).items()}
    assert start_of(next(iter(lora_layers(model).values()))) == (None, None)
    step = exact_step("llama")
    initialise(model, nn.Identity(), step, [], _means(model))
    assert all(torch.equal(t, before[n]) for n, t in adapter_state(model).items())
    assert TARGETS["gpt2"] == exact_step("gpt2").target_modules
