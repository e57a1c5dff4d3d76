"""Out of memory, anywhere in a run: the same work again a rung lower, with nothing lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lowvram import cli, pipeline
from lowvram.errors import LowvramError, OutOfMemoryError
from lowvram.memory.receipt import Receipt
from lowvram.planner.plan import Plan
from lowvram.training import proof
from lowvram.training.recovery import forget_unscaling, is_out_of_memory, whole_update
from lowvram.training.run import Run
from tests import tiny_runs
from tests.tiny_runs import ASKED, Cli, edit_plan, events, metrics, result, write_rows

byte_model, command = tiny_runs.byte_model, tiny_runs.command
pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"  # a long one is cut, and ends anywhere


class Fault:
    """Raises `times` out-of-memory errors at a place of a step (1-based), or of the evaluation after it."""

    def __init__(self, place: str, step: int, times: int = 1) -> None:
        self.place, self.step, self.left = place, step, times
        self.raised = 0

    def __call__(self, run: Run) -> None:
        """As the hook that a run calls before its first step; the proof is over by then."""
        self.run = run
        last = run.model.get_base_model().model.layers[-1]
        last.register_forward_pre_hook(self._in_forward)
        last.register_full_backward_hook(self._in_backward)
        optimizer = run.optimizer
        update = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._due("update"):
                self._half_an_update(optimizer, update)
            return update(*args, **kwargs)

        optimizer.step = step

    def _due(self, place: str) -> bool:
        if place != self.place or self.run.step + 1 != self.step or not self.left:
            return False
        self.left -= 1
        self.raised += 1
        return True

    def _in_forward(self, layer: torch.nn.Module, _args: Any) -> None:
        if self._due("forward" if layer.training else "evaluation"):
            raise torch.OutOfMemoryError(FULL)

    def _in_backward(self, *_: Any) -> None:
        if self._due("backward"):
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    def _half_an_update(self, optimizer: Any, update: Callable[[], Any]) -> None:
        """As 8-bit optimizers do it: parameter by parameter, until there is no room for one's state."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        later = {p: p.grad for p in parameters[len(parameters) // 2 :]}
        for parameter in later:
            parameter.grad = None
        update()
        for parameter, gradient in later.items():
            parameter.grad = gradient
        raise torch.OutOfMemoryError(FULL)


