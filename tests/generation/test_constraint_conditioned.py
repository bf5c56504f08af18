"""Rows under constraints: what a step reads of them, and whole runs that never leave their language."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError, NoiseError
from mlx_diffgemma.generation import engine, vocabulary
from mlx_diffgemma.generation.constraint import conditioned
from mlx_diffgemma.generation.constraint.automaton import Constraint, anything, build, never_first
from mlx_diffgemma.generation.constraint.chain import condition
from mlx_diffgemma.generation.constraint.classes import ClassOrder
from mlx_diffgemma.generation.constraint.conditioned import Guide
from mlx_diffgemma.generation.constraint.parts import Anything, Pattern, Spelled, Spellings
from mlx_diffgemma.generation.events import Committed, Denoised, Event, Finished
from mlx_diffgemma.generation.noise import NoiseRecorder, RecordedNoise, SeededNoise
from mlx_diffgemma.generation.settings import LED_STEPS, GenerationConfig
from mlx_diffgemma.generation.vocabulary import Shaping
from mlx_diffgemma.model.network import Network
from tests import small
from tests.generation.test_constraint_automaton import is_text, random_pattern
from tests.generation.test_constraint_chain import sums_of
from tests.generation.test_constraint_classes import CAP, HIDDEN, TEMPERATURE, hidden_of, table_of, weights_of

STOP, PAD = small.EOS, 0
TOKENS = [None] * small.FIRST_BYTE + [bytes([b]) for b in range(256)] + [letter.encode() for letter in small.LETTERS]
SPELLINGS = Spellings(TOKENS)
SETTINGS = GenerationConfig(max_tokens=40, max_denoising_steps=12, stop_ids=(STOP,))
PROMPT, OTHER = [2, 40, 41, 42, 43], [2, 50]


def spelled(text: str) -> tuple[int, ...]:
    return tuple(small.FIRST_LETTER + small.LETTERS.index(letter) for letter in text)


def built(*parts: Any) -> Constraint:
    return build(parts, SPELLINGS, stop_ids=[STOP], pad_id=PAD)


def pairs_of_letters(count: int) -> Pattern:
    """`count` times "a" or "b" and a digit, then any letters."""
    transitions = np.full((2 * count + 1, 256), -1, np.int32)
    for i in range(count):
        transitions[2 * i, list(b"ab")] = 2 * i + 1
        transitions[2 * i + 1, list(b"0123456789")] = 2 * i + 2
    transitions[-1, list(b"xyz")] = 2 * count
    return Pattern(transitions=transitions, start=0, accepting=np.arange(2 * count + 1) == 2 * count)


def run(
    network: Network,
    *prompts: list[int],
    constraint: Constraint | Sequence[Constraint | None] | None,
    seeds: Sequence[int] = (0,),
    noise: Any = None,
    **options: Any,
) -> list[Event]:
    noise = noise or SeededNoise(seeds, length=small.CANVAS, vocabulary=small.VOCABULARY)
    return list(engine.generate(network, list(prompts), SETTINGS.replace(**options), noise, constraint=constraint))


def tokens(events: list[Event], row: int = 0) -> list[int]:
    return [i for e in events if isinstance(e, Committed) for i in e.rows[row].ids]


def reasons(events: list[Event]) -> tuple[str, ...]:
    assert isinstance(events[-1], Finished)
    return events[-1].reasons


@pytest.fixture(scope="module")
def network() -> Network:
    return small.network()


# ------------------------------------------------------------------------------------------------------------- a step


SIZE, LENGTH = 1500, 6


def nats(q: np.ndarray) -> np.ndarray:
    return -(q * np.log(np.maximum(q, 1e-300))).sum(-1)


def step_constraint() -> Constraint:
    """Few enough ids, and a class of many."""
    return build(
        [Anything(without=(5, 6)), Spelled(choices=((5, 6), (6,)))], Spellings([None] * SIZE), stop_ids=[1], pad_id=0
    )


@pytest.mark.parametrize("led", [False, True], ids=["by the constraint", "by the model"])
def test_rows_are_read_each_under_its_own_constraint(led: bool) -> None:
    """Free, constrained from the start, and constrained from another state: against all logits in float64. Where the
    model leads, what is shown is each position's own, and the less sure of the two counts where there is a choice."""
    table, constraint = table_of(SIZE), step_constraint()
    hidden = hidden_of(3 * LENGTH)[::-1].reshape(3, LENGTH, HIDDEN)  # the last row is the least sure
    order, after = ClassOrder(constraint.classes), constraint.walk(constraint.start, [9, 5])
    guides = [None, *(Guide(constraint=constraint, order=order, state=s, left=4) for s in (after, constraint.start))]
    shaping, unsure = Shaping(cap=CAP, temperature=TEMPERATURE), np.random.default_rng(0).random((3, LENGTH)) < 0.5
    sums = conditioned.walk(hidden, table, shaping, guides, led=led)
    reading = sums.read(None, None)
    sparse = np.array(sums.sparse_signal(unsure))
    rows = weights_of(table)
    logits = CAP * np.tanh(np.array(hidden).astype(np.float64) @ rows.T / CAP) / TEMPERATURE
    free = np.log(np.exp(logits).sum(-1))
    assert reading.signal is not None and sums.pinned is not None
    for row, guide in enumerate(guides):
        if guide is None:
            q, best = np.exp(logits[row] - free[row][:, None]), logits[row].argmax(-1)
            assert sums.log_probabilities()[row] is None
        else:
            plain = condition(constraint, sums_of(logits[row], constraint), guide.state, guide.left)
            q = np.exp(logits[row] + plain.multiplier[:, np.maximum(constraint.classes, 0)]) * (constraint.classes >= 0)
            best = plain.best
            found = sums.log_probabilities()[row]
            assert found == pytest.approx(plain.log_mass - free[row].sum(), abs=1e-3) and found < 0
        assert np.array(reading.best)[row].tolist() == best.tolist()
        entropy = nats(q)
        if led and guide:
            q = np.exp(logits[row]) * (constraint.classes >= 0)
            q /= q.sum(-1, keepdims=True)
            entropy = np.where(np.array(sums.pinned)[row], entropy, np.maximum(entropy, nats(q)))
        np.testing.assert_allclose(np.array(reading.entropy)[row], entropy, atol=1e-4)
        np.testing.assert_allclose(np.array(reading.tail)[row], 1 - q.max(-1), atol=1e-5)
        np.testing.assert_allclose(np.array(reading.signal)[row], q @ rows * HIDDEN**0.5, atol=1e-3)
        one = rows[q.argmax(-1)] * HIDDEN**0.5
        expected = np.where(unsure[row][:, None], q @ rows * HIDDEN**0.5, one)
        np.testing.assert_allclose(sparse[row], expected, atol=1e-3)
    assert mx.array_equal(reading.guess, reading.best)


