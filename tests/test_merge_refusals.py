"""Bases and adapters that cannot be merged: one clear message each, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.merge import merge_adapter
from lowvram.export.merged_tensors import MergedTensors
from lowvram.export.quantized_output import write_quantized
from lowvram.export.tensor_files import tensors_of_folder
from tests.merge_cases import LLAMA, Case, save_adapter, save_base
from tests.tiny_gguf import byte_level

Harm = Callable[[Path], object]
WEIGHTS, INDEX = "adapter/adapter_model.safetensors", "base/model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_adapter(save_base(Case(shard="40KB"), folder / "base"), Case(), folder / "adapter")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A base in several shards and an adapter, to be harmed."""
    return Path(shutil.copytree(made, tmp_path / "home"))


def _refused(home: Path, says: str) -> None:
    before = sorted(home.rglob("*"))
    with pytest.raises(ConfigError, match=says) as told:
        merge_adapter(ModelSource(str(home / "base")), home / "adapter", home / "out")
    assert told.value.remedy
    assert sorted(home.rglob("*")) == before


def _config(**changes: Any) -> Harm:
    def harm(home: Path) -> None:
        file = home / "adapter/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return harm


def _tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Harm:
    def harm(home: Path) -> None:
        tensors = load_file(home / file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, home / file)

    return harm


def _shard(home: Path) -> Path:
    return sorted((home / "base").glob("*.safetensors"))[1]


def _cut(home: Path) -> None:
    _shard(home).write_bytes(_shard(home).read_bytes()[:-100])


def _broken_header(home: Path) -> None:
    content = bytearray(_shard(home).read_bytes())
    content[8:20] = b"{" * 12
    _shard(home).write_bytes(content)


def _shape_against_bytes(home: Path) -> None:
    content = _shard(home).read_bytes()
    _shard(home).write_bytes(content.replace(b'"shape":[64', b'"shape":[65', 1))


def _table(text: bytes) -> Harm:
    def harm(home: Path) -> None:
        _shard(home).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))

    return harm


def _index(change: Callable[[dict[str, str]], object]) -> Harm:
    def harm(home: Path) -> None:
        index = json.loads((home / INDEX).read_text())
        change(index["weight_map"])
        (home / INDEX).write_text(json.dumps(index))

    return harm


def _whole_index(content: Any) -> Harm:
    return lambda home: (home / INDEX).write_text(json.dumps(content))


def _twice(home: Path) -> None:
    """A shard holds a tensor that another one holds as well."""
    other = load_file(_shard(home))
    file = sorted((home / "base").glob("*.safetensors"))[0]
    save_file({**load_file(file), **other}, file)


def _only_consolidated(home: Path) -> None:
    """As a Mistral folder whose other half was not downloaded."""
    kept = _shard(home).rename(home / "base/consolidated.safetensors")
    for file in {*(home / "base").glob("*.safetensors"), home / INDEX} - {kept}:
        file.unlink()


def _named_weights(home: Path) -> None:
    config = json.loads((home / "base/config.json").read_text())
    (home / "base/config.json").write_text(json.dumps({**config, "transformers_weights": "b.safetensors"}))


def _pickled_base(home: Path) -> None:
    for file in (*(home / "base").glob("*.safetensors"), home / INDEX):
        file.unlink()
    torch.save({}, home / "base/pytorch_model.bin")


def _pickled_adapter(home: Path) -> None:
    (home / WEIGHTS).unlink()
    torch.save({}, home / "adapter/adapter_model.bin")


def _other_base(**shape: Any) -> Harm:
    def harm(home: Path) -> None:
        shutil.rmtree(home / "base")
        LlamaForCausalLM(LlamaConfig(**{**LLAMA, **shape})).save_pretrained(home / "base")

    return harm


def _quantised_base(home: Path) -> None:
    shutil.rmtree(home / "base")
    save_base(Case(), home / "base")
    packed = {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 96, dtype=torch.uint8)}
    _tensors(lambda tensors: tensors.update(packed), "base/model.safetensors")(home)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
