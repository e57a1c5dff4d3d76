"""Wishes that contradict each other are told together; and what follows from wishes: schedule, adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.data.stats import DataStats
from lowvram.engine.config import PAGED, StepConfig
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.hardware import Hardware, card_of_size, probe
from lowvram.planner.build import make_plan
from lowvram.planner.first_step import with_adapter
from lowvram.planner.profiles import Profile, load_profile
from lowvram.planner.schedule import Schedule, batch_factor, schedule_for
from lowvram.planner.wishes import Wishes
from lowvram.units import GiB
from tests.tiny import stats_of

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
PROFILE = load_profile("8gb")
Config = Callable[[dict[str, object]], Path]


@pytest.fixture
def source(config_only: Config) -> ModelSource:
    return ModelSource(str(config_only(SMALL)))


def _gpu(**changes: Any) -> Hardware:
    return card_of_size(8 * GiB, probe(trial=False)).model_copy(update=changes)


def _cpu() -> Hardware:
    none = {"backend": "cpu", "capability": None, "context_bytes": 0, "held_bytes": 0, "bf16": False}
    return probe(trial=False).model_copy(update=none)


def _turing() -> Hardware:
    return _gpu(name="RTX 2080", capability=(7, 5), bf16=False)


def _refusal(source: ModelSource, hardware: Hardware, **wishes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_plan(source, hardware, PROFILE, Wishes(**wishes))
    return caught.value


# --- contradictions ---

TOGETHER = {
    "rank": 999,
    "seq_len": 4096,
    "batch": 6,
    "micro_batch": 4,
    "precision": "int8",
    "optimizer": "paged_adamw8bit",
    "no_offload": True,
    "packing": True,
    "levers": "double_quantization=on,offload_checkpoints=on,tile_tokens=1024",
}
NEAREST = {  # what each message says -> what its remedy names, and the wishes that follow it
    "--rank 999 is above the full rank 128": ("--rank 128", {"rank": 128}),
    "--seq-len 4096 is beyond the model's 512": ("--seq-len 512", {"seq_len": 512}),
    "--micro-batch 4 does not divide the 6": ("--micro-batch 3, or --batch 8", {"micro_batch": 3}),
    "double_quantization=on is for an NF4 base": ("--precision nf4", {"precision": "nf4"}),
    "--no-offload and optimizer=paged_adamw8bit": ("Leave one of them out", {"optimizer": "adamw8bit"}),
    "--no-offload and offload_checkpoints=on": ("Leave one", {"levers": "double_quantization=on"}),
    "--packing and levers that tile": ("Leave one", {}),  # as the line above
}


def _numbered(text: str) -> list[str]:
    return [re.sub(r"^\d+\. ", "", line.strip()) for line in text.splitlines() if re.match(r" *\d+\. ", line)]


def test_contradictions_are_told_together_and_each_remedy_works(source: ModelSource) -> None:
    """All of them in one error; every remedy followed leaves the others; all of them followed is a plan."""
    error = _refusal(source, _gpu(), **TOGETHER)
    messages, remedies = _numbered(error.message), _numbered(error.remedy)
    assert len(messages) == len(remedies) == len(NEAREST)
    assert error.message.startswith(f"{len(NEAREST)} wishes cannot be granted:")
    for says, (names, changes) in NEAREST.items():
        at = next(n for n, message in enumerate(messages) if says in message)
        assert names in remedies[at]
        left = _numbered(_refusal(source, _gpu(), **TOGETHER | changes).message)
        gone = set(messages) - set(left)
        assert messages[at] in gone or not changes
        assert not set(left) - set(messages)
    followed = TOGETHER.copy()
    for _, changes in NEAREST.values():
        followed |= changes
    plan = make_plan(source, _gpu(), PROFILE, Wishes(**followed))
    assert (plan.rank, plan.seq_len, plan.micro_batch, plan.accumulation) == (128, 512, 3, 2)
    assert (plan.base_precision, plan.optimizer, plan.packing) == ("nf4", "adamw8bit", True)
    assert plan.levers.double_quantization


def test_the_other_value_of_each_remedy_works_too(source: ModelSource) -> None:
    """`--batch 8` as well as `--micro-batch 3`; `Leave it out` as well as `--precision nf4`."""
    plan = make_plan(source, _gpu(), PROFILE, Wishes(batch=8, micro_batch=4, seq_len=64))
    assert (plan.micro_batch, plan.accumulation) == (4, 2)
    plan = make_plan(source, _gpu(), PROFILE, Wishes(precision="int8", seq_len=64))
    assert plan.base_precision == "int8"
    wishes = Wishes(levers="offload_checkpoints=on,tile_tokens=1024", seq_len=64)
    assert make_plan(source, _gpu(), PROFILE, wishes).levers.offload_checkpoints
    assert make_plan(source, _gpu(), PROFILE, Wishes(packing=True, seq_len=64)).packing


def test_unknown_targets_are_told_beside_a_cpu_s_refusals(source: ModelSource) -> None:
    """fp16's loss scaling and paging need a GPU; what the device can is named."""
    wishes = {
        "targets": "q_proj,no_proj",
        "precision": "fp16",
        "optimizer": "paged_adamw8bit",
        "seq_len": 999,
    }
    error = _refusal(source, _cpu(), **wishes)
    messages, remedies = _numbered(error.message), _numbered(error.remedy)
    assert len(messages) == len(remedies) == 4
    for says, names in {
        "no linear layer called no_proj; it has q_proj, k_proj": "--targets all-linear",
        "--seq-len 999": "--seq-len 512",
        "--precision fp16 needs a GPU": "--precision fp32, int8 or nf4",
        "paged_adamw8bit: a CPU": "--optimizer adamw8bit or adamw",
    }.items():
        at = next(n for n, message in enumerate(messages) if says in message)
        assert names in remedies[at]
    followed = {"targets": "all-linear", "seq_len": 512, "optimizer": "adamw8bit"}
    for precision in ("fp32", "int8", "nf4"):
        plan = make_plan(source, _cpu(), load_profile("cpu"), Wishes(**followed, precision=precision))
        assert (plan.base_precision, plan.optimizer) == (precision, "adamw8bit")


