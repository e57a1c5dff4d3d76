"""Learning the same: accumulation, clipping, schedules, optimizers, seeds; beside torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoConfig,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lowvram.device_rates import DeviceRates
from lowvram.engine.adapters import trainable
from lowvram.engine.batch import collate
from lowvram.engine.config import StepConfig
from lowvram.engine.optimizer import make_optimizer
from lowvram.engine.shape import shape_of
from lowvram.engine.step import SummedLoss, train_step
from lowvram.memory.estimate import estimate
from lowvram.planner.arithmetic import resident_bytes
from lowvram.planner.time_model import TimeModel
from lowvram.planner.workload import Workload
from lowvram.training import checkpoint
from lowvram.training.run_folder import RunFolder
from tests.fault_run import adapter_bytes, learned, save_plan
from tests.forked_cli import ForkedCli
from tests.tiny import examples
from tests.tiny_models import adapted_model, assert_same, exact_step, plain_loss_and_gradients

LENGTHS = (60, 3, 7, 31, 2)  # 40, 2, 5, 21 and 2 trained tokens
SPLITS: dict[str, list[slice]] = {
    "one by one": [slice(n, n + 1) for n in range(5)],
    "two and three": [slice(0, 2), slice(2, 5)],
    "four and one": [slice(0, 4), slice(4, 5)],
}
Gradients = dict[str, torch.Tensor]


class Seen(torch.optim.SGD):
    """What an optimizer gets to see; nothing is updated."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(parameters.values())
        self._by_name, self.gradients = parameters, Gradients()

    def step(self, *_: Any) -> None:  # type: ignore[override]
        self.gradients = {name: p.grad.clone() for name, p in self._by_name.items() if p.grad is not None}


def _seen(split: list[slice], **options: Any) -> tuple[float, float, Gradients]:
    """Loss, norm and gradients of one step over LENGTHS, in float64."""
    step = exact_step("llama")
    model = adapted_model("llama", step)
    rows, seen = examples(LENGTHS), Seen(trainable(model))
    batches = [collate(rows[part], 0) for part in split]
    result = train_step(SummedLoss(model, step), seen, batches, **{"max_grad_norm": 1e9, **options})
    return float(result.loss), float(result.grad_norm), seen.gradients


@pytest.mark.parametrize("split", SPLITS)
def test_accumulation_with_unequal_token_counts_equals_one_big_batch(split: str) -> None:
    """And transformers' own mean over all trained tokens; a mean of the parts' means would be far off."""
    loss, norm, gradients = _seen([slice(0, 5)])
    expected, references = plain_loss_and_gradients("llama", examples(LENGTHS))
    parted = _seen(SPLITS[split])
    assert parted[0] == pytest.approx(loss, rel=1e-12)
    assert parted[1] == pytest.approx(norm, rel=1e-9)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert_same(parted[2], gradients)
    assert_same(parted[2], references)
    means = [_seen([part])[0] for part in SPLITS[split]]
    assert abs(sum(means) / len(means) - loss) > 1e-4


