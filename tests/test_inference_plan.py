"""What answering is predicted to take, against what a CPU really allocates, and plans within a budget."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lowvram.engine.adapter_folder import AdapterFolder
from lowvram.engine.config import Levers, StepConfig
from lowvram.engine.decoding import Thread, decoded, prepare_for_decoding
from lowvram.engine.inference_config import InferenceStep
from lowvram.engine.model import load
from lowvram.engine.sampling import Sampler, Sampling
from lowvram.engine.source import ModelSource
from lowvram.engine.switching import Switch, add_layers
from lowvram.errors import ConfigError, DoesNotFitError
from lowvram.hardware import imagined_card, probe
from lowvram.memory.estimate import estimate_of, peak_of
from lowvram.memory.inference import inference_estimate, trace_all_layers, trace_inference
from lowvram.memory.profiled import profiled_peak_bytes
from lowvram.planner.inference import InferencePlan, InferenceRequest, plan_inference
from lowvram.units import GiB
from tests.conftest import LLAMA_8B, QWEN2_7B
from tests.tiny_adapters import save_adapter

_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
WEIGHTS = {"base_weights", "embeddings", "head", "adapters"}
Made = Callable[[dict[str, object]], Path]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, with two adapters beside it."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SMALL)).save_pretrained(folder / "base")
    save_adapter(folder / "base", folder / "plain", 1)
    save_adapter(folder / "base", folder / "dora", 2, use_dora=True)
    save_adapter(folder / "base", folder / "embedding", 4, target_modules=["embed_tokens", "q_proj"])
    save_adapter(folder / "base", folder / "head", 3, modules_to_save=["lm_head"])
    return folder


def _adapters(folder: Path, names: tuple[str, ...]) -> list[AdapterFolder]:
    return [AdapterFolder(name, folder / name) for name in names]


def _really_allocated(base: Path, adapters: list[AdapterFolder], step: InferenceStep, active: str) -> int:
    """Peak bytes that torch's profiler sees two tokens of an answer allocate, beyond the weights."""
    model = load(ModelSource(str(base)), step.model_step, "cpu")
    switch = Switch(add_layers(model, adapters), adapters)
    if active:
        switch.to(active)
    prepare_for_decoding(model)
    lengths = [step.context - 2 - 3 * row for row in range(step.batch)]
    prompts = [torch.randint(5, 900, (length,)).tolist() for length in lengths]
    sampling = Sampling(temperature=1.0, top_p=0.5)

    def run() -> None:
        sampler = Sampler(sampling, range(step.batch), torch.device("cpu"))
        if step.batch > 1:
            assert len(list(decoded(model, prompts, 2, sampler))) == 2
            return
        thread, (prompt,) = Thread(model, step.context), prompts  # a chat that goes on as is worst
        first = 1 if len(prompt) <= 1024 else (len(prompt) - 1) % 1024 + 1
        assert len(list(thread.decoded("", prompt[:first], 1, sampler))) == 1
        assert len(list(thread.decoded("", prompt, 2, sampler))) == 2

    gc.collect()
    return profiled_peak_bytes(run)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("changes", "names", "active"),
    [
        ({"context": 700}, (), ""),
        ({"context": 2500}, ("plain",), "plain"),
        ({"context": 900, "batch": 3}, ("plain",), "plain"),
        ({"context": 300, "batch": 8}, (), ""),
        ({"context": 1200, "base_precision": "int8"}, ("plain",), "plain"),
        ({"context": 600, "base_precision": "nf4"}, ("plain",), "plain"),
        ({"context": 1500}, ("dora", "plain"), "dora"),
        ({"context": 1500}, ("plain", "dora"), "plain"),
        ({"context": 700}, ("head", "plain"), "head"),
        ({"context": 700}, ("embedding",), "embedding"),
        ({"context": 500, "base_precision": "bf16", "compute_dtype": "bf16"}, ("plain",), "plain"),
    ],
    ids=[
        "short",
        "in parts",
        "padded",
        "many",
        "int8",
        "nf4",
        "dora",
        "beside dora",
        "own head",
        "own embedding",
        "bf16",
    ],
)
def test_the_trace_is_what_a_cpu_really_allocates(
    small: Path, changes: dict[str, Any], names: tuple[str, ...], active: str
) -> None:
    """Beyond the weights, within 1 % and never more than 0.5 % under it.

    In 16 bits up to 20 % more are counted, which attention takes only on some CPUs.
    """
    step = InferenceStep.model_validate({"base_precision": "fp32", "compute_dtype": "fp32", **changes})
    adapters = _adapters(small, names)
    trace = trace_inference(AutoConfig.from_pretrained(small / "base"), step, adapters, "cpu")
    held = sum(a.n_bytes for a in trace.allocations if a.component in WEIGHTS)
    predicted = peak_of(trace)[0] - held
    measured = _really_allocated(small / "base", adapters, step, active)
    most = 0.2 if step.compute_dtype == "bf16" else 0.01
    assert -0.005 < predicted / measured - 1 < most, (predicted, measured)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", [{"context": 1500}, {"context": 400, "batch": 4}], ids=["one", "four"])