@pytest.mark.parametrize("optimizer", PAGED)
def test_a_paged_optimizer_asks_for_a_gpu_and_its_host(optimizer: str, source: ModelSource) -> None:
    assert f"--optimizer {optimizer}: a CPU" in _refusal(source, _cpu(), optimizer=optimizer).message
    error = _refusal(source, _gpu(), optimizer=optimizer, no_offload=True)
    assert error.message == f"--no-offload and optimizer={optimizer} contradict each other."
    plan = make_plan(source, _gpu(), PROFILE, Wishes(optimizer=optimizer, seq_len=64))
    assert plan.optimizer == optimizer


def test_one_contradiction_is_no_list(source: ModelSource) -> None:
    error = _refusal(source, _gpu(), rank=999)
    assert "1." not in error.message + error.remedy
    assert error.message.startswith("--rank 999 is above")


def test_a_card_without_bf16_is_not_given_any(source: ModelSource) -> None:
    """Turing multiplies fp16: a wish for bf16 is refused, and left alone the plan computes in fp16."""
    error = _refusal(source, _turing(), precision="bf16")
    assert "RTX 2080 has no bf16 arithmetic" in error.message
    assert "--precision fp16" in error.remedy
    for wishes, base in (({}, None), ({"precision": "fp16"}, "fp16"), ({"precision": "nf4"}, "nf4")):
        plan = make_plan(source, _turing(), PROFILE, Wishes(seq_len=64, **wishes))
        assert plan.compute_dtype == "fp16"
        assert plan.base_precision in (base, plan.base_precision if base is None else base)
        assert plan.base_precision != "bf16"
    assert make_plan(source, _gpu(), PROFILE, Wishes(seq_len=64)).compute_dtype == "bf16"


