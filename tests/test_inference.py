"""Decoding against transformers' own generate: alone, batched, in parts, streamed and sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from lowvram.engine import decoding
from lowvram.engine.decoding import Thread, decoded, prepare_for_decoding
from lowvram.engine.generate import Answers
from lowvram.engine.sampling import Sampler, Sampling
from lowvram.errors import ConfigError
from tests import tiny_runs
from tests.tiny import SHAPE
from tests.tiny_adapters import generated
from tests.tiny_models import MODELS

byte_model = tiny_runs.byte_model
pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[5, 17, 33, 2, 9, 41, 8, 77, 15, 3, 22], [60, 4, 4, 19], [7], [90, 31, 64, 2, 55, 12, 13, 71]]
N_NEW = 20
CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    **MODELS,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=5)),
}


def _model(kind: str) -> Any:
    torch.manual_seed(3)
    model = KINDS[kind]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # or the likeliest token is the same everywhere
    model.generation_config.eos_token_id = None
    return model


def _decode(model: Any, prompts: list[list[int]], n: int = N_NEW) -> list[list[int]]:
    sampler = Sampler(Sampling(), range(len(prompts)), CPU)
    steps = list(decoded(model, prompts, n, sampler))
    return torch.stack(steps, dim=1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_tokens_are_those_of_generate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a batch padded on the left, and with prompts read three tokens at a time."""
    model = _model(kind)
    wanted = [generated(model, prompt, N_NEW, do_sample=False) for prompt in PROMPTS]
    assert len({tuple(row) for row in wanted}) == len(PROMPTS)
    assert any(len(set(row)) > 3 for row in wanted)
    prepare_for_decoding(model)
    assert [_decode(model, [prompt])[0] for prompt in PROMPTS] == wanted
    assert _decode(model, PROMPTS) == wanted
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 3)
    assert [_decode(model, [prompt])[0] for prompt in PROMPTS] == wanted
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 3 * len(PROMPTS))
    assert _decode(model, PROMPTS) == wanted


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    tiny = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ConfigError, match="has an encoder"):
        prepare_for_decoding(T5ForConditionalGeneration(tiny))


@pytest.fixture
def answers(byte_model: Any) -> Answers:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # or the likeliest token is the same everywhere
    return Answers.of(model, AutoTokenizer.from_pretrained(byte_model))


def test_a_streamed_answer_is_the_whole_one(answers: Answers) -> None:
    """Random bytes are half characters most of the time; no piece shows what the next one changes."""
    for seed in range(8):
        sampling = Sampling(temperature=1.5, seed=seed)
        (whole,) = answers.to([[65, 66]], 60, sampling)
        stream = answers.stream([65, 66], 60, sampling)
        pieces = list(stream)
        assert "".join(pieces) == whole.text
        assert stream.answer == whole
        assert len(pieces) > 5


def test_an_answer_ends_at_its_stop_token_whatever_its_neighbours_do(answers: Answers) -> None:
    """In one batch some rows stop early; each is what it is alone, and counts its stop token."""
    prompts = [[i, 2 * i, 70] for i in range(1, 13)]
    likely_end = answers.to([prompts[0]], 8)[0]
    row = list(answers.tokenizer(likely_end.text)["input_ids"])
    assert row
    stopping = Answers(answers.model, answers.tokenizer, frozenset({*range(0, 257, 5)}))
    together = stopping.to(prompts, 12)
    assert together == [stopping.to([prompt], 12)[0] for prompt in prompts]
    assert {answer.stopped for answer in together} == {True, False}
    assert all(answer.n_tokens <= 12 for answer in together)


@pytest.mark.parametrize("kind", ["llama", "mistral with a window", "opt"])
def test_a_conversation_is_read_on_from_where_it_was(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was read before: the same tokens as of the whole prompt; only what is new is read."""
    model = _model(kind)
    turns = [[5, 17, 33], [5, 17, 33, 60, 61, 2], [5, 17, 8, 8], [5, 17, 33, 60], [5, 17, 33, 60]]
    turns.append(turns[-1] + generated(model, turns[-1], 6, do_sample=False) + [9, 9])
    wanted = [generated(model, turn, 6, do_sample=False) for turn in turns]
    prepare_for_decoding(model)
    thread, n_read = Thread(model, 40), []
    prefill = decoding.Reader.prefill
    monkeypatch.setattr(
        decoding.Reader, "prefill", lambda r, ids: (n_read.append(ids.shape[1]), prefill(r, ids))[1]
    )
    for turn, tokens in zip(turns, wanted, strict=True):
        sampler = Sampler(Sampling(), [0], CPU)
        assert [int(token) for token in thread.decoded("one", turn, 6, sampler)] == tokens
    whole = [len(turn) for turn in turns]
    assert n_read == (whole if "window" in kind else [3, 3, 2, 2, 1, 3])
    stopped = thread.decoded("one", turns[1], 6, Sampler(Sampling(), [0], CPU))
    next(stopped), next(stopped)
    del stopped
    n_read.clear()
    assert [int(t) for t in thread.decoded("one", turns[1], 6, Sampler(Sampling(), [0], CPU))] == wanted[1]
    assert [int(t) for t in thread.decoded("two", turns[1], 6, Sampler(Sampling(), [0], CPU))] == wanted[1]
    assert n_read == ([6, 6] if "window" in kind else [1, 6])


def _shares(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """By hand, in float64: [V]."""
    shares = (logits.double() / temperature).softmax(-1)
    order = shares.argsort(descending=True)
    before = shares[order].cumsum(0) - shares[order]
    kept = torch.zeros_like(shares)
    kept[order[before < top_p]] = 1
    return shares * kept / (shares * kept).sum()


def test_drawn_tokens_have_the_shares_that_they_should() -> None:
    """Each within 5 standard deviations of its share; none from outside the likeliest 80 %."""
    torch.manual_seed(0)
    logits, n = torch.randn(12) * 2, 20_000
    wanted = _shares(logits, 0.7, 0.8)
    assert 0 < (wanted > 0).sum() < 12
    sampler = Sampler(Sampling(temperature=0.7, top_p=0.8, seed=3), [0], CPU)
    drawn = torch.cat([sampler(logits[None]) for _ in range(n)])
    counts = drawn.bincount(minlength=12)
    assert (counts[wanted == 0] == 0).all()
    deviation = (n * wanted * (1 - wanted)).sqrt()
    assert ((counts - n * wanted).abs() <= 5 * deviation + 1e-6).all()
    warped = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, logits[None]))
    torch.testing.assert_close(warped.softmax(-1)[0].double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_seed_decides_and_a_row_s_draws_are_its_own(answers: Answers) -> None:
    prompts = [[i, 3 * i] for i in range(1, 7)]
    hot = Sampling(temperature=1.3, top_p=0.95, seed=11)
    first = answers.to(prompts, 15, hot)
    assert first == answers.to(prompts, 15, hot)
    assert first != answers.to(prompts, 15, Sampling(temperature=1.3, top_p=0.95, seed=12))
    in_parts = [*answers.to(prompts[:4], 15, hot, range(4)), *answers.to(prompts[4:], 15, hot, [4, 5])]
    assert in_parts == first
    same = answers.to([prompts[0]] * 3, 15, hot)
    assert len({answer.text for answer in same}) == 3  # the same prompt asked thrice is drawn thrice
