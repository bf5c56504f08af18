"""Token by token: the law of the draw, the events, and every way to end."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_diffgemma.errors import ConfigError, PromptError
from mlx_diffgemma.generation import autoregressive, engine, vocabulary
from mlx_diffgemma.generation.events import Committed, Event, Finished, Prefilled
from mlx_diffgemma.generation.noise import NoiseRecorder, RecordedNoise, SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from tests import small

SETTINGS = GenerationConfig(decoding="autoregressive", max_tokens=24, stop_ids=())
PROMPT = [2, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def network() -> Network:
    return small.network()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """mlx_lm compiles each of its filters, which on a CPU takes a compiler some seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def noise(*seeds: int) -> SeededNoise:
    return SeededNoise(seeds or (0,), length=small.CANVAS, vocabulary=small.VOCABULARY)


def run(network: Network, *prompts: list[int], seeds: tuple[int, ...] = (0,), **options: Any) -> list[Event]:
    return list(engine.generate(network, list(prompts), SETTINGS.replace(**options), noise(*seeds)))


def tokens(events: list[Event], row: int = 0) -> list[int]:
    return [i for e in events if isinstance(e, Committed) for i in e.rows[row].ids]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


class Fixed:
    """Noise that draws every row at the same numbers."""

    def __init__(self, draws: np.ndarray):
        self.draws = mx.array(draws.astype(np.float32))

    def token(self, number: int) -> mx.array:
        return self.draws


def chosen(logits: np.ndarray, draws: np.ndarray, **options: Any) -> list[int]:
    found = autoregressive.choose(mx.array(logits), SETTINGS.replace(**options), Fixed(draws), 0)  # type: ignore[arg-type]
    return found.ids.tolist()  # type: ignore[return-value]


def test_the_draw_inverts_the_distribution() -> None:
    """Against numpy in float64: the first id at which the cumulative distribution passes the draw."""
    random = np.random.default_rng(0)
    logits, draws = random.normal(0, 3, (200, 1000)).astype(np.float32), random.random(200)
    for temperature in (0.5, 1.0, 1.7):
        weights = np.exp(logits.astype(np.float64) / temperature)
        cumulative = weights.cumsum(-1) / weights.sum(-1, keepdims=True)
        expected = (cumulative <= draws[:, None]).sum(-1)
        clear = np.abs(cumulative - draws[:, None]).min(-1) > 1e-6
        found = np.array(chosen(logits, draws, temperature=temperature))
        assert clear.sum() > 190 and (found[clear] == expected[clear]).all()


@pytest.mark.parametrize(
    "options", [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.8, "top_k": 40, "min_p": 0.02}]
)
@pytest.mark.usefixtures("uncompiled")
def test_what_is_kept_is_what_mlx_lm_keeps(options: dict[str, Any]) -> None:
    logits = mx.random.normal((50, 300), scale=2.0, key=mx.random.key(1))
    theirs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if "top_p" in options:
        theirs = apply_top_p(theirs, options["top_p"])
    if "min_p" in options:
        theirs = apply_min_p(theirs, options["min_p"])
    if "top_k" in options:
        theirs = apply_top_k(theirs, options["top_k"])
    ours = autoregressive.keep(logits, **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, **options})
    assert mx.array_equal(ours > vocabulary.LOWEST, theirs > -mx.inf)
    assert 1 <= (ours > vocabulary.LOWEST).sum(axis=-1).max().item() < 300


def test_rows_of_a_batch_are_filtered_each_by_itself() -> None:
    logits = np.stack([np.arange(10.0), np.arange(10.0)[::-1]]).astype(np.float32)
    assert chosen(logits, np.array([0.0, 0.999]), top_k=2) == [8, 1]
    assert chosen(logits, np.array([0.5, 0.5]), greedy=True) == [9, 0]
    assert chosen(logits, np.array([0.5, 0.5]), temperature=0) == [9, 0]


