"""The generation loop: what it emits, when it stops, and what every edge of it means."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError, PromptError
from mlx_diffgemma.generation import engine
from mlx_diffgemma.generation.events import CanvasRow, Committed, Denoised, Event, Finished, Prefilled
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig, unused_keys
from mlx_diffgemma.model.network import Network
from tests import small

SETTINGS = GenerationConfig(max_tokens=3 * small.CANVAS, max_denoising_steps=12, stop_ids=())
PROMPT = [2, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def network() -> Network:
    return small.network()


def run(
    network: Network, *prompts: list[int], seeds: tuple[int, ...] = (0,), length: int = small.CANVAS, **options: Any
) -> list[Event]:
    noise = SeededNoise(seeds, length=length, vocabulary=small.VOCABULARY)
    return list(engine.generate(network, list(prompts), SETTINGS.replace(**options), noise))


def tokens(events: list[Event], row: int = 0) -> list[int]:
    return [i for e in events if isinstance(e, Committed) for i in e.rows[row].ids]


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_the_order_of_events(network: Network) -> None:
    events = run(network, PROMPT)
    kinds = [type(e) for e in events if not isinstance(e, Denoised)]
    assert kinds == [Prefilled, Committed, Committed, Committed, Finished]
    steps = [(e.index, e.step) for e in events if isinstance(e, Denoised)]
    assert steps == sorted(steps) and steps[0] == (0, 0)
    assert {canvas for canvas, _ in steps} == {0, 1, 2}


def test_the_first_step_arrives_after_one_decoder_pass(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    denoise = Network.denoise
    monkeypatch.setattr(Network, "denoise", lambda self, *a: passes.append(1) or denoise(self, *a))
    events = engine.generate(network, [PROMPT], SETTINGS, SeededNoise([0], length=16, vocabulary=small.VOCABULARY))
    for expected in range(1, 4):
        next(event for event in events if isinstance(event, Denoised))
        assert len(passes) == expected
    events.close()
    assert len(passes) == 3


def test_the_same_noise_gives_the_same_run_and_another_does_not(network: Network) -> None:
    assert tokens(run(network, PROMPT)) == tokens(run(network, PROMPT))
    assert tokens(run(network, PROMPT)) != tokens(run(network, PROMPT, seeds=(1,)))


def test_batch_rows_equal_single_runs(network: Network) -> None:
    prompts = [PROMPT, [2, 50], [2, *range(60, 90)]]
    together = run(network, *prompts, seeds=(5, 6, 7))
    for row, prompt in enumerate(prompts):
        alone = run(network, prompt, seeds=(5 + row,))
        assert tokens(together, row) == tokens(alone)
        rows = [e.rows[row] for e in together if isinstance(e, Committed)]
        assert [r.steps for r in rows] == [e.rows[0].steps for e in alone if isinstance(e, Committed)]


def test_rows_of_a_batch_stop_at_different_canvases_and_steps(network: Network) -> None:
    prompts, seeds = [PROMPT, [2, 50], [2, *range(60, 90)]], (5, 6, 7)
    stop = tokens(run(network, *prompts, seeds=seeds), row=1)[small.CANVAS + 3]  # in row 1's second canvas
    together = run(network, *prompts, seeds=seeds, stop_ids=(stop,))
    lengths = [len(tokens(together, row)) for row in range(3)]
    assert len(set(lengths)) > 1
    for row, prompt in enumerate(prompts):
        alone = run(network, prompt, seeds=(seeds[row],), stop_ids=(stop,))
        assert tokens(together, row) == tokens(alone)
        assert finished(together).reasons[row] == finished(alone).reasons[0]


@pytest.mark.parametrize("count", [1, small.CANVAS - 1, small.CANVAS, small.CANVAS + 1])
def test_max_tokens_is_exact(network: Network, count: int) -> None:
    events = run(network, PROMPT, max_tokens=count)
    assert len(tokens(events)) == count
    assert finished(events).reasons == ("length",)
    assert sum(isinstance(e, Committed) for e in events) == -(-count // small.CANVAS)


def test_text_ends_before_the_first_stop_id(network: Network) -> None:
    everything = tokens(run(network, PROMPT))
    stop = everything[20]
    events = run(network, PROMPT, stop_ids=(stop,))
    assert tokens(events) == everything[: everything.index(stop)]
    assert finished(events).reasons == ("stop",)


def test_a_canvas_of_stop_ids_alone_is_an_empty_answer(network: Network) -> None:
    first = tokens(run(network, PROMPT))[0]
    events = run(network, PROMPT, stop_ids=(first,))
    assert tokens(events) == []
    assert finished(events).reasons == ("stop",)
    assert finished(events).statistics.generated_tokens == 0


def test_avoid_empty_forbids_stop_ids_at_the_first_position_only(network: Network) -> None:
    first = tokens(run(network, PROMPT))[0]
    events = run(network, PROMPT, stop_ids=(first,), avoid_empty=True)
    steps = [e for e in events if isinstance(e, Denoised)]
    assert all(e.best[0, 0].item() != first and e.guess[0, 0].item() != first for e in steps if e.index == 0)
    assert len(tokens(events)) > 0
    assert finished(events).statistics.departures == {"avoid_empty": True}


def test_departures_are_named_and_the_reference_has_none(network: Network) -> None:
    assert finished(run(network, PROMPT)).statistics.departures == {}
    events = run(network, PROMPT, greedy=True, canvas_length=8, length=8)
    assert finished(events).statistics.departures == {"greedy": True, "canvas_length": 8}
    assert all(mx.array_equal(e.guess, e.best) for e in events if isinstance(e, Denoised))


def test_the_next_canvas_keeps_what_was_accepted_and_renoises_the_rest(network: Network) -> None:
    noise = SeededNoise([0], length=small.CANVAS, vocabulary=small.VOCABULARY)
    for event in run(network, PROMPT):
        if isinstance(event, Denoised):
            fresh = noise.ids(event.index, event.step)
            expected = mx.where(event.accepted, event.guess, fresh)
            assert mx.array_equal(event.next_canvas, expected)


def test_a_settled_row_keeps_everything_while_others_go_on(network: Network) -> None:
    events = [e for e in run(network, *[[2, 50 + i] for i in range(4)], seeds=(1, 2, 3, 4)) if isinstance(e, Denoised)]
    frozen = 0
    for before, after in itertools.pairwise(events):
        for row in range(4):
            if before.index == after.index and before.settled[row]:
                frozen += 1
                assert after.settled[row]
                assert mx.array_equal(before.best[row], after.best[row])
                assert mx.array_equal(before.next_canvas[row], after.next_canvas[row])
    assert frozen > 0


def test_stop_rules(network: Network) -> None:
    def steps(**options: Any) -> list[tuple[int, bool]]:
        events = run(network, PROMPT, max_tokens=small.CANVAS, **options)
        return [(r.steps, r.settled) for e in events if isinstance(e, Committed) for r in e.rows]

    assert steps(max_denoising_steps=1) == [(1, False)]
    assert steps(confidence_threshold=0.0) == [(12, False)]
    assert steps(confidence_threshold=1e9, stability_threshold=0) == [(1, True)]
    [(free, settled)] = steps(confidence_threshold=1e9, stability_threshold=1)
    assert settled and 1 < free <= 12
    [(longer, _)] = steps(confidence_threshold=1e9, stability_threshold=3)
    assert longer > free


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_prefill_in_chunks_reports_progress_and_changes_nothing(network: Network, chunk: int) -> None:
    prompt = [2, *range(30, 60)]
    events = run(network, prompt, prefill_step_size=chunk)
    progress = [e.tokens for e in events if isinstance(e, Prefilled)]
    assert progress == [*range(chunk, len(prompt), chunk), len(prompt)]
    assert tokens(events) == tokens(run(network, prompt))


def test_a_prompt_longer_than_the_window(network: Network) -> None:
    assert len(tokens(run(network, [2, *range(20, 90)]))) == 3 * small.CANVAS


def test_output_ends_at_the_context_limit(network: Network) -> None:
    limit = network.config.max_position_embeddings
    events = run(network, [40] * (limit - 2 * small.CANVAS - 3), max_tokens=1000)
    assert len(tokens(events)) == 2 * small.CANVAS
    assert finished(events).reasons == ("length",)


def test_a_prompt_that_does_not_fit_is_refused_before_any_work(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "encode", lambda *a: pytest.fail("encoded"))
    limit = network.config.max_position_embeddings
    with pytest.raises(PromptError, match=f"the prompt is {limit} tokens.*\nShorten it by at least {small.CANVAS}"):
        run(network, [40] * limit)


@pytest.mark.parametrize("prompts", [[], [[]], [[2], []]])
def test_an_empty_prompt_is_refused(network: Network, prompts: list[list[int]]) -> None:
    with pytest.raises(PromptError, match="no tokens"):
        run(network, *prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected a positive integer"),
        ({"max_denoising_step": 3}, "Did you mean 'max_denoising_steps'"),
        ({"top_k": 3}, "top_k would do nothing in diffusion decoding"),
        ({"t_min": 0.9}, "t_min is 0.9, expected less than t_max, 0.8"),
        ({"entropy_bound": -1}, "entropy_bound is -1"),
    ],
)
def test_options_that_cannot_work_are_refused(network: Network, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(network, PROMPT, **options)


def test_statistics(network: Network) -> None:
    events = run(network, PROMPT, [2], seeds=(0, 1))
    statistics = finished(events).statistics
    rows = [row for e in events if isinstance(e, Committed) for row in e.rows]
    assert statistics.prompt_tokens == 6 and statistics.reused_tokens == 0
    assert statistics.generated_tokens == sum(len(row.ids) for row in rows)
    assert statistics.steps == sum(isinstance(e, Denoised) for e in events)
    assert statistics.tokens_per_forward == pytest.approx(
        sum(i != 0 for row in rows for i in row.ids) / sum(row.steps for row in rows)
    )
    assert statistics.peak_memory_bytes > 0
    for row in rows:
        assert len(row.accepted_per_step) == row.steps
        assert all(1 <= count <= small.CANVAS for count in row.accepted_per_step)


def test_the_time_a_consumer_takes_is_not_the_models(network: Network) -> None:
    import time

    noise = SeededNoise([0], length=small.CANVAS, vocabulary=small.VOCABULARY)
    settings = SETTINGS.replace(max_tokens=small.CANVAS, max_denoising_steps=3, confidence_threshold=0.0)
    start = time.perf_counter()
    for event in engine.generate(network, [PROMPT], settings, noise):
        if isinstance(event, Denoised):
            time.sleep(0.2)
        if isinstance(event, Finished):
            spent = event.statistics.denoise_seconds
            assert spent < time.perf_counter() - start - 0.55


def test_closing_frees_the_prefix(network: Network) -> None:
    def stop_after_a_step() -> None:
        events: Iterator[Event] = engine.generate(
            network, [[40] * 400], SETTINGS, SeededNoise([0], length=small.CANVAS, vocabulary=small.VOCABULARY)
        )
        next(e for e in events if isinstance(e, Denoised))
        events.close()  # type: ignore[attr-defined]

    stop_after_a_step()
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(3):
        stop_after_a_step()
    assert mx.get_active_memory() <= before + 1000


def test_rows_are_what_was_committed(network: Network) -> None:
    """The ids are the last step's best tokens, in every way a canvas can end."""
    for options in ({}, {"max_denoising_steps": 2}, {"confidence_threshold": 1e9, "stability_threshold": 0}):
        best: mx.array | None = None
        for event in run(network, PROMPT, **options):
            if isinstance(event, Denoised):
                best = event.best
            elif isinstance(event, Committed):
                assert best is not None
                assert isinstance(event.rows[0], CanvasRow)
                assert list(event.rows[0].ids) == np.array(best)[0].tolist()


