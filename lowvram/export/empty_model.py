"""A model's structure as plain transformers builds it, on the meta device, with its real buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError, first_line


def empty_model(source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    """Every parameter on the meta device, tied as transformers ties them; buffers that no file has are real.

    Raises:
        ConfigError: transformers has no language model for this config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = copy.deepcopy(source.config)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
    except (ValueError, ImportError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"transformers cannot build a language model of type '{config.model_type}': {first_line(error)}",
            "Update transformers (pip install -U transformers).",
        ) from error
    model.tie_weights()  # accelerate makes a parameter of its own of each name
    return model.eval()
