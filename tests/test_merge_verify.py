"""`lowvram merge` of a run: verified on held-out rows, onto both bases, in 4 bits, complete, no paths."""

from __future__ import annotations

import getpass
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lowvram.engine.model import load
from lowvram.engine.nf4 import nf4_values
from lowvram.engine.source import ModelSource
from lowvram.errors import MergeError
from lowvram.export.merge import write_merged
from lowvram.export.merge_check import MergeCheck
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.quantized_values import values_as_trained
from lowvram.export.tensor_files import tensors_of_folder
from lowvram.planner.plan import Plan
from lowvram.training.data import prepare
from tests.test_pipeline import run as command  # noqa: F401  # a fixture
from tests.tiny import plain_loss
from tests.tiny_runs import ASKED, Cli, byte_model, write_rows  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A 16-bit base with a licence and rows."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(byte_model, intermediate_size=128)  # bnb's CPU kernels take no 96
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(folder / "base")
    (folder / "base/LICENSE").write_text("Do as you like.")
    written = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps({**written, "_name_or_path": str(folder)}))
    write_rows(folder / "rows.jsonl", range(40))
    return folder


@pytest.fixture
def trained(home: Path, tmp_path: Path, command: Cli) -> Any:  # noqa: F811
    def train(precision: str, *more: str) -> Path:
        kept = home / f"run-{precision}"
        if not kept.exists():
            given = ("--model", home / "base", "--data", home / "rows.jsonl", "--precision", precision)
            code, _, err = command("auto", *given, *ASKED, "--steps", "6", *more, "-o", kept)
            assert code == 0, err
        return Path(shutil.copytree(kept, tmp_path / "run"))

    return train


def _losses(text: str) -> dict[str, float]:
    return {name: float(loss) for name, loss in re.findall(r"(\w[^:;]*): loss (\d+\.\d+)", text)}


def _peft_loss(base: Any, run: Path, home: Path) -> float:
    """Plain peft and transformers on the run's held-out rows, one at a time."""
    plan = Plan.from_yaml(run / "plan.yaml")
    prepared = prepare(str(plan.data), ModelSource(str(home / "base")), plan.held_out_share, plan.reading)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    with torch.no_grad():
        return float(plain_loss(model, list(prepared.held_out.cut(plan.seq_len))))


def test_a_merge_is_verified_against_plain_peft(home: Path, trained: Any, command: Cli) -> None:  # noqa: F811
    run = trained("bf16")
    code, out, err = command("merge", run)
    assert code == 0, err
    assert "Merging needs about" in out
    assert "2 of 2 held-out rows" in out
    losses = _losses(out)
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    wanted = _peft_loss(base, run, home)
    assert losses["adapter on the base as it is stored"] == pytest.approx(wanted, abs=2e-4)
    assert losses["merged onto the base as it is stored"] == pytest.approx(wanted, abs=5e-3)
    assert "cosine 0.9999" in out or "cosine 1.0000" in out


def test_onto_nf4_is_the_base_that_was_trained_on(home: Path, trained: Any, command: Cli) -> None:  # noqa: F811
    """Both choices are told; the merged tensors are transformers' own 4-bit values plus the adapter."""
    run = trained("nf4")
    code, out, err = command("merge", run)
    assert code == 0, err
    onto_base = _losses(out)
    assert "--onto nf4 would give" in out
    code, out, err = command("merge", run, "--onto", "nf4", "-o", run / "nf4")
    assert code == 0, err
    onto_nf4 = _losses(out)
    as_trained = "adapter on its NF4 values (as it was trained)"
    assert onto_nf4[as_trained] == onto_base[as_trained]
    assert onto_nf4["merged onto its NF4 values"] == pytest.approx(onto_nf4[as_trained], abs=5e-3)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=Plan.from_yaml(run / "plan.yaml").levers.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        home / "base", quantization_config=config, dtype=torch.bfloat16
    ).dequantize()
    for module in loaded.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
    wanted = PeftModel.from_pretrained(loaded, run / "adapter").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(run / "nf4", dtype=torch.float32).state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, wanted[name], rtol=2**-7, atol=1e-6)
    stored = tensors_of_folder(home / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[name].bfloat16(), stored[name].whole())


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_values_by_rows_are_the_engine_s(home: Path, trained: Any, precision: str) -> None:
    """What the training's own model has, bit for bit."""
    plan = Plan.from_yaml(trained(precision) / "plan.yaml")
    tensors = MergedTensors.open(ModelSource(str(home / "base")), None)
    tensors.merge_onto(values_as_trained(tensors, plan.step))
    model = load(ModelSource(str(home / "base")), plan.step, "cpu")
    n_quantised = 0
    for name, module in model.named_modules():
        if not hasattr(module, "source_cls"):
            continue
        n_quantised += 1
        wanted = nf4_values(module) if precision == "nf4" else module.values()
        assert torch.equal(tensors.tensor(f"{name}.weight"), wanted), name
    assert n_quantised == 14


