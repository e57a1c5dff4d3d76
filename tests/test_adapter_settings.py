"""The adapter's settings in whole models: gradients, counts and files against plain peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PhiConfig

from lowvram.engine.adapter_start import adapter_parameters
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import collate, collate_packed
from lowvram.engine.biases import plus_bias, train_biases
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import load, skeleton
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.shape import shape_of
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, evaluate, train_step
from lowvram.errors import ConfigError
from tests.test_lora import _layer, _saved_bytes
from tests.tiny import examples, plain_loss
from tests.tiny_models import MODELS, adapted_model, assert_same, exact_norms, exact_step

pytestmark = pytest.mark.usefixtures("one_thread")

# facebook/opt-1.3b in small: the classic example's architecture
SMALL_OPT = {
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
CLASSIC: dict[str, Any] = {"rank": 4, "alpha": 16, "dropout": 0.05, "target_modules": ("q_proj", "v_proj")}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "lora-fa": {"freeze_a": True},
    "rslora": {"use_rslora": True},
    "dora, bias all, lora-fa": {"use_dora": True, "bias": "all", "freeze_a": True},
}
Rows = list[Any]


@pytest.fixture
def opt(tmp_path: Path) -> ModelSource:
    """The classic example's architecture, small, with weights and biases that are not zero."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**SMALL_OPT))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "opt")
    return ModelSource(str(tmp_path / "opt"))


def _by_plain_peft(kind: str, step: StepConfig, ours: nn.Module, rows: Rows) -> tuple[float, dict[str, Any]]:
    """peft's own layers with the weights of `ours`, under the same names."""
    base = exact_norms(MODELS[kind]().double())
    base.set_attn_implementation("sdpa")
    config = LoraConfig(
        r=step.rank,
        lora_alpha=step.alpha,
        bias=step.bias,
        use_dora=step.use_dora,
        target_modules=list(step.target_modules),
        fan_in_fan_out=kind == "gpt2",
    )
    plain = get_peft_model(base, config).double()
    plain.load_state_dict(ours.state_dict())
    loss = plain_loss(plain, rows)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable(plain).items()}


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen2"])
@pytest.mark.parametrize("levers", [Levers(gradient_checkpointing=False), Levers(), Levers(tile_tokens=4)])
@pytest.mark.parametrize(
    "changes", [{"bias": "all"}, {"bias": "lora_only"}, {"bias": "all", "use_dora": True}]
)
def test_gradients_equal_plain_peft_s(kind: str, levers: Levers, changes: dict[str, Any]) -> None:
    """float64, 1e-9: plain, recomputed and by tiles, whose last norm's bias is behind all layers."""
    step = exact_step(kind, levers=levers, **changes)
    model = adapted_model(kind, step)
    rows = examples((21, 9), first_id=1)
    batch = collate(rows, 0)
    loss = SummedLoss(model, step)(*batch.tensors) / batch.trained_tokens
    loss.backward()
    expected, references = _by_plain_peft(kind, step, model, rows)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert any(name.endswith(".bias") for name in references)
    gradients = {name: p.grad for name, p in trainable(model).items()}
    assert gradients.keys() == references.keys()
    assert_same(gradients, references)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_packed_row_equals_its_examples(settings: str) -> None:
    rows = examples((13, 9, 17), first_id=1)
    results = []
    for packed in (False, True):
        step = exact_step("opt", packing=packed, **SETTINGS[settings])
        model = adapted_model("opt", step)
        batch = collate_packed(rows) if packed else collate(rows, 0)
        (SummedLoss(model, step)(*batch.tensors, lengths=batch.lengths) / batch.trained_tokens).backward()
        results.append({name: p.grad for name, p in trainable(model).items()})
    assert_same(*results)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen2", "llama"])
def test_counts_equal_the_closed_form(settings: str, kind: str) -> None:
    model = MODELS[kind]()
    shape = shape_of(model.config)
    step = StepConfig(rank=3, base_precision="fp32", target_modules=shape.resolve_targets("all-linear"))
    step = step.model_copy(update=SETTINGS[settings])
    counted = sum(p.numel() for p in trainable(add_adapters(model, step)).values())
    assert shape.n_trainable(step) == counted
    with_inference = step.model_copy(update={"inference_mode": True})
    assert shape.n_trainable(with_inference) == len(trainable(add_adapters(MODELS[kind](), with_inference)))


def test_opt_1_3b_by_hand() -> None:
    """The classic example: r (in + out) of two layers of 2,048 in each of 24; the biases by hand as well."""
    config = OPTConfig(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32)
    config.word_embed_proj_dim, config.vocab_size = 2048, 50272
    shape, step = shape_of(config), StepConfig(**CLASSIC)
    factors = 24 * 2 * 4 * (2048 + 2048)
    in_a_layer = 4 * 2048 + 8192 + 2048 + 2 * 2048  # q, k, v, out; fc1; fc2; two norms
    expected = {
        "plain": factors,
        "bias all": factors + 24 * in_a_layer + 2048,
        "bias lora_only": factors + 24 * 2 * 2048,
        "dora": factors + 24 * 2 * 2048,
        "lora-fa": factors // 2,
        "rslora": factors,
        "dora, bias all, lora-fa": factors // 2 + 24 * 2 * 2048 + 24 * in_a_layer + 2048,
    }
    assert {name: shape.n_trainable(step.model_copy(update=SETTINGS[name])) for name in SETTINGS} == expected
    assert expected["plain"] == 786432


