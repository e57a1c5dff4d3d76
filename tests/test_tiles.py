"""Tiled layers against plain transformers + peft, in float64 on tiny real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import CausalVariant
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lowvram.data.tokens import Example
from lowvram.engine import tile_attention
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.step import SummedLoss
from lowvram.engine.tiles import why_not_tiled
from lowvram.errors import ConfigError
from tests.tiny import examples
from tests.tiny_models import (
    MODELS,
    SHAPE,
    adapted_model,
    assert_same,
    exact_step,
    plain_loss_and_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _rows(lengths: tuple[int, ...]) -> list[Example]:
    """Without the token that stands for padding here."""
    return examples(lengths, first_id=1)


def _loss_and_gradients(
    model: Any, step: StepConfig, lengths: tuple[int, ...]
) -> tuple[float, dict[str, Any]]:
    batch = collate(_rows(lengths), 0)
    loss = SummedLoss(model, step)(*batch.tensors) / batch.trained_tokens
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tile", [0, 4, 7, 64])
@pytest.mark.parametrize("lengths", [(21,), (9, 17, 4, 1, 12)])
def test_loss_and_gradients_equal_plain_transformers(kind: str, tile: int, lengths: tuple[int, ...]) -> None:
    levers = Levers(tile_tokens=tile, offload_checkpoints=tile in (0, 7), loss_chunk_tokens=16)
    step = exact_step(kind, levers=levers)
    loss, gradients = _loss_and_gradients(adapted_model(kind, step), step, lengths)
    expected, references = plain_loss_and_gradients(kind, _rows(lengths))
    assert loss == pytest.approx(expected, rel=1e-9)
    assert min(float(reference.abs().max()) for reference in references.values()) > 1e-6
    assert_same(gradients, references)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_dropout_is_the_same_when_computed_again(kind: str) -> None:
    """The gradient along a direction is the loss's own slope there, for the masks that one seed draws."""
    step = exact_step(kind, levers=Levers(tile_tokens=4, offload_checkpoints=True), dropout=0.3)
    model = adapted_model(kind, step)
    batch = collate(_rows((13, 8)), 0)
    loss_of = SummedLoss(model, step)

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        value: torch.Tensor = loss_of(*batch.tensors)
        return value

    loss().backward()
    parameters = list(trainable(model).values())
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    ends = []
    for sign in (1, -1):
        for p, d in zip(parameters, directions, strict=True):
            p.data += sign * 1e-6 * d
        ends.append(float(loss().detach()))
        for p, d in zip(parameters, directions, strict=True):
            p.data -= sign * 1e-6 * d
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
    torch.manual_seed(8)
    assert abs(loss_of(*batch.tensors).item() - ends[0]) > 1e-3  # another seed draws other masks


def test_numbers_drawn_after_a_step_do_not_depend_on_its_tiles() -> None:
    """The masks have seeds of their own: one number is drawn for the whole step."""
    drawn = []
    for tile in (4, 7):
        step = exact_step("llama", levers=Levers(tile_tokens=tile), dropout=0.3)
        batch = collate(_rows((13,)), 0)
        model = adapted_model("llama", step)
        torch.manual_seed(3)
        SummedLoss(model, step)(*batch.tensors).backward()
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("heads_in_a_call", [1, 2])
def test_query_heads_of_one_key_head_may_go_one_after_another(
    heads_in_a_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three look at each key head; with many keys one call's gradients, a copy for each, would be large."""
    config = LlamaConfig(**{**SHAPE, "num_attention_heads": 6, "hidden_size": 48})
    monkeypatch.setitem(MODELS, "six heads", lambda: LlamaForCausalLM(config))
    calls, attend = set(), tile_attention._attend
    monkeypatch.setattr(tile_attention, "_GRADIENT_BYTES", 1)
    monkeypatch.setattr(tile_attention, "_ENOUGH_HEADS", heads_in_a_call)
    monkeypatch.setattr(tile_attention, "_attend", lambda q, *rest: calls.add(q.shape[1]) or attend(q, *rest))
    step = exact_step("six heads", levers=Levers(tile_tokens=4))
    loss, gradients = _loss_and_gradients(adapted_model("six heads", step), step, (24,))
    expected, references = plain_loss_and_gradients("six heads", _rows((24,)))
    assert calls == {3, heads_in_a_call, 1}  # 3 where no gradient is wanted, 1 what is left of three
    assert loss == pytest.approx(expected, rel=1e-9)
    assert_same(gradients, references)


@given(
    kind=st.sampled_from(sorted(MODELS)),
    lengths=st.lists(st.integers(2, 23), min_size=1, max_size=4),
    tile=st.integers(0, 30),
    offloads=st.booleans(),
    chunk=st.integers(16, 40),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tile_of_any_batch_equals_the_whole(
    kind: str, lengths: list[int], tile: int, offloads: bool, chunk: int
) -> None:
    levers = Levers(tile_tokens=tile, offload_checkpoints=offloads, loss_chunk_tokens=chunk)
    step, whole = (
        exact_step(kind, levers=levers),
        exact_step(kind, levers=Levers(gradient_checkpointing=False)),
    )
    loss, gradients = _loss_and_gradients(adapted_model(kind, step), step, tuple(lengths))
    expected, references = _loss_and_gradients(adapted_model(kind, whole), whole, tuple(lengths))
    assert loss == pytest.approx(expected, rel=1e-9)
    assert_same(gradients, references)


def test_the_causal_mask_of_last_queries_is_no_tensor() -> None:
    """torch's own way to ask for it takes 8 bytes for each query and key, in host memory, for nothing."""
    mask = tile_attention._LowerRight(CausalVariant.LOWER_RIGHT, 4096, 1 << 40)
    assert mask.untyped_storage().nbytes() == 0
    assert (mask.variant, mask.seq_len_q, mask.seq_len_kv) == (CausalVariant.LOWER_RIGHT, 4096, 1 << 40)


def test_evaluation_is_the_same_and_keeps_nothing() -> None:
    step = exact_step("llama", levers=Levers(tile_tokens=5))
    model = adapted_model("llama", step).eval()
    batch = collate(_rows((17, 9)), 0)
    with torch.no_grad():
        tiled = SummedLoss(model, step)(*batch.tensors)
        plain = SummedLoss(model, exact_step("llama"))(*batch.tensors)
    assert float(tiled) == pytest.approx(float(plain), rel=1e-12)
    assert not tiled.requires_grad


def test_the_model_itself_runs_as_before() -> None:
    """Answers are written by the model's own forward, with tiles or without."""
    step = exact_step("llama", levers=Levers(tile_tokens=5))
    model, ids = adapted_model("llama", step).eval(), torch.arange(1, 12)[None]
    before = model(input_ids=ids).logits
    loss_of = SummedLoss(model, step)
    loss_of(*collate(_rows((17,)), 0).tensors).backward()
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    SummedLoss(model, step)(*collate(_rows((17,)), 0).tensors).backward()  # a second one over the same


def test_refused_where_it_would_be_wrong() -> None:
    config = Gemma2Config(**SHAPE, head_dim=8, sliding_window=5)
    step = exact_step("gemma2", levers=Levers(tile_tokens=5))
    model = add_adapters(Gemma2ForCausalLM(config), step)
    with pytest.raises(ConfigError, match="cannot be run by tiles: its attention is not"):
        SummedLoss(model, step)
    with pytest.raises(ValueError, match="need gradient_checkpointing=on"):
        Levers(tile_tokens=5, gradient_checkpointing=False)


def test_stretched_positions_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope))
    assert "depends on the sequence's length" in why_not_tiled(model.get_decoder())
