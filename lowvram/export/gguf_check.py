"""A written GGUF in a real llama.cpp: it loads, cuts a chat as it was trained, and goes on from it."""

from __future__ import annotations

import importlib.util
import json
import math
import urllib.request
from pathlib import Path
from typing import Any

from lowvram.errors import ConfigError, MergeError, first_line

_PROBE = "Grüße, 你好 🙂!\n\n  It's 12345 x {y}."
_REPORT = "Report this with the model's name, and take another --type or: lowvram merge RUN"


def require_llama_cpp() -> None:
    """Raises: ConfigError, if xllamacpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError("--check needs a llama.cpp.", "Install one: pip install xllamacpp")


def check_file(file: Path, tokenizer: Any) -> None:
    """Load the file (mapped, so memory is the pages that it touches) and compare with the tokenizer.

    Raises:
        MergeError: llama.cpp does not load it, cuts a chat otherwise, or computes no number.
    """
    text = _PROBE
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": _PROBE}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    server = _server(file, len(ids) + 8)
    found = _post(server, "/tokenize", {"content": text, "add_special": False, "parse_special": True})[
        "tokens"
    ]
    if found != ids:
        at = next((i for i, pair in enumerate(zip(found, ids, strict=False)) if pair[0] != pair[1]), -1)
        raise MergeError(
            f"llama.cpp cuts a chat into {len(found)} tokens, not the {len(ids)} of the training "
            f"(they differ from token {at} on).",
            _REPORT,
        )
    step = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    likely = _post(server, "/completion", step)["completion_probabilities"]
    if any(not math.isfinite(token["logprob"]) for token in likely):
        raise MergeError("llama.cpp computes no number with the file.", _REPORT)


def _server(file: Path, context: int) -> Any:
    """llama-server inside this process, on a port of this machine alone that the system chooses."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.warmup, params.verbosity = False, 0
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise MergeError(f"llama.cpp does not load the file: {first_line(error)}", _REPORT) from error


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())