def test_the_best_text_need_not_hold_the_likeliest_ids() -> None:
    """Of equal texts the one with the lowest ids is best, but three of four begin otherwise: the signal of a position
    that counts as sure is that of its likeliest id."""
    texts = ((2, 3), (4, 5), (4, 6), (4, 7))
    constraint = build([Spelled(choices=texts)], Spellings([None] * 8), stop_ids=[1], pad_id=0)
    guide = Guide(constraint=constraint, order=ClassOrder(constraint.classes), state=constraint.start, left=2)
    table = table_of(8)
    sums = conditioned.walk(mx.zeros((1, 3, HIDDEN)), table, Shaping(cap=CAP, temperature=1.0), [guide])
    reading = sums.read(None, None)
    assert reading.best.tolist() == [[2, 3, 1]]
    np.testing.assert_allclose(reading.tail, [[0.25, 0.75, 0]], atol=1e-6)
    signal = np.array(sums.sparse_signal(np.zeros((1, 3), bool)))
    np.testing.assert_allclose(signal[0, 0], weights_of(table)[4] * HIDDEN**0.5, rtol=1e-5)


def test_a_step_without_constraints_is_the_walk_of_all_ids() -> None:
    table, hidden, shaping = table_of(300), hidden_of(12).reshape(2, 6, HIDDEN), Shaping(cap=CAP, temperature=0.5)
    draws = mx.random.uniform(shape=(2, 6), key=mx.random.key(0))
    ours, free = conditioned.walk(hidden, table, shaping, [None, None]), vocabulary.walk(hidden, table, shaping)
    for name in ("best", "guess", "entropy", "tail", "signal"):
        assert mx.array_equal(getattr(ours.read(draws, None), name), getattr(free.read(draws), name))
    assert ours.pinned is None


