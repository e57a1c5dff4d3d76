"""The LoRA function against peft's own formula, in value, gradients, dropout and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lowvram.engine import lora
from lowvram.engine.adapters import LoraLinear
from lowvram.engine.lora import dropped_places, lora_linear
from tests.same_dropout import SameDropout

CPU_STATE_BYTES = 5056
RESULTS = ("y", "dx", "dA", "dB")


@pytest.fixture(params=[False, True], ids=["keeps the places", "draws a mask again"])
def redraws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU's way and a GPU's, both with the CPU's generator."""
    monkeypatch.setattr(lora, "_redraws", lambda _device, _dropout: request.param)
    return bool(request.param)


def _layer(base: nn.Module, r: int, *, p: float = 0.0, use_rslora: bool = False) -> Any:
    """Our layer over `base`, in training mode, with a B that is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=7, lora_dropout=p, use_rslora=use_rslora, target_modules=["0"])
    config.fan_in_fan_out = isinstance(base, Conv1D)
    config._register_custom_module({nn.Linear: LoraLinear, Conv1D: LoraLinear})
    layer: Any = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    assert type(layer) is LoraLinear
    dtype = next(base.parameters()).dtype
    for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        nn.init.normal_(weight, std=0.5)
        weight.data = weight.data.double() if dtype == torch.float64 else weight.data.float()
    return layer.train()


def _results(layer: Any, x: torch.Tensor, run: Any) -> dict[str, torch.Tensor | None]:
    """y and every gradient of sum(y * fixed numbers), dropout from one fixed seed."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    layer.zero_grad()
    torch.manual_seed(5)
    y = run(x)
    torch.manual_seed(77)  # what happens between forward and backward must not matter
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return dict(zip(RESULTS, (y.detach(), x.grad, a.grad, b.grad), strict=True))


def _peft(layer: Any) -> Any:
    """peft's own forward, with the same elements dropped."""

    def run(x: torch.Tensor) -> torch.Tensor:
        own = layer.lora_dropout["default"]
        if isinstance(own, nn.Dropout) and not lora._redraws(x.device, own):
            layer.lora_dropout["default"] = SameDropout(own.p)
        y: torch.Tensor = super(LoraLinear, layer).forward(x)
        layer.lora_dropout["default"] = own
        return y

    return run


