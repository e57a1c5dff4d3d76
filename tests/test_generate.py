"""Generate: an answer says whether the model ended it itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowvram.engine.generate import greedy_answers


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