@pytest.fixture(scope="module")
def made(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A plan's file: two micro-batches of two, no dropout, so that splits compute the same."""
    folder = tmp_path_factory.mktemp("recovery")
    data = write_rows(folder / "rows.jsonl", range(30))

    def make(name: str, *more: object) -> Path:
        file = folder / f"{name}.yaml"
        asked = ("--steps", STEPS, "--precision", "fp32", "--dropout", "0", *ASKED, *more)
        argv = ["lowvram", "plan", "--model", byte_model, "--data", data, *asked, "-o", file]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*map(str, argv)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert not ended.value.code
        edit_plan(file, save_every=2, evaluate_every=2)
        return file

    return make


@pytest.fixture(scope="module")
def plan(made: Callable[..., Path]) -> Path:
    return made("plan")


@pytest.fixture(scope="module")
def unfailed(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfailed") / "run"
    train(plan, folder)
    return folder


def train(plan: Path, folder: Path, before: Callable[[Run], None] = lambda _: None) -> str:
    console = Console(file=StringIO(), width=400)
    saved = Plan.from_yaml(plan)
    planned = pipeline.checked(pipeline.from_saved(saved, "again"))
    pipeline.start(planned, folder, console, before=before)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_learned_alike(run: Path, other: Path) -> None:
    """Losses, gradient norms and the adapter to float32's rounding; what an update skipped would show."""
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert (ours["held_out_loss"] is None) == (theirs["held_out_loss"] is None)
        for name in ("loss", "grad_norm", *(["held_out_loss"] if ours["held_out_loss"] else [])):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (ours["step"], name)
        assert (ours["tokens"], ours["trained_tokens"]) == (theirs["tokens"], theirs["trained_tokens"])
    for name, tensor in adapter(run).items():
        torch.testing.assert_close(tensor, adapter(other)[name], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_is_repeated_a_rung_lower(
    place: str, step: int, plan: Path, unfailed: Path, tmp_path: Path
) -> None:
    fault = Fault(place, step)
    train(plan, tmp_path / "run", fault)
    assert fault.raised == 1
    (rung,) = Receipt.model_validate_json((tmp_path / "run" / "receipt.json").read_text()).rungs
    assert (rung.at_step, rung.moment) == (step - 1, "training")
    assert rung.step.effective_batch == 4
    assert rung.predicted_peak_reserved_bytes < Plan.from_yaml(plan).estimate.peak_reserved_bytes
    (told,) = events(tmp_path / "run", "out of memory")
    assert rung.sentence in told
    assert "out of memory" in told
    assert_learned_alike(tmp_path / "run", unfailed)


@pytest.mark.parametrize("step", [1, 4])
def test_an_update_is_finished_not_repeated(step: int, plan: Path, unfailed: Path, tmp_path: Path) -> None:
    """Half of the parameters had been updated: those are left alone, and no rung is needed."""
    fault = Fault("update", step)
    train(plan, tmp_path / "run", fault)
    assert fault.raised == 1
    assert events(tmp_path / "run", "out of memory") == []
    assert adapter(tmp_path / "run").keys() == adapter(unfailed).keys()
    for name, tensor in adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, adapter(unfailed)[name], rtol=0, atol=0)


def test_an_evaluation_is_repeated_a_rung_lower(plan: Path, unfailed: Path, tmp_path: Path) -> None:
    fault = Fault("evaluation", 5)  # after step 4
    train(plan, tmp_path / "run", fault)
    assert fault.raised == 1
    (rung,) = Receipt.model_validate_json((tmp_path / "run" / "receipt.json").read_text()).rungs
    assert (rung.moment, rung.at_step) == ("evaluation", 4)
    assert_learned_alike(tmp_path / "run", unfailed)


def test_packed_rows_are_cut_between_examples(made: Callable[..., Path], tmp_path: Path) -> None:
    packed = made("packed", "--packing")
    train(packed, tmp_path / "whole")
    fault = Fault("backward", 3)
    train(packed, tmp_path / "run", fault)
    assert fault.raised == 1
    assert_learned_alike(tmp_path / "run", tmp_path / "whole")


def test_after_three_rungs_the_run_is_saved_and_a_leaner_plan_is_there(
    plan: Path, unfailed: Path, tmp_path: Path, command: Cli
) -> None:
    run = tmp_path / "run"
    fault = Fault("forward", 4, times=100)
    with pytest.raises(OutOfMemoryError) as refused:
        train(plan, run, fault)
    assert refused.value.exit_code == 4
    assert fault.raised == 1 + len(events(run, "out of memory")) <= 4
    assert "step 4" in refused.value.message
    assert "step 3 is whole" in refused.value.message
    assert f"lowvram resume {run}" in refused.value.remedy
    leaner = Plan.from_yaml(run / "leaner_plan.yaml")
    assert leaner.fits
    assert leaner.rank == Plan.from_yaml(plan).rank
    assert leaner.estimate.peak_reserved_bytes < Plan.from_yaml(plan).estimate.peak_reserved_bytes
    code, out, err = command("resume", run)
    assert code == 0, err
    assert "Continuing after step 3" in out
    assert_learned_alike(run, unfailed)
    rungs = Receipt.model_validate_json((run / "receipt.json").read_text()).rungs
    assert len(rungs) == len(events(run, "out of memory"))  # a resume stays on its rung


@pytest.mark.parametrize("step", [4, STEPS])
def test_an_evaluation_that_the_run_gave_up_in_is_made_by_its_resume(
    step: int, plan: Path, unfailed: Path, tmp_path: Path, command: Cli
) -> None:
    """No step's record and no held-out loss is missing, also of the last step; and it counts for the best."""
    run = tmp_path / "run"
    fault = Fault("evaluation", step + 1, times=100)
    with pytest.raises(OutOfMemoryError) as refused:
        train(plan, run, fault)
    assert f"(evaluation, after step {step})" in refused.value.message
    assert f"GiB. The checkpoint of step {step} is whole" in refused.value.message
    assert [row["step"] for row in metrics(run)] == list(range(1, step + 1))
    assert metrics(run)[-1]["held_out_loss"] is None
    code, out, err = command("resume", run)
    assert code == 0, err
    assert f"step {step}/{STEPS} held-out loss" in out
    assert_learned_alike(run, unfailed)
    assert result(run)["adapter_step"] == result(unfailed)["adapter_step"]


def test_levers_go_up_again_only_when_asked(plan: Path, unfailed: Path, tmp_path: Path, command: Cli) -> None:
    run = tmp_path / "run"
    with pytest.raises(LowvramError):
        train(plan, run, Fault("forward", 3, times=100))
    code, _, err = command("resume", run, "--planned-levers")
    assert code == 0, err
    assert Receipt.model_validate_json((run / "receipt.json").read_text()).rungs == ()
    assert_learned_alike(run, unfailed)


def test_the_proof_changes_nothing(
    plan: Path, unfailed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run without its proof has the same bytes; with it, the largest batch's peaks are known."""
    ran = []
    monkeypatch.setattr(proof, "_largest_step", lambda run: ran.append(run))
    train(plan, tmp_path / "run")
    assert ran
    for name, tensor in adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, adapter(unfailed)[name], rtol=0, atol=0)
    saved = Plan.from_yaml(plan)
    receipt = Receipt.model_validate_json((unfailed / "receipt.json").read_text())
    assert receipt.largest_batch_tokens == saved.micro_batch * saved.seq_len
    assert f"{saved.micro_batch} x {saved.seq_len} tokens" in events(unfailed, "proof")[0]


def test_the_proof_drops_a_rung_before_the_first_step(
    plan: Path, unfailed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, failed = proof._largest_step, []

    def fails_once(run: Run) -> None:
        if not failed:
            failed.append(run.now)
            raise torch.OutOfMemoryError(FULL)
        largest(run)

    monkeypatch.setattr(proof, "_largest_step", fails_once)
    train(plan, tmp_path / "run")
    (rung,) = Receipt.model_validate_json((tmp_path / "run" / "receipt.json").read_text()).rungs
    assert (rung.moment, rung.at_step) == ("proof", 0)
    assert_learned_alike(tmp_path / "run", unfailed)


def test_a_proof_above_the_budget_drops_a_rung(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = iter(["the proof took 9 GiB of 8 GiB"])
    monkeypatch.setattr(proof, "_over_budget", lambda _: next(over, None))
    train(plan, tmp_path / "run")
    (rung,) = Receipt.model_validate_json((tmp_path / "run" / "receipt.json").read_text()).rungs
    assert rung.reason == "the proof took 9 GiB of 8 GiB"
    assert result(tmp_path / "run")["stop_reason"] == "finished"


def test_an_adapter_without_gradient_is_named(plan: Path, tmp_path: Path) -> None:
    def cut(run: Run) -> None:
        """v_proj's output no longer reaches the loss."""
        layer = run.model.get_base_model().model.layers[0].self_attn.v_proj
        layer.register_forward_hook(lambda _module, _args, output: output.detach())

    with pytest.raises(LowvramError, match=r"1 of \d+ adapters got no gradient .*layers.0.self_attn.v_proj"):
        train(plan, tmp_path / "run", cut)


def test_a_mask_that_covers_nothing_is_refused(plan: Path, tmp_path: Path) -> None:
    def unmask(run: Run) -> None:
        examples = run.data.steps_from
        whole = lambda e: type(e)(e.input_ids, b"\0" + b"\1" * (len(e) - 1), e.where)  # noqa: E731

        def steps_from(step: int) -> Any:
            for epoch, groups in examples(step):
                yield epoch, [[whole(e) for e in group] for group in groups]

        object.__setattr__(run.data, "steps_from", steps_from)

    with pytest.raises(LowvramError, match="the mask of the prompts is wrong"):
        train(plan, tmp_path / "run", unmask)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(FULL), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_smaller_step_may_mend(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_update_that_fails_twice_ends_the_run() -> None:
    """Some parameters are ahead of others: neither repeating nor saving would be right."""
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]

    class Halfway(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
            (ready, *_) = [p for p in parameters if p.grad is not None]
            self.state[ready]["step"] = self.state[ready].get("step", 0) + 1
            raise torch.OutOfMemoryError(FULL)

    for parameter in parameters:
        parameter.grad = torch.ones(4)
    with pytest.raises(OutOfMemoryError, match="in the middle of an update"):
        whole_update(Halfway(parameters, lr=0.1), torch.device("cpu"))


def test_a_repeated_step_of_fp16_unscales_again() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    forget_unscaling(scaler)  # before anything was scaled
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(parameter.sum()).backward()
        scaler.unscale_(optimizer)
        forget_unscaling(scaler)
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert scaler.get_scale() == 8.0
    assert parameter.tolist() == [0.5, 0.5]
    forget_unscaling(None)
