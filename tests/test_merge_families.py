"""Merges of each family that lowvram trains, verified against plain peft by streaming its weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lowvram.engine.batch import collate
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.held_out import Rows
from lowvram.export.merge import write_merged
from lowvram.export.merge_check import MergeCheck
from lowvram.export.merged_tensors import MergedTensors
from tests.merge_cases import CASES, LLAMA, Case, adapted, save_adapter, save_base
from tests.tiny import examples
from tests.tiny_models import LLAMA_LIKE, MODELS, TARGETS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", MODELS)
def test_a_streamed_model_is_the_loaded_one(tmp_path: Path, kind: str) -> None:
    """The loss that verifying finds, weights read module by module, is plain transformers' own."""
    torch.manual_seed(0)
    MODELS[kind]().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out
        lora = LoraConfig(r=4, target_modules=list(TARGETS.get(kind, LLAMA_LIKE)), use_dora=kind == "qwen3")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "adapter")
    tensors = MergedTensors.open(ModelSource(str(tmp_path / "base")), tmp_path / "adapter")
    check = MergeCheck(tensors, tmp_path / "adapter", None, "base", None)
    write_merged(
        tensors, tmp_path / "adapter", tmp_path / "out", check=lambda f: check.run(f, lambda *_: None)
    )
    assert check.comparison is not None
    batch = check.rows.batch
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for found, model in (
        (check.comparison.adapter_loss, PeftModel.from_pretrained(plain, tmp_path / "adapter")),
        (check.comparison.merged_loss, AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()),
    ):
        with torch.no_grad():
            wanted = model.eval()(input_ids=batch.input_ids, labels=batch.input_ids).loss
        assert found == pytest.approx(float(wanted), abs=1e-4)
    assert check.comparison.cosine > 0.99
    assert check.comparison.max_error > 0  # bf16 rounds


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_kind_of_adapter_is_verified_unmerged(tmp_path: Path, case: Case) -> None:
    """With the loss that plain peft has in float32 on a model that is loaded as a whole."""
    base = save_base(case, tmp_path / "base")
    adapter = save_adapter(base, case, tmp_path / "adapter")
    tensors = MergedTensors.open(ModelSource(str(base)), adapter)
    check = MergeCheck(tensors, adapter, None, "base", None)
    if case.base.startswith("gpt2"):  # of 32 positions
        check.rows = Rows(collate(examples((20,)), 0), "rows")
    write_merged(tensors, adapter, tmp_path / "out", check=lambda folder: check.run(folder, lambda *_: None))
    assert check.comparison is not None
    batch = check.rows.batch
    given = {"input_ids": batch.input_ids}
    if batch.source_ids is not None:
        given = {"input_ids": batch.source_ids, "decoder_input_ids": batch.input_ids}
    with torch.no_grad():
        logits = adapted(base, adapter, torch.float32)(**given).logits.flatten(0, 1)[batch.positions]
    wanted = torch.nn.functional.cross_entropy(logits, batch.targets)
    assert check.comparison.adapter_loss == pytest.approx(float(wanted), abs=1e-4)


def test_experts_merge_but_are_not_verified(tmp_path: Path) -> None:
    """transformers fuses them when it loads: refused before anything is written, with the way out."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
    MixtralForCausalLM(MixtralConfig(**shape)).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", Case({"target_modules": ["q_proj"]}), tmp_path / "adapter")
    tensors = MergedTensors.open(ModelSource(str(tmp_path / "base")), adapter)
    with pytest.raises(ConfigError, match="cannot be verified one by one") as told:
        MergeCheck(tensors, adapter, None, "base", None)
    assert told.value.remedy == "Merge with --no-verify."
