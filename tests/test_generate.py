"""Generate: an answer says whether the model ended it itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram.engine.adapters import add_adapters
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.generate import greedy_answers
from lowvram.engine.model import load
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss
from tests import tiny_runs

byte_model = tiny_runs.byte_model


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stops", [True, False])
def test_an_answer_says_whether_it_stopped(smollm: Path, stops: bool) -> None:
    """A model that writes the same token always: its stop token, or another."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(8, len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    said = tokenizer.eos_token_id if stops else tokenizer("hello")["input_ids"][0]
    model.lm_head.bias.data[said] = 9.0
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]))
    (answer,) = greedy_answers(adapted, tokenizer, ["hi"], max_new_tokens=5)
    assert answer.stopped == stops
    assert answer.text == ("" if stops else tokenizer.decode([said]) * 5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("levers", [Levers(), Levers(tile_tokens=16), Levers(kept_layers=1)], ids=str)
def test_a_model_that_is_asked_trains_on_as_before(byte_model: Path, levers: Levers) -> None:
    """As the demo asks it, between its steps: the same loss and gradients, to the last bit."""
    step = StepConfig(
        base_precision="nf4", compute_dtype="fp32", rank=2, dropout=0.0, seq_len=40, levers=levers
    )
    torch.manual_seed(0)
    model = add_adapters(load(ModelSource(str(byte_model)), step, "cpu"), step).train()
    loss_of, tokenizer = SummedLoss(model, step), AutoTokenizer.from_pretrained(byte_model)
    ids = torch.arange(40)[None]
    batch = (ids, torch.arange(39), ids[0, 1:])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss_of(*batch).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    answers = greedy_answers(model, tokenizer, ["hi", "a longer question"], max_new_tokens=5)
    assert [answer.n_tokens for answer in answers] == [5, 5]
    assert model.training
    after = gradients()
    assert len(after) == len(before) > 0
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
