"""The search against brute force over whole spaces, with made-up memory and with traces; levers, and time."""

from __future__ import annotations

import csv
import itertools
import math
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoConfig

from lowvram import hardware
from lowvram.data.padding import padded_share
from lowvram.device_rates import DeviceRates, rates_of
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.shape import ModelShape, shape_of
from lowvram.memory.estimate import MemoryEstimate, estimate
from lowvram.memory.layers import period_of
from lowvram.planner.arithmetic import floor_bytes, kept_bytes, working_bytes
from lowvram.planner.guess import Guess
from lowvram.planner.hunt import Hunt
from lowvram.planner.levers import LEVERS, Setting
from lowvram.planner.profiles import LeverName, load_profile
from lowvram.planner.space import Candidate, candidates
from lowvram.planner.time_model import TimeModel
from lowvram.planner.variants import split, value_of, with_kept, with_value
from lowvram.planner.workload import Workload
from lowvram.units import GiB

LADDER = load_profile("8gb").ladder
STEP = StepConfig(
    target_modules=("q_proj", "v_proj"),
    seq_len=512,
    accumulation=4,
    base_precision="bf16",
    levers=Levers(expandable_segments=True),
)
CARD = hardware.card_of_size(8 * GiB, hardware.probe(trial=False))


def _config(kind: str, **changes: Any) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 16384,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(kind, **shape | changes)


def _space(shape: ModelShape, step: StepConfig, ladder: tuple[str, ...], **pinned: Any) -> list[Candidate]:
    return candidates(Setting(step, shape, CARD, layer_period=1), pinned, ladder, packing=False)


def _all_steps(space: list[Candidate]) -> list[StepConfig]:
    return [one.at(index) for one in space for index in range(len(one.kept))]


def _seconds(shape: ModelShape) -> Any:
    time = TimeModel(shape, rates_of(CARD), on_cpu=False)

    def seconds(step: StepConfig) -> float:
        whole = step.micro_batch * step.accumulation
        return time.seconds(step, Workload((step.seq_len,) * 2, step.seq_len, whole))

    return seconds


# --- against brute force ---


def _made_up(shape: ModelShape, draw: random.Random) -> Any:
    """Memory that grows along every lever, by other amounts than the guess believes."""
    parts = [draw.uniform(0.7, 1.5) for _ in range(2)]
    constant = draw.uniform(0, 0.3e9)

    def estimate_of(step: StepConfig) -> MemoryEstimate:
        levers = step.levers
        kept = shape.n_layers if not levers.gradient_checkpointing else levers.kept_layers
        n_bytes = (
            constant
            + floor_bytes(step, shape)
            + parts[0] * max(working_bytes(step, shape))
            + parts[1] * kept * kept_bytes(step, shape)
        )
        return MemoryEstimate(
            peak_allocated_bytes=int(n_bytes),
            peak_reserved_bytes=int(n_bytes),
            peak_moment="",
            components_bytes={},
            phases_bytes={"forward": int(n_bytes)},
            n_events=0,
        )

    return estimate_of


@pytest.mark.parametrize("seed", range(300))
def test_finds_what_brute_force_finds_with_few_traces(seed: int) -> None:
    draw = random.Random(seed)
    shape = SHAPES[draw.choice(sorted(SHAPES))]
    ladder = tuple(draw.sample(LADDER, draw.randint(1, len(LADDER))))
    step = STEP.model_copy(update={"seq_len": draw.choice((64, 512, 3000, 9000))})
    pinned = draw.choice(({}, {}, {"base_precision": "nf4"}, {"kept_layers": 1}, {"head": "int8"}))
    space = _space(shape, step, ladder, **pinned)
    memory, seconds = _made_up(shape, draw), _seconds(shape)
    steps = [(seconds(s), memory(s).peak_reserved_bytes) for s in _all_steps(space)]
    budget = int(draw.uniform(0.9 * min(b for _, b in steps), 1.02 * max(b for _, b in steps)))
    hunt = Hunt(space, seconds, memory, budget, Guess(shape))
    found = hunt.fastest()
    best = min((s for s, n_bytes in steps if n_bytes <= budget), default=math.inf)
    assert (seconds(found) if found else math.inf) == pytest.approx(best, rel=0.005)
    assert found is None or memory(found).peak_reserved_bytes <= budget
    assert hunt.n_traced <= 60


