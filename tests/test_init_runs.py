"""Plans and runs that ask for an initialisation, through the command line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowvram import hardware
from lowvram.engine.config import DATA_INITS, DIFFERENCE_INITS, RANKS_TAKEN, StepConfig
from lowvram.engine.source import ModelSource
from lowvram.planner.build import make_plan
from lowvram.planner.initialisation import seconds
from lowvram.planner.plan import Plan
from lowvram.planner.profiles import profile_for
from lowvram.planner.wishes import Wishes
from lowvram.planning import run_bytes
from lowvram.training import loop, start
from lowvram.training.run import Run
from lowvram.units import GiB
from tests import test_pipeline

Cli = test_pipeline.Run
command = test_pipeline.run
tiny_home = test_pipeline.home
SHORT = ("--batch", "4", "--micro-batch", "2", "--rank", "2", "--seq-len", "64", "--learning-rate", "1e-2")


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _stops_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = loop._report

    def stopped(state: Run, *args: Any) -> None:
        report(state, *args)
        if state.step == n:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "_report", stopped)


_QUICK = ("lora_ga", "loftq")  # the others take 20 seconds each as well


@pytest.mark.parametrize(
    "init", [i if i in _QUICK else pytest.param(i, marks=pytest.mark.slow) for i in RANKS_TAKEN]
)
def test_a_run_is_initialised_once_resumed_and_saved(
    init: str, tiny_home: Path, tmp_path: Path, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and stopped runs agree to the last bit, though the stopped one never initialises again."""
    asked = ("--model", tiny_home / "tiny", "--data", tiny_home / "rows.jsonl", *SHORT, "--steps", "3")
    code, out, err = command("auto", *asked, "--init", init, "--precision", "nf4", "-o", tmp_path / "whole")
    assert code == 0, err
    assert f"init {init}, as you asked" in out
    assert f"init {init}: done in" in out
    losses, result = _losses(tmp_path / "whole"), json.loads((tmp_path / "whole/result.json").read_text())
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    with monkeypatch.context() as patch:
        _stops_after(1, patch)
        assert command("train", tmp_path / "whole/plan.yaml", "-o", tmp_path / "parted")[0] == 130
    monkeypatch.setattr(start, "initialise", lambda *_: pytest.fail("initialised again"))
    assert command("resume", tmp_path / "parted")[0] == 0
    assert _losses(tmp_path / "parted") == losses
    saved = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "parted"))
    ours, theirs = map(load_file, saved)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {t.shape[0] for n, t in ours.items() if "lora_A" in n} == {4 if init in DIFFERENCE_INITS else 2}


def test_first_loss_of_a_difference_is_the_base_s_and_a_merge_knows_it(
    tiny_home: Path, tmp_path: Path, command: Cli
) -> None:
    """Merged into the 16-bit base it is what plain peft's adapter makes of it."""
    asked = ("--model", tiny_home / "tiny", "--data", tiny_home / "rows.jsonl", *SHORT, "--steps", "2")
    for init in ("default", "lora_ga"):
        more = ("--init", init, "--precision", "fp32", "--dropout", "0")
        assert command("auto", *asked, *more, "-o", tmp_path / init)[0] == 0
    first = [_losses(tmp_path / init)[0] for init in ("default", "lora_ga")]
    assert first[1] == pytest.approx(first[0], rel=1e-6)
    assert _losses(tmp_path / "default")[1] != _losses(tmp_path / "lora_ga")[1]
    assert command("merge", tmp_path / "lora_ga")[0] == 0
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_home / "tiny", dtype=torch.float32)
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "lora_ga/adapter")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora_ga/merged", dtype=torch.float32)
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=0, atol=1e-4)
    assert float((adapted - untrained).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("asked", "message", "remedy"),
    [
        (("--init", "lora_ga", "--rank", "17"), "takes 34 directions", "--rank 16 or less"),
        (("--init", "pissa", "--rank", "33", "--targets", "all-linear"), "narrowest has 32", "--rank 32"),
        (("--init", "lora_ga", "--dora"), "DoRA's magnitudes", "--init default or eva"),
        (("--init", "olora", "--init-batches", "4"), "looks at no data", "--init eva, lora_ga, lora_one"),
        (("--init-batches", "4"), "looks at no data", "Leave it out"),
        (("--init", "pissa", "--inference-mode"), "contradict each other", "Leave one of them out"),
        (("--init", "loftq", "--precision", "fp32"), "has lost nothing", "--precision nf4 or int8"),
        (("--init", "eva", "--levers", "tile_tokens=16"), "looks at whole sequences", "another --init"),
        (("--init", "best"), "--init best", "Leave a flag out"),
    ],
)
def test_what_cannot_be_is_refused(
    asked: tuple[str, ...], message: str, remedy: str, tiny_home: Path, command: Cli
) -> None:
    code, _, err = command("plan", "--model", tiny_home / "tiny", *asked)
    assert code == 2
    assert message in err
    assert remedy in err


def test_plans_of_initialisations(tiny_home: Path) -> None:
    """LoRA-GA is scaled as in its paper unless asked otherwise; LoftQ gets a quantised base unasked."""
    card = hardware.card_of_size(8 * GiB, hardware.probe())
    profile = profile_for(card)

    def plan(**wishes: Any) -> Plan:
        asked = Wishes(**{"rank": 8, "seq_len": 64, "precision": "nf4", "levers": "none", **wishes})
        return make_plan(ModelSource(str(tiny_home / "tiny")), card, profile, asked)

    default, ga = plan(), plan(init="lora_ga")
    assert (ga.use_rslora, ga.alpha) == (True, 16)
    assert plan(init="lora_ga", alpha=5.0).alpha == 5
    without = plan(init="lora_ga", rslora=False)
    assert (without.use_rslora, without.alpha) == (False, profile.alpha)
    pissa = plan(init="pissa")
    assert (pissa.use_rslora, pissa.alpha) == (default.use_rslora, default.alpha)
    assert ga.n_trainable == pissa.n_trainable == default.n_trainable
    assert ga.estimate.phases_bytes["initialisation"] > 0
    assert "initialisation" not in default.estimate.phases_bytes
    assert ga.seconds_in_all > default.seconds_in_all
    assert ga.host_ram_bytes > default.host_ram_bytes
    assert run_bytes(ga) > run_bytes(default)
    assert any("as in the paper of lora_ga" in reason for reason in ga.reasons)
    assert any("from 8 micro-batches" in reason for reason in ga.reasons)
    assert plan(init="loftq", precision=None).base_precision in ("nf4", "int8")


def test_only_what_looks_at_data_takes_time_for_it() -> None:
    """Two passes a step of 3 seconds: 8 micro-batches are 12 seconds, twice that with weight gradients."""
    taken = {init: seconds(StepConfig(init=init), 3.0, 2.0) for init in RANKS_TAKEN}
    assert {init for init, n in taken.items() if n} == set(DATA_INITS)
    assert (taken["lora_ga"], taken["eva"]) == (24.0, 6.0)


@pytest.mark.slow
def test_lora_ga_on_the_real_model_in_nf4(smollm: Path, tmp_path: Path, command: Cli) -> None:
    data = Path(__file__).parents[1] / "lowvram" / "demo" / "answers.jsonl"
    asked = ("--precision", "nf4", "--init", "lora_ga", "--steps", "4", "--batch", "2", "--targets", "qv")
    code, out, err = command("auto", "--model", smollm, "--data", data, *asked, "-o", tmp_path / "run")
    assert code == 0, err
    assert "gradients of 8 micro-batches in one pass" in out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
