"""Random requests to the planner on small real architectures, and cards on which the choice is hard."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig

from lowvram.data.stats import DataStats
from lowvram.engine.config import StepConfig
from lowvram.engine.source import ModelSource
from lowvram.errors import ConfigError
from lowvram.hardware import DEFAULT_CONTEXT_BYTES, DEFAULT_HELD_BYTES, Hardware, card_of_size
from lowvram.memory.cache import RememberedModel
from lowvram.planner.build import search_for
from lowvram.planner.choice import choose
from lowvram.planner.conflicts import refuse_conflicts
from lowvram.planner.first_step import Request, first_step
from lowvram.planner.profiles import LeverName, Profile, load_profile
from lowvram.planner.search import Search
from lowvram.planner.wishes import Wishes
from lowvram.units import GiB

_SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# As quick to trace as narrow ones. Where a step takes less than 100 MiB, a page of 20 MiB is more than most
# levers save, so that the search has to trace hundreds of candidates: narrow models get small ladders.
_WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_GPT2 = {"n_embd": 512, "n_layer": 3, "n_head": 4, "n_positions": 1024, "vocab_size": 8192}
_OPT = {"ffn_dim": 1536, "word_embed_proj_dim": 512, "max_position_embeddings": 1024}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 8, "vocab_size": 1024}),
    "wide llama": ("llama", _WIDE | {"num_hidden_layers": 8, "vocab_size": 64000}),
    "tied qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "wide tied qwen2": ("qwen2", _WIDE | {"vocab_size": 128000, "tie_word_embeddings": True}),
    "narrow qwen2": ("qwen2", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000}),
    "wide mistral": ("mistral", _WIDE | {"sliding_window": 512}),
    "mistral": ("mistral", {"hidden_size": 256, "head_dim": 64, "sliding_window": 512}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "layer_types": _ALTERNATING}),
    "gpt2": ("gpt2", {"bos_token_id": 0, "eos_token_id": 1} | _GPT2),
    "opt": ("opt", _OPT | {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"num_hidden_layers": 2, "vocab_size": 8000}),
}
_LEVERS = (
    *("none", "all", "gradient_checkpointing=off", "gradient_checkpointing=on", "kept_layers=1"),
    *("kept_layers=4", "head=nf4", "head=int8", "head=streamed,embedding_on_host=on", "head=16bit"),
    *("embedding_on_host=on", "embedding_on_host=off,head=16bit", "loss_chunk_tokens=64", "tile_tokens=1024"),
    *("offload_checkpoints=on", "offload_checkpoints=off,tile_tokens=0", "double_quantization=off"),
    *("double_quantization=on", "empty_cache=on,loss_chunk_tokens=256", "expandable_segments=off"),
)
_TARGETS = {"gpt2": "c_attn", "phi3": "qkv_proj", "opt": "q_proj,v_proj,fc1"}
_HOST_BYTES = 16 * GiB
ON_HOST = {"embedding_on_host": True, "offload_checkpoints": True, "head": "streamed"}


def save_models(folder: Path) -> dict[str, ModelSource]:
    """Each architecture's config in a folder of its own; nothing has weights."""
    sources = {}
    for name, (kind, changes) in _MODELS.items():
        shape = {} if kind == "gpt2" else _SHAPE
        path = folder / name.replace(" ", "-")
        AutoConfig.for_model(kind, **shape | changes).save_pretrained(path)
        sources[name] = ModelSource(str(path))
    return sources


def random_request(
    draw: random.Random, models: Mapping[str, ModelSource], host: Hardware
) -> tuple[str, Request]:
    """Model, wishes, profile and data; on a card that holds everything."""
    name = draw.choice(sorted(models))
    wishes, profile = _wishes(draw, name), _profile(draw, most_levers=99 if "wide" in name else 3)
    free = draw.choice((_HOST_BYTES,) * 22 + (int(2.02 * GiB), int(2.2 * GiB), GiB))
    machine = host.model_copy(update={"host_free_bytes": free, "host_total_bytes": 2 * _HOST_BYTES})
    stats = _stats(draw) if draw.random() < 0.5 else None
    return name, Request(models[name], card_of_size(80 * GiB, machine), profile, wishes, stats)


def _wishes(draw: random.Random, name: str) -> Wishes:
    """Few at a time; from few values, so that traces are shared between seeds."""
    targets = _TARGETS.get(name, "qv")
    values: dict[str, tuple[Any, ...]] = {
        "rank": (2, 8, 8, 64, 2500),
        "alpha": (32.0,),
        "dropout": (0.0, 0.05),
        "targets": ("all-linear", targets, targets, "no_proj"),
        "seq_len": (256, 500, 1536, 1536, 5000),
        "batch": (1, 4, 4, 6),
        "micro_batch": (1, 2, 3, 4),
        "precision": ("nf4", "nf4", "int8", "bf16", "fp16", "fp32"),
        "optimizer": ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"),
        "levers": _LEVERS,
        "no_offload": (True,),
        "packing": (True, False),
        "prefer": ("speed", "context", "quality"),
        "rslora": (True, False),
        "steps": (1, 40),
        "seed": (7,),
    }
    often = {"seq_len", "levers"}
    wished = [n for n in values if draw.random() < (0.4 if n in often else 0.18)]
    return Wishes(**{n: draw.choice(values[n]) for n in wished})


