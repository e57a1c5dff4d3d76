"""Ollama's Modelfile and vLLM's command, from the tokenizer's own template and the adapter's own files."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.export.adapter_files import read_adapter
from lowvram.export.chat_format import ChatFormat, chat_format
from lowvram.export.ollama import modelfile
from lowvram.export.vllm import vllm_command
from tests.chat_families import FAMILIES, tokenizer_of
from tests.test_gguf import reference
from tests.tiny_gguf import byte_level, saved_model

TURNS = [("user", "Hi {{ .x }}\n\nthere"), ("assistant", 'A "quote" \\ here'), ("user", "你好 🙂?")]
SYSTEM = ("system", "Be brief.")


def _messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "none"])
def test_the_format_is_that_of_the_template(name: str, smollm: Path) -> None:
    """Chat templates of eight makers' kinds, system messages in three places or in none."""
    tokenizer = tokenizer_of(FAMILIES[name], smollm)
    found = chat_format(tokenizer)
    assert found is not None
    assert found.own_system == FAMILIES[name].system
    assert found.system_last == (name == "mistral_v3")
    asked = [_messages(*TURNS), _messages(TURNS[0])]
    if found.own_system:
        asked += [_messages(SYSTEM, *TURNS), _messages(SYSTEM, TURNS[2])]
    for messages in asked:
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found.rendered(messages) == own


def test_a_template_that_is_no_fixed_text_is_none() -> None:
    """One that numbers its turns, one that drops old answers, and one that refuses everything."""
    tokenizer = byte_level("gpt-2")
    for template in (
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% endif %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ):
        tokenizer.chat_template = template
        assert chat_format(tokenizer) is None


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Asked struct { System string; Messages []*Message }
func main() {
  var asked []Asked
  text, _ := os.ReadFile(os.Args[1])
  if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
  made := template.Must(template.New("t").Parse(string(text)))
  for _, a := range asked {
    if err := made.Execute(os.Stdout, a); err != nil { panic(err) }
    os.Stdout.Write([]byte{0})
  }
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, whose text/template Ollama renders with")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "none"])
def test_go_renders_it_so(name: str, smollm: Path, tmp_path: Path) -> None:
    found = chat_format(tokenizer_of(FAMILIES[name], smollm))
    assert found is not None
    asked = [_messages(*TURNS), _messages(TURNS[0]), _messages(SYSTEM, *TURNS), _messages(SYSTEM, TURNS[2])]
    (tmp_path / "main.go").write_text(GO)
    (tmp_path / "template").write_text(found.go_template)
    body = [{"System": m[0]["content"] if m[0]["role"] == "system" else "", "Messages": m} for m in asked]
    done = subprocess.run(
        ["go", "run", str(tmp_path / "main.go"), str(tmp_path / "template")],
        input=json.dumps(body),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\0")[:-1] == [found.rendered(messages) for messages in asked]


def test_every_fixed_text_stands_in_quotes() -> None:
    """ "{{-" and "-}}" would trim a line's end that is part of the format."""
    made = ChatFormat("<s>\n", "S ", "\n\n", "\tA", ' "again" ', "\n").go_template
    for text in ('"<s>\\n"', '"\\tA"', '" \\"again\\" "', '"\\n\\n"'):
        assert f"{{{{- {text} -}}}}" in made
    assert '"""' not in made


def test_modelfile(tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    base = saved_model(tmp_path / "base", "llama", tokenizer)
    made = modelfile(ModelSource(str(base)), tokenizer, adapter_on=None, add_bos=False, context=384)
    assert "FROM ./model.gguf\n" in made.text
    assert 'TEMPLATE """{{- $before := "" -}}' in made.text
    assert 'PARAMETER stop "<|im_end|>"\n' in made.text
    assert "PARAMETER num_ctx 384\n" in made.text
    assert "PARAMETER temperature 0\n" in made.text
    other = modelfile(ModelSource(str(base)), tokenizer, adapter_on="llama3:8b", add_bos=False, context=None)
    assert "FROM llama3:8b\nADAPTER ./adapter.gguf\n" in other.text
    assert "num_ctx" not in other.text


def test_modelfile_takes_the_generation_config(tmp_path: Path) -> None:
    """Llama 3's several stop tokens, and its temperature where it samples."""
    tokenizer = byte_level("gpt-2")
    base = saved_model(tmp_path / "base", "llama", tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = {"eos_token_id": ends, "do_sample": True, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(config))
    made = modelfile(ModelSource(str(base)), tokenizer, adapter_on=None, add_bos=False, context=None)
    assert made.stops == ("<|im_end|>", "<|endoftext|>")
    assert "PARAMETER temperature 0.6\n" in made.text


def test_the_engine_s_start_token_is_not_written_twice(smollm: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["llama3"], smollm)
    found = chat_format(tokenizer)
    assert found is not None
    assert "<|begin_of_text|>" in found.go_template
    assert "<|begin_of_text|>" not in found.without_start("<|begin_of_text|>").go_template


def test_without_a_format_there_is_no_template_line_and_it_is_said(tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    base = saved_model(tmp_path / "base", "llama", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    made = modelfile(ModelSource(str(base)), tokenizer, adapter_on=None, add_bos=False, context=None)
    assert "TEMPLATE" not in made.text
    assert "no TEMPLATE line" in made.notes[0]


def _adapter(folder: Path, **options: Any) -> Any:
    base = saved_model(folder / "base", "llama with biases", tie_word_embeddings=False)
    config = LoraConfig(**{"r": 20, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
    torch.manual_seed(0)
    get_peft_model(reference(base), config).save_pretrained(folder / "ad apter")
    return read_adapter(folder / "ad apter")


def test_vllm_s_command_has_the_next_rank_that_it_takes(tmp_path: Path) -> None:
    command = vllm_command(_adapter(tmp_path), "Qwen/Qwen2-7B", "mine")
    folder = tmp_path / "ad apter"
    assert command == (
        f"vllm serve Qwen/Qwen2-7B --enable-lora --max-lora-rank 32 --lora-modules 'mine={folder}'"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 600}, "a rank of 600; vLLM's largest is 512"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole weights"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        vllm_command(_adapter(tmp_path, **options), "base", "mine")
    assert "lowvram merge RUN" in refused.value.remedy
