"""Log-probabilities of canvases and texts, answers chosen by them, earlier ends, and the hint."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError, PromptError
from mlx_diffgemma.generation import engine, sampler
from mlx_diffgemma.generation.events import CanvasRow, Committed, Denoised, Finished, Statistics
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.pipeline.choosing import RETRY_BELOW, choose
from mlx_diffgemma.pipeline.machine.pace import Pace
from mlx_diffgemma.pipeline.model import DiffusionGemma
from mlx_diffgemma.pipeline.results import Result, event_json, result_json
from mlx_diffgemma.pipeline.scores import score_ids
from tests import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionGemma:
    return small.model(tmp_path_factory.mktemp("model"))


def one(result: Any) -> Result:
    assert isinstance(result, Result)
    return result


def by_one_pass(model: DiffusionGemma, ids: list[int], start: int) -> list[float]:
    """Log-probabilities of the tokens from `start` on, from one whole causal pass."""
    logits = model.network.head(model.network.encode(mx.array([ids]), model.network.make_cache()))[0]
    logits = np.array(logits, np.float64)
    total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return [logits[i - 1, ids[i]] - total[i - 1] for i in range(start, len(ids))]


@pytest.mark.parametrize("prompt", ["Hi", "a prompt longer than the window"])
def test_a_canvas_is_scored_by_the_pass_that_commits_it(model: DiffusionGemma, prompt: str) -> None:
    plain, result = (one(model.generate(prompt, seed=3, logprobs=n)) for n in (False, 2))
    assert result.tokens == plain.tokens and len(result.canvases) > 1
    assert plain.logprobs is None and plain.avg_logprob is None
    ids = model.ids(prompt)
    expected = by_one_pass(model, [*ids, *result.tokens], len(ids))
    assert result.logprobs == pytest.approx(expected, abs=2e-5)
    assert result.avg_logprob == pytest.approx(np.mean(expected), abs=2e-5)
    for canvas in result.canvases:
        assert canvas.logprobs and canvas.top_logprobs and canvas.canvas_logprobs
        assert len(canvas.logprobs) == len(canvas.top_logprobs) == len(canvas.canvas_logprobs) == len(canvas.ids)
        assert all(len(top) == 2 and top[0][1] >= top[1][1] for top in canvas.top_logprobs)
        likeliest = [top[0] for top in canvas.top_logprobs]
        for (best, nats), own, token in zip(likeliest, canvas.logprobs, canvas.ids, strict=True):
            assert nats >= own - 1e-6 and (token != best or own == pytest.approx(nats, abs=1e-5))


def test_a_stop_id_is_scored_and_the_last_canvas_too(model: DiffusionGemma) -> None:
    free = one(model.generate("Hi", seed=3))
    stop = free.tokens[-3]
    result = one(model.generate("Hi", seed=3, stop_ids=(stop,), logprobs=True))
    assert result.finish_reason == "stop" and result.logprobs is not None
    ids = model.ids("Hi")
    assert result.logprobs == pytest.approx(by_one_pass(model, [*ids, *result.tokens, stop], len(ids)), abs=2e-5)


def test_rows_of_a_batch_have_their_own_scores(model: DiffusionGemma) -> None:
    together = model.generate(["Hi", "a longer prompt"], seeds=[1, 2], logprobs=1)
    assert isinstance(together, list)
    for seed, prompt, row in zip((1, 2), ("Hi", "a longer prompt"), together, strict=True):
        alone = one(model.generate(prompt, seed=seed, logprobs=1))
        assert row.tokens == alone.tokens and row.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_the_canvas_own_log_probabilities_are_the_last_steps(model: DiffusionGemma) -> None:
    """log p of the best token under the step's distribution: bounded by its entropy from both sides."""
    last: Denoised | None = None
    for event in model.stream("Hi", seed=3, logprobs=True, max_tokens=16):
        if isinstance(event, Denoised):
            last = event
        elif isinstance(event, Committed):
            assert last is not None
            told = event.rows[0].canvas_logprobs
            entropy = np.array(last.entropy[0])
            assert told is not None and len(told) == len(event.rows[0].ids)
            assert all(-nats <= h + 1e-5 for nats, h in zip(told, entropy, strict=False))