def test_guesses_are_texts_drawn_from_the_conditioned_product() -> None:
    """Chi-square over 3,000 canvases of two positions, ids within their classes too."""
    size, count = 12, 3_000
    table = table_of(size)
    constraint = build(
        [Anything(without=(5,)), Spelled(choices=((5,),))], Spellings([None] * size), stop_ids=[1], pad_id=0
    )
    hidden = mx.repeat(mx.random.normal((1, 2, HIDDEN), key=mx.random.key(3)) * 0.1, count, axis=0)
    guide = Guide(constraint=constraint, order=ClassOrder(constraint.classes), state=constraint.start, left=3)
    sums = conditioned.walk(hidden, table, Shaping(cap=CAP, temperature=0.8), [guide] * count, with_signal=False)
    draws, path = (mx.random.uniform(shape=(count, 2), key=mx.random.key(k)) for k in (4, 5))
    guesses = np.array(sums.read(draws, path).guess)
    logits = np.array(hidden[0]).astype(np.float64) @ weights_of(table).T
    logits = CAP * np.tanh(logits / CAP) / 0.8
    texts = [(a, b) for a in range(size) for b in range(size) if may_go_on(constraint, (a, b), 1)]
    weights = np.exp([logits[0, a] + logits[1, b] for a, b in texts])
    expected = weights / weights.sum() * count
    seen = np.array([(guesses == text).all(1).sum() for text in texts])
    assert seen.sum() == count and len(texts) > 90
    common = expected >= 5
    found, wanted = np.append(seen[common], seen[~common].sum()), np.append(expected[common], expected[~common].sum())
    freedom = common.sum()
    assert abs(((found - wanted) ** 2 / wanted).sum() - freedom) < 4 * (2 * freedom) ** 0.5


def may_go_on(constraint: Constraint, ids: tuple[int, ...], left: int) -> bool:
    state = constraint.walk(constraint.start, ids)
    return state >= 0 and constraint.distance[state] <= left


# -------------------------------------------------------------------------------------------------------------- a run


def test_random_languages_are_never_left(network: Network) -> None:
    """Every answer is a text of its language, ended or cut at max_tokens where it may end, settled or not."""
    rng, ended = np.random.default_rng(0), 0
    for seed in range(20):
        try:
            constraint = built(random_pattern(rng, 6), Spelled(choices=(spelled("ok"), spelled("no."))))
        except ConfigError:
            continue
        events = run(network, PROMPT, constraint=constraint, seeds=[seed], greedy=bool(seed % 2), max_denoising_steps=4)
        assert is_text(constraint, tokens(events))
        ended += reasons(events) == ("stop",)
    assert ended > 5


@pytest.mark.parametrize("steps", [1, 12])
def test_a_text_goes_over_several_canvases(network: Network, steps: int) -> None:
    constraint = built(pairs_of_letters(14))
    for seed in range(3):
        events = run(network, PROMPT, constraint=constraint, seeds=[seed], max_denoising_steps=steps)
        text = tokens(events)
        assert is_text(constraint, text) and 28 <= len(text) <= 40
        assert sum(isinstance(e, Committed) for e in events) > 1