def test_so_it_is_of_a_real_model(smollm: Path, changes: dict[str, Any]) -> None:
    step = InferenceStep.model_validate({"base_precision": "fp32", "compute_dtype": "fp32", **changes})
    trace = trace_all_layers(ModelSource(str(smollm)).config, step, [], "cpu")
    held = sum(a.n_bytes for a in trace.allocations if a.component in WEIGHTS)
    predicted, measured = peak_of(trace)[0] - held, _really_allocated(smollm, [], step, "")
    assert -0.005 < predicted / measured - 1 < 0.01, (predicted, measured)


@pytest.mark.parametrize("shape", [QWEN2_7B, LLAMA_8B], ids=["qwen2-7b", "llama-8b"])
@pytest.mark.parametrize(("context", "batch"), [(2048, 1), (5000, 3)])
def test_the_kv_cache_has_its_closed_form(shape: dict[str, Any], context: int, batch: int) -> None:
    """2 * layers * heads of keys * width of a head * tokens * 2 bytes, for each row."""
    config = AutoConfig.for_model(**{k: v for k, v in shape.items() if k != "architectures"})
    step = InferenceStep(base_precision="nf4", compute_dtype="bf16", context=context, batch=batch)
    width = config.hidden_size // config.num_attention_heads
    wanted = 2 * config.num_hidden_layers * config.num_key_value_heads * width * context * batch * 2
    found = inference_estimate(config, step, [], "cuda", (8, 6))
    assert found.kv_cache_bytes == wanted
    assert found.components_bytes["kv_cache"] == wanted


def test_a_window_keeps_no_more_than_itself() -> None:
    shape = {**_SMALL, "sliding_window": 100, "model_type": "mistral", "head_dim": 16}
    config = AutoConfig.for_model(**shape)
    step = InferenceStep(base_precision="bf16", compute_dtype="bf16", context=3000)
    found = inference_estimate(config, step, [], "cpu")
    seen_once = 1023 % 1024  # of a last part's full states the cache keeps a view
    assert found.kv_cache_bytes <= 2 * 6 * 2 * 16 * (100 + 1024 + seen_once) * 2
    whole = config.to_dict() | {"sliding_window": None}
    unlimited = inference_estimate(AutoConfig.for_model(**whole), step, [], "cpu")
    assert unlimited.kv_cache_bytes == 2 * 6 * 2 * 16 * 3000 * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_the_shortcut_equals_the_trace_of_every_layer(small: Path, batch: int) -> None:
    config = AutoConfig.from_pretrained(small / "base")
    config.num_hidden_layers = 9
    step = InferenceStep(base_precision="nf4", compute_dtype="bf16", context=2300, batch=batch)
    adapters = _adapters(small, ("plain", "dora"))
    short = trace_all_layers(config, step, adapters, "cuda", (8, 6))
    whole = trace_inference(config, step, adapters, "cuda", (8, 6))
    assert estimate_of(short, step.model_step, "cuda") == estimate_of(whole, step.model_step, "cuda")


def test_an_embedding_with_an_adapter_stays_on_the_card(small: Path) -> None:
    """Whatever the levers of the training were: peft wraps a plain embedding only."""
    levers = Levers(embedding_on_host=True, head="nf4")
    for name, on_host in (("plain", True), ("embedding", False)):
        request = _asked(
            small / "base", 8, trained=StepConfig(levers=levers), adapters=_adapters(small, (name,))
        )
        plan = plan_inference(request)
        assert plan.embedding_on_host == on_host
        assert plan.head == ("nf4" if on_host else "16bit")


def _asked(source: Path, gib: int, **asked: Any) -> InferenceRequest:
    return InferenceRequest(ModelSource(str(source)), imagined_card(gib * GiB), **asked)


def test_qwen2_7b_answers_on_8_gb(config_only: Made) -> None:
    """4 bits of 6.5 billion weights, two tables of 1.09 GB in 16 bits, and 56 KiB a token of context."""
    plan = plan_inference(_asked(config_only(QWEN2_7B), 8, context=8192))
    parts = plan.estimate.components_bytes
    assert plan.fits
    assert (plan.base_precision, plan.compute_dtype, plan.context, plan.batch) == ("nf4", "bf16", 8192, 1)
    assert 3.1 * GiB < parts["base_weights"] < 3.3 * GiB
    assert plan.estimate.kv_cache_bytes == 8192 * 56 * 1024
    assert plan.estimate.peak_reserved_bytes < plan.budget_bytes < 7 * GiB
    assert "context: as asked for" in plan.summary
    assert "8,192 tokens of context" in plan.summary