HARMS: dict[str, tuple[Harm, str]] = {
    "truncated shard": (_cut, "is cut off: .* of .* bytes"),
    "broken header": (_broken_header, "broken safetensors header"),
    "header a list": (_table(b"[1, 2]"), "broken safetensors header"),
    "header without places": (_table(b'{"a": {"dtype": "F32"}}'), "broken safetensors header"),
    "header of texts": (_table(b'{"a": "b"}'), "broken safetensors header"),
    "unknown dtype": (
        _table(b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}'),
        "stored as F4, which lowvram does not read",
    ),
    "header against itself": (_shape_against_bytes, "bytes by its place"),
    "path traversal": (
        _index(lambda m: m.update({"lm_head.weight": "../../x"})),
        "points outside its folder",
    ),
    "absolute path": (_index(lambda m: m.update({"lm_head.weight": "/etc/passwd"})), "points outside"),
    "missing shard": (lambda home: _shard(home).unlink(), "is missing"),
    "index lists more": (
        _index(lambda m: m.update({"more.weight": m["lm_head.weight"]})),
        r"lists 1 tensors that no file holds, first 'more.weight'",
    ),
    "index of a number": (_index(lambda m: m.update({"lm_head.weight": 5})), "is not a safetensors index"),
    "index of nothing": (_index(lambda m: m.update({"lm_head.weight": None})), "is not a safetensors index"),
    "index of lists": (_index(lambda m: m.update({"lm_head.weight": ["a"]})), "is not a safetensors index"),
    "index a list": (_whole_index(["a"]), "is not a safetensors index"),
    "index of a list": (_whole_index({"weight_map": ["a"]}), "is not a safetensors index"),
    "a tensor twice": (_twice, "both hold"),
    "other names of files": (_only_consolidated, "neither model.safetensors nor .*consolidated.safetensors"),
    "weights that the config names": (_named_weights, "names its weights. file, b.safetensors"),
    "pickled base": (_pickled_base, "only pickled weights: pytorch_model.bin"),
    "pickled adapter": (_pickled_adapter, "pickled and is not read"),
    "missing base": (lambda home: shutil.rmtree(home / "base"), "neither a folder nor reachable|no folder"),
    "no adapter": (lambda home: (home / "adapter/adapter_config.json").unlink(), "holds no adapter_config"),
    "adapter cut off": (
        lambda home: (home / WEIGHTS).write_bytes((home / WEIGHTS).read_bytes()[:-9]),
        "is cut off",
    ),
    "other base, shapes": (_other_base(hidden_size=32), r"is \[\d+, \d+\] in the base and \[\d+, \d+\] in"),
    "other base, names": (_other_base(num_hidden_layers=1), "'model.layers.1.* which the base does not have"),
    "quantised base": (_quantised_base, "stored as uint8, not in 16 or 32 bits"),
    "rank": (_config(r=8), "says rank 8 for '.*', its factors are of rank 4 and 4"),
    "pattern's rank": (_config(rank_pattern={"q_proj": 2}), "says rank 2 for '.*q_proj'"),
    "no rank": (_config(r=None), "no usable r and lora_alpha"),
    "infinite rank": (_config(r=float("inf")), "no usable r and lora_alpha"),
    "patterns a list": (_config(rank_pattern=["a"]), r"says rank_pattern \['a'\], which is not a mapping"),
    "alphas a text": (_config(alpha_pattern="a"), "says alpha_pattern a, which is not a mapping"),
    "targets a number": (_config(target_modules=5), "says target_modules 5, which is not a text or a list"),
    "saved a list of lists": (_config(modules_to_save=[["a"]]), "says modules_to_save"),
    "half a pair": (_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "lacks a whole lora_A and lora_B"),
    "not a number": (
        _tensors(lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan"))),
        "q_proj.weight' would hold a number that bfloat16 cannot",
    ),
    "unknown tensor": (_tensors(lambda t: t.update({f"{Q}.lora_E": torch.ones(2)})), "no part of a plain"),
    "new bias": (
        _tensors(lambda t: t.update({f"{Q}.base_layer.bias": torch.ones(64)})),
        "its layer has no bias there",
    ),
    "resized": (
        _tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(130, 64)})),
        r"'lm_head.weight' is \[128, 64\] in the base and \[130, 64\]",
    ),
    "other peft": (_config(peft_type="IA3"), "peft_type IA3"),
    "bias": (_config(bias="some"), "bias some"),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights pissa, which changed the base"),
    "experts": (_config(target_parameters=["mlp.experts.down_proj"]), "target_parameters"),
    "replicated": (_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "alora": (_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "of a newer peft": (_config(use_something_new=True), "use_something_new True"),
    "config no JSON": (lambda home: (home / "adapter/adapter_config.json").write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("kind", HARMS)
def test_refused_with_one_message_and_nothing_written(home: Path, kind: str) -> None:
    harm, says = HARMS[kind]
    harm(home)
    _refused(home, says)


def test_t5_s_shared_weight_cannot_become_two(tmp_path: Path) -> None:
    case = Case({"target_modules": ["q", "lm_head"], "task_type": "SEQ_2_SEQ_LM"}, "t5")
    save_adapter(save_base(case, tmp_path / "base"), case, tmp_path / "adapter")
    _refused(tmp_path, "is one weight with 3 others")


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    """transformers 5 holds all experts in one tensor; files on disk have one of each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
    MixtralForCausalLM(MixtralConfig(**shape)).save_pretrained(tmp_path / "base")
    case = Case({"target_modules": ["q_proj"]})
    save_adapter(tmp_path / "base", case, tmp_path / "adapter")
    merge_adapter(ModelSource(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "fine")
    expert = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    _tensors(lambda t: t.update({expert: torch.ones(2, 192, 64)}))(tmp_path)
    _refused(tmp_path, "another name in memory than on disk|makes of other tensors")


_NO_TOKENIZER = "The tokenizer in '.*adapter' cannot be loaded"
BROKEN: dict[str, tuple[str, str | None, str]] = {
    "tokenizer cut off": (
        "adapter/tokenizer.json",
        '{"version": ',
        _NO_TOKENIZER,
    ),
    "tokenizer a list": ("adapter/tokenizer.json", "[]", _NO_TOKENIZER),
    "tokenizer gone": ("adapter/tokenizer.json", None, _NO_TOKENIZER),
    "no kind": ("adapter/tokenizer_config.json", '{"tokenizer_class": 5}', _NO_TOKENIZER),
    "tokenizer config": ("adapter/tokenizer_config.json", "{", "cannot be read as JSON"),
    "generation config": ("base/generation_config.json", "{", "cannot be read as JSON"),
    "generation config a list": ("base/generation_config.json", "[]", "cannot load .*generation_config"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_would_not_load_is_refused_before_a_weight_is_written(
    home: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content, says = BROKEN[kind]
    byte_level("gpt-2").save_pretrained(home / "adapter")
    if content is None:
        (home / file).unlink()
    else:
        (home / file).write_text(content)
    for written in ("merge.write_shards", "quantized_output.write_file"):
        monkeypatch.setattr(f"lowvram.export.{written}", lambda *_: pytest.fail("wrote weights"))
    _refused(home, says)
    tensors = MergedTensors.open(ModelSource(str(home / "base")), home / "adapter")
    options: dict[str, Any] = {"double_quantization": True, "progress": print, "check": print}
    with pytest.raises(ConfigError, match=says):
        write_quantized(tensors, home / "adapter", home / "out", **options)


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("beside", ["zz_old", "consolidated", "model.fp16"])
def test_a_file_beside_the_model_is_no_part_of_it(tmp_path: Path, shard: str, beside: str) -> None:
    """As transformers loads it: such a file's tensors replaced the model's, and verification agreed."""
    base = save_base(Case(shard=shard), tmp_path / "base")
    save_adapter(base, Case(), tmp_path / "adapter")
    merged = [tmp_path / "without", tmp_path / "with"]
    merge_adapter(ModelSource(str(base)), tmp_path / "adapter", merged[0])
    whole = LlamaForCausalLM.from_pretrained(base).state_dict()
    others = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    save_file({**others, "layers.0.attention.wq.weight": torch.ones(2)}, base / f"{beside}.safetensors")
    merge_adapter(ModelSource(str(base)), tmp_path / "adapter", merged[1])
    without, found = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in merged)
    assert all(torch.equal(without[name], found[name]) for name in without)
    assert tensors_of_folder(merged[1]).keys() == tensors_of_folder(merged[0]).keys()


def test_the_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    base = save_base(Case(shard="40KB"), tmp_path / "base")
    single = {
        name: tensor + 1 for name, tensor in LlamaForCausalLM.from_pretrained(base).state_dict().items()
    }
    save_file(single, base / "model.safetensors", {"format": "pt"})
    loaded = LlamaForCausalLM.from_pretrained(base).state_dict()
    found = tensors_of_folder(base)
    assert all(torch.equal(found[name].whole(), loaded[name]) for name in loaded)
    assert all(torch.equal(loaded[name], single[name]) for name in loaded)
