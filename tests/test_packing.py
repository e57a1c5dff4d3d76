"""Packed examples against the same examples one by one: loss, gradients, order, memory."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig, T5Config

from lowvram.data.order import batches_of_epoch, steps_per_epoch
from lowvram.data.packed_order import pack
from lowvram.data.padding import padded_share, rows_per_step
from lowvram.data.tokens import Example
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import Batch, collate, collate_packed
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import load
from lowvram.engine.packing import require_packable
from lowvram.engine.shape import shape_of
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss, evaluate, train_step
from lowvram.errors import ConfigError
from lowvram.memory import run
from lowvram.memory.allocator import replay_reserved
from lowvram.memory.estimate import estimate, peak_of, trace_all_layers
from lowvram.memory.profiled import executed_step_bytes
from lowvram.memory.run import trace_step
from lowvram.memory.weights import meta_batch
from lowvram.planner.profiles import load_profile
from lowvram.planner.schedule import schedule_for
from lowvram.planner.wishes import Wishes
from lowvram.training.data import TrainingData
from tests.tiny import examples, stats_of
from tests.tiny_models import (
    LLAMA_LIKE,
    MODELS,
    adapted_model,
    assert_same,
    exact_step,
    plain_loss_and_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")
GSM8K_LENGTHS: list[int] = json.loads(Path(__file__).with_name("gsm8k_lengths.json").read_text())
RECOMPUTED: dict[str, dict[str, Any]] = {
    "nothing": {"gradient_checkpointing": False},
    "all layers": {},
    "all but the last": {"kept_layers": 1},
}
WEIGHTS = {"base_weights", "embeddings", "head", "adapters", "optimizer_state"}


def _rows(lengths: tuple[int, ...], seed: int = 0) -> list[Example]:
    return examples(lengths, seed, first_id=1)


def _packed(**changes: Any) -> StepConfig:
    return exact_step("llama", packing=True, **changes)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_packed_loss_and_gradients_equal_plain_transformers(kind: str, recomputed: str) -> None:
    """Two rows one after the other, one of a single example; windows are 5 tokens, chunks end inside one."""
    levers = Levers(**RECOMPUTED[recomputed], loss_chunk_tokens=16)
    step = exact_step(kind, packing=True, levers=levers)
    model = adapted_model(kind, step)
    rows = [_rows((9, 17, 4, 12)), _rows((11,), 1)]
    gradients: dict[str, torch.Tensor] = {}
    parameters = trainable(model)

    class Keep(torch.optim.SGD):
        def step(self, *_: Any) -> None:  # type: ignore[override]
            gradients.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    batches = [collate_packed(row) for row in rows]
    result = train_step(SummedLoss(model, step), Keep(parameters.values()), batches, max_grad_norm=1e9)
    expected, references = plain_loss_and_gradients(kind, [e for row in rows for e in row])
    assert result.loss.item() == pytest.approx(expected, rel=1e-9)
    assert_same(gradients, references)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_token_of_one_example_changes_no_other(kind: str) -> None:
    """Bit by bit, the neighbours before and behind it."""
    model = adapted_model(kind, exact_step(kind, packing=True)).eval()
    loss_of = SummedLoss(model, exact_step(kind, packing=True))
    hidden: list[torch.Tensor] = []
    model.get_base_model().get_decoder().register_forward_hook(
        lambda _module, _args, output: hidden.append(output.last_hidden_state[0])
    )
    batch = collate_packed(_rows((7, 8, 9)))
    changed = batch.input_ids.clone()
    changed[0, 10] += 1 if changed[0, 10] < 50 else -1
    with torch.no_grad():
        for ids in (batch.input_ids, changed):
            loss_of(ids, batch.positions, batch.targets, lengths=batch.lengths)
    differs = (hidden[0] != hidden[1]).any(-1).tolist()
    assert differs == [False] * 10 + [True] * 5 + [False] * 9


def test_a_packed_step_is_the_unpacked_step() -> None:
    """Three steps of the same examples, packed or one a pass: losses, gradient norms and weights."""
    data = _rows((9, 5, 7, 16, 3, 12, 8, 6, 14, 4, 10, 11, 13, 15, 5, 6, 7, 9, 3, 8, 12, 16, 4, 10))
    lengths = [len(e) for e in data]
    order = batches_of_epoch(lengths, micro_batch=2, accumulation=4, seed=0, epoch=0, packed_tokens=32)
    trained, told, passes = [], [], []
    for packed in (False, True):
        step = exact_step("llama", packing=packed, seq_len=16)
        model = adapted_model("llama", step)
        loss_of, parameters = SummedLoss(model, step), trainable(model)
        optimizer = torch.optim.SGD(parameters.values(), 0.05)
        steps = order if packed else [[[i] for row in step for i in row] for step in order]
        results = []
        for batches in steps:
            rows = [[data[i] for i in batch] for batch in batches]
            made = [collate_packed(row) if packed else collate(row, 0) for row in rows]
            results.append(train_step(loss_of, optimizer, made, max_grad_norm=1.0))
        trained.append(parameters)
        told.append([(r.loss.item(), r.grad_norm.item(), r.trained_tokens) for r in results])
        passes.append(sum(map(len, steps)))
    assert len(told[0]) == 3
    assert told[1] == [pytest.approx(one, rel=1e-9) for one in told[0]]
    assert_same(trained[1], trained[0])
    assert passes[1] < passes[0]


def test_evaluation_packs_as_well() -> None:
    step = _packed()
    loss_of = SummedLoss(adapted_model("llama", step), step)
    rows = _rows((5, 19, 8))
    together = evaluate(loss_of, [collate_packed(rows)], "cpu")
    assert together == pytest.approx(evaluate(loss_of, [collate(rows, 0)], "cpu"), rel=1e-9)


def test_collate_packed() -> None:
    a, b = Example((5, 6, 7), (0, 1, 1), "x:1"), Example((8, 9), (0, 1), "x:2")  # type: ignore[arg-type]
    batch = collate_packed([a, b])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.lengths == batch.to("cpu").lengths == (3, 2)


_TOY: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**_TOY), ""),
        (
            Gemma2Config(**_TOY, num_key_value_heads=2, head_dim=16, intermediate_size=64),
            "not transformers' SDPA",
        ),
        (T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97), "not one stack"),
        (
            LlamaConfig(**_TOY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "length",
        ),
        (AutoConfig.for_model("phimoe", **_TOY), ""),
    ],
    ids=["llama", "gemma2", "t5", "dynamic rope", "phimoe"],
)
def test_what_cannot_be_packed_is_said(config: Any, reason: str) -> None:
    unpacked = shape_of(config).unpacked
    assert reason in unpacked if reason else unpacked == ""


def test_packing_is_refused_where_examples_would_see_each_other() -> None:
    model = adapted_model("llama", _packed())
    decoder = model.get_base_model().get_decoder()
    batch = collate_packed(_rows((9, 5)))
    loss_of = SummedLoss(model, _packed())
    decoder.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}),
        with_kwargs=True,
    )
    with pytest.raises(ConfigError, match="is not told where"):
        loss_of(*batch.tensors, lengths=batch.lengths)
    decoder.layers[1].shortcut = torch.nn.Conv1d(1, 1, 3)
    with pytest.raises(ConfigError, match="see each other outside attention"):
        require_packable(decoder)
    decoder._supports_sdpa = False
    with pytest.raises(ConfigError, match="cannot be packed: its attention is not"):
        require_packable(decoder)
    for changes in ({"levers": Levers(tile_tokens=64)}, {"task_type": "SEQ2SEQ_LM"}):
        with pytest.raises(ValueError, match="packing"):
            StepConfig.model_validate({"packing": True, **changes})


LENGTHS = st.lists(st.integers(2, 100), min_size=1, max_size=150)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 1))
def test_packed_order_is_whole_and_within_the_row(
    lengths: list[int], micro_batch: int, accumulation: int, epoch: int
) -> None:
    """Every example once, no row above its limit, as many steps as unpacked, and none of them empty."""
    limit = 100 * micro_batch
    order = partial(
        batches_of_epoch, lengths, micro_batch=micro_batch, accumulation=accumulation, seed=1, epoch=epoch
    )
    packed = order(packed_tokens=limit)
    assert packed == order(packed_tokens=limit)
    assert sorted(i for step in packed for row in step for i in row) == list(range(len(lengths)))
    assert len(packed) == len(order()) == steps_per_epoch(len(lengths), micro_batch * accumulation)
    for step in packed:
        assert step
        for row in step:
            assert row
            assert sum(lengths[i] for i in row) + max(len(row) - micro_batch, 0) <= limit
    if epoch == 0:
        assert lengths[packed[0][0][0]] == max(lengths)


def test_packed_epochs_and_seeds_differ() -> None:
    order = partial(batches_of_epoch, GSM8K_LENGTHS, micro_batch=1, accumulation=16, packed_tokens=2048)
    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    assert order(seed=0, epoch=1) != order(seed=0, epoch=2)
    assert order(seed=0, epoch=1) != order(seed=1, epoch=1)


@pytest.mark.parametrize(
    ("micro_batch", "effective_batch", "seq_len", "rows"),
    [(1, 16, 2048, 2), (4, 16, 512, 2), (2, 8, 1024, 1), (8, 64, 1024, 2), (1, 22, 2048, 3), (1, 8, 2048, 1)],
)
def test_packed_steps_have_equal_tokens_in_as_few_rows_as_hold_them(
    micro_batch: int, effective_batch: int, seq_len: int, rows: int
) -> None:
    """On GSM8K: every step within 10 % of the mean; an order that packs each step's examples has 25 %."""
    packed = batches_of_epoch(
        GSM8K_LENGTHS,
        micro_batch=micro_batch,
        accumulation=effective_batch // micro_batch,
        seed=3,
        epoch=1,
        packed_tokens=micro_batch * seq_len,
    )
    assert {len(step) for step in packed} == {rows}
    tokens = [sum(GSM8K_LENGTHS[i] for row in step for i in row) for step in packed]
    mean = sum(GSM8K_LENGTHS) / len(packed)
    assert rows == -(-mean // (micro_batch * seq_len))
    assert 0.9 * mean < min(tokens) <= max(tokens) < 1.1 * mean
    seen = {(a, b) for step in packed for row in step for a, b in pairwise(row) if a < b}
    assert len(seen) > len(GSM8K_LENGTHS) // 4  # and rows are not sorted


def test_gsm8k_rows_are_at_least_98_percent_full() -> None:
    """Of 2,048 tokens each, the rule's own room counted as empty; no packing can need fewer than 136."""
    rows = pack(range(len(GSM8K_LENGTHS)), GSM8K_LENGTHS, 2048, 1)
    tokens = sum(GSM8K_LENGTHS)
    assert tokens / (2048 * len(rows)) >= 0.98
    assert len(rows) == -(-tokens // 2048) == 136
    steps = batches_of_epoch(  # 74 examples a step are 7.95 rows
        GSM8K_LENGTHS, micro_batch=1, accumulation=74, seed=0, epoch=1, packed_tokens=2048
    )
    assert tokens / (2048 * sum(map(len, steps))) >= 0.98


@given(st.lists(st.integers(1, 120), max_size=80), st.integers(1, 4))
def test_pack_needs_no_more_rows_than_first_fit_decreasing(lengths: list[int], micro_batch: int) -> None:
    """A long example has a row of its own; else at most one row more than the plain method."""
    rows = pack(range(len(lengths)), lengths, 100, micro_batch)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 for row in rows if sum(lengths[i] for i in row) > 100)
    plain: list[list[int]] = []
    for n in sorted(lengths, reverse=True):
        fits = (row for row in plain if sum(row) + n + max(len(row) + 1 - micro_batch, 0) <= 100)
        (next(fits, None) or plain.append([]) or plain[-1]).append(n)
    assert len(rows) <= len(plain) + 1


def test_pack_closes_a_row_with_what_fits_best() -> None:
    assert pack(range(6), [9, 7, 5, 4, 4, 2], 20, 2) == [[0, 1, 5], [2, 4, 3]]
    assert pack([], [], 20, 2) == []


@pytest.mark.parametrize(
    ("micro_batch", "effective_batch", "seq_len"),
    [
        (1, 16, 512),
        (2, 16, 512),
        (4, 16, 512),
        (4, 16, 256),
        (8, 16, 512),
        (4, 32, 300),
        (2, 8, 1024),
        (8, 64, 1024),
    ],
)
def test_expected_padding_and_rows_are_the_order_s(
    micro_batch: int, effective_batch: int, seq_len: int
) -> None:
    """On GSM8K's lengths in SmolLM2's tokens."""
    ascending, lengths = sorted(GSM8K_LENGTHS), [min(n, seq_len) for n in GSM8K_LENGTHS]
    quantiles = [ascending[round((len(ascending) - 1) * p / 100)] for p in range(101)]
    accumulation = effective_batch // micro_batch
    order = partial(batches_of_epoch, lengths, micro_batch=micro_batch, accumulation=accumulation, seed=3)
    micros = [m for epoch in range(4) for step in order(epoch=epoch) for m in step]
    computed = sum(len(m) * max(lengths[i] for i in m) for m in micros)
    whole = [s for e in range(4) for s in order(epoch=e, packed_tokens=micro_batch * seq_len)]
    given_ = {"micro_batch": micro_batch, "effective_batch": effective_batch, "seq_len": seq_len}
    share = padded_share(quantiles, **given_)
    assert 1 / (1 - share) == pytest.approx(computed / (4 * sum(lengths)), rel=0.015)
    assert rows_per_step(quantiles, **given_) == pytest.approx(sum(map(len, whole)) / len(whole), rel=0.02)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("effective_batch", [1, 7, 16, 512, 5000])
def test_the_schedule_s_epoch_is_the_order_s(packing: bool, effective_batch: int) -> None:
    lengths = GSM8K_LENGTHS if effective_batch > 1 else GSM8K_LENGTHS[:150]
    ascending = sorted(lengths)
    quantiles = tuple(ascending[round((len(ascending) - 1) * p / 100)] for p in range(101))
    stats = stats_of(quantiles, len(lengths), 0.5, n_held_out=5, starts=(0,) * 101)
    schedule = schedule_for(load_profile("8gb"), Wishes(epochs=2.0), stats, effective_batch, 2048)
    order = batches_of_epoch(
        lengths,
        micro_batch=1,
        accumulation=effective_batch,
        seed=0,
        epoch=1,
        packed_tokens=2048 if packing else None,
    )
    assert schedule.total_steps == 2 * len(order)


class _InMemory(list[Example]):
    """As much of `Examples` as the order asks for."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(example) for example in self])


@pytest.mark.parametrize("packing", [False, True])
def test_steps_go_on_from_any_step(packing: bool) -> None:
    """Two epochs and a half of 6 steps each; every epoch has every example once."""
    data = _InMemory(_rows((9, 5, 7, 16, 3, 12, 8, 6, 14, 4, 10)))
    shape = SimpleNamespace(
        micro_batch=1, accumulation=2, seq_len=32, seed=4, total_steps=15, packing=packing
    )
    made = TrainingData(shape, data, data, 0)  # type: ignore[arg-type]
    whole = list(made.steps_from(0))
    assert [epoch for epoch, _ in whole] == [0] * 6 + [1] * 6 + [2] * 3
    for at in range(16):
        assert list(made.steps_from(at)) == whole[at:]
    for epoch in (0, 1):
        seen = [e for n, step in whole for row in step for e in row if n == epoch]
        assert sorted(map(id, seen)) == sorted(map(id, data))
    assert whole[:6] != [(0, step) for _, step in whole[6:12]]


def test_a_small_data_set_s_rows_differ_from_epoch_to_epoch() -> None:
    """Though one window holds it all."""
    order = partial(
        batches_of_epoch, GSM8K_LENGTHS[:264], micro_batch=1, accumulation=16, seed=0, packed_tokens=2048
    )
    rows = [{frozenset(row) for step in order(epoch=epoch) for row in step} for epoch in (1, 2)]
    assert len(rows[0] & rows[1]) < 0.1 * len(rows[0])


def test_worked_examples_of_padding() -> None:
    assert padded_share(range(1, 102), micro_batch=2, effective_batch=2, seq_len=1000) == pytest.approx(
        0.0577, abs=1e-4
    )
    assert padded_share([50] * 101, micro_batch=4, effective_batch=8, seq_len=512) == 0
    assert rows_per_step([100] * 101, micro_batch=2, effective_batch=16, seq_len=250) == 4


def _batch(step: StepConfig) -> Batch:
    """A packed row of the plan's full shape; all but the first tokens train."""
    shape = meta_batch(step)
    ids, targets = (torch.randint(5, 40, t.shape) for t in (shape.input_ids, shape.targets))
    starts = set(range(-1, step.micro_batch * step.seq_len, step.seq_len))
    positions = [at for at in range(ids.shape[1]) if at not in starts]
    return Batch(ids, torch.tensor(positions), targets, lengths=shape.lengths)


def _traced_and_measured(source: ModelSource, step: StepConfig) -> tuple[int, int]:
    trace = trace_step(source.config, step, "cpu")
    held = sum(a.n_bytes for a in trace.allocations if a.component in WEIGHTS)
    model = add_adapters(load(source, step, "cpu"), step).train()
    return peak_of(trace)[0], held + executed_step_bytes(model, step, lambda: [_batch(step)])


def test_packed_trace_equals_the_executed_step(smollm: Path) -> None:
    """Within 1 % of what the real step allocates on CPU, and never more than 0.5 % under it."""
    levers = Levers(loss_chunk_tokens=64)
    step = StepConfig(
        seq_len=64, micro_batch=2, packing=True, accumulation=1, compute_dtype="fp32", levers=levers
    )
    predicted, measured = _traced_and_measured(ModelSource(str(smollm)), step)
    assert -0.005 < predicted / measured - 1 < 0.01, (predicted, measured)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_trace_equals_the_executed_step_of_a_small_model(
    tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    """Three examples that fill a row, with Mistral each under its window's mask."""
    config = _config(kind)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    step = exact_step(
        "llama",
        rank=8,
        dropout=0.05,
        seq_len=200,
        micro_batch=3,
        packing=True,
        accumulation=1,
        levers=Levers(gradient_checkpointing=checkpointing, loss_chunk_tokens=64),
    )
    predicted, measured = _traced_and_measured(ModelSource(str(tmp_path)), step)
    assert -0.005 < predicted / measured - 1 < 0.01, (predicted, measured)


TRACED = ("llama", "mistral", "gemma3_text")
_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def _config(kind: str, n_layers: int = 2) -> Any:
    more: dict[str, Any] = {"num_hidden_layers": n_layers}
    if kind != "llama":
        more["sliding_window"] = 60
    if kind == "gemma3_text":
        more |= {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * (n_layers // 2)}
    return AutoConfig.for_model(kind, **{**_SMALL, **more})


def _segments(generator: random.Random, step: StepConfig, shortest: int, longest: int) -> list[int]:
    """Lengths that data/packed_order.py might put in one row, which they fill."""
    room, found = step.micro_batch * step.seq_len, [step.seq_len] * generator.randint(0, step.micro_batch - 1)
    room -= sum(found)
    while room >= 2:
        found.append(min(generator.randint(shortest, longest), room))
        room -= found[-1] + (len(found) >= step.micro_batch)
    generator.shuffle(found)
    return found


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("backend", "capability"),
    [("cuda", (8, 9)), ("cuda", (7, 5)), ("cpu", None)],
    ids=["ada", "turing", "cpu"],
)
def test_no_row_takes_more_than_the_planned_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: bool, backend: Any, capability: Any
) -> None:
    """Whatever lengths share it; logits count little here, so that attention's part is seen."""
    levers = Levers(gradient_checkpointing=checkpointing, loss_chunk_tokens=16)
    step = StepConfig(seq_len=120, micro_batch=3, packing=True, target_modules=LLAMA_LIKE, levers=levers)
    planned = peak_of(trace_step(_config(kind), step, backend, capability))[0]
    generator, shares = random.Random(f"{kind} {checkpointing} {capability}"), []
    for shortest, longest in ((8, 12), (2, 120), (50, 60), (100, 120), (61, 61)):
        lengths = tuple(_segments(generator, step, shortest, longest))
        row, trained = meta_batch(step), sum(lengths) - len(lengths)
        batch = replace(
            row,
            input_ids=row.input_ids[:, : sum(lengths)].clone(),
            positions=row.positions[:trained].clone(),
            targets=row.targets[:trained].clone(),
            lengths=lengths,
        )
        monkeypatch.setattr(run, "meta_batches", lambda *_, batch=batch: [batch])
        shares.append(peak_of(trace_step(_config(kind), step, backend, capability))[0] / planned)
        monkeypatch.undo()
    assert max(shares) <= 1, shares
    if capability != (7, 5):  # where grouped heads take O(T^2), short examples take far less
        assert max(shares) > 0.95, shares


@pytest.mark.parametrize("kind", TRACED)
def test_extended_packed_trace_equals_the_whole_model_s(kind: str) -> None:
    """Masks are made in one layer for all, and two rows are traced where there is a window."""
    config = _config(kind, 12)
    step = StepConfig(seq_len=120, micro_batch=2, packing=True, target_modules=("q_proj", "v_proj"))
    extended, whole = trace_all_layers(config, step, "cuda"), trace_step(config, step, "cuda")
    assert peak_of(extended) == peak_of(whole)
    sizes = [[a.n_bytes for a in trace.allocations] for trace in (extended, whole)]
    assert replay_reserved(extended.events, sizes[0]) == replay_reserved(whole.events, sizes[1])


def test_packing_costs_little_memory() -> None:
    """Under recompute as much as the padded batch of the same tokens, to 2 %."""
    step = StepConfig(seq_len=512, micro_batch=2, target_modules=LLAMA_LIKE)
    packed = step.model_copy(update={"packing": True})
    before, after = (estimate(_config("llama"), s).peak_allocated_bytes for s in (step, packed))
    assert after == pytest.approx(before, rel=0.02)
