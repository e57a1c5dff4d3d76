"""The lever liger: refused where it cannot run, else equal results and a trace that sees what it keeps.

Liger and Triton (286 MB) are no part of the test environment: tests/stand_in has their interface, with
kernels computed by numpy. `scripts/check_liger.py` makes the same comparisons with the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from lowvram import hardware
from lowvram.engine import liger
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.attention import register
from lowvram.engine.batch import collate
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.model import attention_for, load, skeleton
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss
from lowvram.errors import ConfigError
from lowvram.memory.cache import _code
from lowvram.memory.estimate import peak_of
from lowvram.memory.run import trace_step
from lowvram.planner.build import make_plan
from lowvram.planner.profiles import profile_for
from lowvram.planner.recheck import checked
from lowvram.planner.wishes import Wishes
from lowvram.units import GiB
from tests.test_memory import ALL, WEIGHTS, _really_allocated
from tests.tiny import SHAPE, examples

ON = Levers(liger=True)
_SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SHAPE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without them, which this one may not be."""
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-ins, able to run on a CPU as Triton's interpreter does."""
    real = [name for name in sys.modules if name.split(".")[0] in ("liger_kernel", "triton")]
    for name in real:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CC", "cc")
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("liger_kernel", "triton")]:
        del sys.modules[name]


@pytest.mark.usefixtures("absent")
def test_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ConfigError) as caught:
        skeleton(LlamaConfig(**SHAPE), StepConfig(levers=ON))
    assert "liger_kernel and triton not installed" in caught.value.message
    assert "pip install 'lowvram[liger]'" in caught.value.remedy


@pytest.mark.usefixtures("present")
def test_refused_where_it_would_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gelu" in liger.why_not_liger(LlamaConfig(**SHAPE, hidden_act="gelu"))
    assert liger.why_not_liger(LlamaConfig(**SHAPE)) == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="needs a GPU"):
        load(ModelSource(str(tmp_path)), StepConfig(levers=ON), "cpu")
    for name in ("CC", "PATH"):
        monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match="needs a C compiler"):
        liger.require_liger(LlamaConfig(**SHAPE), "cuda")


def _loss_and_gradients(levers: Levers) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=0))
    register()
    base.set_attn_implementation(attention_for(base))
    for parameter in base.parameters():
        parameter.data.mul_(5)  # else the loss is that of uniform guessing, whatever the layers do
    if levers.liger:
        liger.apply_liger(base)
    step = StepConfig(
        base_precision="fp32",
        compute_dtype="fp32",
        dropout=0.0,
        rank=4,
        target_modules=ALL,
        levers=levers,
    )
    model = add_adapters(base, step).train()
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    loss = SummedLoss(model, step)(*collate(examples((9, 17, 4), first_id=1), 0).tensors)
    loss.backward()
    gradients = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": False}, {}, {"tile_tokens": 7}, {"offload_checkpoints": True}]
)
def test_loss_and_gradients_are_those_without(changes: dict[str, Any]) -> None:
    plain, ours = (_loss_and_gradients(Levers(liger=on, **changes)) for on in (False, True))
    assert set(plain) == set(ours)
    for name, wanted in plain.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert any(not torch.equal(ours[name], plain[name]) for name in plain), "other arithmetic, other rounding"


@pytest.mark.usefixtures("present")
def test_no_other_model_is_changed() -> None:
    before = dict(vars(modeling_llama))
    liger.apply_liger(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    assert vars(modeling_llama) == before
    other = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert all("forward" not in vars(module) for module in other.modules())


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": False}, {}, {"tile_tokens": 48}])
def test_trace_equals_the_executed_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    """And what it saves: the gate's product with 4 bytes a number, the norms' copies, are not kept."""
    LlamaForCausalLM(LlamaConfig(**{**_SMALL, "vocab_size": 97})).save_pretrained(tmp_path)
    source, peaks = ModelSource(str(tmp_path)), {}
    for on in (False, True):
        step = StepConfig(
            base_precision="fp32",
            compute_dtype="fp32",
            seq_len=128,
            accumulation=1,
            target_modules=ALL,
            levers=Levers(liger=on, loss_chunk_tokens=16, **changes),
        )
        trace = trace_step(source.config, step, "cpu")
        held = sum(a.n_bytes for a in trace.allocations if a.component in WEIGHTS)
        peaks[on] = peak_of(trace)[0]
        assert abs(peaks[on] / (held + _really_allocated(source, step)) - 1) < 0.01
    assert peaks[True] < peaks[False]


@pytest.mark.usefixtures("present")
def test_launches_are_skipped_on_meta_tensors_only_and_only_in_a_trace() -> None:
    from triton.runtime import JITFunction, KernelInterface  # type: ignore[import-not-found]

    from lowvram.memory.launches import no_launches_on_meta

    ran: list[float] = []
    own, kernel = KernelInterface.__getitem__, JITFunction(lambda array: ran.append(array[0]))
    meta = torch.zeros(2, device="meta")
    with no_launches_on_meta():
        kernel[(1,)](meta)
        kernel[(1,)](torch.full((2,), 3.0))
    assert ran == [3.0]
    assert KernelInterface.__getitem__ is own
    with pytest.raises(AssertionError, match="address 0"):
        kernel[(1,)](meta)


@pytest.fixture
def card() -> hardware.Hardware:
    return hardware.card_of_size(8 * GiB, hardware.probe())


@pytest.mark.usefixtures("present")
def test_planned_where_it_is_installed(
    config_only: Callable[[dict[str, object]], Path], card: hardware.Hardware
) -> None:
    source = ModelSource(str(config_only(_SMALL)))
    plan = make_plan(source, card, profile_for(card), Wishes(seq_len=64))
    assert plan.levers.liger
    assert any(reason.startswith("liger: on, it is installed") for reason in plan.reasons)
    without = make_plan(source, card, profile_for(card), Wishes(seq_len=64, levers="liger=off"))
    assert not without.levers.liger
    assert plan.estimate.n_events < without.estimate.n_events
    old = card.model_copy(update={"capability": (7, 5)})
    assert not make_plan(source, old, profile_for(old), Wishes(seq_len=64)).levers.liger
    assert checked(plan, source, card).estimate == plan.estimate


@pytest.mark.usefixtures("absent")
def test_not_planned_where_it_is_not(
    config_only: Callable[[dict[str, object]], Path], card: hardware.Hardware
) -> None:
    source = ModelSource(str(config_only(_SMALL)))
    plan = make_plan(source, card, profile_for(card), Wishes(seq_len=64))
    assert not plan.levers.liger
    with pytest.raises(ConfigError, match="not installed"):
        make_plan(source, card, profile_for(card), Wishes(seq_len=64, levers="liger=on"))
    edited = plan.model_copy(update={"levers": plan.levers.model_copy(update={"liger": True})})
    with pytest.raises(ConfigError, match="not installed"):
        checked(edited, source, card)


def test_a_remembered_trace_is_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.memory import cache

    seen = []
    for installed in ("0.8.5", "0.9.0"):
        monkeypatch.setattr(cache, "version", lambda _name, installed=installed: installed)
        seen.append(_code.__wrapped__())
    assert seen[0] != seen[1]


@pytest.mark.usefixtures("present")
def test_an_older_version_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_act="silu")
    for number, reason in (
        ("0.8.4", "liger-kernel 0.8.5 or newer not installed"),
        ("0.8.5", ""),
        ("0.10.0", ""),
    ):
        monkeypatch.setattr(liger, "version", lambda _name, number=number: number)
        assert liger.why_not_liger(config) == reason
