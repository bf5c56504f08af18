"""The causal pass as a language model, against transformers': logits in units of its own float32 error, what it writes
from left to right, how likely it finds a text."""

import math
from functools import cache
from itertools import count
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from benchmarks import demo_score, train_demo
from convert import record_reference as reference
from mlx_diffgemma import load
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.scores import score_ids
from tests import small
from tests.reference_models import CHUNKS, MEDIAN, MODELS, ROUTER_TIE, Measure, Scenario, compare, lengths, network

WORST = 2.0
SCENARIOS = [
    Scenario(name, length, batch)
    for name, model in MODELS.items()
    for length in lengths(model)
    if length > 1
    for batch in (1, 3)
]


def causal_logits(model: Any, ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Softcapped logits [B, T, V] of transformers' causal pass over left-padded ids: `encoder`, then the head. There is
    no one public method."""
    mask = torch.from_numpy(np.arange(ids.shape[1])[None] >= padding[:, None])
    with torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        tokens = torch.from_numpy(ids).long()
        hidden = model.model.encoder(input_ids=tokens, attention_mask=mask, **{reference.CACHE: cache})
        scores = model.lm_head(hidden.last_hidden_state)
        cap = model.final_logit_softcapping
        return (torch.tanh(scores / cap) * cap).numpy()


@cache
def models(name: str) -> tuple[Any, Any]:
    """transformers in float64 and in float32."""
    return MODELS[name].reference().double(), MODELS[name].reference()


@cache
def measured(scenario: Scenario, chunk: int) -> Measure:
    """Our logits, read in pieces of `chunk`, at all places that are no padding."""
    ids, padding, told, other = expected(scenario)
    net = network(scenario.model)
    prefix = net.make_cache(scenario.batch, padding.tolist())
    step = chunk or scenario.length
    hidden = [net.encode(mx.array(ids[:, i : i + step]), prefix) for i in range(0, scenario.length, step)]
    ours = np.array(net.head(mx.concatenate(hidden, axis=1)))
    real = np.arange(scenario.length)[None] >= padding[:, None]
    return compare(ours[real], told[real], other[real])


@cache
def expected(scenario: Scenario) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first random ids without a tie in any router (at a tie either expert is right), their padding, and their
    logits: truth, and of the rival's two ways of attention the one farther from it."""
    (truth, rival), padding = models(scenario.model), scenario.padding()
    for attempt in count():
        random = np.random.default_rng([scenario.length, scenario.batch, attempt])
        ids = random.integers(0, MODELS[scenario.model].text["vocab_size"], (scenario.batch, scenario.length))
        with reference.router_gaps(truth) as gaps:
            told = causal_logits(truth, ids, padding)
        if min(gaps) > ROUTER_TIE:
            found = []
            for attention in ("eager", "sdpa"):  # one of them is lucky now and then, which says nothing of ours
                rival.set_attn_implementation(attention)
                found.append(causal_logits(rival, ids, padding))
            return ids, padding, told, max(found, key=lambda logits: np.square(logits - told).sum())
    raise AssertionError("count() ends never")


def test_causal_logits_are_as_close_as_the_reference(record_summary) -> None:
    cases = [measured(scenario, chunk) for scenario in SCENARIOS for chunk in CHUNKS]
    ratios = [case.ratio for case in cases]
    record_summary(
        f"causal parity with transformers in float64, in units of its float32 error: {len(ratios)} cases,"
        f" median {median(ratios):.2f} (at most {MEDIAN}), worst {max(ratios):.2f} (at most {WORST})"
    )
    assert len(ratios) == len(MODELS) * 4 * 2 * 3
    assert median(ratios) <= MEDIAN and max(ratios) <= WORST
    assert all(case.same_argmax for case in cases)


@pytest.fixture(scope="module")
def demo() -> DiffusionGemma:
    return load(BUILT_IN)


@cache
def truth() -> Any:
    return reference.built_in_model(BUILT_IN).double()


def greedily(model: Any, prompts: list[list[int]], stop_ids: tuple[int, ...], most: int) -> list[list[int]]:
    """What transformers' causal pass writes to left-padded prompts, its best token each time."""
    longest = max(map(len, prompts))
    padding = np.array([longest - len(prompt) for prompt in prompts])
    ids = np.array([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    cache, answers = DynamicCache(config=model.config.get_text_config()), [[] for _ in prompts]
    running = np.ones(len(prompts), bool)
    new = ids
    for length in range(longest, longest + most):
        mask = torch.from_numpy(np.arange(length)[None] >= padding[:, None])
        tokens = torch.from_numpy(new).long()
        with torch.no_grad():
            found = model.model.encoder(input_ids=tokens, attention_mask=mask, **{reference.CACHE: cache})
            best = model.lm_head(found.last_hidden_state[:, -1]).argmax(-1).numpy()
        running &= ~np.isin(best, stop_ids)
        for row in np.flatnonzero(running):
            answers[row].append(int(best[row]))
        if not running.any():
            break
        new = best[:, None]
    return answers


def test_greedy_answers_are_the_references(demo: DiffusionGemma, record_summary) -> None:
    """Fourteen questions: in one padded batch, and some of them alone."""
    tasks = (*train_demo.TASKS, "sudoku")
    questions = [example.prompt for task in tasks for example in demo_score.held_out(task, 3)][:14]
    prompts = [demo.ids(question) for question in questions]
    expected = greedily(truth(), prompts, demo.generation_config.stop_ids, 60)
    options: Any = {"decoding": "autoregressive", "greedy": True, "max_tokens": 60}
    together = demo.generate(questions, seed=0, **options)
    assert isinstance(together, list) and len(set(map(len, prompts))) > 1
    assert [list(result.tokens) for result in together] == expected
    for number in (0, 5, 13):
        alone = demo.generate(questions[number], seed=0, **options)
        assert not isinstance(alone, list) and list(alone.tokens) == expected[number]
    tokens = sum(map(len, expected))
    record_summary(f"greedy autoregressive answers equal transformers': {len(expected)} prompts, {tokens} tokens")


def test_perplexity_is_the_references_to_six_digits(demo: DiffusionGemma) -> None:
    text = "\n".join(f"{example.prompt}\n{example.answer}" for example in train_demo.structured(3, 6))
    ids = demo.text_ids(text)
    logits = torch.from_numpy(causal_logits(truth(), np.array([ids]), np.zeros(1, int)))[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    found = demo.score(text)
    assert len(found.tokens) == len(ids) - 1 > 200
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_no_score(chunk: int) -> None:
    net, ids = small.network(), np.random.default_rng(0).integers(8, small.VOCABULARY, 90).tolist()
    whole = score_ids(net, ids)
    assert score_ids(net, ids, chunk=chunk).logprobs == pytest.approx(whole.logprobs, abs=2e-5)
    assert score_ids(net, ids, start=40, chunk=chunk).logprobs == pytest.approx(whole.logprobs[39:], abs=2e-5)