def test_committed_comes_before_its_pass_unless_scores_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    network, passes = small.network(), list[str]()
    encode = Network.encode
    monkeypatch.setattr(Network, "encode", lambda self, *a: passes.append("encode") or encode(self, *a))
    for logprobs, expected in (
        (False, ["encode", "told", "encode", "told"]),
        (True, ["encode", *["encode", "told"] * 2]),
    ):
        passes.clear()
        noise = SeededNoise([0], length=small.CANVAS, vocabulary=small.VOCABULARY)
        settings = GenerationConfig(max_tokens=32, max_denoising_steps=3, stop_ids=(), logprobs=logprobs)
        for event in engine.generate(network, [[2, 40]], settings, noise):
            if isinstance(event, Committed):
                passes.append("told")
        assert passes == expected


def test_results_and_events_as_data(model: DiffusionGemma) -> None:
    result = one(model.generate("Hi", seed=3, logprobs=1))
    told = result_json(result)
    assert told["avg_logprob"] == result.avg_logprob and len(told["canvases"][0]["top_logprobs"][0][0]) == 2
    assert "logprobs" not in result_json(one(model.generate("Hi", seed=3)))["canvases"][0]
    for event in model.stream("Hi", seed=3, decoding="autoregressive", max_tokens=3):
        assert event_json(event, model.tokenizer.decode)["event"] in ("prefilled", "committed", "finished")


# ----------------------------------------------------------------------------------------------------- one of several


def answer(seed: int, *logprobs: float) -> Result:
    statistics = Statistics(
        prompt_tokens=3,
        reused_tokens=0,
        generated_tokens=len(logprobs),
        steps=4,
        prefill_seconds=1.0,
        denoise_seconds=2.0,
        commit_seconds=0.5,
        tokens_per_forward=2.0,
        peak_memory_bytes=7,
        tuning="",
    )
    row = CanvasRow(
        ids=(9,) * len(logprobs), steps=4, settled=True, mean_entropy=0.0, accepted_per_step=(), logprobs=logprobs
    )
    return Result(
        text=str(seed),
        thinking=None,
        tool_calls=[],
        tokens=row.ids,
        finish_reason="stop",
        canvases=(row,),
        statistics=statistics,
        seed=seed,
    )


def test_the_best_mean_is_given_and_retries_end_when_nothing_is_doubtful() -> None:
    """Two prompts with seeds 10 and 11; what each seed's answer is worth is written down here."""
    worth = {10: (-3.0, -0.1), 11: (-0.2,), 12: (-2.5, -0.3), 14: (-0.1, -0.2), 13: (-0.1,), 15: (-0.5,)}
    asked: list[tuple[list[int], list[int]]] = []

    def answers(prompts: list[int], seeds: list[int]) -> list[Result]:
        asked.append((prompts, seeds))
        return [answer(seed, *worth[seed]) for seed in seeds]

    assert min(worth[12]) < RETRY_BELOW < min(worth[14])
    found = choose(GenerationConfig(retries=5), [10, 11], answers)
    assert asked == [([0, 1], [10, 11]), ([0], [12]), ([0], [14])]
    assert [result.seed for result in found] == [14, 11]
    statistics = found[0].statistics
    assert (statistics.steps, statistics.generated_tokens, statistics.attempts) == (12, 3, 2.0)
    assert statistics.denoise_seconds == 6.0

    asked.clear()
    found = choose(GenerationConfig(best_of=3), [10, 11], answers)
    assert asked == [([0, 0, 0, 1, 1, 1], [10, 12, 14, 11, 13, 15])]
    assert [result.seed for result in found] == [14, 13] and found[0].statistics.attempts == 3.0


def test_best_of_gives_the_best_of_its_seeds(model: DiffusionGemma) -> None:
    each = [one(model.generate("Hi", seed=seed, logprobs=True)) for seed in (4, 5, 6)]
    best = max(each, key=lambda result: result.avg_logprob or -math.inf)
    chosen = one(model.generate("Hi", seed=4, best_of=3))
    assert (chosen.tokens, chosen.seed) == (best.tokens, best.seed)
    assert chosen.statistics.attempts == 3 and chosen.statistics.departures == {"best_of": 3}
    batch = model.generate(["Hi", "you"], seed=4, best_of=2, decoding="autoregressive")
    assert isinstance(batch, list) and [r.seed in ((4, 6), (5, 7))[i] for i, r in enumerate(batch)] == [True, True]