# --- the adapter ---


def _adapted(rank: int, profile: Profile = PROFILE, **wishes: Any) -> StepConfig:
    return with_adapter(StepConfig(), rank, profile, Wishes(**wishes))


def test_scaling_goes_on_from_the_profile_s_rank() -> None:
    """alpha/r up to it, alpha/sqrt(r) above: no jump, and never stronger than at the profile's own rank."""
    own = PROFILE.alpha / PROFILE.rank
    assert _adapted(PROFILE.rank).scaling == own
    assert not _adapted(PROFILE.rank).use_rslora
    for rank in range(1, PROFILE.rank + 1):
        assert _adapted(rank).scaling == PROFILE.alpha / rank
    for rank in (PROFILE.rank + 1, 2 * PROFILE.rank, 64, 256):
        step = _adapted(rank)
        assert step.use_rslora
        assert step.scaling == pytest.approx(own * math.sqrt(PROFILE.rank / rank), rel=1e-3)


def test_wishes_for_alpha_and_rslora_are_kept() -> None:
    """An alpha of one's own is scaled as it always was, unless rsLoRA is asked for as well."""
    step = _adapted(64, alpha=7.0)
    assert (step.alpha, step.use_rslora, step.scaling) == (7.0, False, 7 / 64)
    step = _adapted(64, alpha=7.0, rslora=True)
    assert (step.alpha, step.use_rslora, step.scaling) == (7.0, True, 7 / 8)
    step = _adapted(64, rslora=False)
    assert (step.alpha, step.use_rslora) == (PROFILE.alpha, False)
    assert _adapted(2, rslora=True).use_rslora


def test_rslora_that_was_asked_for_is_peft_s() -> None:
    """The profile's alpha over sqrt(r) at any rank, as the comparison in the README trained it."""
    for rank in (2, PROFILE.rank, 64):
        step = _adapted(rank, rslora=True)
        assert (step.alpha, step.scaling) == (PROFILE.alpha, PROFILE.alpha / math.sqrt(rank))
    never = PROFILE.model_copy(update={"use_rslora": "never"})
    assert _adapted(PROFILE.rank, never, rslora=True).alpha == PROFILE.alpha


@pytest.mark.parametrize(
    ("rule", "ranks_with"), [("never", ()), ("always", (2, 4, 64)), ("above_rank", (64,))]
)
def test_the_profile_says_which_ranks_are_stabilised(rule: str, ranks_with: tuple[int, ...]) -> None:
    """Where it says always, its alpha is meant for that already."""
    profile = PROFILE.model_copy(update={"use_rslora": rule})
    assert tuple(rank for rank in (2, 4, 64) if _adapted(rank, profile).use_rslora) == ranks_with
    if rule != "above_rank":
        assert {_adapted(rank, profile).alpha for rank in (2, 4, 64)} == {profile.alpha}


def test_a_profile_that_always_scales_by_the_root_says_whose_alpha_it_is(config_only: Any) -> None:
    source = ModelSource(str(config_only(SMALL)))
    profile = load_profile("cpu").model_copy(update={"use_rslora": "always"})
    plan = make_plan(source, _cpu(), profile, Wishes(seq_len=64, precision="fp32"))
    (told,) = [reason for reason in plan.reasons if reason.startswith("LoRA r=")]
    assert f"alpha={profile.alpha:g} (profile cpu), scaled by alpha/sqrt(r) on" in told


def test_plain_lora_has_its_reason_and_other_ways_have_theirs(config_only: Any) -> None:
    source, plain = ModelSource(str(config_only(SMALL))), "plain LoRA: of the other ways"
    for asked, expected in (
        ({}, True),
        ({"rank": 3}, True),
        ({"dora": True}, False),
        ({"lora_fa": True}, False),
    ):
        plan = make_plan(source, _cpu(), load_profile("cpu"), Wishes(seq_len=64, precision="fp32", **asked))
        assert any(reason.startswith(plain) for reason in plan.reasons) is expected, asked


