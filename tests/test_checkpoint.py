"""Checkpoints: exact round trips, and nothing but whole ones after a kill, damage or a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.training import checkpoint
from lowvram.training.checkpoint import CheckpointState, collect_rng, load, newest, restore_rng, save

ODD_TENSORS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "flag": torch.tensor([True, False]),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "half": torch.tensor([1e-7, float("nan"), float("inf"), -0.0]).half(),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}


def state_of(step: int, **changes: Any) -> CheckpointState:
    """A small checkpoint whose every value follows from its step."""
    values: dict[str, Any] = {
        "step": step,
        "epoch": step // 10,
        "step_in_epoch": step % 10,
        "plan_sha256": "ab" * 32,
        "adapter": {"layers.0.lora_A": torch.full((64, 64), float(step))},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"params": [0]}]},
        "scheduler": {"last_epoch": step},
        "rng": {},
        "extra": {"tokens": 100 * step},
    }
    return CheckpointState(**{**values, **changes})


def same(left: Any, right: Any) -> bool:
    """Equal in type, order, bits and dtype all the way down."""
    if isinstance(left, torch.Tensor):
        if left.dtype != right.dtype or left.shape != right.shape or right.device.type != "cpu":
            return False
        flat = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
        return torch.equal(*flat)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


# Round trips


def test_odd_tensors_and_nested_values_come_back_exactly(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tied = nn.Parameter(torch.randn(4))
    state = state_of(
        7,
        adapter={**ODD_TENSORS, "half of one": whole[:6], "other half": whole[6:]},
        optimizer={"state": {0: {"a": tied, "b": tied}, "0": {"a": torch.ones(1)}, 1: {}}, "none": None},
        scheduler={
            "nested": [(1, (2.5, None)), [], (), {}, [True, 1, 1.0, "1"]],
            "tiny": 5e-324,
            "text": "å\n",
        },
        extra={"third": 1 / 3, "big": 2**70, "tensor": torch.tensor(3)},
    )
    loaded = load(save(tmp_path, state))
    # Not by CheckpointState's own ==, which would call 1 and True the same.
    for name, value in vars(state).items():
        assert same(value, getattr(loaded, name)), name


def test_what_json_cannot_hold_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, state_of(1))
    with pytest.raises(TypeError, match="set at extra/bad"):
        save(tmp_path, state_of(2, extra={"bad": {1}}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_loaded_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(3))
    loaded = load(path)
    os.truncate(path / checkpoint.ADAPTER, 0)  # a tensor that is a view of the file would now kill us
    assert torch.equal(loaded.adapter["layers.0.lora_A"], torch.full((64, 64), 3.0))


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(1, rng=collect_rng()))
    assert sorted(file.name for file in path.iterdir()) == sorted([*checkpoint.FILES, checkpoint.MANIFEST])
    json.loads((path / checkpoint.STATE).read_text())
    assert "pickle" not in Path(checkpoint.__file__).read_text().replace("Nothing is pickled", "")


def draw() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.randn()), torch.randn(4).tolist()


def test_every_generator_goes_on_from_where_it_was(tmp_path: Path) -> None:
    np.random.randn()  # numpy keeps the second of each pair of normal numbers
    path = save(tmp_path, state_of(1, rng=collect_rng()))
    expected = draw()
    assert draw() != expected
    restore_rng(load(path).rng)
    assert draw() == expected


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, fused=True)


def adamw8bit(parameters: Any) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    kind: Any = vars(bnb.optim)["AdamW8bit"]
    optimizer: torch.optim.Optimizer = kind(parameters, lr=1e-2, weight_decay=0.01)
    return optimizer


class Training:
    """A model with dropout, one matrix above bitsandbytes' 8-bit threshold and a bias below it."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.2), nn.Linear(128, 1, bias=False))
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, steps: int) -> list[float]:
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        loss: torch.Tensor = self.model(torch.randn(8, 64)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> CheckpointState:
        return state_of(
            3,
            adapter=dict(self.model.named_parameters()),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            rng=collect_rng(),
        )

    def resume(self, state: CheckpointState) -> None:
        self.model.load_state_dict(state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        restore_rng(state.rng)


@pytest.mark.parametrize("make", [adamw, adamw8bit])
def test_a_resumed_optimizer_gives_the_same_bits(make: Any, tmp_path: Path) -> None:
    whole = Training(make, seed=1)
    losses = whole.train(5)

    first = Training(make, seed=1)
    assert first.train(3) == losses[:3]
    path = save(tmp_path, first.state())
    loaded = load(path)
    assert same(first.optimizer.state_dict(), loaded.optimizer)
    assert set(loaded.optimizer["state"]) == {0, 1, 2}  # numbers, not "0"
    if make is adamw8bit:
        assert b'"U8"' in (path / checkpoint.TENSORS).read_bytes()  # the 8-bit kind is what was tested

    second = Training(make, seed=2)
    second.resume(loaded)
    assert second.train(2) == losses[3:]
    for expected, got in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(expected, got)


# Which checkpoints stay


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, state_of(step))
    assert names(tmp_path) == ["step-000010", "step-000015"]
    save(tmp_path, state_of(20), keep=0)
    assert names(tmp_path) == ["step-000020"]


def test_going_back_removes_the_future_that_was_left(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, state_of(step), keep=3)
    save(tmp_path, state_of(15), keep=2)
    assert names(tmp_path) == ["step-000010", "step-000015"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, state_of(5))
    path = save(tmp_path, state_of(5, epoch=99))
    assert load(path).epoch == 99
    assert names(tmp_path) == ["step-000005"]


def test_a_step_set_aside_is_found_and_later_removed(tmp_path: Path) -> None:
    save(tmp_path, state_of(5)).rename(tmp_path / ".step-000005.old")  # killed between two renames
    path, notes = newest(tmp_path)
    assert path is not None
    assert load(path).step == 5
    assert notes == []
    save(tmp_path, state_of(6), keep=1)
    assert names(tmp_path) == ["step-000006"]


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, state_of(999_999))
    save(tmp_path, state_of(1_000_000))
    assert newest(tmp_path)[0] == tmp_path / "step-1000000"


