"""Receipts: measured phase by phase, kept, read back, and used by the next plan of the same device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lowvram import hardware, planning
from lowvram.engine.config import StepConfig
from lowvram.engine.source import ModelSource
from lowvram.gpu_driver import Card, Driver, OwnMemory
from lowvram.hardware import Hardware, card_of_size
from lowvram.memory.receipt import PHASES, Receipt
from lowvram.planner.profiles import load_profile
from lowvram.planner.receipts import Experience, experience_on, load_receipts, with_experience
from lowvram.planner.wishes import Wishes
from lowvram.training import monitor as monitor_file
from lowvram.training.monitor import MemoryMonitor
from lowvram.training.receipt import by_phase, keep_copy
from lowvram.units import GiB, MiB
from tests.tiny_models import save_llama

PREDICTED = 1000 * MiB
STEP = StepConfig(seq_len=1024, micro_batch=2)
GPU = "NVIDIA GeForce RTX 3060"


def _receipt(**changes: Any) -> Receipt:
    plain: dict[str, Any] = {
        "finished_at": "2026-11-23T10:11:12+00:00",
        "model": "m",
        "step": STEP,
        "device": GPU,
        "device_bytes": 12 * GiB,
        "backend": "cuda",
        "budget_bytes": 10 * GiB,
        "predicted_peak_allocated_bytes": PREDICTED,
        "predicted_peak_reserved_bytes": PREDICTED,
        "predicted_context_bytes": 700 * MiB,
        "measured_peak_allocated_bytes": PREDICTED,
        "measured_peak_reserved_bytes": PREDICTED,
        "measured_peak_driver_bytes": PREDICTED + 300 * MiB,
        "measured_peak_resident_bytes": None,
        "measured_context_bytes": 300 * MiB,
        "measured_held_bytes": 0,
        "measured_steps": 5,
        "largest_batch_tokens": 2 * 1024,
        "phases": {},
        "versions": {},
    }
    return Receipt(**{**plain, **changes})


def _gpu(**changes: Any) -> Hardware:
    """A 12 GB card whose context the probe could only assume."""
    card = card_of_size(12 * GiB, hardware.probe())
    return card.model_copy(update={"name": GPU, **changes})


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts receipts of three runs and whatever else is given into a cache of this test."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))

    def keep(*receipts: Receipt) -> Path:
        for receipt in receipts:
            folder = keep_copy(receipt).parent
        return folder

    return keep


def _three(kept: Callable[..., Path]) -> Path:
    measured = {996: 240, 999: 310, 1001: 280}  # of 1000 MiB predicted, with contexts
    return kept(
        *(
            _receipt(
                measured_peak_reserved_bytes=reserved * MiB,
                measured_peak_allocated_bytes=(reserved - 2) * MiB,
                measured_context_bytes=context * MiB,
            )
            for reserved, context in measured.items()
        )
    )


def test_errors_are_signed_and_told(kept: Callable[..., Path]) -> None:
    _three(kept)
    found = experience_on(_gpu())
    assert found.n_runs == 3
    assert found.reserved_errors is not None
    assert found.allocated_errors is not None
    assert found.reserved_errors.lowest == pytest.approx(-0.004)
    assert found.reserved_errors.median == pytest.approx(-0.001)
    assert found.reserved_errors.highest == pytest.approx(0.001)
    assert found.allocated_errors.highest == pytest.approx(-0.001)
    assert found.context_bytes == 310 * MiB
    said = "3 earlier runs on this card measured -0.4 % to +0.1 % against the predicted reserved peak"
    assert found.sentence == said


def test_foreign_and_broken_receipts_count_for_nothing(kept: Callable[..., Path]) -> None:
    folder = _three(kept)
    kept(
        _receipt(device="NVIDIA GeForce RTX 4090", measured_context_bytes=999 * MiB),
        _receipt(device_bytes=8 * GiB, measured_context_bytes=999 * MiB),
        _receipt(backend="rocm", measured_context_bytes=999 * MiB),
    )
    whole = _receipt(measured_context_bytes=999 * MiB).model_dump_json()
    (folder / "20261124T000000Z-cut.json").write_text(whole[:-20])
    (folder / "20261124T000000Z-newer.json").write_text(whole.replace('"version":1', '"version":2'))
    (folder / "20261124T000000Z-more.json").write_text('{"surprise": 1, ' + whole[1:])
    (folder / "20261124T000000Z-empty.json").write_text("")
    (folder / "20261124T000000Z-binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / "20261124T000000Z-folder.json").mkdir()
    assert len(load_receipts()) == 6
    assert experience_on(_gpu()).context_bytes == 310 * MiB
    assert experience_on(_gpu()).n_runs == 3


def test_no_folder_is_no_experience(tmp_path: Path) -> None:
    assert experience_on(_gpu(), tmp_path / "none") == Experience()
    (tmp_path / "file").write_text("")
    assert experience_on(_gpu(), tmp_path / "file") == Experience()
    assert Experience().sentence is None


def test_only_the_full_shape_is_compared_and_every_underestimate(kept: Callable[..., Path]) -> None:
    """Half the tokens at half the memory is no error of 50 %; half the tokens at more memory is one."""
    kept(_receipt(largest_batch_tokens=1024, measured_peak_reserved_bytes=500 * MiB))
    assert experience_on(_gpu()).n_runs == 0
    assert experience_on(_gpu()).context_bytes == 300 * MiB  # the context does not depend on the tokens
    kept(_receipt(largest_batch_tokens=1024, measured_peak_reserved_bytes=1100 * MiB))
    found = experience_on(_gpu())
    said = "1 earlier run on this card measured +10.0 % against the predicted reserved peak"
    assert found.sentence == said


@pytest.mark.parametrize(
    ("probed", "measured", "assumed", "used"),
    [
        (700, None, True, 700),  # nothing measured: the assumption stays
        (700, 300, True, 300),  # a measurement replaces an assumption
        (700, 900, True, 900),
        (200, 300, False, 300),  # the probe's context was still empty
        (400, 300, False, 400),  # and is never lowered
    ],
)
def test_the_context_is_the_largest_measured(
    probed: int, measured: int | None, assumed: bool, used: int
) -> None:
    gpu = _gpu(context_bytes=probed * MiB, context_measured=not assumed)
    experience = Experience(n_runs=1, context_bytes=measured and measured * MiB)
    assert with_experience(gpu, experience).context_bytes == used * MiB
    cpu = gpu.model_copy(update={"backend": "cpu", "context_bytes": 0})
    assert with_experience(cpu, experience) == cpu


def test_the_next_plan_uses_and_tells_them(kept: Callable[..., Path], tmp_path: Path) -> None:
    """A measured context moves the budget by its difference; the predicted bytes stay."""
    LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=500,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "tiny")

    def planned() -> Any:
        source = ModelSource(str(tmp_path / "tiny"))
        wishes = Wishes(rank=2, seq_len=64, batch=2)
        profile = load_profile("12gb")
        return planning.plan_for(source, None, _gpu(), profile, wishes, lambda _: None).plan

    before = planned()
    assert not any("earlier run" in reason for reason in before.reasons)
    _three(kept)
    after = planned()
    assert after.reasons[-1].startswith("3 earlier runs on this card measured -0.4 % to +0.1 %")
    assert after.device.context_bytes == 310 * MiB
    assert after.budget_bytes - before.budget_bytes == before.device.context_bytes - 310 * MiB
    assert after.estimate == before.estimate
    assert after.sha256 == before.sha256


class _Cuda:
    """torch.cuda's counters, and the driver's, in a script."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak = 0
        self.context = 100 * MiB
        self.asked = 0

    def take(self, mib: int) -> None:
        self.allocated += mib * MiB
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def memory_reserved(self) -> int:
        return self.reserved

    def memory_stats(self) -> dict[str, int]:
        return {"allocated_bytes.all.peak": self.peak, "reserved_bytes.all.peak": self.reserved}

    def now_bytes(self) -> int:
        self.asked += 1
        return self.reserved + self.context

    held_by_others_bytes = 7 * MiB
    uuid, name = "", GPU

    def told_bytes(self, _: Card) -> int:
        return self.reserved + self.context


