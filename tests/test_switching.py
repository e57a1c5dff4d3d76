"""Several adapters on one base: each answers as it does alone in plain peft, and none leaves a trace."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lowvram.engine.adapter_folder import AdapterFolder
from lowvram.engine.config import StepConfig
from lowvram.engine.decoding import decoded, prepare_for_decoding
from lowvram.engine.inference_config import InferenceStep
from lowvram.engine.model import load
from lowvram.engine.sampling import Sampler, Sampling
from lowvram.engine.source import ModelSource
from lowvram.engine.switching import BASE, Switch, add_layers
from lowvram.errors import ConfigError
from lowvram.memory.inference import require_adapters_fit
from tests.tiny import SHAPE
from tests.tiny_adapters import alone, generated, save_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [5, 17, 33, 2, 9, 41]
N_NEW = 12
# Rank, layers, scaling, magnitudes and biases; one of rank 2r is what LoRA-GA's difference is saved as.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "own": {"bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, dora": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "head": {"modules_to_save": ["lm_head"], "target_modules": ["o_proj"]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 (its q, k and v have biases) with an adapter of each kind."""
    folder = tmp_path_factory.mktemp("switching")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(folder / "base")
    for seed, (name, changes) in enumerate(KINDS.items()):
        save_adapter(folder / "base", folder / name, seed, **changes)
    return folder


def _switched(home: Path, names: list[str], precision: str = "fp32") -> tuple[Any, Switch]:
    step = StepConfig.model_validate({"base_precision": precision, "compute_dtype": "fp32"})
    base = load(ModelSource(str(home / "base")), step, "cpu")
    adapters = [AdapterFolder(name, home / name) for name in names]
    switch = Switch(add_layers(base, adapters), adapters)
    prepare_for_decoding(base)
    return base, switch


def _written(model: Any) -> list[int]:
    steps = decoded(model, [PROMPT], N_NEW, Sampler(Sampling(), [0], torch.device("cpu")))
    return [int(token) for token in steps]


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([PROMPT])).logits  # type: ignore[no-any-return]


def test_each_adapter_answers_as_alone_in_plain_peft(home: Path) -> None:
    """In every order, with the base between them; answers are equal and logits to 1e-4 of the largest."""
    base, switch = _switched(home, list(KINDS))
    assert switch.active == "plain"
    references = {name: alone(home / "base", home / name) for name in KINDS}
    references[BASE] = alone(home / "base", None)
    logits = {name: _logits(model) for name, model in references.items()}
    wanted = {name: generated(model, PROMPT, N_NEW, do_sample=False) for name, model in references.items()}
    assert len({tuple(row) for row in wanted.values()}) == len(KINDS) + 1
    for name in (
        "biases",
        BASE,
        "dora",
        "own",
        "few",
        "embedding",
        "biases",
        "embedding, dora",
        "head",
        "plain",
        BASE,
        "own",
        "head",
        "dora",
        BASE,
    ):
        switch.to(name)
        assert switch.active == name
        atol = 1e-4 * float(logits[name].abs().max())
        torch.testing.assert_close(_logits(base), logits[name], rtol=0, atol=atol, msg=name)
        assert _written(base) == wanted[name], name


def test_the_base_itself_is_as_before(home: Path) -> None:
    """Bit by bit, after every adapter was on."""
    base, switch = _switched(home, list(KINDS))
    for name in (*KINDS, BASE):
        switch.to(name)
    own = AutoModelForCausalLM.from_pretrained(home / "base").state_dict()
    ours = (".base_layer", ".original_module")
    here = {re.sub("|".join(map(re.escape, ours)), "", n): value for n, value in base.state_dict().items()}
    assert {name for name in own if not torch.equal(own[name], here[name])} == set()


