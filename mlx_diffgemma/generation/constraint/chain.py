"""The canvas under a constraint, exactly: a chain over its states, in float64 and log space.

A step gives independent distributions p; the chain conditions their product on "the canvas goes on with a text of the
language". With A the log-mass of a class at a position and W(s, s') that of all classes from s to s':

    backward   β(s)  = log Σ W(s, s') · β'(s')        what can follow
    forward    P(s') = Σ P(s) · W(s, s') β'(s') / β(s)     in linear space: each factor is a probability
    multiplier q(v) = p(v) · μ(class of v)           so each position's distribution stays a product of two factors

Best and guess are whole paths: what is committed, or accepted, can be gone on with to a text. Cost: canvas length ×
pairs of states, twice.
"""

from dataclasses import dataclass

import numpy as np

from ...errors import ConfigError
from .automaton import Constraint

NONE = -np.inf  # the log of no mass


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassSums:
    """What L positions say about the C classes, from shaped logits l; float64 but for the ids."""

    mass: np.ndarray  # [L, C], log Σ exp l over the class
    entropy: np.ndarray  # [L, C], nats, of the distribution inside the class
    top: np.ndarray  # [L, C], the largest l
    top_id: np.ndarray  # [L, C], the (lowest) id that has it

    def at(self, positions: slice) -> "ClassSums":
        """Those of some positions."""
        return ClassSums(
            mass=self.mass[positions],
            entropy=self.entropy[positions],
            top=self.top[positions],
            top_id=self.top_id[positions],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioned:
    """One row's canvas under its constraint."""

    constraint: Constraint
    sums: ClassSums
    state: int  # before the canvas
    log_mass: float  # log of the summed weight of all texts; less log Σ exp l of each position: their probability
    posterior: np.ndarray  # [L, C]: probability of each class at each position
    multiplier: np.ndarray  # [L, C]: log μ
    entropy: np.ndarray  # [L], nats
    best: np.ndarray  # [L] int: ids of the most probable text; of equals the one with the lowest ids
    states: np.ndarray  # [L + 1] int: along `best`, before each position and behind the last
    _steps: np.ndarray  # [L, P]: probability of each pair's next state, given its state
    _shares: np.ndarray  # [L, M]: a class's share of its set's mass

    def sample(self, draws: np.ndarray) -> np.ndarray:
        """Classes [L] of a text drawn from all texts of the language, by one number in [0, 1) per position."""
        pairs, state, chosen = self.constraint.pairs, self.state, np.zeros(len(draws), np.intp)
        for i, draw in enumerate(draws):
            a, b = pairs.first[state], pairs.first[state + 1]
            pair, inside = passed(self._steps[i, a:b], draw)
            kind = pairs.kinds[a + pair]
            c, d = pairs.starts[kind], pairs.starts[kind + 1]
            chosen[i] = pairs.members[c + passed(self._shares[i, c:d], inside)[0]]
            state = pairs.target[a + pair]
        return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class Alone:
    """Positions each by itself, as if any id of the language could stand at any of them."""

    posterior: np.ndarray  # [L, C]
    multiplier: np.ndarray  # [L, C]: log μ
    entropy: np.ndarray  # [L], nats


def alone(sums: ClassSums) -> Alone:
    top = sums.mass.max(axis=1, keepdims=True)
    whole = top + np.log(np.exp(sums.mass - top).sum(axis=1, keepdims=True))
    logs = sums.mass - whole
    posterior = np.exp(logs)
    multiplier = np.broadcast_to(-whole, logs.shape)
    return Alone(posterior=posterior, multiplier=multiplier, entropy=_entropy(posterior, logs, sums))


def _entropy(posterior: np.ndarray, logs: np.ndarray, sums: ClassSums) -> np.ndarray:
    """Of the ids, from the classes' probabilities and the entropies inside of them."""
    with np.errstate(invalid="ignore"):
        return np.where(posterior > 0, posterior * (sums.entropy - logs), 0.0).sum(axis=1)


def condition(constraint: Constraint, sums: ClassSums, state: int, left: int) -> Conditioned:
    """The canvas from `state` on, when the text may get `left` tokens more: what lies behind those is cut off, and
    where the canvas ends, or the text is cut, only states remain that can end within the tokens then left."""
    if constraint.distance[state] > left:
        raise ConfigError(f"the text needs {constraint.distance[state]} tokens more, {left} are left.")
    pairs, length = constraint.pairs, len(sums.mass)
    allowed = _allowed(constraint, length, left)
    weight, shares = _set_mass(sums.mass, pairs.members, pairs.starts)
    ahead, steps = _backward(weight, constraint, allowed)
    posterior = _class_posterior(_forward(steps, constraint, state), shares, constraint)
    with np.errstate(divide="ignore"):
        logs = np.log(posterior)
    best, states = _viterbi(sums, constraint, allowed, state)
    return Conditioned(
        constraint=constraint,
        sums=sums,
        state=state,
        log_mass=float(ahead[state]),
        posterior=posterior,
        multiplier=logs - sums.mass,
        entropy=_entropy(posterior, logs, sums),
        best=best,
        states=states,
        _steps=steps,
        _shares=shares,
    )


def _allowed(constraint: Constraint, length: int, left: int) -> np.ndarray:
    """States that may stand before each position and behind the last, bool [L + 1, S]."""
    allowed = np.ones((length + 1, constraint.states), bool)
    cut = min(length, left)
    allowed[cut] = constraint.distance <= left - cut
    allowed[cut + 1 :] = constraint.stopped
    return allowed


def _set_mass(mass: np.ndarray, members: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-mass of each set of classes [L, K], and each member's share of its set [L, M]."""
    each = mass[:, members]
    sizes = np.diff(starts)
    peak = np.maximum.reduceat(each, starts[:-1], axis=1)
    each = np.exp(each - np.repeat(peak, sizes, axis=1))
    total = np.add.reduceat(each, starts[:-1], axis=1)
    return peak + np.log(total), each / np.repeat(total, sizes, axis=1)


def _backward(weight: np.ndarray, constraint: Constraint, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """β before the first position [S], and per position each pair's probability given its state [L, P]."""
    pairs = constraint.pairs
    starts, sizes, sources = _runs(pairs.first)
    beta = np.where(allowed[-1], 0.0, NONE)
    steps = np.empty((len(weight), len(pairs.target)))
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in reversed(range(len(weight))):
            row = steps[i]
            np.add(weight[i].take(pairs.kinds), beta.take(pairs.target), out=row)
            peak = np.maximum.reduceat(row, starts)
            peak[peak == NONE] = 0.0
            row -= np.repeat(peak, sizes)
            np.exp(row, out=row)
            total = np.add.reduceat(row, starts)
            row *= np.repeat(1 / np.where(total > 0, total, 1.0), sizes)
            beta = np.full(constraint.states, NONE)
            beta[sources] = peak + np.log(total)
            beta[~allowed[i]] = NONE
    return beta, steps


def _runs(first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the pairs of each state that has any start, how many there are, and which state it is."""
    sizes = np.diff(first)
    sources = np.flatnonzero(sizes)
    return first[sources], sizes[sources], sources


def _forward(steps: np.ndarray, constraint: Constraint, state: int) -> np.ndarray:
    """Per position the probability that a class of each set is taken, [L, K]."""
    pairs = constraint.pairs
    here = np.zeros(constraint.states)
    here[state] = 1.0
    taken = np.empty((len(steps), len(pairs.starts) - 1))
    for i, row in enumerate(steps):
        flow = row * here.take(pairs.source)
        taken[i] = np.bincount(pairs.kinds, flow, minlength=taken.shape[1])
        here = np.bincount(pairs.target, flow, minlength=len(here))
    return taken


def _class_posterior(taken: np.ndarray, shares: np.ndarray, constraint: Constraint) -> np.ndarray:
    """Probability of each class at each position [L, C]."""
    pairs = constraint.pairs
    order = np.argsort(pairs.members, kind="stable")
    found, starts = np.unique(pairs.members[order], return_index=True)
    each = np.repeat(taken, np.diff(pairs.starts), axis=1) * shares
    posterior = np.zeros((len(taken), constraint.table.shape[1]))
    posterior[:, found] = np.add.reduceat(each[:, order], starts, axis=1)
    return posterior


def _viterbi(sums: ClassSums, constraint: Constraint, allowed: np.ndarray, state: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the most probable text [L], and the states along it [L + 1]."""
    pairs, length = constraint.pairs, len(sums.top)
    top = np.maximum.reduceat(sums.top[:, pairs.members], pairs.starts[:-1], axis=1)
    starts, _, sources = _runs(pairs.first)
    value = np.full((length + 1, constraint.states), NONE)  # of the best way on
    value[length, allowed[length]] = 0.0
    for i in reversed(range(length)):
        ways = top[i].take(pairs.kinds) + value[i + 1].take(pairs.target)
        value[i, sources] = np.maximum.reduceat(ways, starts)
        value[i, ~allowed[i]] = NONE
    ids, states = np.zeros(length, np.int64), np.zeros(length + 1, np.int64)
    states[0] = state
    for i in range(length):
        ways = slice(pairs.first[states[i]], pairs.first[states[i] + 1])
        kinds, targets = pairs.kinds[ways], pairs.target[ways]
        scores = top[i, kinds] + value[i + 1, targets]
        ids[i], states[i + 1] = min(
            (_lowest(sums, i, pairs.members[pairs.starts[kinds[w]] : pairs.starts[kinds[w] + 1]]), targets[w])
            for w in np.flatnonzero(scores == scores.max())
        )
    return ids, states


def _lowest(sums: ClassSums, position: int, classes: np.ndarray) -> int:
    """The lowest id with the largest logit of some classes."""
    top = sums.top[position, classes]
    return int(sums.top_id[position, classes[top == top.max()]].min())


def passed(masses: np.ndarray, draw: float) -> tuple[int, float]:
    """Where the cumulative sum of `masses` passes the fraction `draw` of its total, and at which fraction of that
    entry. An entry without mass is never chosen."""
    cumulative = np.cumsum(masses)
    target = draw * cumulative[-1]
    index = min(int(np.searchsorted(cumulative, target, side="right")), int(np.flatnonzero(masses)[-1]))
    return index, float(np.clip((target - cumulative[index] + masses[index]) / masses[index], 0.0, 1.0))
