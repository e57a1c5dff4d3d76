"""Gradients of frozen weights against autograd's own; LoRA-GA and LoRA-One from them; their memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lowvram.data.tokens import Example
from lowvram.engine.adapter_init import Means, initialise
from lowvram.engine.adapter_start import factors_of, lora_layers
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.attention import register
from lowvram.engine.batch import Batch, collate, collate_packed
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.gradient_init import groups_within, summed_gradients, weight_gradient
from lowvram.engine.host import Host
from lowvram.engine.int8 import Int8Linear
from lowvram.engine.linears import in_out_features, replace_linears
from lowvram.engine.model import attention_for, load
from lowvram.engine.nf4 import fill_nf4, nf4_linear, nf4_values
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss
from lowvram.engine.weight_init import weight_of
from lowvram.errors import ConfigError
from lowvram.memory.estimate import estimate_of, peak_of
from lowvram.memory.layers import blocks_of, extend, with_layers
from lowvram.memory.profiled import profiled_peak_bytes
from lowvram.memory.run import trace_step
from tests.test_memory import _batch, _outcome
from tests.tiny import SHAPE, examples, plain_loss
from tests.tiny_models import MODELS, exact_norms, exact_step

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "all recomputed": {},
    "nothing recomputed": {"levers": Levers(gradient_checkpointing=False, loss_chunk_tokens=16)},
    "tiles": {"levers": Levers(tile_tokens=7, offload_checkpoints=True)},
    "packed": {"packing": True},
}
CPU_STATE_BYTES = 5056
RESIDENT = {"base_weights", "embeddings", "head", "adapters"}


def _base(kind: str, precision: str) -> Any:
    """A tiny model that multiplies in float64, whatever its weights are held in."""
    torch.manual_seed(0)
    model = exact_norms(MODELS[kind]().double())
    register()
    model.set_attn_implementation(attention_for(model))
    if precision == "nf4":
        replace_linears(model, _nf4)
    elif precision == "int8":
        replace_linears(model, _int8)
    return model


def _nf4(linear: nn.Linear, dtype: torch.dtype = torch.float64) -> Any:
    """bitsandbytes knows no float64 on a CPU: there torch multiplies with the dequantised weight."""
    widths = in_out_features(linear)
    new = nf4_linear(*widths, bias=False, compute_dtype=dtype, double_quantization=True)
    fill_nf4(new, linear.weight.data.float())
    if dtype == torch.float64:
        new.forward = lambda x: F.linear(x, nf4_values(new).to(x.dtype))
    return new


def _int8(linear: nn.Linear) -> Int8Linear:
    new = Int8Linear(*in_out_features(linear), bias=False, compute_dtype=torch.float64)
    new.fill(linear.weight.data)
    return new


def _plain_twin(base: Any) -> Any:
    """The same model with plain linear layers of the dequantised weights, which require gradients."""
    twin = copy.deepcopy(base)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Int8Linear) or hasattr(getattr(module, "weight", None), "quant_state"):
            weight = weight_of(module).double()
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
            plain.weight.data = weight
            twin.set_submodule(name, plain)
    twin.set_attn_implementation("sdpa")
    return twin.requires_grad_(True)


def _rows() -> list[Example]:
    return examples((21, 9, 17, 12), first_id=1)


def _batches(step: StepConfig) -> list[Batch]:
    rows = _rows()
    parts = (rows[:2], rows[2:])
    return [collate_packed(part) if step.packing else collate(part, 0) for part in parts]


def _true_gradients(base: Any) -> dict[str, torch.Tensor]:
    """Of the mean loss, by transformers' logits and autograd; [out, in] by name."""
    twin = _plain_twin(base)
    plain_loss(twin, _rows()).backward()
    return {
        f"base_model.model.{name}": m.weight.grad.t() if isinstance(m, Conv1D) else m.weight.grad
        for name, m in twin.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not twin.get_output_embeddings()
    }


def _means(**changes: Any) -> Means:
    return Means(**{"host": Host(CPU), "seed": 3, "original": lambda _: torch.empty(0), **changes})


