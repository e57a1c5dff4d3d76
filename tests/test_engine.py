"""The engine's step against plain transformers + peft, in float64 on tiny real architectures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowvram.data.tokens import Example
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.attention import register
from lowvram.engine.batch import Batch, collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.loss import WholeHead, summed_cross_entropy
from lowvram.engine.model import attention_for, load, skeleton
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.recompute import layers_of
from lowvram.engine.shape import shape_of
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, evaluate, train_step
from lowvram.errors import ConfigError
from tests.tiny import SHAPE, examples, plain_loss

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, sliding_window=5, attn_logit_softcapping=0.5)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64, **_NO_DROPOUT)
    ),
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TARGETS = {"gpt2": ("c_attn", "c_proj")}

RECOMPUTED: dict[str, dict[str, Any]] = {
    "nothing": {"gradient_checkpointing": False},
    "all layers": {},
    "all but the last": {"kept_layers": 1},
}


def _step(**changes: Any) -> StepConfig:
    base = {"base_precision": "fp32", "compute_dtype": "fp32", "rank": 3, "alpha": 7, "dropout": 0.0}
    return StepConfig(**{**base, "target_modules": ("q_proj", "v_proj", "down_proj"), **changes})


def _pair(kind: str, step: StepConfig) -> tuple[Any, Any]:
    """Our model and the plain transformers + peft one, in float64, with the same weights and B not zero."""
    torch.manual_seed(0)
    plain = MODELS[kind]().double()
    ours = MODELS[kind]().double()
    ours.load_state_dict(plain.state_dict())
    register()
    ours.set_attn_implementation(attention_for(ours))
    plain.set_attn_implementation("eager")
    config = LoraConfig(
        r=step.rank,
        lora_alpha=step.alpha,
        use_rslora=step.use_rslora,
        target_modules=list(step.target_modules),
        task_type="CAUSAL_LM",
    )
    reference, model = get_peft_model(plain, config).double(), add_adapters(ours, step).double()
    for name, parameter in trainable(reference).items():
        torch.nn.init.normal_(parameter, std=0.2)
        trainable(model)[name].data.copy_(parameter.data)
    return model.train(), reference.train()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("lengths", [((9, 17, 4), (12,)), ((21,),)])
def test_loss_and_gradients_equal_plain_transformers(
    kind: str, recomputed: str, chunk: int, lengths: tuple[tuple[int, ...], ...]
) -> None:
    levers = Levers(**RECOMPUTED[recomputed], loss_chunk_tokens=chunk)
    step = _step(levers=levers, use_rslora=chunk > 99)
    step = step.model_copy(update={"target_modules": TARGETS.get(kind, step.target_modules)})
    model, reference = _pair(kind, step)
    micro_batches = [examples(part, seed) for seed, part in enumerate(lengths)]
    gradients: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, *_: Any) -> None:  # type: ignore[override]
            gradients.update({n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None})

    loss_of = SummedLoss(model, step)
    result = train_step(
        loss_of, Keep(trainable(model).values()), [collate(m, 0) for m in micro_batches], max_grad_norm=1e9
    )
    expected = plain_loss(reference, [e for m in micro_batches for e in m])
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-7)
    for name, parameter in trainable(reference).items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6
        # transformers' RMSNorm works in float32 even here: 1e-7 relative, whatever the rest computes in;
        # so does the softmax of Gemma 2's attention
        atol = (1e-5 if kind == "gemma2" else 1e-6) * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=atol)


def test_the_last_layers_are_computed_once() -> None:
    """Three layers: the first two twice, and of a model that has been trained otherwise before as well."""
    model, _ = _pair("llama", _step())
    calls: list[int] = []
    for index, layer in enumerate(layers_of(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    for kept, expected in (
        (0, [0, 1, 2, 2, 1, 0]),
        (1, [0, 1, 2, 1, 0]),
        (2, [0, 1, 2, 0]),
        (0, [0, 1, 2, 2, 1, 0]),
    ):
        calls.clear()
        SummedLoss(model, _step(levers=Levers(kept_layers=kept)))(
            *collate(examples((9,)), 0).tensors
        ).backward()
        assert calls == expected
    with pytest.raises(ConfigError, match="kept_layers=3 leaves none of the 3 layers"):
        SummedLoss(model, _step(levers=Levers(kept_layers=3)))
    with pytest.raises(ValueError, match="exception from gradient_checkpointing"):
        Levers(kept_layers=1, gradient_checkpointing=False)


def test_window_is_obeyed() -> None:
    """Without the window the loss differs: the mask is really built."""
    model, reference = _pair("mistral with a window", _step())
    reference.get_base_model().config.sliding_window = None
    rows = examples((30,))
    batch = collate(rows, 0)
    ours = SummedLoss(model, _step())(batch.input_ids, batch.positions, batch.targets) / batch.trained_tokens
    assert abs(ours.item() - plain_loss(reference, rows).item()) > 1e-4


@pytest.mark.parametrize("chunk", [16, 17, 1000])
def test_chunked_loss_equals_full_loss(chunk: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).double().requires_grad_(False)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (37,))
    summed_cross_entropy(hidden, targets, WholeHead(head), chunk).backward()
    assert hidden.grad is not None
    ours, hidden.grad = hidden.grad.clone(), None
    full = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    full.backward()
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert float(summed_cross_entropy(hidden, targets, WholeHead(head), chunk)) == pytest.approx(
            full.item(), rel=1e-9
        )


def test_collate_positions_and_targets() -> None:
    a, b = Example((5, 6, 7), (0, 1, 1), "x:1"), Example((8, 9), (0, 1), "x:2")
    batch = collate([a, b], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]


def test_padding_changes_nothing() -> None:
    model, _ = _pair("llama", _step())
    loss_of = SummedLoss(model, _step())
    together = evaluate(loss_of, [collate(examples((5, 19)), 96)], "cpu")
    apart = evaluate(loss_of, [collate([e], 0) for e in examples((5, 19))], "cpu")
    assert together == pytest.approx(apart, rel=1e-7)


def test_targets() -> None:
    model = MODELS["llama"]()
    shape = shape_of(model.config)
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert shape.resolve_targets("all-linear") == layers
    assert shape.resolve_targets("qv") == ("q_proj", "v_proj")
    assert shape.resolve_targets("up_proj, down_proj") == ("up_proj", "down_proj")
    with pytest.raises(ConfigError, match=r"no linear layer called query.*q_proj"):
        shape.resolve_targets("query")


@pytest.mark.parametrize("family", sorted(MODELS))
def test_shape_says_what_the_model_has(family: str) -> None:
    """Counted on the model with its adapters: what a plan says of parameters is what trains."""
    model = MODELS[family]()
    shape, step = shape_of(model.config), _step()
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    step = step.model_copy(update={"target_modules": shape.resolve_targets("all-linear")})
    adapted = trainable(add_adapters(model, step))
    assert shape.n_trainable(step) == sum(p.numel() for p in adapted.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_nf4_step_trains_every_adapter(smollm: Path, optimizer: str) -> None:
    """On the real model in NF4 the loss falls, every B moves, and evaluation does not harm the base."""
    source = ModelSource(str(smollm))
    targets = ("q_proj", "down_proj")
    step = StepConfig.model_validate(
        {
            "rank": 4,
            "dropout": 0.0,
            "target_modules": targets,
            "optimizer": optimizer,
            "compute_dtype": "fp32",
        }
    )
    model = add_adapters(load(source, step, "cpu"), step).train()
    loss_of = SummedLoss(model, step)
    adapter = make_optimizer(trainable(model), step, 5e-3)
    batch = collate(examples((40, 33)), 0)
    before = evaluate(loss_of, [batch], "cpu")
    for _ in range(3):
        result = train_step(loss_of, adapter, [batch], max_grad_norm=1.0)
    after = evaluate(loss_of, [batch], "cpu")
    assert float(result.loss) < before
    assert after < before - 0.5
    assert all(bool(p.abs().max() > 0) for n, p in trainable(model).items() if "lora_B" in n)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


TOY: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}


@pytest.mark.parametrize("kind", ["bloom", "xglm", "bert", "mamba", "falcon", "bart"])
def test_models_whose_attention_would_not_obey_are_refused(kind: str) -> None:
    """Bloom and XGLM would see the future without a mask, BERT does by design."""
    with pytest.raises(ConfigError, match=kind) as caught:
        skeleton(AutoConfig.for_model(kind, **TOY), _step())
    assert "Llama" in caught.value.remedy
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("scaled", [False, True])
def test_t5_loss_and_gradients_equal_plain_transformers(recomputed: str, scaled: bool) -> None:
    """Source and target of different lengths, padding on both sides of the model."""
    step = _step(
        task_type="SEQ2SEQ_LM",
        target_modules=("q", "v", "wo"),
        levers=Levers(**RECOMPUTED[recomputed], loss_chunk_tokens=16),
    )
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    config = T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=scaled)
    torch.manual_seed(0)
    plain, ours = (T5ForConditionalGeneration(config).double() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    register()
    ours.set_attn_implementation(attention_for(ours))
    reference = get_peft_model(
        plain, LoraConfig(r=3, lora_alpha=7, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    ).double()
    model = add_adapters(ours, step).double()
    for name, parameter in trainable(reference).items():
        torch.nn.init.normal_(parameter, std=0.2)
        trainable(model)[name].data.copy_(parameter.data)
    source, labels = torch.randint(1, 97, (2, 11)), torch.randint(1, 97, (2, 7))
    source_mask = torch.ones_like(source)
    source_mask[1, 6:] = 0
    labels[0, 5:] = -100
    expected = reference.train()(input_ids=source, attention_mask=source_mask, labels=labels).loss
    expected.backward()
    kept = (labels != -100).flatten()
    decoder_ids = plain._shift_right(labels)
    batch = Batch(decoder_ids, kept.nonzero()[:, 0], labels.flatten()[kept], source, source_mask)
    loss = SummedLoss(model.train(), step)(*batch.tensors) / batch.trained_tokens
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    ours_by_name = trainable(model)
    for name, parameter in trainable(reference).items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-7
        atol = 1e-6 * float(parameter.grad.abs().max())
        torch.testing.assert_close(ours_by_name[name].grad, parameter.grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"intermediate_size": 80}])
def test_weights_that_are_missing_or_of_another_shape_are_refused(
    tmp_path: Path, change: dict[str, int]
) -> None:
    """transformers would train on random numbers in their place."""
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    load(ModelSource(str(tmp_path)), _step(), "cpu")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match="weights of"):
        load(ModelSource(str(tmp_path)), _step(), "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has mapped")
def test_a_quantised_base_lets_go_of_its_files(smollm: Path) -> None:
    """SmolLM2's file has 269 MB, of which only the embedding's 57 and the norms are still needed."""
    step = StepConfig(base_precision="nf4", compute_dtype="bf16")
    model: Any = load(ModelSource(str(smollm)), step, "cpu")
    assert str((smollm / "model.safetensors").resolve()) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(smollm / "model.safetensors", "pt") as file:
        assert torch.equal(model.lm_head.weight, file.get_tensor("model.embed_tokens.weight").bfloat16())


def test_skeleton_has_the_loaded_model_s_parameters(smollm: Path) -> None:
    """Names, 4-bit layers and dtypes of the traced model are those of the trained one."""
    source, step = ModelSource(str(smollm)), StepConfig(target_modules=("q_proj",))
    loaded, traced = load(source, step, "cpu"), skeleton(source.config, step)
    kinds = [{n: type(m).__name__ for n, m in model.named_modules()} for model in (loaded, traced)]
    assert kinds[0] == kinds[1]
    dtypes = [
        {n: p.dtype for n, p in m.named_parameters() if p.dtype != torch.uint8} for m in (loaded, traced)
    ]
    assert dtypes[0].items() <= dtypes[1].items()
