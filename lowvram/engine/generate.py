"""Greedy answers of a model, one prompt at a time, with the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, device: str
) -> list[str]:
    """The most likely answer to each prompt, without its stop token.

    Prompts run one by one, so none is padded; generation uses transformers' own attention, not the
    mask-free training one.
    """
    was_training, trained_with = model.training, model.config._attn_implementation
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")
    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    model.get_base_model().set_attn_implementation(trained_with)
    model.train(was_training)
    return answers