def _trained(source: ModelSource, step: StepConfig, steps: int = 4) -> Any:
    torch.manual_seed(1)
    model = add_adapters(load(source, step, "cpu"), step).train()
    loss_of = SummedLoss(model, step)
    optimizer = make_optimizer(trainable(model), step, 2e-2)
    batch = collate(examples((40, 33), first_id=3), 1)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    first = evaluate(loss_of, [batch], "cpu")
    for _ in range(steps):
        train_step(loss_of, optimizer, [batch], max_grad_norm=1.0)
    assert evaluate(loss_of, [batch], "cpu") < first - 0.05
    for name, parameter in adapter_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    return model.eval()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("precision", ["nf4", "int8", "fp32"])
def test_it_trains_and_plain_peft_loads_it(
    opt: ModelSource, tmp_path: Path, settings: str, precision: str
) -> None:
    """The classic example, small. Logits in plain peft: over the same values 1e-4 of the largest."""
    step = StepConfig(
        **CLASSIC, **SETTINGS[settings], base_precision=precision, compute_dtype="fp32", seq_len=64
    )
    model = _trained(opt, step)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    base = _plain_base(opt, step)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.randint(3, 97, (2, 30))
    ours, theirs = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    with plain.disable_adapter():
        assert float((plain(input_ids=ids).logits - theirs).abs().max()) > 1e-2 * float(theirs.abs().max())


def _plain_base(source: ModelSource, step: StepConfig) -> Any:
    """transformers' own model; of an int8 base its values, which no library reads back."""
    if step.base_precision == "int8":
        plain = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32)
        values = {n: m.values() for n, m in load(source, step, "cpu").named_modules() if hasattr(m, "values")}
        for name, value in values.items():
            plain.get_submodule(name).weight.data = value.clone()
        return plain
    kept = load(source, step.model_copy(update={"levers": Levers()}), "cpu")
    kept.set_attn_implementation("sdpa")
    return kept


def test_float32_biases_move_where_bf16_would_not() -> None:
    """A bias of size 1 and a step of 2e-4, a hundred times; what comes out is bf16."""
    layer = nn.Linear(8, 4).bfloat16()
    nn.init.ones_(layer.bias)
    model = nn.Sequential(layer).requires_grad_(False)
    layer.bias.requires_grad_()
    train_biases(model)
    optimizer = torch.optim.SGD([layer.bias], lr=2e-4)
    for _ in range(100):
        y = model(torch.zeros(2, 3, 8, dtype=torch.bfloat16))
        (y.float().sum() / 6).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(layer.bias, torch.full((4,), 0.98), rtol=1e-5, atol=0)


def test_a_bias_s_gradient_in_float64() -> None:
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    product = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, b: plus_bias(p * 1, b), (product, bias))


def test_a_head_with_a_bias_is_refused() -> None:
    config = PhiConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
    )
    step = StepConfig(base_precision="fp32", compute_dtype="fp32", bias="all")
    assert "head has a bias" in shape_of(config).untrained_biases
    with pytest.raises(ConfigError, match="head has a bias"):
        add_adapters(skeleton(config, step), step)


def test_a_frozen_a_keeps_no_input() -> None:
    """Of 64 tokens of 96 numbers only x A^T is kept, r numbers a token."""
    layer = _layer(nn.Linear(96, 80, bias=False), 8)
    layer.lora_A["default"].weight.requires_grad_(False)
    x = torch.randn(2, 64, 96, requires_grad=True)
    known = list(layer.parameters())
    assert _saved_bytes(lambda: layer(x), known) == 2 * 64 * 8 * 4


@pytest.mark.parametrize("n_in", [576, 4096])
def test_a_random_a_needs_no_projection(n_in: int) -> None:
    """peft's LoRA-FA multiplies B's gradient by (A A^T)^-1; a random A's is near a multiple of 1."""
    torch.manual_seed(0)
    a = nn.init.kaiming_uniform_(torch.empty(8, n_in), a=5**0.5)
    inverse = torch.linalg.inv(a @ a.t())
    off = inverse - inverse.diagonal().mean() * torch.eye(8)
    assert float(off.norm() / inverse.norm()) < 0.25
    assert float(inverse.diagonal().mean()) == pytest.approx(3, rel=0.1)


def test_a_checkpoint_holds_a_frozen_a() -> None:
    step = exact_step("opt", freeze_a=True)
    model = adapted_model("opt", step)
    held = adapter_parameters(model)
    assert {n for n in held if ".lora_A." in n}
    assert not any(".lora_A." in n for n in trainable(model))
    assert len(held) == 2 * len(trainable(model))
