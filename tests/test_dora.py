"""DoRA without a dequantised weight, against peft's own over the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lowvram.engine import lora
from lowvram.engine.adapters import LoraLinear, LoraLinear4bit
from lowvram.engine.dora import Dora, row_norms, start_magnitudes
from lowvram.engine.int8 import Int8Linear
from lowvram.engine.nf4 import fill_nf4, nf4_linear, nf4_values
from tests.same_dropout import SameDropout

RESULTS = ("y", "dx", "dA", "dB", "dm")
N_IN, N_OUT, RANK = 300, 40, 4  # more inputs than are read at one time


@pytest.fixture(params=[False, True], ids=["keeps the places", "draws a mask again"])
def redraws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(lora, "_redraws", lambda _device, _dropout: request.param)
    return bool(request.param)


def _wrapped(base: nn.Module, p: float, ours: bool) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=7, lora_dropout=p, use_dora=True, target_modules=["0"])
    config.fan_in_fan_out = isinstance(base, Conv1D)
    if ours:
        import bitsandbytes as bnb

        kinds = {bnb.nn.Linear4bit: LoraLinear4bit, nn.Linear: LoraLinear, Conv1D: LoraLinear}
        config._register_custom_module(kinds)
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]


def _pair(base: nn.Module, p: float = 0.0, reference_base: nn.Module | None = None) -> tuple[Any, Any]:
    """Our layer and peft's, of the same factors and magnitudes, none of them at its start."""
    torch.manual_seed(0)
    ours = _wrapped(copy.deepcopy(base), p, ours=True)
    peft = _wrapped(copy.deepcopy(base) if reference_base is None else reference_base, p, ours=False)
    assert type(ours.lora_variant["default"]) is Dora
    start_magnitudes(nn.Sequential(ours))
    exact = next(peft.base_layer.parameters()).dtype == torch.float64
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        own = getattr(ours, part)["default"].weight
        if part != "lora_magnitude_vector":
            nn.init.normal_(own, std=0.05)
        else:
            own.data *= torch.linspace(0.7, 1.4, own.numel())
        if not exact:
            own.data = own.data.float()
        getattr(peft, part)["default"].weight.data = own.data.clone()
    return ours.train(), peft.train()


def _results(layer: Any, x: torch.Tensor, run: Any = None) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(5)
    y = (run or layer)(x)
    torch.manual_seed(77)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    weights = [
        getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    ]
    return dict(zip(RESULTS, (y.detach(), x.grad, *(w.grad for w in weights)), strict=True))


def _assert_equal(ours: dict[str, Any], reference: dict[str, Any], rel: float) -> None:
    """Largest difference over the largest value; 0 instead of the reference would be 1."""
    for name in RESULTS:
        scale = float(reference[name].abs().max())
        assert scale > 0.01, name
        assert float((ours[name].double() - reference[name].double()).abs().max()) <= rel * scale, name


def _input(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 9, N_IN, generator=generator, dtype=torch.float64).to(dtype)


BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(N_IN, N_OUT, bias=False),
    "biased": lambda: nn.Linear(N_IN, N_OUT),
    "conv1d": lambda: Conv1D(N_OUT, N_IN),
}


@pytest.mark.usefixtures("redraws", "one_thread")
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_peft_in_float64(kind: str, p: float, redraws: bool) -> None:
    torch.manual_seed(1)
    ours, peft = _pair(BASES[kind]().double(), p)
    if p and not redraws:
        peft.lora_dropout["default"] = SameDropout(p)
    _assert_equal(_results(ours, _input()), _results(peft, _input()), 1e-9)
    _assert_equal(_results(ours.eval(), _input()), _results(peft.eval(), _input()), 1e-9)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_recomputing_changes_nothing(p: float) -> None:
    torch.manual_seed(1)
    ours, _ = _pair(nn.Linear(N_IN, N_OUT).double(), p)
    again = _results(ours, _input(), lambda x: checkpoint(ours, x, use_reentrant=False))
    _assert_equal(again, _results(ours, _input()), 0.0)


def _quantized(kind: str) -> tuple[Any, nn.Linear]:
    """A layer in few bits, and a plain one of its values, in float32."""
    torch.manual_seed(1)
    source, plain = nn.Linear(N_IN + 20, N_OUT), nn.Linear(N_IN + 20, N_OUT)
    if kind == "int8":
        quantized: Any = Int8Linear(N_IN + 20, N_OUT, bias=True, compute_dtype=torch.float32)
        quantized.fill(source.weight.data)
        values = quantized.values()
    else:
        quantized = nf4_linear(
            N_IN + 20, N_OUT, bias=True, compute_dtype=torch.float32, double_quantization=True
        )
        fill_nf4(quantized, source.weight.data)
        values = nf4_values(quantized)
    quantized.bias = nn.Parameter(source.bias.data.clone(), requires_grad=False)
    plain.weight.data, plain.bias.data = values.clone(), source.bias.data.clone()
    return quantized, plain.requires_grad_(False)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_quantised_base_equals_peft_on_its_values(kind: str, p: float) -> None:
    """float32: 1e-5 of the largest value."""
    quantized, plain = _quantized(kind)
    ours, peft = _pair(quantized, p, plain)
    if p:
        peft.lora_dropout["default"] = SameDropout(p)
    x = torch.randn(2, 9, N_IN + 20)
    _assert_equal(_results(ours, x), _results(peft, x), 1e-5)


def test_a_quantised_base_starts_as_peft_starts_it() -> None:
    quantized, plain = _quantized("nf4")
    ours = _wrapped(quantized, 0.0, ours=True)
    start_magnitudes(nn.Sequential(ours))
    started = ours.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(started, torch.linalg.norm(plain.weight, dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(row_norms(ours, "default"), started, rtol=0, atol=0)  # B is 0


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bf16_is_near_float64(p: float) -> None:
    """3 % of the largest value: half a dozen roundings to 8 bits follow one another."""
    torch.manual_seed(1)
    base = nn.Linear(N_IN, N_OUT).bfloat16()
    exact = copy.deepcopy(base).double()
    ours, peft = _pair(base, p, exact)
    peft = peft.double()
    if p:
        peft.lora_dropout["default"] = SameDropout(p)
    x = _input(torch.bfloat16)
    results = _results(ours, x)
    _assert_equal(results, _results(peft, x.double()), 0.03)
    assert results["dm"].dtype == torch.float32


def test_a_small_change_of_a_magnitude_is_felt_in_bf16() -> None:
    """Rows 0.3 % longer: the bf16 nearest to such a gain is 1, so g - 1 is what is rounded."""
    torch.manual_seed(1)
    ours, _ = _pair(nn.Linear(N_IN, N_OUT, bias=False).bfloat16())
    start_magnitudes(nn.Sequential(ours))
    x = torch.randn(2000, N_IN).bfloat16()
    before = ours(x).detach().double()
    ours.lora_magnitude_vector["default"].weight.data *= 1.003
    slope = float((ours(x).detach().double() * before).sum() / before.square().sum())
    assert 1.0027 < slope < 1.0033
