"""Answering: what a chat and a batch really take on a GPU, beside what was predicted; random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import torch
from gpu_check_model import config_of, random_model
from gpu_check_rows import Row
from gpu_check_step import attempt, measured_rows

from lowvram.engine.decoding import Thread, decoded, prepare_for_decoding
from lowvram.engine.inference_config import InferenceStep
from lowvram.engine.sampling import Sampler, Sampling
from lowvram.memory.inference import first_part, inference_estimate
from lowvram.training.monitor import MemoryMonitor

CHAT = InferenceStep(base_precision="nf4", compute_dtype="bf16", context=16_384, expandable_segments=True)
BATCH = CHAT.model_copy(update={"context": 2048, "batch": 8})
ANSWERED = (("qwen2-7b", CHAT), ("qwen2-7b/4", BATCH))
_N_NEW = 32  # tokens of each answer; the first comes with the prompt, the others are timed
_SAMPLING = Sampling(temperature=1.0, top_p=0.5)  # as traced: the likeliest token takes less


def answer_rows(
    emit: Callable[[Row], None], device: str, answered: tuple[tuple[str, InferenceStep], ...] = ANSWERED
) -> None:
    """Full contexts, read and written by the engine's own code: one row for each model and step."""
    for model, step in answered:
        emit(_answered(model, step, device))
        gc.collect()
        torch.cuda.empty_cache()


def _answered(model: str, step: InferenceStep, device: str) -> Row:
    backend = "cuda" if device == "cuda" else "cpu"
    capability = torch.cuda.get_device_capability(0) if device == "cuda" else None
    predicted = inference_estimate(config_of(model), step, (), backend, capability)
    monitor, seconds = MemoryMonitor(device), [0.0]
    monitor.start()
    try:
        outcome = attempt(lambda: seconds.append(_seconds(model, step, device)))
        speed = round(step.batch * (_N_NEW - 1) / seconds[-1], 1) if seconds[-1] else None
        base = Row(check="answers", model=model, outcome=outcome, tokens_per_second=speed)
        shape = {"seq_len": step.context, "micro_batch": step.batch}
        return measured_rows(base.model_copy(update=shape), predicted, monitor, 0)[0]
    finally:
        monitor.stop()


def _seconds(model: str, step: InferenceStep, device: str) -> float:
    """Of all tokens of the longest answers but the first."""
    config = config_of(model)
    loaded = random_model(config, step.model_step, device)
    prepare_for_decoding(loaded)
    longest, vocab_size = step.context - _N_NEW, config.get_text_config().vocab_size
    lengths = [longest - row for row in range(step.batch)]  # uneven, so that rows are padded
    prompts = [torch.randint(vocab_size, (length,)).tolist() for length in lengths]
    sampler = Sampler(_SAMPLING, range(step.batch), torch.device(device))
    if step.batch > 1:
        return _timed(decoded(loaded, prompts, _N_NEW, sampler))
    thread, prompt = Thread(loaded, step.context), prompts[0]
    list(
        thread.decoded("", prompt[: first_part(longest)], 1, sampler)
    )  # the rest then looks back on it, as traced
    return _timed(thread.decoded("", prompt, _N_NEW, sampler))


def _timed(tokens: Iterator[torch.Tensor]) -> float:
    next(tokens).tolist()  # which waits for the device
    started = time.perf_counter()
    for one in tokens:
        one.tolist()
    return time.perf_counter() - started