def test_three_adamw_steps_end_at_the_same_weights_however_they_are_split() -> None:
    """With clipping, which sees the whole step's gradient, and decay."""
    ends = []
    for split in ([slice(0, 5)], *SPLITS.values()):
        step = exact_step("llama", weight_decay=0.1)
        model = adapted_model("llama", step)
        optimizer, loss_of = make_optimizer(trainable(model), step, 1e-2), SummedLoss(model, step)
        for seed in range(3):
            rows = examples(LENGTHS, seed)
            train_step(loss_of, optimizer, [collate(rows[part], 0) for part in split], max_grad_norm=0.01)
        ends.append({name: p.detach().clone() for name, p in trainable(model).items()})
    start = trainable(adapted_model("llama", exact_step("llama")))
    for end in ends[1:]:
        for name, value in ends[0].items():
            assert float((value - start[name].detach()).abs().max()) > 1e-2
            torch.testing.assert_close(end[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("clip", ["torch's", "accelerate's"])
def test_clipping_equals_torch_s(clip: str) -> None:
    """Of all gradients together; the norm that is told is the one before."""
    _, norm, whole = _seen([slice(0, 5)])
    options: dict[str, Any] = {"max_grad_norm": norm / 3}
    if clip == "accelerate's":  # which the loop uses
        options["clip"] = Accelerator(cpu=True).clip_grad_norm_
    _, told, clipped = _seen(SPLITS["two and three"], **options)
    reference = [nn.Parameter(torch.zeros_like(gradient)) for gradient in whole.values()]
    for parameter, gradient in zip(reference, whole.values(), strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(reference, norm / 3)
    assert told == pytest.approx(norm, rel=1e-9)
    assert_same(clipped, {name: p.grad for name, p in zip(whole, reference, strict=True)})
    lengths = torch.stack([gradient.norm() for gradient in clipped.values()])
    assert float(lengths.norm()) == pytest.approx(norm / 3, rel=1e-5)  # torch adds 1e-6 to the norm


# Schedules, through the command line

SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": get_constant_schedule_with_warmup,
}


def _expected_rates(schedule: str, rate: float, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    counts = (warmup,) if schedule == "constant" else (warmup, total)
    made = SCHEDULES[schedule](optimizer, *counts)
    rates = []
    for _ in range(total):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_s_learning_rates_are_transformers(
    schedule: str, forked_cli: ForkedCli, fault_home: Path, tmp_path: Path
) -> None:
    changes = {"schedule": schedule, "warmup_steps": 3, "total_steps": 9, "learning_rate": 3e-3}
    plan = save_plan(forked_cli, fault_home, tmp_path / "plan.yaml", **changes)
    ended = forked_cli.run("train", plan, "-o", tmp_path / "run")
    assert ended.code == 0, ended.err
    rates = [record.learning_rate for record in RunFolder(tmp_path / "run").read_metrics()]
    assert rates == pytest.approx(_expected_rates(schedule, 3e-3, 3, 9), rel=1e-12)
    assert rates[0] == 0
    assert max(rates) == rates[3] == 3e-3
    assert rates[-1] == 3e-3 or (rates[-1] < 1e-3 and schedule != "constant")


# Optimizers

OPTIMIZERS: dict[str, tuple[type, torch.dtype]] = {
    "adamw": (torch.optim.AdamW, torch.float32),
    "adamw8bit": (bnb.optim.AdamW8bit, torch.uint8),
    "paged_adamw": (bnb.optim.PagedAdamW, torch.float32),
    "paged_adamw8bit": (bnb.optim.PagedAdamW8bit, torch.uint8),
}
NAMES = {"layer.lora_A.weight": (64, 96), "layer.lora_B.weight": (96, 64), "layer.bias": (64,)}
pages_nothing = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def _parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in NAMES.items()}


def _take(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pages_nothing
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_is_what_its_name_says_and_moves_as_adamw(name: str) -> None:
    """Those in float32 to rounding, those in 8 bits by 5 % of the way at most."""
    step = StepConfig.model_validate({"optimizer": name, "weight_decay": 0.1})
    parameters, references, start = _parameters(), _parameters(), _parameters()
    made = make_optimizer(parameters, step, 1e-2)
    kind, dtype = OPTIMIZERS[name]
    assert type(made) is kind
    assert getattr(made, "is_paged", False) == name.startswith("paged")
    assert name != "adamw" or all(group["fused"] for group in made.param_groups)
    decays = [{"params": [p], "weight_decay": 0.1 * (p.dim() == 2)} for p in references.values()]
    reference = torch.optim.AdamW(decays, lr=1e-2)
    _take(made, parameters, range(8))
    _take(reference, references, range(8))
    moments = [v for v in made.state[parameters["layer.lora_A.weight"]].values() if _is_moment(v)]
    assert [moment.dtype for moment in moments[:2]] == [dtype, dtype]
    far = 0.05 if dtype == torch.uint8 else 1e-5
    for key, parameter in parameters.items():
        way = (references[key] - start[key]).norm()
        assert float(way) > 0.1
        assert float((parameter - references[key]).norm() / way) < far, key


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == (64, 96)


@pages_nothing
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_decays_a_vector(name: str) -> None:
    """Without a gradient a matrix shrinks by decay times rate, a bias stays; B's rate is LoRA+'s."""
    step = StepConfig.model_validate({"optimizer": name, "weight_decay": 0.1, "lora_plus_ratio": 4})
    parameters = {key: nn.Parameter(torch.ones(shape)) for key, shape in NAMES.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(parameters, step, 1e-2).step()
    expected = {"layer.lora_A.weight": 1 - 1e-3, "layer.lora_B.weight": 1 - 4e-3, "layer.bias": 1.0}
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected[key]), msg=key)


@pages_nothing
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_goes_on_from_a_checkpoint_to_the_last_bit(name: str, tmp_path: Path) -> None:
    step = StepConfig.model_validate({"optimizer": name, "weight_decay": 0.1})
    whole, resumed = _parameters(), _parameters()
    straight = make_optimizer(whole, step, 1e-2)
    _take(straight, whole, range(3))
    rest: dict[str, Any] = {"epoch": 0, "step_in_epoch": 3, "plan_sha256": "", "scheduler": {}, "rng": {}}
    state = checkpoint.CheckpointState(
        step=3, adapter=dict(whole), optimizer=straight.state_dict(), extra={}, **rest
    )
    loaded = checkpoint.load(checkpoint.save(tmp_path, state))
    with torch.no_grad():
        for key, parameter in resumed.items():
            parameter.copy_(loaded.adapter[key])
    second = make_optimizer(resumed, step, 1e-2)
    second.load_state_dict(loaded.optimizer)
    for optimizer, parameters in ((straight, whole), (second, resumed)):
        _take(optimizer, parameters, range(3, 6))
    assert all(torch.equal(whole[key], resumed[key]) for key in NAMES)


ROUND = DeviceRates(
    flops=1e13, memory_bytes_per_second=1e11, host_bytes_per_second=1e10, measured=False, source="round"
)


def test_a_paged_float32_state_takes_adamw_s_eight_bytes_and_the_way_to_the_host() -> None:
    """A parameter's two moments; torch counts its steps in a float a tensor, 512 bytes on a GPU."""
    wide = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **wide, vocab_size=1000)
    shape, work = shape_of(config), Workload((512, 512), 512, 2)
    step = StepConfig(seq_len=64, rank=8, target_modules=("q_proj", "down_proj"), accumulation=1)
    state, seconds = {}, {}
    for name in OPTIMIZERS:
        asked = step.model_copy(update={"optimizer": name})
        state[name] = estimate(config, asked).components_bytes["optimizer_state"]
        seconds[name] = TimeModel(shape, ROUND, on_cpu=False).of(asked, work).optimizer
    assert state["paged_adamw"] == pytest.approx(8 * shape.n_trainable(step), rel=0.1)
    assert 0.9 * state["adamw"] < state["paged_adamw"] <= state["adamw"]
    assert seconds["adamw"] < seconds["paged_adamw8bit"] < seconds["paged_adamw"]
    assert resident_bytes(step, shape) == resident_bytes(
        step.model_copy(update={"optimizer": "paged_adamw"}), shape
    )


# Seeds

KINDS: dict[str, dict[str, Any]] = {
    "float32, padded": {},
    "NF4, packed, LoRA+": {"base_precision": "nf4", "packing": True, "lora_plus_ratio": 4.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_every_bit_and_another_seed_others(
    kind: str, forked_cli: ForkedCli, fault_home: Path, tmp_path: Path
) -> None:
    runs = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        changes = {"total_steps": 4, "seed": seed, **KINDS[kind]}
        plan = save_plan(forked_cli, fault_home, tmp_path / "plan.yaml", **changes)
        ended = forked_cli.run("train", plan, "-o", tmp_path / name)
        assert ended.code == 0, ended.err
        runs[name] = (learned(tmp_path / name), adapter_bytes(tmp_path / name))
    assert runs["one"] == runs["again"]
    losses = [[step[3] for step in runs[name][0]] for name in ("one", "other")]
    assert all(first != second for first, second in zip(*losses, strict=True))
    assert runs["one"][1] != runs["other"][1]
