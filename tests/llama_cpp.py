"""A real llama.cpp (the xllamacpp wheel): what it makes of a GGUF file, asked over its own server."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp

_TAIL = -7.0  # one in a thousand; of the more unlikely ones F16 leaves two digits


class LlamaCpp:
    """llama-server inside this process, one model, one thread, greedy."""

    def __init__(self, model: Path, lora: Path | None = None, context: int = 512) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        url = f"{self._server.listening_address}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def tokens(self, text: str, *, whole: bool = True) -> list[int]:
        """With the start token where `whole`; control tokens in the text are taken as such."""
        found: list[int] = self.post(
            "/tokenize", {"content": text, "add_special": whole, "parse_special": True}
        )["tokens"]
        return found

    def goes_on(self, ids: list[int], n: int, *, ignore_eos: bool = True) -> dict[str, Any]:
        """Greedily, by at most `n` tokens, with the logarithms of the five likeliest of each."""
        return dict(
            self.post(
                "/completion",
                {
                    "prompt": ids,
                    "n_predict": n,
                    "temperature": 0,
                    "n_probs": 5,
                    "ignore_eos": ignore_eos,
                    "return_tokens": True,
                    "cache_prompt": False,
                },
            )
        )


def assert_agrees(
    model: Any, engine: LlamaCpp, ids: list[int], n: int, *, tolerance: float, ends: tuple[int, ...] = ()
) -> None:
    """transformers, given llama.cpp's own tokens so far, finds each the likeliest, and all five as likely.

    The server leaves out the likelihoods of a token that ends within a character.

    Args:
        ends: tokens that end an answer; none of them is chosen here.
    """
    answer = engine.goes_on(ids, n)
    written, steps = answer["tokens"], list(answer["completion_probabilities"])
    assert len(written) == n
    assert len(steps) > n // 3
    with torch.no_grad():
        logits = model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1].double()
    for token, wanted in zip(written, logits.log_softmax(-1), strict=True):  # [V]
        others = wanted.index_fill(0, torch.tensor(ends, dtype=torch.long), -torch.inf)
        assert float(others.max() - wanted[token]) < tolerance
        for likely in steps.pop(0)["top_logprobs"] if steps and steps[0]["id"] == token else ():
            if likely["logprob"] > _TAIL:
                wrong = abs(likely["logprob"] - float(wanted[likely["id"]]))
                assert wrong < tolerance, (likely, token)
    assert not steps