def test_onto_another_precision_than_the_run_s_is_refused(trained: Any, command: Cli) -> None:  # noqa: F811
    run = trained("bf16")
    code, _, err = command("merge", run, "--onto", "nf4")
    assert (code, "was trained on a base in bf16" in err, "Use --onto base" in err) == (2, True, True), err
    code, _, err = command("merge", run / "adapter", "--onto", "nf4")
    assert (code, "has no plan.yaml" in err) == (2, True), err
    assert not (run / "merged").exists()


def test_in_4_bits_only_with_its_error_told(home: Path, trained: Any, command: Cli) -> None:  # noqa: F811
    run = trained("bf16")
    code, out, err = command("merge", run, "--quantized-base")
    assert code == 0, err
    found = re.search(r"weights are (\d+\.\d+)% off", out)
    assert found
    assert 5 < float(found.group(1)) < 15  # NF4 of normal numbers: 9 %
    model = AutoModelForCausalLM.from_pretrained(run / "merged-4bit")
    assert model.is_loaded_in_4bit
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    error = model.dequantize().state_dict()[name].float() - wanted[name]
    assert 0.05 < float(error.norm() / wanted[name].norm()) < 0.15
    assert "merged and quantised again: loss" in out


@pytest.mark.parametrize("harm", ["q_proj", "embed_tokens", "input_layernorm"])
def test_a_damaged_tensor_is_found_and_nothing_is_left(home: Path, trained: Any, harm: str) -> None:
    """One tensor of the written file is shifted by a row."""
    run = trained("bf16")
    tensors = MergedTensors.open(ModelSource(str(home / "base")), run / "adapter")
    check = MergeCheck(tensors, run / "adapter", Plan.from_yaml(run / "plan.yaml"), "base", None)

    def damaged(folder: Path) -> None:
        name = next(name for name in tensors.names if harm in name)
        tensor = tensors_of_folder(folder)[name]
        with tensor.file.open("r+b") as handle:
            handle.seek(tensor.offset)
            values = handle.read(tensor.n_bytes)
            handle.seek(tensor.offset)
            half = tensor.n_bytes // 2
            handle.write(values[half:] + values[:half] if harm != "input_layernorm" else bytes(len(values)))
        check.run(folder, lambda _done, _total: None)

    with pytest.raises(MergeError, match=f"does not compute what base and adapter do.*{harm}"):
        write_merged(tensors, run / "adapter", run / "merged", check=damaged)
    assert not (run / "merged").exists()
    assert not list(run.glob(".merged*"))


def test_without_a_run_the_text_is_told(home: Path, trained: Any, command: Cli) -> None:  # noqa: F811
    run = trained("bf16")
    code, out, err = command("merge", run / "adapter", "-o", run / "one")
    assert (code, "a bundled text of" in out) == (0, True), err
    code, out, err = command("merge", run / "adapter", "-o", run / "two", "--data", home / "rows.jsonl")
    assert (code, "of 40 rows.jsonl rows" in out) == (0, True), err
    code, out, err = command("merge", run / "adapter", "-o", run / "three", "--no-verify")
    assert (code, "Not verified: --no-verify." in out) == (0, True), err
    shutil.move(home / "rows.jsonl", home / "gone")
    try:
        code, out, err = command("merge", run, "-o", run / "four")
    finally:
        shutil.move(home / "gone", home / "rows.jsonl")
    assert (code, "the run's data cannot be read" in out) == (0, True), err


def test_what_comes_out_is_complete_and_names_nobody(home: Path, trained: Any, command: Cli) -> None:  # noqa: F811
    run = trained("bf16")
    (run / "adapter/chat_template.jinja").write_text("{{ messages[0]['content'] }}: own")
    code, _, err = command("merge", run)
    assert code == 0, err
    merged = run / "merged"
    assert (merged / "LICENSE").read_text() == "Do as you like."
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (merged / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}: own"
    assert tokenizer("a b").input_ids == AutoTokenizer.from_pretrained(home / "base")("a b").input_ids
    card = (merged / "README.md").read_text()
    assert "| held-out loss after |" in card
    assert "rows.jsonl" in card
    assert "held-out rows" in card  # with which it was verified
    people = {str(home), str(run), str(Path.home()), str(run.parent), f"/{getpass.getuser()}/"}
    for file in merged.iterdir():
        content = file.read_bytes()
        assert not [name for name in people if name.encode() in content], file