@pytest.mark.parametrize("precision", ["plain", "nf4", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_autograd_s_of_the_dequantised_weight(precision: str, variant: str) -> None:
    base, step = _base("llama", precision), exact_step("llama", **VARIANTS[variant])
    truth = _true_gradients(base)
    _assert_gradients(base, step, truth)


def test_gradient_of_a_turned_weight_with_a_bias() -> None:
    base, step = _base("gpt2", "plain"), exact_step("gpt2")
    _assert_gradients(base, step, _true_gradients(base))


def test_gradient_through_bitsandbytes_own_kernel() -> None:
    """In float32, the least that it knows on a CPU."""
    torch.manual_seed(0)
    base = MODELS["llama"]()
    register()
    base.set_attn_implementation(attention_for(base))
    replace_linears(base, lambda linear: _nf4(linear, torch.float32))
    truth = _true_gradients(base.double())
    _assert_gradients(base.float(), exact_step("llama"), truth, torch.float32, 1e-4)


def _assert_gradients(
    base: Any,
    step: StepConfig,
    truth: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float64,
    rel: float = 1e-10,
) -> None:
    """To 1e-10 of the largest, with an adapter in place that would change everything if it were used."""
    model = add_adapters(base, step).to(dtype).train()
    for layer in lora_layers(model).values():
        nn.init.normal_(factors_of(layer)[1])
    batches = _batches(step)
    found = summed_gradients(
        SummedLoss(model, step), lora_layers(model), truth, batches, Host(CPU), torch.Tensor.backward
    )
    assert found.keys() == truth.keys() == lora_layers(model).keys()
    n_tokens = sum(batch.trained_tokens for batch in batches)
    for name, gradient in found.items():
        largest = float(truth[name].abs().max())
        assert largest > 1e-6
        assert float((gradient / n_tokens - truth[name]).abs().max()) <= rel * largest, name
    assert all(p.grad is None for p in trainable(model).values())


def test_bf16_inputs_are_summed_in_float32() -> None:
    """4,096 tokens: a bf16 sum would be off by more than a percent."""
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(4096, n, generator=generator).bfloat16() for n in (8, 5))
    true = grad.double().t() @ x.double()
    found = weight_gradient(grad, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("precision", ["plain", "nf4"])
@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_a_and_b_have_the_paper_s_directions_and_norms(precision: str, init: str) -> None:
    """Against torch.linalg.svd of autograd's gradient; signs of singular vectors are free, of pairs not."""
    base, step = _base("llama", precision), exact_step("llama", init=init, use_rslora=True, alpha=16)
    truth = _true_gradients(base)
    model = add_adapters(base, step).double().train()
    initialise(model, SummedLoss(model, step), step, _batches(step), _means())
    r = step.rank
    for name, layer in lora_layers(model).items():
        u, s, vh = torch.linalg.svd(truth[name])
        a, b = (factor.detach() for factor in factors_of(layer))
        if init == "lora_ga":
            size = truth[name].shape[0] ** 0.25 / 16**0.5
            _assert_same_directions(a / size, vh[:r])
            _assert_same_directions(b.t() / size, u[:, r : 2 * r].t())
        else:
            best = -(u[:, :r] * s[:r]) @ vh[:r] / s[0] / 128
            torch.testing.assert_close(b @ a, best, rtol=1e-3, atol=1e-4 * float(best.abs().max()))
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-6, atol=0)


def _assert_same_directions(found: torch.Tensor, true: torch.Tensor) -> None:  # [r, n], [r, n]
    """Orthonormal rows, each the other's but for its sign; 4r columns and 4 rounds are not exact."""
    torch.testing.assert_close(found @ found.t(), torch.eye(len(found), dtype=found.dtype), rtol=0, atol=1e-9)
    assert float((found * true).sum(dim=1).abs().min()) > 0.999


def test_groups_of_layers_give_what_one_pass_gives() -> None:
    """Room for one gradient at a time: as many passes as layers; and the training's generator goes on."""
    results = []
    for room in (None, 1):
        base, step = _base("llama", "nf4"), exact_step("llama", init="lora_ga", rank=2, dropout=0.1)
        torch.manual_seed(5)
        model = add_adapters(base, step).double().train()
        before, said = torch.get_rng_state(), []
        means = _means(room_bytes=room, say=said.append)
        initialise(model, SummedLoss(model, step), step, _batches(step), means)
        assert torch.equal(torch.get_rng_state(), before)
        assert ("21 passes" in said[0]) == (room == 1)
        results.append({n: p.detach().clone() for n, p in trainable(model).items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12)


def test_groups_are_neighbours_that_fit() -> None:
    sizes = {"a": 3, "b": 3, "c": 3, "d": 9, "e": 1}
    assert groups_within(sizes, None) == [["a", "b", "c", "d", "e"]]
    assert groups_within(sizes, 6) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_rank_that_leaves_no_directions_and_a_loss_without_any_are_refused() -> None:
    base, step = _base("llama", "plain"), exact_step("llama", init="lora_ga", rank=9)
    model = add_adapters(base, step).double().train()
    with pytest.raises(ConfigError, match=r"takes 18 directions.* has 16"):  # k and v: 32 to 16
        initialise(model, SummedLoss(model, step), step, _batches(step), _means())
    step = exact_step("llama", init="lora_ga", rank=2)
    model = add_adapters(_base("llama", "plain"), step).double().train()
    first = next(iter(lora_layers(model)))
    nn.init.constant_(model.get_submodule(first.replace("q_proj", "o_proj")).base_layer.weight, float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        initialise(model, SummedLoss(model, step), step, _batches(step), _means())


_SMALL = {**SHAPE, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 11, "vocab_size": 1000}
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MANY_TOKENS = {"max_position_embeddings": 2048}


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
@pytest.mark.parametrize("init", ["lora_ga", "lora_one", "eva", "pissa", "olora", "loftq"])
def test_repeated_trace_of_an_initialisation_equals_the_whole_one(init: str, backend: Any) -> None:
    config = LlamaConfig(**_SMALL | _MANY_TOKENS)
    step = StepConfig(init=init, rank=4, seq_len=256, target_modules=_TARGETS)
    blocks = blocks_of(config)
    assert blocks is not None
    extended = extend(trace_step(with_layers(config, blocks.traced_layers), step, backend), blocks)
    whole = trace_step(config, step, backend)
    assert _outcome(extended) == _outcome(whole)
    ours, whole_s = (estimate_of(trace, step, backend).phases_bytes for trace in (extended, whole))
    assert ours["initialisation"] == whole_s["initialisation"] > 0


@pytest.mark.parametrize("changes", [{}, {"levers": Levers(gradient_checkpointing=False)}, {"packing": True}])
def test_initialisation_takes_a_plain_step_and_one_layer_s_gradient_at_most(changes: dict[str, Any]) -> None:
    """Beside a GPU, where the sums are the host's; a plain step without its optimizer's state."""
    config = LlamaConfig(**_SMALL | _MANY_TOKENS)
    step = StepConfig(init="lora_ga", rank=4, seq_len=512, target_modules=_TARGETS, **changes)
    plain = step.model_copy(update={"init": "default"})
    ours = estimate_of(trace_step(config, step, "cuda"), step, "cuda").phases_bytes
    trace = trace_step(config, plain, "cuda")
    theirs = estimate_of(trace, plain, "cuda").phases_bytes
    state = sum(a.n_bytes for a in trace.allocations if a.component == "optimizer_state")
    start = 2 * sum(p * 4 for p in _factor_sizes(config)) * config.num_hidden_layers
    step_alone = max(theirs[phase] for phase in ("forward", "backward")) - state
    one_gradient = 4 * config.hidden_size * config.intermediate_size
    assert ours["initialisation"] <= step_alone + start + one_gradient
    assert ours["initialisation"] > ours["load"] - one_gradient


def _factor_sizes(config: LlamaConfig) -> list[int]:
    """in + out of a layer's linear layers."""
    hidden, kv = config.hidden_size, config.hidden_size // 2
    wide = config.intermediate_size
    return [2 * hidden, hidden + kv, hidden + kv, 2 * hidden, *[hidden + wide] * 3]


@pytest.mark.parametrize("init", ["lora_ga", "lora_one", "eva", "pissa", "olora"])
def test_traced_initialisation_equals_the_executed_one(init: str, tmp_path: Path) -> None:
    """On a CPU, whose sums are in the same memory, as torch's profiler sees it: within 1 %.

    Up to three copies of the CPU generator's state are in the truth, 15 kB whatever the model.
    """
    config = LlamaConfig(**_SMALL | _MANY_TOKENS | {"num_hidden_layers": 3}, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    levers = Levers(loss_chunk_tokens=64)
    step = StepConfig(init=init, rank=4, seq_len=256, target_modules=_TARGETS, levers=levers)
    source = ModelSource(str(tmp_path))
    trace = trace_step(source.config, step, "cpu")
    held = sum(a.n_bytes for a in trace.allocations if a.component in RESIDENT)
    predicted = estimate_of(trace, step, "cpu").phases_bytes["initialisation"]
    model = add_adapters(load(source, step, "cpu"), step).train()
    loss_of = SummedLoss(model, step)
    measured = held + profiled_peak_bytes(lambda: initialise(model, loss_of, step, [_batch(step)], _means()))
    assert predicted <= peak_of(trace)[0]
    assert (predicted + 3 * CPU_STATE_BYTES) / measured - 1 > -0.005
    assert predicted / measured - 1 < 0.01