def test_the_last_tokens_are_kept_for_the_end(network: Network) -> None:
    constraint = built(Anything(without=spelled("!")), Spelled(choices=(spelled("!!!"),)))
    for seed in range(4):
        ids = tokens(run(network, PROMPT, constraint=constraint, seeds=[seed], max_tokens=20))
        assert len(ids) <= 20 and tuple(ids[-3:]) == spelled("!!!")


def test_rows_have_constraints_of_their_own(network: Network) -> None:
    first, second = built(pairs_of_letters(3)), built(Spelled(choices=(spelled("yes"), spelled("no"))))
    prompts, constraints, seeds = [PROMPT, OTHER, PROMPT, OTHER], [first, None, second, first], [4, 5, 6, 7]
    together = run(network, *prompts, constraint=constraints, seeds=seeds)
    for row, (prompt, constraint) in enumerate(zip(prompts, constraints, strict=True)):
        alone = run(network, prompt, constraint=constraint, seeds=[seeds[row]])
        assert tokens(together, row) == tokens(alone)
        assert constraint is None or is_text(constraint, tokens(alone))


def test_anything_goes_is_the_free_run(network: Network) -> None:
    """One state and one class: the same steps, the same ids, from the same noise."""
    for seed in range(3):
        free, guided = (run(network, PROMPT, constraint=c, seeds=[seed]) for c in (None, anything(small.VOCABULARY)))
        assert tokens(free) == tokens(guided)
        assert sum(isinstance(e, Denoised) for e in free) == sum(isinstance(e, Denoised) for e in guided)


def test_avoid_empty_is_a_constraint_like_others(network: Network) -> None:
    """Best tokens are the same; its guesses are drawn by two numbers in place of one."""
    first = tokens(run(network, PROMPT, constraint=None))[0]
    guarded = never_first(small.VOCABULARY, [first])
    ours = run(network, PROMPT, constraint=guarded, stop_ids=(first,), greedy=True)
    named = run(network, PROMPT, constraint=None, stop_ids=(first,), greedy=True, avoid_empty=True)
    assert tokens(ours) == tokens(named) != []


def test_the_sparse_signal_changes_nothing(network: Network) -> None:
    constraint = built(pairs_of_letters(5))
    dense, sparse = (run(network, PROMPT, constraint=constraint, sparse_signal=s) for s in (False, True))
    assert tokens(dense) == tokens(sparse)


def test_pinned_text_is_known_as_such(network: Network) -> None:
    pin = spelled("abcdefgh")
    constraint = built(Spelled(choices=(pin,)), Anything())
    event = next(e for e in run(network, PROMPT, constraint=constraint) if isinstance(e, Denoised))
    assert event.pinned is not None
    assert event.pinned[0].tolist() == [True] * 8 + [False] * (small.CANVAS - 8)
    assert event.best[0, :8].tolist() == list(pin) and event.entropy[0, :8].max().item() < 1e-6


def test_results_say_how_probable_the_language_was(network: Network) -> None:
    constraint = built(pairs_of_letters(14))
    events = run(
        network, PROMPT, OTHER, constraint=[constraint, None], seeds=[0, 1], max_denoising_steps=1, max_tokens=48
    )
    rows = [event.rows for event in events if isinstance(event, Committed)]
    assert all(row[0].log_probability < -1 for row in rows if row[0].steps)
    assert all(row[1].log_probability is None for row in rows)
    free = run(network, PROMPT, constraint=anything(small.VOCABULARY))
    assert all(abs(e.rows[0].log_probability) < 1e-4 for e in free if isinstance(e, Committed))


def test_a_run_repeats_from_its_recorded_noise(network: Network, tmp_path: Path) -> None:
    constraint = built(pairs_of_letters(3))
    recorder = NoiseRecorder(SeededNoise([3], length=small.CANVAS, vocabulary=small.VOCABULARY))
    first = run(network, PROMPT, constraint=constraint, noise=recorder)
    recorder.save(tmp_path / "noise.npz")
    again = run(network, PROMPT, constraint=constraint, noise=RecordedNoise.load(tmp_path / "noise.npz"))
    assert tokens(first) == tokens(again)
    recorder = NoiseRecorder(SeededNoise([3], length=small.CANVAS, vocabulary=small.VOCABULARY))
    run(network, PROMPT, constraint=None, noise=recorder)
    recorder.save(tmp_path / "free.npz")
    with pytest.raises(NoiseError, match="recorded without a constraint"):
        run(network, PROMPT, constraint=constraint, noise=RecordedNoise.load(tmp_path / "free.npz"))