def test_what_does_not_fit_is_refused_with_what_does(config_only: Made) -> None:
    source = config_only(QWEN2_7B)
    request = _asked(source, 7, context=30_000)
    with pytest.raises(DoesNotFitError, match=r"30,000 tokens .* needs .* GiB, the budget is") as refused:
        plan_inference(request)
    found = re.search(r"--context (\d+), or a (\d+) GB card", refused.value.remedy)
    assert found
    nearest, card = int(found[1]), int(found[2])
    assert 12_000 < nearest < 30_000
    step = max(request._known, key=lambda known: known.embedding_on_host and known.context)
    assert request.fits(step.model_copy(update={"context": nearest}))
    assert not request.fits(step.model_copy(update={"context": int(1.02 * nearest) + 128}))
    assert plan_inference(_asked(source, card, context=30_000)).fits
    with pytest.raises(DoesNotFitError, match="on a bf16 base") as refused:
        plan_inference(_asked(source, 8, precision="bf16"))
    assert "--precision nf4" in refused.value.remedy
    with pytest.raises(ConfigError, match=r"knows 131,072 positions"):
        plan_inference(_asked(source, 7, context=200_000))
    with pytest.raises(DoesNotFitError, match="the budget is"):
        plan_inference(_asked(source, 4))


def test_where_it_is_tight_the_embedding_moves_and_the_context_shrinks(config_only: Made) -> None:
    """The first only where it has to."""
    source = config_only(QWEN2_7B)
    request = _asked(source, 7, context=12_000)
    moved = plan_inference(request)
    assert moved.embedding_on_host
    assert moved.fits
    assert "the embedding stays in host memory" in moved.reason
    step = InferenceStep.model_validate({name: getattr(moved, name) for name in InferenceStep.model_fields})
    assert not request.fits(step.model_copy(update={"embedding_on_host": False}))
    trained = StepConfig(base_precision="nf4", seq_len=30_000)
    shrunk = plan_inference(_asked(source, 7, trained=trained))
    assert 12_000 < shrunk.context < 30_000
    assert shrunk.fits
    assert "the longest that fits" in shrunk.reason


def test_the_run_s_own_precision_and_length_are_taken(config_only: Made) -> None:
    trained = StepConfig(base_precision="int8", seq_len=3000, levers=Levers(head="int8"))
    plan = plan_inference(_asked(config_only(QWEN2_7B), 24, trained=trained))
    assert (plan.base_precision, plan.head, plan.context) == ("int8", "int8", 3000)
    assert "precision: as trained, context: the run's" in plan.reason
    other = plan_inference(_asked(config_only(LLAMA_8B), 24, trained=trained, precision="nf4", context=500))
    assert (other.base_precision, other.context) == ("nf4", 500)


def test_as_many_rows_as_fit_are_answered_together(config_only: Made) -> None:
    source = config_only(QWEN2_7B)
    plan = plan_inference(_asked(source, 8, context=1024, batch=None, rows=100))
    assert 1 < plan.batch < 32
    assert plan.fits
    with pytest.raises(DoesNotFitError, match="in each of 64 rows") as refused:
        plan_inference(_asked(source, 8, context=1024, batch=64))
    assert "--batch 1" in refused.value.remedy
    assert plan_inference(_asked(source, 24, context=512, batch=None, rows=5)).batch == 5


def test_on_a_cpu_the_budget_is_host_memory(small: Path) -> None:
    here = probe(trial=False).model_copy(update={"backend": "cpu", "host_free_bytes": 64 << 20})
    source = ModelSource(str(small / "base"))
    plan = plan_inference(InferenceRequest(source, here))
    assert (plan.device.backend, plan.context) == ("cpu", 2048)
    assert plan.budget_bytes < 64 << 20
    tiny = here.model_copy(update={"host_free_bytes": 1 << 20})
    with pytest.raises(DoesNotFitError, match="the budget is 870 KiB"):
        plan_inference(InferenceRequest(source, tiny))


def test_a_plan_travels_as_json(small: Path) -> None:
    plan = plan_inference(_asked(small / "base", 8, adapters=_adapters(small, ("plain", "dora"))))
    assert plan.adapters == ("plain", "dora")
    assert InferencePlan.model_validate_json(plan.model_dump_json()) == plan