def test_foreign_files_are_neither_read_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "step-000099").write_text("a file")
    (tmp_path / "step-final").mkdir()
    save(tmp_path, state_of(5))
    save(tmp_path, state_of(6), keep=1)
    assert newest(tmp_path) == (tmp_path / "step-000006", [])
    assert names(tmp_path) == ["step-000006", "step-000099", "step-final"]


def test_no_folder_and_an_empty_one_have_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "missing") == (None, [])


# Damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(harm: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    save(tmp_path, state_of(30))
    harm(save(tmp_path, state_of(60)) / name)
    path, notes = newest(tmp_path)
    assert path == tmp_path / "step-000030"
    assert load(path).step == 30
    (note,) = notes
    assert note.startswith("step-000060 is damaged: ")
    if name != checkpoint.MANIFEST or harm is not flip_a_bit:  # a flipped manifest accuses another file
        assert name in note
    with pytest.raises(ConfigError, match="is damaged") as caught:
        load(tmp_path / "step-000060")
    assert caught.value.exit_code == 2


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, state_of(60)) / checkpoint.TENSORS)
    assert newest(tmp_path) == (None, ["step-000060 is damaged: optimizer.safetensors has a wrong hash"])


def test_a_manifest_cannot_send_the_reader_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(1)) / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["../../secret"] = manifest["files"].pop(checkpoint.STATE)
    path.write_text(json.dumps(manifest))
    assert newest(tmp_path) == (None, ["step-000001 is damaged: manifest.json lists other files"])


def test_a_later_format_is_said_not_guessed(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(1)) / checkpoint.MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert "format 2" in newest(tmp_path)[1][0]


# A full disk


def full_in_safetensors(_: Any, path: Path) -> None:
    path.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_in_python(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("function", "fails"),
    [("save_file", full_in_safetensors), ("_sync_file", full_in_python), ("_describe", full_in_python)],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    function: str, fails: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, state_of(5))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, fails)
        with pytest.raises(DoesNotFitError, match=r"step 6 needs 16 KiB, .* free") as caught:
            save(tmp_path, state_of(6), keep=1)
    assert caught.value.exit_code == 3
    assert "lowvram resume" in caught.value.remedy
    assert names(tmp_path) == ["step-000005"]
    assert newest(tmp_path) == (tmp_path / "step-000005", [])
    assert load(save(tmp_path, state_of(6))).step == 6  # after making room


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(SafetensorError):
        save(tmp_path, state_of(6))
    assert names(tmp_path) == []


# Kills

DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lowvram.training import checkpoint
from tests_state import state_of

torch.set_num_threads(1)  # a forked process has none of its parent's threads
folder = Path(sys.argv[1])


def checked():
    path, notes = checkpoint.newest(folder)
    assert not notes, notes
    for other in folder.glob("step-*"):  # the older ones too: they are what damage falls back on
        checkpoint.load(other)
    if path is None:
        return 0
    state = checkpoint.load(path)
    expected = state_of(state.step)
    assert torch.equal(state.adapter["big"], expected.adapter["big"])
    assert state.extra == expected.extra
    return state.step


def child(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(1)


def killed_at_call(number):
    real, calls = os.fsync, [0]

    def fsync(descriptor):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    checkpoint.save(folder, state_of(checked() + 1))
    os._exit(0)


def endless():
    step = checked()
    while True:
        step += 1
        checkpoint.save(folder, state_of(step))


unfinished = 0
for number in range(1, 20):
    before = checked()
    _, status = os.waitpid(child(lambda: killed_at_call(number)), 0)
    if status == 0:
        break  # the save has fewer calls
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checked() in (before, before + 1)
    unfinished += any(path.name.endswith(".tmp") for path in folder.iterdir())
assert status == 0 and number >= 7, number

for _ in range(8):
    before = checked()
    pid = child(endless)
    time.sleep(random.uniform(0.02, 0.4))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert checked() >= before
    unfinished += any(path.name.endswith(".tmp") for path in folder.iterdir())
    assert len([path for path in folder.iterdir() if path.name.startswith("step-")]) <= 3
checkpoint.save(folder, state_of(checked() + 1))
assert len(list(folder.iterdir())) == 2, list(folder.iterdir())
print(unfinished, checked())
"""
DRIVER_STATE = """
import torch
from lowvram.training.checkpoint import CheckpointState


def state_of(step):
    adapter = {"big": torch.full((1 << 18,), float(step))}
    return CheckpointState(step, 0, step, "x", adapter, {"state": {0: adapter}}, {}, {}, {"tokens": 3 * step})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once for all kills")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tests_state.py").write_text(DRIVER_STATE)
    (tmp_path / "driver.py").write_text(DRIVER)
    folder = tmp_path / "checkpoints"
    path = os.pathsep.join([str(Path(checkpoint.__file__).parents[2]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    unfinished, step = map(int, done.stdout.split())
    assert unfinished >= 5  # the kills did land inside a save
    assert step > 1