SHAPES = {
    "untied": shape_of(_config("llama", num_hidden_layers=8)),
    "tied": shape_of(_config("qwen2", tie_word_embeddings=True)),
    "large": shape_of(_config("llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)),
    "untileable": shape_of(_config("gemma2")),
}
SMALL_LADDERS = {  # of small spaces, so that each step of them can be traced
    "recomputing": ("micro_batch", "gradient_checkpointing", "kept_layers", "loss_chunk_tokens"),
    "precision": ("gradient_checkpointing", "base_precision", "double_quantization", "embedding_on_host"),
    "head": ("gradient_checkpointing", "embedding_on_host", "optimizer", "head"),
    "tiles": ("micro_batch", "gradient_checkpointing", "offload_checkpoints", "tile_tokens"),
}


@pytest.mark.parametrize("ladder", SMALL_LADDERS)
@pytest.mark.parametrize("kind", ["llama", "tied qwen2"])
def test_finds_what_brute_force_finds_with_real_traces(kind: str, ladder: str) -> None:
    """Every step of the space is traced; then a budget between any two of them."""
    config = _config(kind.split()[-1], tie_word_embeddings=kind.startswith("tied"))
    shape, step = shape_of(config), STEP.model_copy(update={"seq_len": 1536 if ladder == "tiles" else 256})
    assert period_of(config) == 1
    space, seconds = _space(shape, step, SMALL_LADDERS[ladder]), _seconds(shape)
    traced = {s.model_dump_json(): estimate(config, s, "cuda", (8, 6)) for s in _all_steps(space)}
    assert len(traced) >= 5
    known = [(seconds(s), traced[s.model_dump_json()].peak_reserved_bytes) for s in _all_steps(space)]
    levels = sorted({n_bytes for _, n_bytes in known})
    for budget in (levels[0] - 1, *levels):
        asked: list[str] = []

        def trace(step: StepConfig, asked: list[str] = asked) -> MemoryEstimate:
            asked.append(step.model_dump_json())
            return traced[asked[-1]]

        found = Hunt(space, seconds, trace, budget, Guess(shape)).fastest()
        best = min((s for s, n_bytes in known if n_bytes <= budget), default=math.inf)
        assert (seconds(found) if found else math.inf) == pytest.approx(best, rel=0.005), budget
        assert len(asked) == len(set(asked))


# --- the space ---


def test_every_lever_of_the_engine_is_searched_or_says_why_not() -> None:
    names = {lever.name for lever in LEVERS}
    assert set(Levers.model_fields) <= names
    assert {"base_precision", "optimizer", "micro_batch", "packing"} <= names
    assert set(get_args(LeverName)) | {"expandable_segments", "empty_cache"} == names
    assert set(LADDER) == set(get_args(LeverName))


def test_what_is_left_out_of_the_ladder_is_never_moved() -> None:
    for name in LADDER:
        space = _space(SHAPES["untied"], STEP, tuple(n for n in LADDER if n != name))
        lever = next(lever for lever in LEVERS if lever.name == name)
        unused = lever.unused(Setting(STEP, SHAPES["untied"], CARD, layer_period=1))
        assert {value_of(step, name) for step in _all_steps(space)} == {unused}, name


def test_steps_of_a_space_are_valid_and_different() -> None:
    """What the engine would refuse is not among them, and nothing is there twice."""
    for shape in SHAPES.values():
        steps = _all_steps(_space(shape, STEP, LADDER))
        assert len({step.model_dump_json() for step in steps}) == len(steps) > 500
        for step in random.Random(0).sample(steps, 200):
            assert StepConfig.model_validate(step.model_dump()) == step
            assert step.micro_batch * step.accumulation == 4
            assert not (shape.tied and step.levers.embedding_on_host and step.levers.head == "16bit")
            assert not (shape.untiled and step.levers.tiles)


def test_leaner_steps_never_take_more_by_trace() -> None:
    """What the search builds on: along the levers memory only shrinks, but for pages and rounding."""
    config = _config("llama")
    shape = shape_of(config)
    space = _space(shape, STEP.model_copy(update={"seq_len": 1536}), LADDER)
    draw = random.Random(1)
    pairs = [(a, b) for a, b in (draw.sample(space, 2) for _ in range(4000)) if a.is_leaner(b)]
    compared = 0
    for lean, fat in draw.sample(pairs, 25):
        first, second = (estimate(config, one.step, "cuda", (8, 6)) for one in (lean, fat))
        if lean.loads_like(fat) or max(v for k, v in first.phases_bytes.items() if k != "load") == max(
            first.phases_bytes.values()
        ):
            assert first.peak_allocated_bytes <= 1.002 * second.peak_allocated_bytes
            compared += 1
    assert compared > 10


# --- the time model ---


def test_modelled_ratios_are_those_measured_on_a_cpu() -> None:
    """benchmarks/levers.csv: SmolLM2-135M at 1,024 tokens on two cores, each lever beside its absence."""
    rows = {}
    with (Path(__file__).parents[1] / "benchmarks" / "levers.csv").open(encoding="utf-8") as file:
        rows = {row["lever"]: row for row in csv.DictReader(file)}
    smol = _config(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    shape = shape_of(smol)
    cpu = DeviceRates(
        flops=1.2e11,
        memory_bytes_per_second=2e10,
        host_bytes_per_second=2e10,
        measured=False,
        source="two cores",
    )
    time, work = TimeModel(shape, cpu, on_cpu=True), Workload((1024, 1024), 1024, 1)
    plain = STEP.model_copy(update={"seq_len": 1024, "accumulation": 1, "base_precision": "nf4"})
    whole = with_value(plain, "gradient_checkpointing", False)

    def ratio(step: StepConfig, over: StepConfig) -> float:
        return time.seconds(step, work) / time.seconds(over, work)

    modelled = {
        "gradient_checkpointing": ratio(plain, whole),
        "kept_layers=15 of 30": ratio(with_kept(plain, 15), whole),
        "tile_tokens: a quarter": ratio(with_value(plain, "tile_tokens", 256), plain),
        "head=nf4": ratio(with_value(plain, "head", "nf4"), plain),
        "double_quantization=off": ratio(plain, with_value(plain, "double_quantization", False)),
    }
    for lever, value in modelled.items():
        assert value == pytest.approx(float(rows[lever]["ratio"]), rel=0.1), lever


def test_seconds_of_a_step_by_hand() -> None:
    """A 7B on a device of round rates: 4ND, 2ND recomputed, weights dequantised three times."""
    shape = SHAPES["large"]
    rates = DeviceRates(
        flops=1e13, memory_bytes_per_second=1e11, host_bytes_per_second=1e10, measured=False, source="round"
    )
    time, work = TimeModel(shape, rates, on_cpu=False), Workload((1000, 1000), 1000, 2)
    step = STEP.model_copy(
        update={"seq_len": 1000, "accumulation": 2, "base_precision": "nf4", "levers": Levers()}
    )
    parts = time.of(step, work)
    head = 16384 * 4096
    body = shape.n_parameters - 2 * head
    linear = sum(one.n_in * one.n_out * one.count for one in shape.linears)
    adapters = shape.n_trainable(step)
    attention = 2 * 32 * 4096 * 4.5 * 2 * 1000**2
    flops = 2000 * (6 * body + 8 * adapters + 4 * head * (1 + 32 / 1000)) + attention
    assert parts.arithmetic == pytest.approx(flops / 1e13, rel=1e-12)
    assert parts.dequantisation == pytest.approx(linear * 4.5 * 3 * 2 * 1.01 / 1e11, rel=1e-12)
    assert parts.transfers == 0
    busy = parts.arithmetic + parts.dequantisation
    offloaded = time.of(with_value(step, "offload_checkpoints", True), work)
    assert offloaded.transfers == pytest.approx(0.03 * busy, rel=1e-12)  # 0.16 s of copies hide
    slow = TimeModel(shape, rates.model_copy(update={"host_bytes_per_second": 1e7}), on_cpu=False)
    copies = 3 * 32 * 2000 * 4096 * 2 / 1e7
    waits = slow.of(with_value(step, "offload_checkpoints", True), work).transfers
    assert waits == pytest.approx(0.03 * busy + copies - busy, rel=1e-12)


def test_padding_and_packing_decide_by_the_data_s_lengths() -> None:
    """Short examples among long ones: passes of one dequantise often, passes of four compute padding."""
    lengths = (*range(100, 200), 2000)
    work = Workload(lengths, 2000, 16)
    assert work.tokens(1, packing=False).passes == 16
    assert work.padding(4) == padded_share(lengths, micro_batch=4, effective_batch=16, seq_len=2000) > 0.02
    packed = work.tokens(1, packing=True)
    assert packed.passes < 4
    assert packed.computed == pytest.approx(work.tokens(1, packing=False).computed)
    time = TimeModel(SHAPES["large"], rates_of(CARD), on_cpu=False)
    step = STEP.model_copy(update={"seq_len": 2000, "accumulation": 16, "base_precision": "nf4"})
    alone, fours = time.seconds(step, work), time.seconds(split(step, 4), work)
    together = time.seconds(with_value(step, "packing", True), work)
    assert together < min(alone, fours)


def test_faster_devices_and_fewer_tokens_take_less() -> None:
    seconds = [
        TimeModel(SHAPES["large"], rates_of(hardware.card_of_size(gib * GiB, CARD)), on_cpu=False).seconds(
            STEP, Workload((512, 512), 512, 4)
        )
        for gib in (6, 8, 12, 16, 24)
    ]
    assert all(a >= b for a, b in itertools.pairwise(seconds))