def test_the_order_of_events(network: Network) -> None:
    events = run(network, PROMPT)
    assert [type(e) for e in events] == [Prefilled, *[Committed] * 24, Finished]
    assert [e.index for e in events if isinstance(e, Committed)] == list(range(24))
    statistics = finished(events).statistics
    assert statistics.decoding == "autoregressive" and statistics.departures == {}
    assert statistics.steps == statistics.generated_tokens == 24
    assert statistics.seconds_per_step == pytest.approx(statistics.commit_seconds / 24)


def test_a_token_is_the_models_own(network: Network) -> None:
    """Greedy tokens and log-probabilities against one pass over the whole text."""
    events = run(network, PROMPT, greedy=True, logprobs=3)
    written = tokens(events)
    hidden = network.encode(mx.array([[*PROMPT, *written]]), network.make_cache())
    logits = network.head(hidden)[0, len(PROMPT) - 1 : -1]
    assert logits.argmax(axis=-1).tolist() == written
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    rows = [e.rows[0] for e in events if isinstance(e, Committed)]
    for i, row in enumerate(rows):
        assert row.logprobs == pytest.approx([expected[i, written[i]].item()], abs=2e-5)
        assert row.top_logprobs is not None
        [top] = row.top_logprobs
        best = mx.argsort(-expected[i])[:3].tolist()
        assert [ident for ident, _ in top] == best
        assert [nats for _, nats in top] == pytest.approx(expected[i][mx.array(best)].tolist(), abs=2e-5)
        p = np.exp(np.array(expected[i], np.float64))
        assert row.mean_entropy == pytest.approx(float(-(p * np.array(expected[i], np.float64)).sum()), abs=1e-4)


def test_the_same_seed_repeats_and_another_does_not(network: Network) -> None:
    assert tokens(run(network, PROMPT)) == tokens(run(network, PROMPT))
    assert tokens(run(network, PROMPT)) != tokens(run(network, PROMPT, seeds=(1,)))


def test_batch_rows_equal_single_runs_and_stop_each_at_their_own(network: Network) -> None:
    prompts, seeds = [PROMPT, [2, 50], [2, *range(60, 90)]], (5, 6, 7)
    stop = tokens(run(network, *prompts, seeds=seeds), row=1)[9]
    together = run(network, *prompts, seeds=seeds, stop_ids=(stop,))
    assert len({len(tokens(together, row)) for row in range(3)}) > 1
    for row, prompt in enumerate(prompts):
        alone = run(network, prompt, seeds=(seeds[row],), stop_ids=(stop,))
        assert tokens(together, row) == tokens(alone)
        assert finished(together).reasons[row] == finished(alone).reasons[0]


def test_a_stop_id_ends_the_text_and_is_scored(network: Network) -> None:
    everything = tokens(run(network, PROMPT))
    stop = everything[10]
    events = run(network, PROMPT, stop_ids=(stop,), logprobs=True)
    assert tokens(events) == everything[: everything.index(stop)]
    assert finished(events).reasons == ("stop",)
    assert sum(len(e.rows[0].logprobs or ()) for e in events if isinstance(e, Committed)) == len(tokens(events)) + 1


def test_avoid_empty_forbids_a_stop_id_at_first(network: Network) -> None:
    first = tokens(run(network, PROMPT))[0]
    assert tokens(run(network, PROMPT, stop_ids=(first,))) == []
    events = run(network, PROMPT, stop_ids=(first,), avoid_empty=True)
    assert tokens(events) and finished(events).statistics.departures == {"avoid_empty": True}


def test_the_context_limit_ends_the_text(network: Network) -> None:
    limit = network.config.max_position_embeddings
    events = run(network, [40] * (limit - 3), max_tokens=100)
    assert len(tokens(events)) == 3 and finished(events).reasons == ("length",)
    with pytest.raises(PromptError, match="with one token it does not fit"):
        run(network, [40] * limit)


@pytest.mark.parametrize("chunk", [1, 7])
def test_prefill_in_chunks_changes_nothing(network: Network, chunk: int) -> None:
    prompt = [2, *range(30, 60)]
    assert tokens(run(network, prompt, prefill_step_size=chunk)) == tokens(run(network, prompt))