def test_an_embedding_that_was_trained_comes_and_goes(home: Path, tmp_path: Path) -> None:
    """peft saves the base's embedding with an adapter on it, and loads what is in the file; a head's too."""
    folder = save_adapter(home / "base", tmp_path / "ends", 9, target_modules=["embed_tokens", "lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    bases = [name for name in tensors if "base_layer" in name]
    assert len(bases) == 2
    tensors[bases[0]] += 0.1
    save_file(tensors, file)
    base, switch = _switched(home, ["plain", str(folder)])
    for name, adapter in ((str(folder), folder), ("plain", home / "plain"), (BASE, None)):
        switch.to(name)
        wanted = _logits(alone(home / "base", adapter))
        torch.testing.assert_close(_logits(base), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_tied_weight_has_two_names(tmp_path: Path) -> None:
    """LoRA on the head or on the embedding, or both saved as they are; trained under one name or both."""
    base = tmp_path / "base"
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).save_pretrained(base)
    targets = {"head": ["lm_head"], "both": ["q_proj"], "ends": ["embed_tokens"], "as it was": ["lm_head"]}
    for seed, (name, modules) in enumerate(targets.items()):
        save_adapter(
            base,
            tmp_path / name,
            seed,
            save_embedding_layers=name == "both" or "auto",
            target_modules=modules,
        )
    for name, places in {
        "head": ["lm_head"],
        "both": ["embed_tokens", "lm_head"],
        "ends": ["embed_tokens"],
    }.items():
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(file)
        found = [n for place in places for n in tensors if place in n and "lora" not in n]
        assert found, tensors.keys()
        for scale, tensor in enumerate(found, 1):
            tensors[tensor] = tensors[tensor] * (1 + scale)
        save_file(tensors, file)
    require_adapters_fit(
        ModelSource(str(base)).config,
        InferenceStep(base_precision="nf4", compute_dtype="fp32", context=64),
        [AdapterFolder(name, tmp_path / name) for name in targets],
    )
    model, switch = _switched(tmp_path, list(targets))
    for name in ("ends", "head", BASE, "both", "as it was", "head", "ends", BASE):
        switch.to(name)
        wanted = _logits(alone(base, None if name == BASE else tmp_path / name))
        atol = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(_logits(model), wanted, rtol=0, atol=atol, msg=name)


def test_what_peft_cannot_put_on_one_base_is_no_other_model(home: Path, tmp_path: Path) -> None:
    folder = save_adapter(home / "base", tmp_path / "ends", 9, target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="cannot be on one base with those before it"):
        _switched(home, [str(folder), "head"])


def test_on_a_4_bit_base_too(home: Path) -> None:
    """Against plain peft on transformers' own 4-bit model."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base, switch = _switched(home, ["few", "dora"], "nf4")
    for name in ("dora", "few"):
        plain = AutoModelForCausalLM.from_pretrained(
            home / "base", quantization_config=options, dtype=torch.float32
        )
        for module in plain.modules():  # on a CPU with AVX512-BF16 it would repack its weights
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        reference = PeftModel.from_pretrained(plain, str(home / name)).eval()
        switch.to(name)
        wanted = _logits(reference)
        atol = 1e-3 * float(wanted.abs().max())
        torch.testing.assert_close(_logits(base), wanted, rtol=0, atol=atol)
        assert _written(base) == generated(reference, PROMPT, N_NEW, do_sample=False)


def test_an_unknown_name_is_refused(home: Path) -> None:
    _, switch = _switched(home, ["plain"])
    with pytest.raises(ConfigError, match="no adapter 'sql'") as refused:
        switch.to("sql")
    assert "base, plain" in refused.value.remedy
    assert switch.active == "plain"


def test_a_model_without_adapters_is_the_base(home: Path) -> None:
    base, switch = _switched(home, [])
    assert (switch.active, switch.names) == (BASE, ())
    assert _written(base) == generated(alone(home / "base", None), PROMPT, N_NEW, do_sample=False)


def _drop_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_drop_tensor, "belongs to another model: lacks"),
        (_cut, "is cut off"),
        (_pickle, "is pickled and is not read"),
        (lambda f: _edit(f, r=3), r"adapter_config.json' says rank 3 for 'model.* are of rank 4 and 4"),
        (lambda f: _edit(f, r=0), "adapter_config.json' says rank 0"),
        (lambda f: _edit(f, target_modules=["c_attn"]), "belongs to another model"),
        (lambda f: _edit(f, target_modules=["q_proj"]), "the base has no place for"),
        (lambda f: _edit(f, init_lora_weights="pissa"), "which changes the base"),
        (lambda f: _edit(f, peft_type="IA3"), "peft_type"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read by peft"),
    ],
    ids=["lacks", "cut", "pickled", "rank", "no rank", "other names", "too many", "pissa", "IA3", "no JSON"],
)
def test_a_wrong_adapter_is_refused_without_a_weight(
    home: Path, tmp_path: Path, harm: Callable[[Path], object], says: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(home / "plain", folder)
    harm(folder)
    step = InferenceStep(base_precision="nf4", compute_dtype="fp32", context=64)
    config = ModelSource(str(home / "base")).config
    require_adapters_fit(config, step, [AdapterFolder("good", home / name) for name in ["dora"]])
    with pytest.raises(ConfigError, match=says):
        require_adapters_fit(config, step, [AdapterFolder("bad", folder)])
    other = Qwen2Config(**{**SHAPE, "hidden_size": 64})
    with pytest.raises(ConfigError, match=r"\[.*\] in it and \[.*\] on this base"):
        require_adapters_fit(other, step, [AdapterFolder("good", home / "plain")])