def test_the_order_of_a_constraints_classes_is_made_once() -> None:
    constraint = built(pairs_of_letters(2))
    assert conditioned.order_of(constraint) is conditioned.order_of(constraint)


@pytest.mark.parametrize("greedy", [True, False])
def test_token_by_token_a_text_is_never_left_and_ends_in_time(network: Network, greedy: bool) -> None:
    """Rows with and without a constraint; what has none is as alone."""
    open_end, other = built(pairs_of_letters(3)), built(Spelled(choices=(spelled("yes"), spelled("no"))))
    options: dict[str, Any] = {"decoding": "autoregressive", "greedy": greedy}
    for most in (6, 7, 12):
        for seed in range(3):
            seeds = (seed, seed + 1, seed + 2)
            rows = [open_end, None, other]
            events = run(network, PROMPT, OTHER, OTHER, constraint=rows, seeds=seeds, max_tokens=most, **options)
            assert is_text(open_end, tokens(events, 0)) and is_text(other, tokens(events, 2))
            alone = run(network, OTHER, constraint=None, seeds=(seed + 1,), max_tokens=most, **options)
            assert tokens(events, 1) == tokens(alone)


def test_next_ids_are_those_behind_which_a_text_still_ends() -> None:
    constraint = built(pairs_of_letters(2))
    everything = range(len(constraint.classes))
    for state in range(constraint.states):
        for left in range(1, 7):
            allowed = constraint.next_ids(state, left)
            after = [constraint.walk(state, [i]) for i in everything]
            assert allowed.tolist() == [s >= 0 and constraint.distance[s] <= left - 1 for s in after]
            assert constraint.distance[state] > left or allowed.any(), "never at a dead end"


def test_what_does_not_go_together_is_refused(network: Network) -> None:
    constraint = built(Spelled(choices=(spelled("yes"),)))
    with pytest.raises(ConfigError, match="avoid_empty and a constraint exclude each other"):
        run(network, PROMPT, constraint=constraint, avoid_empty=True)
    with pytest.raises(ConfigError, match="free_steps would do nothing"):
        run(network, PROMPT, constraint=None, free_steps=3)
    with pytest.raises(ConfigError, match=r"2 constraints for 1 prompts"):
        run(network, PROMPT, constraint=[constraint, None])
    with pytest.raises(ConfigError, match=r"shortest has 3 tokens, max_tokens is 2"):
        run(network, PROMPT, constraint=constraint, max_tokens=2)
    with pytest.raises(ConfigError, match=r"knows 9,999 ids, the model \d+"):
        run(network, PROMPT, constraint=anything(9_999))


@pytest.mark.parametrize(("free_steps", "led"), [(None, LED_STEPS), (2, 2), (0, 0)])
def test_the_model_leads_the_first_steps_of_every_canvas(
    network: Network, monkeypatch: pytest.MonkeyPatch, free_steps: int | None, led: int
) -> None:
    walk, told = conditioned.walk, []

    def watched(*given: Any, **named: Any) -> Any:
        told.append(named["led"])
        return walk(*given, **named)

    monkeypatch.setattr(conditioned, "walk", watched)
    constraint = built(pairs_of_letters(9))
    events = run(network, PROMPT, constraint=constraint, free_steps=free_steps, confidence_threshold=0)
    assert told == [event.step < led for event in events if isinstance(event, Denoised)] and len(told) > 12
    assert isinstance(events[-1], Finished) and is_text(constraint, tokens(events))
    assert events[-1].statistics.departures == ({"free_steps": free_steps} if free_steps else {})