def test_a_generation_config_that_asks_for_another_sampler_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampler_config\._cls_name is 'Other', expected 'EntropyBound"):
        GenerationConfig.from_dict({"sampler_config": {"_cls_name": "Other"}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_k": 50, "top_p": 1.0, "temperature": None, "do_sample": False, "transformers_version": "5"}, ""),
        ({"top_k": 64}, "top_k = 64 does nothing here. This model does not use it."),
        ({"temperature": 0.7}, "temperature = 0.7 does nothing here."),
        ({"t_mim": 0.3}, "t_mim = 0.3 does nothing here. Did you mean 't_min'?"),
        ({"max_new_token": 8}, "Did you mean 'max_new_tokens'?"),
        ({"zzz": [1]}, "zzz = [1] does nothing here."),
    ],
)
def test_what_does_nothing_is_said_and_does_nothing(values: dict[str, Any], said: str) -> None:
    assert GenerationConfig.from_dict(values) == GenerationConfig()
    assert said in "".join(unused_keys(values)) and bool(said) == bool(unused_keys(values))


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"stable_answer": 3}, {"regex": "[a-z ]{9,90}"}], ids=str)
def test_a_row_leaves_the_batch_when_it_settles(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its tokens stay as they were, nobody else's change, and every pass holds the rows that still need it."""
    model = small.model(tmp_path)
    prompts = ["hello", "a rather longer prompt than that", "x", "what is it?"]
    alone = [model.generate(prompt, seed=seed, max_tokens=96, **options) for seed, prompt in enumerate(prompts)]
    denoise, widths = model.network.denoise, []

    def watched(canvas: mx.array, *rest: Any) -> mx.array:
        widths.append(canvas.shape[0])
        return denoise(canvas, *rest)

    model.network.denoise = watched  # type: ignore[method-assign]
    events = list(model.prepare(prompts, seed=0, max_tokens=96, **options).events())
    for result, single in zip(events[-1].results, alone, strict=True):
        assert result.tokens == single.tokens
        for ours, own in zip(result.canvases, single.canvases, strict=True):
            assert (ours.steps, ours.settled, ours.early) == (own.steps, own.settled, own.early)
            assert ours.logprobs == pytest.approx(own.logprobs, abs=1e-4)
            assert ours.canvas_logprobs == pytest.approx(own.canvas_logprobs, abs=1e-4)
            assert ours.log_probability == pytest.approx(own.log_probability, abs=1e-3)
    taken = [[canvas.steps for canvas in result.canvases] for result in alone]  # by row and canvas
    assert len({len(steps) for steps in taken}) > 1 and len({steps[0] for steps in taken}) > 1
    assert widths == [
        sum(steps > step for steps in at)
        for at in itertools.zip_longest(*taken, fillvalue=0)
        for step in range(max(at))
    ]
    drawn = [event for event in events if isinstance(event, Denoised)]
    assert all(event.best.shape == event.entropy.shape == (4, small.CANVAS) for event in drawn)
    assert all(len(event.settled) == len(event.mean_entropy) == 4 for event in drawn)
