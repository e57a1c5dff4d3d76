"""The shipped table: every entry has the published shapes, and names are found as people type them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lowvram.engine.known_models import known_config, known_model, nearest_known, table

ENTRIES = table()
# what an id may have that its entry's namesake has not: nothing that changes a weight's shape
VARIES = {"max_position_embeddings", "rope_theta", "rope_scaling", "sliding_window"}
# what transformers 5 turns into rope_parameters and layer_types
CONVERTED = {"rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_pct", "sliding_window_pattern"}
NAMES = [name for entry in ENTRIES for name in (entry["name"], *entry.get("also", {}))]


def _entry(name: str) -> dict[str, Any]:
    return next(entry for entry in ENTRIES if entry["name"] == name)


def _untied_head(facts: dict[str, Any]) -> int:
    """Parameters of a T5 1.1 or FLAN-T5 head. transformers' T5Config overrules the file and ties it, so that
    a model made from the config lacks it; one that is loaded has it, because the weights' files do."""
    own_head = facts["model_type"] == "t5" and not facts["tie_word_embeddings"]
    return facts["vocab_size"] * facts["d_model"] if own_head else 0


@pytest.mark.parametrize("name", [entry["name"] for entry in ENTRIES])
def test_the_model_has_the_published_number_of_parameters(name: str) -> None:
    entry, config = _entry(name), known_config(name)
    assert config is not None
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    counted = sum(p.numel() for p in model.parameters())  # a tied weight comes once
    assert counted + _untied_head(entry["config"]) == entry["parameters"]


@pytest.mark.parametrize("name", [entry["name"] for entry in ENTRIES])
def test_every_fact_is_one_that_the_config_class_reads(name: str) -> None:
    """A misspelt one would be kept and not used."""
    config = known_config(name)
    assert config is not None
    for part, facts in _parts(config, _entry(name)["config"]):
        read = {"model_type", "head_dim", *(field.name for field in dataclasses.fields(part))}
        overruled = {"tie_word_embeddings"} if part.model_type == "t5" else set()
        assert set(facts) <= read | CONVERTED | overruled
        for key in set(facts) - CONVERTED - overruled:
            assert getattr(part, key) == facts[key], key


def _parts(config: Any, facts: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    inner = {key: value for key, value in facts.items() if key.endswith("_config")}
    yield config, {key: value for key, value in facts.items() if key not in inner}
    for key, value in inner.items():
        yield getattr(config, key), value


def test_every_id_is_found_once() -> None:
    assert len({name.casefold() for name in NAMES}) == len(NAMES)
    assert all(known_model(name) is not None for name in NAMES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_other_ids_of_an_entry_have_the_same_shapes(entry: dict[str, Any]) -> None:
    for differs in entry.get("also", {}).values():
        assert set(differs or {}) <= {"stored", "weights_bytes", "config"}
        assert set((differs or {}).get("config", {})) <= VARIES


def test_a_name_may_be_typed_in_any_case() -> None:
    one, other = known_config("Qwen/Qwen2.5-7B"), known_config("qwen/qwen2.5-7b")
    assert one is not None
    assert other is not None
    assert one.to_dict() == other.to_dict()


@pytest.mark.parametrize(
    ("name", "positions", "rope"),
    [
        ("meta-llama/Llama-3.1-8B", 131072, "llama3"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8192, "default"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", 131072, "llama3"),
        ("Qwen/Qwen2-7B", 131072, "default"),
        ("Qwen/Qwen2.5-7B-Instruct", 32768, "default"),
    ],
)
def test_an_alias_keeps_what_is_its_own(name: str, positions: int, rope: str) -> None:
    config = known_config(name)
    assert config is not None
    assert config.max_position_embeddings == positions
    assert config.rope_parameters["rope_type"] == rope


def test_rope_settings_arrive() -> None:
    config = known_config("google/gemma-3-27b-it")
    assert config is not None
    rope = config.get_text_config().rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
    assert rope["sliding_attention"]["rope_theta"] == 10_000.0
    window = ["sliding_attention"] * 5 + ["full_attention"]
    assert config.get_text_config().layer_types[:6] == window


def test_configs_are_not_shared() -> None:
    one, other = known_config("meta-llama/Llama-3.1-8B"), known_config("meta-llama/Llama-3.1-70B")
    assert one is not None
    assert other is not None
    one.rope_parameters["factor"] = 1.0
    again = known_config("meta-llama/Llama-3.1-8B")
    assert again is not None
    assert other.rope_parameters["factor"] == again.rope_parameters["factor"] == 8.0


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("Qwen/Qwen2-7B", 15_231_233_024),  # the index file's total_size
        ("google/gemma-2-2b", 4 * 2_614_341_888),
        ("google/gemma-2-2b-it", 2 * 2_614_341_888),
        ("gpt2", 548_105_171),  # with its causal masks
        ("Qwen/Qwen3-0.6B", 2 * 751_632_384),  # with the tied head stored again
        ("Qwen/Qwen3-0.6B-Base", 2 * 596_049_920),
    ],
)
def test_download_size(name: str, n_bytes: int) -> None:
    known = known_model(name)
    assert known is not None
    assert known.weights_bytes == n_bytes


def test_a_mirror_asks_for_no_access() -> None:
    gated = {name: known.gated for name in NAMES if (known := known_model(name))}
    assert gated["meta-llama/Llama-2-7b-hf"]
    assert gated["google/gemma-3-1b-it"]
    assert not gated["NousResearch/Llama-2-7b-hf"]
    assert not gated["google/flan-t5-base"]
    assert not gated["Qwen/Qwen2-7B"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Qwen/Qwen2-7b-chat", "Qwen/Qwen2-7B"),
        ("meta-llama/Llama-3.1-8B-Instruct-hf", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("mistralai/Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("bert-base-uncased", None),
        ("acme/secret-7B", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_suggested(typed: str, meant: str | None) -> None:
    assert nearest_known(typed) == meant


def test_an_unknown_name_has_no_config() -> None:
    assert known_config("acme/secret-7B") is None
    assert known_model("Qwen2-7B") is None  # without its owner it is another repository