def _profile(draw: random.Random, most_levers: int) -> Profile:
    """A shipped one, often with a part of its ladder or with other policies."""
    profile = load_profile(draw.choice(("8gb", "24gb")))
    changes: dict[str, Any] = {
        "default_seq_len": draw.choice((256, 1536, 1536)),
        "smallest_seq_len": draw.choice((64, 128)),
        "effective_batch": 4,
        "targets": "all-linear",
    }
    names = get_args(LeverName)
    if most_levers < len(names) or draw.random() < 0.4:
        changes["ladder"] = tuple(draw.sample(names, draw.randint(0, min(most_levers, len(names)))))
    if draw.random() < 0.3:
        changes["quantized_head"] = draw.choice(("last_resort", "when_faster", "never"))
    if draw.random() < 0.2:
        changes["use_rslora"] = draw.choice(("never", "always"))
    return profile.model_copy(update=changes)


def _stats(draw: random.Random) -> DataStats:
    """Short, all equal, long-tailed, or longer than any of the models reads; answers begin early or late."""
    kind = draw.choice(("short", "equal", "tailed", "long"))
    longest = {"short": 256, "equal": 500, "tailed": 1536, "long": 4000}[kind]
    power = {"short": 1, "equal": 0, "tailed": 4, "long": 2}[kind]
    lengths = tuple(max(round(longest * (n / 100) ** power), 8) for n in range(101))
    late = draw.choice((0.05, 0.5, 0.9))
    starts = tuple(sorted(int(late * n) for n in lengths))
    n_examples = draw.choice((3, 60, 1000))
    n_tokens = round(n_examples * sum(lengths) / 101)
    return DataStats(
        source=f"{kind}.jsonl",
        shape="text",
        sha256="0",
        template="none",
        n_examples=n_examples,
        n_held_out=max(n_examples // 20, 1),
        n_tokens=n_tokens,
        n_trained_tokens=round((1 - late) * n_tokens),
        longest_tokens=longest,
        length_quantiles=lengths,
        answer_start_quantiles=starts,
    )


def on_card(request: Request, budget_bytes: float) -> Request:
    """The same on a card whose budget that is."""
    total = (budget_bytes + DEFAULT_HELD_BYTES + DEFAULT_CONTEXT_BYTES) / (1 - request.profile.margin_share)
    return replace(request, hardware=card_of_size(math.ceil(total), request.hardware))


def on_larger_card(request: Request, factor: float) -> Request:
    size = math.ceil(request.hardware.total_bytes * factor)
    return replace(request, hardware=card_of_size(size, request.hardware))


def with_wishes(request: Request, **changes: Any) -> Request:
    return replace(request, wishes=Wishes.model_validate(request.wishes.model_dump() | changes))


def chosen(request: Request) -> tuple[StepConfig, Search]:
    """What `decide` decides, without the plan's other figures, which take some traces more."""
    model = RememberedModel(request.source)
    refuse_conflicts(request, model.shape)
    search = search_for(request, model)
    return choose(search, first_step(request, model.shape), request), search


def tight_card(draw: random.Random, request: Request) -> Request:
    """Between too small for the leanest step and enough for the fastest.

    Raises:
        ConfigError, DoesNotFitError: on every card.
    """
    fastest, search = chosen(request)
    leanest = search.leanest(first_step(request, search.model.shape))
    low, high = (search.reserved_bytes(step) for step in (leanest, fastest))
    place = draw.betavariate(1, 2)  # more often where it is tight
    return on_card(request, 0.85 * low + place * (1.05 * max(low, high) - 0.85 * low))


def all_steps(search: Search, base: StepConfig) -> list[StepConfig]:
    """Every candidate of the space with each choice of kept layers."""
    return list(itertools.chain.from_iterable(map(steps_of, search.candidates(base))))


def steps_of(candidate: Any) -> list[StepConfig]:
    return [candidate.at(index) for index in range(len(candidate.kept))]


def contradictions(request: Request) -> list[str]:
    """What `conflicts.py` should refuse, by the README's words; on a card with bf16."""
    wishes, shape = request.wishes, RememberedModel(request.source).shape
    profile, stats = request.profile, request.stats
    try:
        pinned = wishes.pinned_levers()
        targets = shape.resolve_targets(wishes.targets or profile.targets)
    except ConfigError as error:
        return [error.message]
    asked = pinned | {"optimizer": wishes.optimizer}
    tiles = bool(pinned.get("tile_tokens") or pinned.get("offload_checkpoints"))
    paged = str(wishes.optimizer).startswith("paged")
    offloads = paged or any(asked.get(k) == v for k, v in ON_HOST.items())
    nested = pinned.get("double_quantization") and wishes.levers != "all"
    whole_head = pinned.get("head", "" if "head" in profile.ladder else "16bit") == "16bit"
    length = min(wishes.seq_len or (stats.longest_tokens if stats else 8), shape.context_limit)
    whole = first_step(with_wishes(request, targets=None, seq_len=None), shape).accumulation
    found = {
        "rank": (wishes.rank or profile.rank) > shape.full_rank(targets),
        "positions": (wishes.seq_len or 0) > shape.context_limit,
        "answers": stats is not None and stats.n_lost_at(length) > stats.n_examples / 2,
        "micro-batch": wishes.micro_batch is not None and whole % wishes.micro_batch > 0,
        "double quantisation": nested and wishes.precision not in (None, "nf4"),
        "tiles": tiles and shape.untiled,
        "kept layers": pinned.get("kept_layers", 0) >= shape.n_layers,
        "no offload": wishes.no_offload and offloads,
        "one weight": shape.tied and pinned.get("embedding_on_host") and whole_head,
        "packing": wishes.packing and (tiles or shape.unpacked),
    }
    return [name for name, conflicts in found.items() if conflicts]