def test_retries_stop_at_a_confident_answer_or_run_out(model: DiffusionGemma) -> None:
    result = one(model.generate("Hi", seed=4, retries=2))
    each = [one(model.generate("Hi", seed=seed, logprobs=True)) for seed in (4, 5, 6)]
    tried = next((n for n in (1, 2) if min(each[n - 1].logprobs or (0,)) >= RETRY_BELOW), 3)
    assert result.statistics.attempts == tried
    assert result.avg_logprob == pytest.approx(max(r.avg_logprob or -99 for r in each[:tried]), abs=1e-5)


def test_choosing_is_refused_where_nothing_can_be_shown_or_drawn(model: DiffusionGemma) -> None:
    noise = SeededNoise([0], length=small.CANVAS, vocabulary=small.VOCABULARY)
    for call, message in (
        (lambda: model.stream("Hi", best_of=2), "best_of chooses among whole answers"),
        (lambda: model.stream("Hi", retries=2), "retries chooses among whole answers"),
        (lambda: model.chat(best_of=2).send("Hi"), "best_of chooses among whole answers"),
        (lambda: model.generate("Hi", noise=noise, retries=1), "with recorded noise there are none"),
        (lambda: model.generate("Hi", best_of=2, retries=1), "both choose an answer"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_chat_changes_its_decoding_from_turn_to_turn(model: DiffusionGemma) -> None:
    chat = model.chat(max_tokens=20)
    chat.send("Hi", seed=1)
    for turn, decoding in enumerate(("autoregressive", "diffusion", "autoregressive")):
        result = chat.send("And now?", seed=turn, decoding=decoding)
        fresh = one(model.generate(chat.messages[:-1], seed=turn, decoding=decoding, max_tokens=20))
        assert result.tokens == fresh.tokens and result.statistics.decoding == decoding
        assert result.statistics.reused_tokens > 0
    with pytest.raises(ConfigError, match="t_max would do nothing in autoregressive decoding"):
        model.chat(t_max=0.9).send("Hi", decoding="autoregressive")


# ---------------------------------------------------------------------------------------------------- an earlier end


def stable_by_definition(canvases: list[list[int]], stop_ids: set[int], steps: int) -> bool:
    """Whether the part up to and with the first stop id was the same on the last `steps` + 1 canvases."""
    if len(canvases) <= steps:
        return False
    now = canvases[-1]
    end = next((i + 1 for i, token in enumerate(now) if token in stop_ids), len(now))
    return all(before[:end] == now[:end] for before in canvases[-1 - steps :])


def test_an_answer_is_stable_up_to_its_first_stop_id() -> None:
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        count, steps = random.integers(1, 5), int(random.integers(1, 4))
        base = random.integers(0, 3, 6)
        canvases = [np.where(random.random(6) < 0.15, random.integers(0, 3, 6), base).tolist() for _ in range(count)]
        best, earlier = mx.array([canvases[-1]]), [mx.array([c]) for c in canvases[:-1]]
        [found] = sampler.answer_stable(best, earlier, (2,), steps=steps).tolist()  # type: ignore[misc]
        assert found == stable_by_definition(canvases, {2}, steps)
        seen.add(found)
    assert seen == {True, False}
    assert sampler.answer_stable(mx.array([[1, 1]]), [mx.array([[1, 1]])], (), steps=1).tolist() == [True]


def test_a_canvas_ends_when_its_answer_is_stable() -> None:
    """Each row at the first step at which the definition holds; the run's steps before are the reference's."""
    network = small.network()
    settings = GenerationConfig(max_tokens=16, max_denoising_steps=12, stop_ids=(40,), confidence_threshold=0.0)

    def run(**options: Any) -> tuple[list[Denoised], Committed, Finished]:
        noise = SeededNoise([1, 2, 3], length=small.CANVAS, vocabulary=small.VOCABULARY)
        prompts = [[2, 50], [2, 51], [2, 52]]
        events = list(engine.generate(network, prompts, settings.replace(**options), noise))
        [committed], last = [e for e in events if isinstance(e, Committed)], events[-1]
        assert isinstance(last, Finished)
        return [e for e in events if isinstance(e, Denoised)], committed, last

    whole, *_ = run()
    canvases = [np.array(event.best).tolist() for event in whole]
    early = 0
    for steps in (1, 2, 4):
        _, committed, last = run(stable_answer=steps)
        for row in range(3):
            seen = [canvas[row] for canvas in canvases]
            expected = next((n for n in range(1, 13) if stable_by_definition(seen[:n], {40}, steps)), 12)
            found = committed.rows[row]
            assert found.steps == expected and not found.settled
            assert found.early == stable_by_definition(seen[:expected], {40}, steps)
            early += found.early
        assert last.statistics.departures == {"stable_answer": steps}
        assert last.statistics.early_canvases == sum(row.early for row in committed.rows)
    assert early > 0


# ------------------------------------------------------------------------------------------------------------- texts


def test_a_text_and_an_answer_are_scored(model: DiffusionGemma) -> None:
    found = model.score("Hello")
    ids = [small.BOS, *model.tokenizer.encode("Hello")]
    assert found.tokens == tuple(ids[1:])
    assert found.logprobs == pytest.approx(by_one_pass(model, ids, 1), abs=2e-5)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(found.logprobs)))
    assert found.bits_per_byte(5) == pytest.approx(-sum(found.logprobs) / math.log(2) / 5)
    prompt = model.ids("Hi")
    answered = model.score([{"role": "user", "content": "Hi"}], "you")
    assert answered.tokens == (*model.tokenizer.encode("you"), small.TURN_END)
    assert answered.logprobs == pytest.approx(by_one_pass(model, [*prompt, *answered.tokens], len(prompt)), abs=2e-5)
    assert model.score([2, 40, 41]).tokens == (40, 41)