def _input(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def _assert_equal(ours: dict[str, Any], reference: dict[str, Any], rel: float) -> None:
    """Largest difference over the largest value; 0 instead of the reference would be 1."""
    for name in RESULTS:
        if reference[name] is None:
            assert ours[name] is None
            continue
        scale = float(reference[name].abs().max())
        assert scale > 0.01
        assert float((ours[name].double() - reference[name].double()).abs().max()) <= rel * scale, name


def _bases() -> dict[str, nn.Module]:
    return {
        "linear": nn.Linear(24, 40, bias=False),
        "biased": nn.Linear(24, 40),
        "conv1d": Conv1D(40, 24),
    }


@pytest.mark.usefixtures("redraws")
@pytest.mark.parametrize("kind", _bases())
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_peft_in_float64(kind: str, p: float, use_rslora: bool) -> None:
    layer = _layer(_bases()[kind].double(), 4, p=p, use_rslora=use_rslora)
    x = _input(2, 9, 24)
    _assert_equal(_results(layer, x, layer), _results(layer, x, _peft(layer)), 1e-12)


@pytest.mark.parametrize(
    ("shape", "out", "r"), [((1, 1, 1), 1, 1), ((5, 7), 3, 2), ((2, 1, 3, 17), 13, 11), ((3,), 5, 4)]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_odd_shapes(shape: tuple[int, ...], out: int, r: int, p: float) -> None:
    """One token of one number, two and four dimensions, no batch, a rank above the width."""
    layer = _layer(nn.Linear(shape[-1], out).double(), r, p=p)
    x = _input(*shape)
    _assert_equal(_results(layer, x, layer), _results(layer, x, _peft(layer)), 1e-12)


@pytest.mark.usefixtures("redraws")
def test_input_that_is_not_contiguous() -> None:
    layer = _layer(nn.Linear(24, 40, bias=False).double(), 4, p=0.3)
    turned = _input(24, 9).detach().t().requires_grad_()  # rows of a transposed matrix
    assert not turned.is_contiguous()
    _assert_equal(_results(layer, turned, layer), _results(layer, turned, _peft(layer)), 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_input_without_gradient(p: float) -> None:
    """The first layer over a frozen embedding."""
    layer = _layer(nn.Linear(24, 40, bias=False).double(), 4, p=p)
    x = _input(2, 9, 24).detach()
    ours = _results(layer, x, layer)
    assert ours["dx"] is None
    _assert_equal(ours, _results(layer, x, _peft(layer)), 1e-12)


@pytest.mark.usefixtures("redraws")
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_weight_gets_no_gradient(frozen: str) -> None:
    layer = _layer(nn.Linear(24, 40, bias=False).double(), 4, p=0.3)
    getattr(layer, frozen)["default"].weight.requires_grad_(False)
    x = _input(2, 9, 24)
    ours = _results(layer, x, layer)
    assert ours["dA" if frozen == "lora_A" else "dB"] is None
    _assert_equal(ours, _results(layer, x, _peft(layer)), 1e-12)


def test_two_adapters_add_up() -> None:
    layer = _layer(nn.Linear(24, 40, bias=False).double(), 4)
    layer.update_layer("second", 3, 5, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False))
    layer.double().set_adapter(["default", "second"])
    x = _input(2, 9, 24)
    _assert_equal(_results(layer, x, layer), _results(layer, x, _peft(layer)), 1e-12)


@pytest.mark.usefixtures("redraws")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_recompute_draws_the_same_mask(p: float) -> None:
    layer = _layer(nn.Linear(24, 40, bias=False).double(), 4, p=p)
    x = _input(2, 9, 24)
    recomputed = _results(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    _assert_equal(recomputed, _results(layer, x, layer), 0.0)


@pytest.mark.usefixtures("redraws")
def test_backward_leaves_the_generator_as_it_was() -> None:
    """Else a run would differ from one that keeps its masks."""
    layer = _layer(nn.Linear(24, 40).double(), 4, p=0.3)
    y = layer(_input(2, 9, 24)).sum()
    before = torch.get_rng_state()
    y.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_keeps_what_it_should() -> None:
    """Through A = B = 1 the output tells what was dropped: 30 % within 5 sigma, the rest over 0.7.

    Neighbours are dropped independently: both in 9 % of all pairs.
    """
    layer = _layer(nn.Linear(1, 1, bias=False).double(), 1, p=0.3)
    layer.base_layer.weight.data.zero_()
    layer.lora_A["default"].weight.data.fill_(1.0)
    layer.lora_B["default"].weight.data.fill_(1 / layer.scaling["default"])
    y = layer(torch.ones(20000, 1, dtype=torch.float64))
    assert {round(v, 12) for v in y.flatten().tolist()} == {0.0, round(1 / 0.7, 12)}
    gone = (y == 0).double()
    assert abs(float(gone.mean()) - 0.3) < 5 * (0.3 * 0.7 / 20000) ** 0.5
    for distance in (1, 2, 7):
        pairs = float((gone[distance:] * gone[:-distance]).mean())
        assert abs(pairs - 0.09) < 5 * (0.09 * 0.91 / 20000) ** 0.5 * 2**0.5
    assert bool((layer.eval()(torch.ones(99, 1, dtype=torch.float64)) == 1).all())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bf16_is_near_float64(p: float) -> None:
    """2 % of the largest value: bf16 has 8 bits, 0.4 %, and five roundings follow one another."""
    exact = _layer(nn.Linear(96, 80).double(), 8, p=p)
    layer = _layer(nn.Linear(96, 80).bfloat16(), 8, p=p)
    layer.base_layer.load_state_dict(exact.base_layer.state_dict())
    x = _input(2, 33, 96, dtype=torch.bfloat16)
    exact.base_layer.load_state_dict(layer.base_layer.state_dict())  # what bf16 made of them
    for part in ("lora_A", "lora_B"):
        getattr(exact, part).load_state_dict(getattr(layer, part).state_dict())
    reference = _results(exact, x.detach().double().requires_grad_(), _peft(exact))
    ours = _results(layer, x, layer)
    _assert_equal(ours, reference, 0.02)
    assert (ours["y"].dtype, ours["dx"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert (ours["dA"].dtype, ours["dB"].dtype) == (torch.float32, torch.float32)


def _saved_bytes(run: Any, known: list[torch.Tensor]) -> int:
    """Bytes of all storages that `run` keeps for backward, beyond those of `known`."""
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_its_input_and_what_it_dropped(p: float, dtype: torch.dtype, redraws: bool) -> None:
    """No copy of x, no x A^T, no cast weight; peft's own layer keeps them."""
    layer = _layer(nn.Linear(96, 80, bias=False).to(dtype), 8, p=p)
    x = _input(2, 64, 96, dtype=dtype)
    known = [x, *layer.parameters()]
    torch.manual_seed(5)
    ours = _saved_bytes(lambda: lora_linear(layer, x), known)
    torch.manual_seed(5)
    dropout_bytes = CPU_STATE_BYTES if redraws else dropped_places(x.numel(), p or 0.5, x.device).nbytes
    assert ours == (dropout_bytes if p else 0)
    assert _saved_bytes(lambda: _peft(layer)(x), known) > ours + 2 * 64 * 8


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("n_elements", [1, 7, 100_000])
def test_places_are_among_the_elements_and_as_many_as_they_should_be(p: float, n_elements: int) -> None:
    torch.manual_seed(1)
    places = dropped_places(n_elements, p, torch.device("cpu"))
    assert bool((places.diff() > 0).all())
    assert not len(places) or (int(places[0]) >= 0 and int(places[-1]) < n_elements)
    sigma = (n_elements * p * (1 - p)) ** 0.5
    assert abs(len(places) - n_elements * p) <= 5 * sigma + 1
    assert dropped_places(n_elements, p, torch.device("meta")).numel() == round(n_elements * p)
    if n_elements > 7:  # the last stretch is reached as often as the first
        assert abs(int((places >= n_elements // 2).sum()) - n_elements * p / 2) <= 5 * sigma


def test_runs_on_float32_from_a_16_bit_base() -> None:
    """fp16's autocast: LayerNorm hands float32 to a linear layer that answers in 16 bits."""
    layer = _layer(nn.Linear(96, 80).bfloat16(), 8, p=0.3)
    x = _input(2, 33, 96, dtype=torch.float32)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    ours, plain = _results(layer, x, run), _results(layer, x.detach().bfloat16().requires_grad_(), layer)
    assert (ours["y"].dtype, ours["dx"].dtype) == (torch.bfloat16, torch.float32)
    _assert_equal(ours, plain, 0.02)
