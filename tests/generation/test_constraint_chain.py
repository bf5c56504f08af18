"""The chain against enumeration of every canvas: weights, marginals, entropies, best, samples."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.generation.constraint.automaton import Constraint, anything, build, never_first
from mlx_diffgemma.generation.constraint.chain import ClassSums, Conditioned, condition
from mlx_diffgemma.generation.constraint.parts import Anything, Spelled, Spellings
from tests.generation.test_constraint_automaton import PAD, STOP, random_pattern, random_tokens


def sums_of(logits: np.ndarray, constraint: Constraint) -> ClassSums:
    """Per class of [L, V] logits, plainly."""
    count = constraint.table.shape[1]
    made = {name: np.zeros((len(logits), count)) for name in ("mass", "entropy", "top", "top_id")}
    for kind in range(count):
        ids = np.flatnonzero(constraint.classes == kind)
        inside = logits[:, ids]
        made["top"][:, kind] = inside.max(1)
        made["top_id"][:, kind] = ids[inside.argmax(1)]
        mass = made["mass"][:, kind] = np.log(np.exp(inside - inside.max(1, keepdims=True)).sum(1)) + inside.max(1)
        p = np.exp(inside - mass[:, None])
        made["entropy"][:, kind] = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    return ClassSums(**made)


@dataclass
class Enumerated:
    """Every canvas of a constraint, each with its weight."""

    canvases: np.ndarray  # [n, L], in ascending order
    logits: np.ndarray  # [L, V]

    @classmethod
    def of(cls, constraint: Constraint, logits: np.ndarray, state: int, left: int) -> "Enumerated":
        length, vocabulary = logits.shape
        kept = [c for c in product(range(vocabulary), repeat=length) if may_be(constraint, c, state, left)]
        return cls(np.array(kept), logits)

    @property
    def scores(self) -> np.ndarray:
        return self.logits[np.arange(self.canvases.shape[1]), self.canvases].sum(1)

    @property
    def log_mass(self) -> float:
        top = self.scores.max()
        return float(np.log(np.exp(self.scores - top).sum()) + top)

    @property
    def probabilities(self) -> np.ndarray:
        return np.exp(self.scores - self.log_mass)

    def marginals(self) -> np.ndarray:
        made = np.zeros_like(self.logits)
        for canvas, p in zip(self.canvases, self.probabilities, strict=True):
            made[np.arange(len(canvas)), canvas] += p
        return made

    def best(self) -> list[int]:
        return self.canvases[self.scores.argmax()].tolist()


def may_be(constraint: Constraint, canvas: tuple[int, ...], state: int, left: int) -> bool:
    """Whether the text goes on like this, can end with the tokens then left, and is over where it is cut."""
    for used, token in enumerate(canvas):
        if used >= left and not constraint.stopped[constraint.walk(state, [token])]:
            return False
        state = constraint.walk(state, [token])
        if state < 0:
            return False
    return bool(constraint.distance[state] <= max(left - len(canvas), 0))


def marginals_of(got: Conditioned, logits: np.ndarray) -> np.ndarray:
    """q(v) = exp(l(v) + log μ(class of v))."""
    classes = got.constraint.classes
    with np.errstate(invalid="ignore"):
        q = np.exp(logits + got.multiplier[:, np.maximum(classes, 0)])
    return np.where(classes >= 0, q, 0.0)


def random_constraint(rng: np.random.Generator) -> Constraint | None:
    """A random automaton over at most six ids, by random bytes."""
    tokens = random_tokens(rng, 3)
    parts = [random_pattern(rng, int(rng.integers(1, 5))) for _ in range(rng.integers(1, 3))]
    try:
        return build(parts, Spellings(tokens), stop_ids=[STOP], pad_id=PAD)
    except ConfigError:
        return None


def test_the_chain_is_the_enumeration() -> None:
    """225 random automata, up to six ids and five positions, logits that spread over up to 60, tokens left or not."""
    rng = np.random.default_rng(0)
    checked = ended = cut = 0
    while checked < 225:
        constraint = random_constraint(rng)
        if constraint is None:
            continue
        length, left = int(rng.integers(1, 6 - len(constraint.classes) // 6)), int(rng.integers(1, 8))
        state = int(rng.integers(constraint.states - 1))
        if constraint.distance[state] > left:
            continue
        logits = rng.normal(size=(length, len(constraint.classes))) * rng.choice([0.5, 4.0, 15.0])
        got = condition(constraint, sums_of(logits, constraint), state, left)
        plain = Enumerated.of(constraint, logits, state, left)
        p = plain.marginals()
        assert abs(got.log_mass - plain.log_mass) < 1e-9
        np.testing.assert_allclose(marginals_of(got, logits), p, atol=1e-9)
        np.testing.assert_allclose(got.entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(1), atol=1e-9)
        assert got.best.tolist() == plain.best()
        assert got.states[-1] == constraint.walk(state, got.best)
        checked += 1
        ended += bool(constraint.stopped[got.states[-1]])
        cut += left < length
    assert min(ended, cut) > 20, "the cases that matter came up"


def test_equal_texts_are_told_apart_by_their_ids() -> None:
    rng = np.random.default_rng(1)
    ties = 0
    for _ in range(80):
        constraint = random_constraint(rng)
        if constraint is None or constraint.fewest > 4:
            continue
        logits = rng.integers(0, 2, (4, len(constraint.classes))).astype(float)
        got = condition(constraint, sums_of(logits, constraint), constraint.start, 9)
        plain = Enumerated.of(constraint, logits, constraint.start, 9)
        assert got.best.tolist() == plain.best()
        ties += (plain.scores == plain.scores.max()).sum() > 1
    assert ties > 20


def test_samples_follow_the_exact_probabilities() -> None:
    """Chi-square over 6,000 texts of each of three automata; ids inside a class are drawn by what is left of chance."""
    rng = np.random.default_rng(2)
    count, tried = 6_000, 0
    while tried < 3:
        constraint = random_constraint(rng)
        if constraint is None or constraint.fewest > 3:
            continue
        logits = rng.normal(size=(3, len(constraint.classes)))
        got = condition(constraint, sums_of(logits, constraint), constraint.start, 5)
        plain = Enumerated.of(constraint, logits, constraint.start, 5)
        if len(plain.canvases) < 10:
            continue
        tried += 1
        kinds = constraint.classes[plain.canvases]
        texts, which = np.unique(kinds, axis=0, return_inverse=True)
        expected = np.bincount(which.ravel(), plain.probabilities) * count
        drawn = np.array([got.sample(draws) for draws in rng.random((count, 3))])
        rows = {tuple(text): number for number, text in enumerate(texts.tolist())}
        seen = np.bincount([rows[tuple(text)] for text in drawn.tolist()], minlength=len(texts))
        common = expected >= 5
        expected = np.append(expected[common], expected[~common].sum() + 1e-9)
        found = np.append(seen[common], seen[~common].sum())
        freedom = max(len(expected) - 1, 1)
        assert abs(((found - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5


def test_anything_goes_changes_nothing() -> None:
    logits = np.random.default_rng(3).normal(size=(7, 50)) * 5
    got = condition(anything(50), sums_of(logits, anything(50)), 0, 3)
    mass = np.log(np.exp(logits).sum(1))
    p = np.exp(logits - mass[:, None])
    assert abs(got.log_mass - mass.sum()) < 1e-9
    np.testing.assert_allclose(got.multiplier[:, 0], -mass, atol=1e-12)
    np.testing.assert_allclose(got.entropy, -(p * np.log(p)).sum(1), atol=1e-9)
    assert got.best.tolist() == logits.argmax(1).tolist()
    assert got.sample(np.linspace(0, 1 - 2**-24, 7)).tolist() == [0] * 7


def test_ids_that_may_not_come_first() -> None:
    logits = np.random.default_rng(4).normal(size=(3, 6))
    guarded = never_first(6, [2, 4])
    got = condition(guarded, sums_of(logits, guarded), guarded.start, 3)
    barred = logits.copy()
    barred[0, [2, 4]] = -np.inf
    expected = np.exp(barred) / np.exp(barred).sum(1, keepdims=True)
    np.testing.assert_allclose(marginals_of(got, logits), expected, atol=1e-12)


def test_a_text_is_carried_over_canvases() -> None:
    """Nine tokens on canvases of four: pinned ids in order, the rest stop and padding."""
    constraint = build([Spelled(choices=(tuple(range(2, 11)),))], Spellings([None] * 12), stop_ids=[STOP], pad_id=PAD)
    rng, state, left, ids = np.random.default_rng(5), constraint.start, 9, []
    for _ in range(3):
        got = condition(constraint, sums_of(rng.normal(size=(4, 12)) * 9, constraint), state, left)
        ids += got.best.tolist()
        state, left = int(got.states[-1]), left - 4
    assert ids[:10] == [*range(2, 11), STOP] and set(ids[10:]) <= {PAD, STOP}


def test_a_canvas_leaves_room_for_the_end() -> None:
    """Whatever the logits say, a text that must close closes in the tokens left."""
    parts = [Anything(without=(3,)), Spelled(choices=((3, 4, 5),))]
    constraint = build(parts, Spellings([None] * 8), stop_ids=[STOP], pad_id=PAD)
    logits = np.zeros((4, 8))
    logits[:, 6] = 50.0
    for left, expected in ((3, [3, 4, 5]), (4, [6, 3, 4, 5]), (5, [6, 6, 3, 4]), (6, [6, 6, 6, 3]), (7, [6] * 4)):
        got = condition(constraint, sums_of(logits, constraint), constraint.start, left)
        assert got.best.tolist()[:4] == [*expected, STOP][:4]
    with pytest.raises(ConfigError, match=r"needs 3 tokens more, 2 are left"):
        condition(constraint, sums_of(logits, constraint), constraint.start, 2)


def test_extremes_do_not_overflow() -> None:
    """Logits of 3,000 either way: what is impossible has mass 0, what is sure entropy 0."""
    constraint = build([Spelled(choices=((2, 3), (4, 5)))], Spellings([None] * 6), stop_ids=[STOP], pad_id=PAD)
    logits = np.zeros((3, 6))
    logits[0, 2], logits[0, 4], logits[1, 3], logits[2, STOP] = -3000, 3000, 3000, -3000
    got = condition(constraint, sums_of(logits, constraint), constraint.start, 3)
    assert got.best.tolist() == [4, 5, STOP]
    np.testing.assert_allclose(got.posterior.max(1), 1)
    np.testing.assert_allclose(got.entropy, 0, atol=1e-12)
    assert np.isfinite(got.log_mass)
