"""Greedy answers of a model, one prompt at a time, with the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowvram.frozen import Frozen


class Answer(Frozen):
    """What the model wrote, without its stop token, and whether it wrote one."""

    text: str
    stopped: bool


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, device: str
) -> list[Answer]:
    """The most likely answer to each prompt, of at most `max_new_tokens`.

    Prompts run one by one, so none is padded; generation uses transformers' own attention, not the
    mask-free training one.
    """
    was_training, trained_with = model.training, model.config._attn_implementation
    model.eval()
    model.get_base_model().set_attn_implementation("sdpa")
    stops = _stops(model, tokenizer)
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
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        text = tokenizer.decode(written, skip_special_tokens=True)
        answers.append(Answer(text=text, stopped=written[-1] in stops))
    model.get_base_model().set_attn_implementation(trained_with)
    model.train(was_training)
    return answers


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """The model's own stop tokens, as generation takes them, else the tokenizer's."""
    own = model.generation_config.eos_token_id
    if own is None:
        return [tokenizer.eos_token_id]
    return list(own) if isinstance(own, (list, tuple)) else [own]