class _NoSampler:
    """No thread: tests/test_monitor.py has it."""

    def __init__(self, *_: object) -> None: ...
    def start(self) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    fake = _Cuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(monitor_file, "_own_memory", lambda: fake)
    monkeypatch.setattr(monitor_file, "Sampler", _NoSampler)
    return fake


def test_each_phase_has_its_own_peak(cuda: _Cuda) -> None:
    watch = MemoryMonitor("cuda")
    watch.start()
    cuda.take(50)
    watch.enter("other")
    for _ in range(3):
        with watch.during("forward"):
            cuda.take(30)
            with watch.during("backward"):
                cuda.take(20)
                cuda.take(-45)
            cuda.context = 160 * MiB  # a kernel was loaded
            cuda.take(-5)
    peaks = watch.peaks()
    assert {p: peak.allocated for p, peak in peaks.items()} == {
        "load": 50 * MiB,
        "other": 50 * MiB,
        "forward": 80 * MiB,
        "backward": 100 * MiB,
    }
    assert {p: peak.reserved for p, peak in peaks.items()} == {
        "load": 50 * MiB,
        "other": 100 * MiB,  # what the allocator took it keeps
        "forward": 100 * MiB,
        "backward": 100 * MiB,
    }
    assert peaks["load"].driver == 150 * MiB
    assert peaks["backward"].driver == 200 * MiB
    assert watch.peak_bytes == 100 * MiB
    assert watch.held_bytes == 7 * MiB
    assert all(peak.resident is None for peak in peaks.values())