# --- the schedule ---


def _stats(n_examples: int, n_late: int = 0) -> DataStats:
    """Examples of 50 tokens; the answers of `n_late` per cent begin at 40, of the others at 0."""
    return stats_of((50,) * 101, n_examples, 0.4, n_held_out=5, starts=(0,) * (101 - n_late) + (40,) * n_late)


def _schedule(batch: int, stats: DataStats | None = None, seq_len: int = 64, **wishes: Any) -> Schedule:
    return schedule_for(PROFILE, Wishes(**wishes), stats, batch, seq_len)


def test_the_learning_rate_follows_the_root_of_the_batch_within_four_times() -> None:
    """The profile's 2e-4 is for 16 examples."""
    assert (PROFILE.learning_rate, PROFILE.effective_batch) == (2e-4, 16)
    rates = {1: 5e-5, 4: 1e-4, 16: 2e-4, 64: 4e-4, 256: 8e-4, 4096: 8e-4}
    assert {batch: _schedule(batch).learning_rate for batch in rates} == rates
    assert _schedule(64, learning_rate=0.01).learning_rate == 0.01
    large = PROFILE.model_copy(update={"effective_batch": 256})
    assert [batch_factor(large, n) for n in (1, 16, 64, 256)] == [0.25, 0.25, 0.5, 1]


def test_lora_ga_learns_at_a_tenth_of_the_rate() -> None:
    """At the whole rate it ended worse than it began, in benchmarks/adapters.csv."""
    assert _schedule(16, init="lora_ga").learning_rate == 2e-5
    assert _schedule(64, init="lora_ga").learning_rate == 4e-5
    assert _schedule(16, init="lora_ga", learning_rate=0.01).learning_rate == 0.01
    assert _schedule(16, init="lora_one").learning_rate == 2e-4


def test_steps_are_wished_or_follow_from_epochs_and_data() -> None:
    assert _schedule(16, steps=7).total_steps == 7
    assert _schedule(16, _stats(100), steps=7).total_steps == 7
    assert _schedule(16).total_steps == 1
    assert _schedule(16, _stats(100)).total_steps == 3 * 7  # the profile's 3 epochs of 6.25 steps
    assert _schedule(16, _stats(100), epochs=0.5).total_steps == 4
    assert _schedule(16, _stats(3), epochs=0.01).total_steps == 1
    lost = _stats(100, n_late=30)
    assert _schedule(1, lost, seq_len=32, epochs=1.0).total_steps == 100 - lost.n_lost_at(32) < 100
    assert _schedule(1, lost, seq_len=64, epochs=1.0).total_steps == 100


def test_the_warm_up_is_a_share_of_the_steps_and_ends_before_them() -> None:
    """5 %, longer for a larger learning rate, at most 20 %."""
    assert [_schedule(16, steps=n).warmup_steps for n in (1, 2, 20, 1000)] == [0, 0, 1, 50]
    assert _schedule(64, steps=1000).warmup_steps == 100
    assert _schedule(4096, steps=1000).warmup_steps == 200
    assert _schedule(1, steps=1000).warmup_steps == 50
    long = PROFILE.model_copy(update={"warmup_share": 0.99})
    assert schedule_for(long, Wishes(steps=10), None, 16, 64).warmup_steps == 9


def test_held_out_losses_and_checkpoints_are_spread_over_the_run() -> None:
    for steps, evaluate, save in ((1, 1, 1), (4, 1, 1), (100, 20, 20), (10_000, 2000, 50)):
        schedule = _schedule(16, steps=steps)
        assert (schedule.evaluate_every, schedule.save_every) == (evaluate, save)