def test_a_prefix_of_either_decoding_serves_both(network: Network) -> None:
    """A fork behind most of the prompt, made while the other decoding ran."""
    prompt = [2, *range(30, 60)]
    for maker, user in (("diffusion", "autoregressive"), ("autoregressive", "diffusion")):
        options: dict[str, Any] = {"decoding": maker, "max_tokens": 16, "stop_ids": ()}
        cache, kept = network.make_cache(), None
        for event in engine.generate(network, [prompt], GenerationConfig(**options), noise(), cache=cache, pauses=[20]):
            if isinstance(event, Prefilled) and event.tokens == 20:
                kept = cache.fork()
        settings = GenerationConfig(**options | {"decoding": user})
        assert kept is not None
        forked = list(engine.generate(network, [prompt], settings, noise(), cache=kept))
        assert finished(forked).statistics.reused_tokens == 20
        assert tokens(forked) == tokens(list(engine.generate(network, [prompt], settings, noise())))


def test_a_cache_with_the_whole_prompt_is_refused(network: Network) -> None:
    cache = network.make_cache()
    network.encode(mx.array([PROMPT]), cache)
    with pytest.raises(PromptError, match="expected fewer than the prompt has"):
        engine.generate(network, [PROMPT], SETTINGS, noise(), cache=cache)


def test_the_head_sees_one_row_and_no_canvas_is_made(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    head = Network.head
    monkeypatch.setattr(Network, "head", lambda self, x: seen.append(x.shape) or head(self, x))
    monkeypatch.setattr(Network, "denoise", lambda *a: pytest.fail("denoised"))
    run(network, [2, *range(30, 60)])
    assert set(seen) == {(1, 1, network.config.hidden_size)} and len(seen) == 24


def test_closing_stops_within_a_token(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    encode = Network.encode
    monkeypatch.setattr(Network, "encode", lambda self, *a: passes.append(1) or encode(self, *a))
    events = engine.generate(network, [PROMPT], SETTINGS, noise())
    for _ in range(4):  # the prompt, three tokens
        next(events)
    events.close()  # type: ignore[attr-defined]
    assert len(passes) == 1 + 3


def test_a_run_is_repeated_from_its_noise(network: Network, tmp_path: Any) -> None:
    recorder = NoiseRecorder(noise(3))
    recorded = list(engine.generate(network, [PROMPT], SETTINGS, recorder))
    recorder.save(tmp_path / "noise.npz")
    again = RecordedNoise.load(tmp_path / "noise.npz")
    assert again.decoding == "autoregressive" and again.batch_size == 1
    assert tokens(list(engine.generate(network, [PROMPT], SETTINGS, again))) == tokens(recorded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoding": "causal"}, "decoding is 'causal', expected 'diffusion' or 'autoregressive'"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"greedy": True, "top_k": 3}, "top_k would do nothing: greedy"),
        ({"greedy": True, "temperature": 0.5}, "temperature would do nothing: greedy"),
        ({"t_max": 0.9}, "t_max would do nothing in autoregressive decoding"),
        ({"canvas_length": 8}, "canvas_length would do nothing in autoregressive"),
        ({"stable_answer": 4}, "stable_answer would do nothing in autoregressive"),
        ({"retries": 2}, "retries would do nothing in autoregressive"),
        ({"decoding": "diffusion", "min_p": 0.1}, "min_p would do nothing in diffusion decoding"),
        ({"best_of": 0}, "best_of is 0"),
        ({"best_of": 2, "greedy": True}, "best_of would do nothing"),
        ({"logprobs": 21}, "logprobs is 21, expected"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SETTINGS.replace(**options)


def test_a_checkpoints_own_schedule_is_no_obstacle() -> None:
    config = GenerationConfig.from_dict({"t_min": 0.3, "max_denoising_steps": 12})
    assert config.replace(decoding="autoregressive", top_p=0.9).decoding == "autoregressive"
