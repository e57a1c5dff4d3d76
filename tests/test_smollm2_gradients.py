"""LoRA gradients of the real SmolLM2-135M in bf16, lever by lever, against float32: no worse than plain bf16."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowvram.data.conversations import load_conversations
from lowvram.data.tokens import Example, tokenize
from lowvram.engine.adapters import add_adapters, trainable
from lowvram.engine.batch import collate
from lowvram.engine.config import BasePrecision, Levers, StepConfig
from lowvram.engine.head import TiledHead
from lowvram.engine.model import load
from lowvram.engine.nf4 import nf4_values
from lowvram.engine.source import ModelSource
from lowvram.engine.step import SummedLoss
from tests.conftest import GSM8K

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16
# GSM8K's lines, whose questions are masked: one row, and three of different lengths, padded to the longest
BATCHES = {"one row": (0,), "three rows, padded": (4, 1, 2)}
Gradients = dict[str, torch.Tensor]


def _examples(folder: Path, lines: tuple[int, ...]) -> list[Example]:
    rows = load_conversations(str(GSM8K), limit=max(lines) + 1).conversations
    return [tokenize(rows, ModelSource(str(folder)).tokenizer)[line] for line in lines]


def _with_known_adapters(model: Any) -> Any:
    """The same A and B for all, B not zero; float32 on both sides."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(trainable(model).items()):
        std = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model.train()


def _plain_model(folder: Path, base: BasePrecision, attention: str) -> Any:
    """transformers' own model and attention, peft's own layers."""
    more: dict[str, Any] = {}
    if base == "nf4":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention, **more
    )


def _with_peft(model: Any) -> Any:
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(ALL), task_type="CAUSAL_LM")
    return _with_known_adapters(get_peft_model(model, lora))


def _in_float32(plain: Any, folder: Path, head: torch.Tensor | None) -> Any:
    """The very numbers of the bf16 model, NF4 ones as bitsandbytes reads them, in float32."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    for name, module in plain.named_modules():
        if isinstance(module, Linear4bit):
            exact.get_submodule(name).weight.data = nf4_values(module).float()
    if head is not None:
        exact.lm_head.weight = torch.nn.Parameter(head.float())  # no longer the embedding's
    return exact


def _plain_gradients(model: Any, parts: list[list[Example]], more_padding: int = 0) -> Gradients:
    """Of the mean loss over all trained tokens; one forward and backward for each part."""
    n_trained = sum(example.n_trained for part in parts for example in part)
    for part in parts:
        length = max(len(e) for e in part) + more_padding
        ids, mask, labels = torch.zeros(3, len(part), length, dtype=torch.int64)
        labels -= 100
        for row, example in enumerate(part):
            n = len(example)
            ids[row, :n] = torch.tensor(list(example.input_ids))
            mask[row, :n] = 1
            trained = torch.tensor(list(example.trained)) > 0
            labels[row, :n] = torch.where(trained, ids[row, :n], -100)
        n_here = sum(example.n_trained for example in part)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        (loss * n_here / n_trained).backward()
    return _taken(model)


def _taken(model: Any) -> Gradients:
    gradients = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        gradients[name.removeprefix("model.")] = parameter.grad
        parameter.grad = None
    return gradients


def deviation(g, r):
    num = sum(float((g[n]-r[n]).pow(2).sum()) for n in r); den = sum(float(r[n].pow(2).sum()) for n in r)
    return (num/den)**.5
def per(g,r): return {n: float((g[n]-r[n]).norm()/r[n].norm()) for n in r}
def ours(folder, ex, base, **lv):
    step=StepConfig(base_precision=base, compute_dtype="bf16", rank=RANK, alpha=ALPHA, dropout=0.0, target_modules=ALL, levers=Levers(**{"gradient_checkpointing":False,"loss_chunk_tokens":4096,**lv}))
    m=_with_known_adapters(add_adapters(load(ModelSource(str(folder)), step, "cpu"), step))
    b=collate(ex,0)
    (SummedLoss(m,step)(*b.tensors)/b.trained_tokens).backward()
    head=m.get_base_model().get_output_embeddings()
    w = None
    if isinstance(head, TiledHead): w=torch.cat([t.clone() for _,t in head.tiles()])
    return _taken(m), w
if __name__ == "__main__":
    import sys, time
    from lowvram.demo.model import demo_model
    from transformers.utils.logging import disable_progress_bar; disable_progress_bar(); folder=Path(demo_model(print))
    print([len(e) for e in _examples(folder, tuple(range(12)))])
    base=sys.argv[1]
    for bn, lines in BATCHES.items():
        ex=_examples(folder,lines); print(bn,[ (len(e),e.n_trained) for e in ex])
        t=time.time(); plain=_plain_model(folder,base,"sdpa")
        ref=_plain_gradients(_with_peft(_in_float32(plain,folder,None)),[ex]); print("ref",time.time()-t)
        pm=_with_peft(plain)
        runs={"together":_plain_gradients(pm,[ex]), "more padding":_plain_gradients(pm,[ex],37), "split": _plain_gradients(pm,[[e] for e in ex]), "reversed": _plain_gradients(pm,[ex[::-1]])}
        
        pm.get_base_model().set_attn_implementation("eager"); runs["eager"]=_plain_gradients(pm,[ex])
        del pm, plain
        noise={}
        def show(k,g,r):
            p=per(g,r); v=sorted(p.values()); 
            print(f"{k:24s} dev {deviation(g,r):.5f} vs together {deviation(g,runs['together']):.5f} per: median {v[len(v)//2]:.4f} max {v[-1]:.4f} A {median([x for n,x in p.items() if 'lora_A' in n]):.4f} B {median([x for n,x in p.items() if 'lora_B' in n]):.4f}", flush=True)
            return p
        P=[show(k,g,ref) for k,g in runs.items()]
        pmax={n:max(p[n] for p in P) for n in ref}; pmed={n:median(p[n] for p in P) for n in ref}
        for k,lv in {"whole":{}, "chunk":dict(loss_chunk_tokens=16),"ckpt":dict(gradient_checkpointing=True),"tiles":dict(gradient_checkpointing=True,tile_tokens=64),"offload":dict(gradient_checkpointing=True,offload_checkpoints=True),"streamed":dict(head="streamed"),"emb":dict(head="streamed",embedding_on_host=True),"all":dict(head="streamed",embedding_on_host=True,gradient_checkpointing=True,offload_checkpoints=True,tile_tokens=64,loss_chunk_tokens=16),"nf4":dict(head="nf4"),"int8":dict(head="int8")}.items():
            t=time.time(); g,w=ours(folder,ex,base,**lv)
            p=show(k,g,ref)
            print("     ratios: overall/median per/med max", deviation(g,ref)/median(deviation(x,ref) for x in runs.values()), max(p[n]/pmax[n] for n in ref), median(p[n]/pmed[n] for n in ref), time.time()-t)
            if k in("nf4","int8"):
                r2=_plain_gradients(_with_peft(_in_float32(_plain_model(folder,base,"sdpa"),folder,w)),[ex]); show(k+" own ref",g,r2)