def test_the_driver_is_asked_rarely_and_the_context_is_the_largest(cuda: _Cuda) -> None:
    watch = MemoryMonitor("cuda")
    watch.start()
    watch.enter("other")
    for step in range(100):
        with watch.during("forward"):
            cuda.take(10 if step == 50 else 0)
            cuda.context = 100 * MiB + min(step, 50) * MiB
    assert cuda.asked == 4  # the ends of load, of other, of the first forward, and where more was reserved
    assert watch.context_bytes == 150 * MiB
    cuda.context = 5 * GiB  # somebody else's
    cuda.take(10)
    watch.peaks()
    assert watch.context_bytes == 150 * MiB


def test_phases_stand_side_by_side(cuda: _Cuda) -> None:
    watch = MemoryMonitor("cuda")
    watch.start()
    cuda.take(50)
    told = by_phase({"load": 40, "evaluation": 60}, watch.peaks())
    assert list(told) == ["load", "evaluation"]
    assert (told["load"].predicted_allocated_bytes, told["load"].measured_allocated_bytes) == (40, 50 * MiB)
    assert told["evaluation"].measured_allocated_bytes is None


def _card(free_gib: float, own_gib: float | None) -> Driver:
    own = None if own_gib is None else int(own_gib * GiB)
    return Driver(
        version="580",
        cards=(
            Card(
                uuid="GPU-1",
                name=GPU,
                total_bytes=12 * GiB,
                free_bytes=int(free_gib * GiB),
                capability=(8, 6),
                own_bytes=own,
                processes=(),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("before", "after", "fresh", "own", "held"),
    [
        (_card(11, 0.5), _card(8, 3.5), False, 3.5, 0.5),  # the probe's context was there already
        (_card(11.5, None), _card(8, 3.5), True, 3.5, 0.5),
        (_card(11.5, None), _card(8, None), True, 3.5, 0.5),  # a container: what the card lost since
        (_card(11, 0.25), _card(8, 0.25), True, 3, 1),  # a stranger under our number
        (_card(11.5, None), _card(8, None), False, None, None),  # nothing tells
        (Driver(), _card(8, 3.5), True, None, None),
    ],
)
def test_own_memory(
    monkeypatch: pytest.MonkeyPatch,
    before: Driver,
    after: Driver,
    fresh: bool,
    own: float | None,
    held: float | None,
) -> None:
    monkeypatch.setattr("lowvram.gpu_driver.read_driver", lambda: after)
    memory = OwnMemory(before, "1", GPU, fresh)
    assert memory.now_bytes() == (None if own is None else int(own * GiB))
    assert memory.held_by_others_bytes == (None if held is None else int(held * GiB))


@pytest.fixture(scope="module")
def job(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A two-layer model of SmolLM2's vocabulary, and 30 rows."""
    folder = tmp_path_factory.mktemp("job")
    save_llama(
        smollm,
        folder / "tiny",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "tiny", folder / "rows.jsonl"


def _train(lowvram: Any, job: tuple[Path, Path], run: Path) -> Any:
    given = ("--steps", 2, "--batch", 2, "--rank", 2, "--precision", "fp32", "--output", run)
    done = lowvram("auto", "--model", job[0], "--data", job[1], *given)
    assert done.returncode == 0, done.stderr
    return done


def test_a_real_run_leaves_its_receipt_twice(
    lowvram: Any, job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    _train(lowvram, job, tmp_path / "run")
    receipt = Receipt.model_validate_json((tmp_path / "run" / "receipt.json").read_bytes())
    assert load_receipts() == [receipt]
    assert set(receipt.phases) == set(PHASES) - {"initialisation"}  # the adapter starts as LoRA does
    for phase in receipt.phases.values():
        assert phase.measured_allocated_bytes is None
        assert phase.measured_reserved_bytes is None
        assert phase.measured_driver_bytes is None
        assert phase.measured_resident_bytes is not None
    highest = max(p.measured_resident_bytes or 0 for n, p in receipt.phases.items() if n != "other")
    assert receipt.measured_peak_resident_bytes == highest > 1 * MiB
    assert receipt.measured_peak_reserved_bytes is None
    assert (receipt.backend, receipt.measured_steps) == ("cpu", 2)
    assert receipt.model == str(job[0])
    full = receipt.step.micro_batch * receipt.step.seq_len
    assert 0.5 * full < receipt.largest_batch_tokens <= full
    assert not receipt.comparable  # resident bytes are not what was predicted


def test_a_cache_that_cannot_be_written_fails_no_run(
    lowvram: Any, job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    done = _train(lowvram, job, tmp_path / "run")
    assert "no copy of its receipt is kept" in done.stdout
    assert (tmp_path / "run" / "receipt.json").is_file()
    assert (tmp_path / "run" / "result.json").is_file()
    shutil.rmtree(tmp_path / "run")