def test_windows_score_every_token_once(model: DiffusionGemma) -> None:
    network, limit = model.network, model.config.max_position_embeddings
    ids = np.random.default_rng(0).integers(8, small.VOCABULARY, limit + 130).tolist()
    found = score_ids(network, ids, stride=100)
    assert len(found.logprobs) == len(ids) - 1
    expected = by_one_pass(model, ids[:limit], 1)
    for first in (100, 200):
        window = ids[first : first + limit]
        expected += by_one_pass(model, window, len(expected) + 1 - first)
    assert found.logprobs == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("ids", "stride", "message"),
    [
        ([2], None, "there is nothing to score"),
        ([2] * 513, None, "the text is 513 tokens; the model's context is 512"),
        ([2] * 9, 512, "the stride is 512 tokens, expected 1 … 511"),
        ([2, 99999], None, "has the id 99999"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: DiffusionGemma, ids: list[int], stride: int | None, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        model.score(ids, stride=stride)


def test_messages_without_an_answer_are_refused(model: DiffusionGemma) -> None:
    with pytest.raises(PromptError, match="give messages and `answer`"):
        model.score([{"role": "user", "content": "Hi"}])


# --------------------------------------------------------------------------------------------------------------- hint


def test_the_hint_needs_both_times_and_a_clear_difference() -> None:
    pace, slow = Pace(16), answer(0, *[-0.1] * 9)
    assert pace.hint(slow.canvases, slow.statistics) == ""
    fields: dict[str, Any] = {"decoding": "autoregressive", "steps": 10, "denoise_seconds": 0.0}
    quick = Statistics(**{**vars(slow.statistics), **fields})  # 0.05 s a token
    pace.note(quick, rows=2)
    assert pace.hint(slow.canvases, slow.statistics) == ""
    pace.note(quick, rows=1)
    assert pace.hint(slow.canvases, slow.statistics).startswith("autoregressive decoding would have taken about 0.5 s")
    assert pace.hint(slow.canvases, quick) == ""
    pace.note(slow.statistics, rows=1)
    assert pace.hint(slow.canvases, quick) == ""  # a canvas takes 2.5 s here
    assert "diffusion" in pace.hint(slow.canvases, Statistics(**{**vars(quick), "commit_seconds": 9.0}))


def test_a_model_hints_once_it_has_measured_both(model: DiffusionGemma, tmp_path: Path) -> None:
    fresh = small.model(tmp_path)
    hints = [one(fresh.generate("Hi", seed=1, decoding=d)).hint for d in ("diffusion", "autoregressive") * 2]
    assert hints[0] == "" and all(hint == "" or "by this machine's times" in hint for hint in hints)
    assert len(fresh.pace._canvases) == len(fresh.pace._tokens) == 2
