"""The reading of a step whose rows are under constraints: best, guess, entropy and signal of the conditioned product.

It stands where `vocabulary.walk` and `Sums.read` stand. Rows of one constraint are walked together, rows without one as
ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

from ...errors import ConfigError
from ...model.table import Table, scaled
from ...model.tuning import DEFAULT, Tuning
from .. import vocabulary
from ..settings import GenerationConfig
from ..vocabulary import Reading, Shaping
from . import classes
from .automaton import Constraint
from .chain import Alone, Conditioned, alone, condition


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """What a row's canvas has to go on with."""

    constraint: Constraint
    order: classes.ClassOrder  # of the constraint's classes
    state: int  # before the canvas
    left: int  # tokens that the text may get from here on


@lru_cache(maxsize=32)
def order_of(constraint: Constraint) -> classes.ClassOrder:
    """Made once: runs of one constraint share it."""
    return classes.ClassOrder(constraint.classes)


class Guides:
    """The constraints of a run's rows, and how far along each text is."""

    def __init__(self, constraint: Constraint | Sequence[Constraint | None] | None, rows: int):
        """One constraint for all rows, or one (or None) a row. Errors: ConfigError where their numbers differ."""
        self.constraints = list(constraint) if isinstance(constraint, Sequence) else [constraint] * rows
        if len(self.constraints) != rows:
            raise ConfigError(f"{len(self.constraints)} constraints for {rows} prompts: give one for all, or one each.")
        self.states = [made.start if made else 0 for made in self.constraints]

    def check(self, settings: GenerationConfig, vocabulary: int, tokens: int) -> None:
        """ConfigError for settings that do not go with a constraint, for a constraint on other ids than the model's,
        and for one without a text of so few `tokens`."""
        if settings.avoid_empty and any(self.constraints):
            raise ConfigError("avoid_empty and a constraint exclude each other: the constraint says what may be empty.")
        if settings.free_steps is not None and not any(self.constraints):
            raise ConfigError("free_steps would do nothing: there is no constraint.")
        for made in filter(None, self.constraints):
            if len(made.classes) > vocabulary:
                raise ConfigError(
                    f"the constraint knows {len(made.classes):,} ids, the model {vocabulary:,}: they do not belong"
                    " together.\nBuild it with the model's own tokenizer."
                )
            made.check(tokens)

    def of_canvas(self, left: Sequence[int]) -> list[Guide | None]:
        """What each row's canvas has to go on with, if `left` tokens may come; None for 0, and without a constraint."""
        rows = zip(self.constraints, self.states, left, strict=True)
        return [
            Guide(constraint=made, order=order_of(made), state=state, left=tokens) if made and tokens else None
            for made, state, tokens in rows
        ]

    def next_ids(self, left: int, vocabulary: int) -> mx.array | None:
        """Which ids may come next in each row, when `left` tokens may: bool [B, vocabulary]; None without
        constraints."""
        if not any(self.constraints):
            return None
        some = np.ones((len(self.constraints), vocabulary), bool)
        for allowed, made, state in zip(some, self.constraints, self.states, strict=True):
            if made:
                allowed[:] = False
                allowed[: len(made.classes)] = made.next_ids(state, left)
        return mx.array(some)

    def advance(self, row: int, ids: Sequence[int]) -> None:
        """What the row's text goes on with is committed."""
        made = self.constraints[row]
        if made and self.states[row] >= 0:
            self.states[row] = made.walk(self.states[row], ids)


def walk(
    hidden: mx.array,
    table: Table,
    shaping: Shaping,
    guides: Sequence[Guide | None],
    *,
    with_signal: bool = True,
    led: bool = False,
    tuning: Tuning = DEFAULT,
) -> "RowSums":
    """Hidden states [B, L, H] and what each row has to go on with → sums to read from.

    With `led` each position is by itself, but for the ids that no text has: the next step is shown what it says alone,
    and it is as unsure as the less sure of the two. Guesses, and places without a choice, are the text's as ever.
    """
    if not any(guides):
        free = vocabulary.walk(hidden, table, shaping, with_signal=with_signal, tuning=tuning)
        return RowSums(parts=[(list(range(len(guides))), free)], with_signal=with_signal)
    groups: dict[int, list[int]] = {}
    for row, guide in enumerate(guides):
        groups.setdefault(id(guide and guide.constraint), []).append(row)
    parts: list[tuple[list[int], vocabulary.Sums | GuidedSums]] = []
    for rows in groups.values():
        x, some = hidden[mx.array(rows)], [guide for row in rows if (guide := guides[row])]
        if some:
            head = classes.Head(table=table, shaping=shaping)
            parts.append((rows, _guided(x, head, some, with_signal, led, tuning)))
        else:
            parts.append((rows, vocabulary.walk(x, table, shaping, with_signal=with_signal, tuning=tuning)))
    return RowSums(parts=parts, with_signal=with_signal)


def _guided(
    hidden: mx.array,
    head: classes.Head,
    guides: list[Guide],
    with_signal: bool,
    led: bool,
    tuning: Tuning,
) -> "GuidedSums":
    """Of the rows of one constraint, [b, L, H]."""
    length = hidden.shape[1]
    reading = classes.read(hidden.flatten(0, 1), head, guides[0].order, keep=with_signal, tuning=tuning)
    chains = [
        condition(guide.constraint, reading.sums.at(slice(row * length, (row + 1) * length)), guide.state, guide.left)
        for row, guide in enumerate(guides)
    ]
    return GuidedSums(reading=reading, chains=chains, with_signal=with_signal, led=led)


@dataclass(frozen=True, kw_only=True, eq=False)
class GuidedSums:
    """What one walk found out about b rows of one constraint."""

    reading: classes.ClassReading  # of their b · L positions
    chains: list[Conditioned]  # one a row
    with_signal: bool
    led: bool  # what the next step is shown is each position's own

    def read(self, draws: mx.array | None, path: mx.array | None) -> Reading:
        """Two uniform draws in [0, 1) per position, float32 [b, L]: the text's classes are drawn along `path`, the
        ids inside those by `draws`. Without them the guess is the best text."""
        best = np.stack([chain.best for chain in self.chains])
        guess = best if draws is None or path is None else self._guess(np.array(draws), np.array(path))
        entropy = np.stack([chain.entropy for chain in self.chains])
        if self.led:
            alone = self._alone.entropy.reshape(entropy.shape)
            entropy = np.where(self.pinned(), entropy, np.maximum(entropy, alone))
        _, tail = self._likeliest()
        signal = self.reading.signal(self._shown()[1]) if self.with_signal else None
        return Reading(
            best=mx.array(best.astype(np.int32)),
            guess=mx.array(guess.astype(np.int32)),
            entropy=mx.array(entropy.astype(np.float32)),
            tail=mx.array(tail.astype(np.float32)).reshape(best.shape),
            signal=None if signal is None else signal.reshape(*best.shape, -1),
        )

    def sparse_signal(self, positions: np.ndarray) -> mx.array:
        """The signal [b, L, H] with the full product at some flat positions alone; the others are one token."""
        likeliest, _ = self._likeliest()
        signal = scaled(self.reading.head.table(mx.array(likeliest.astype(np.int32))))
        if len(positions):
            signal[mx.array(positions)] = self.reading.signal(self._shown()[1], positions)
        return signal.reshape(len(self.chains), -1, signal.shape[-1])

    def pinned(self) -> np.ndarray:
        """Positions [b, L] where the best text had no choice."""
        return np.stack([chain.constraint.forced[chain.states[:-1]] for chain in self.chains])

    def log_probabilities(self) -> list[float]:
        """As `RowSums.log_probabilities`."""
        head, length = self.reading.head, len(self.reading.hidden) // len(self.chains)
        hidden = self.reading.hidden.reshape(len(self.chains), length, -1)
        sums = vocabulary.walk(hidden, head.table, head.shaping, with_signal=False, tuning=self.reading.tuning)
        whole = np.array(sums.log_mass(), np.float64).sum(axis=1)
        return [chain.log_mass - mass for chain, mass in zip(self.chains, whole.tolist(), strict=True)]

    def _guess(self, draws: np.ndarray, path: np.ndarray) -> np.ndarray:
        kinds = np.concatenate([chain.sample(row) for chain, row in zip(self.chains, path, strict=True)])
        return self.reading.pick(kinds, draws.ravel()).reshape(draws.shape)

    @cached_property
    def _alone(self) -> Alone:
        return alone(self.reading.sums)

    def _shown(self) -> tuple[np.ndarray, np.ndarray]:
        """What the next step is shown: the classes' probabilities, and log μ. [b · L, C] each."""
        if self.led:
            return self._alone.posterior, self._alone.multiplier
        posteriors, multipliers = zip(*((chain.posterior, chain.multiplier) for chain in self.chains), strict=True)
        return np.concatenate(posteriors), np.concatenate(multipliers)

    def _likeliest(self) -> tuple[np.ndarray, np.ndarray]:
        """Of what is shown, per position the likeliest id, which need not be that of the best text, and the
        probability of the others."""
        sums, (shown, multiplier) = self.reading.sums, self._shown()
        posterior = shown.copy()
        kind = (multiplier + sums.top).argmax(axis=1)[:, None]
        beside = -np.expm1(np.take_along_axis(sums.top - sums.mass, kind, 1))  # of the other ids of its class
        beside *= np.take_along_axis(posterior, kind, 1)
        np.put_along_axis(posterior, kind, beside, 1)
        return np.take_along_axis(sums.top_id, kind, 1)[:, 0], posterior.sum(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSums:
    """The sums of a batch, row by row."""

    parts: list[tuple[list[int], vocabulary.Sums | GuidedSums]]  # which rows, and theirs
    with_signal: bool

    @property
    def pinned(self) -> mx.array | None:
        """Positions [B, L] where the best text had no choice; None for a batch without constraints."""
        guided = [(rows, sums.pinned()) for rows, sums in self.parts if isinstance(sums, GuidedSums)]
        if not guided:
            return None
        pinned = np.zeros((sum(len(rows) for rows, _ in self.parts), guided[0][1].shape[1]), bool)
        for rows, found in guided:
            pinned[rows] = found
        return mx.array(pinned.astype(np.int32)).astype(mx.bool_)

    def log_probabilities(self) -> list[float | None]:
        """Per row the log of the probability, under the unconditioned distributions, that the canvas goes on with a
        text; None without a constraint. One walk more."""
        made: dict[int, float | None] = {}
        for rows, sums in self.parts:
            found = sums.log_probabilities() if isinstance(sums, GuidedSums) else [None] * len(rows)
            made.update(zip(rows, found, strict=True))
        return [made[row] for row in sorted(made)]

    def read(self, draws: mx.array | None, path: mx.array | None) -> Reading:
        """As `vocabulary.Sums.read`; `path` is one more uniform draw per position, for rows under a constraint."""
        [(_, first), *others] = self.parts
        if not others:
            return first.read(draws, path) if isinstance(first, GuidedSums) else first.read(draws)
        readings = []
        for rows, sums in self.parts:
            some = [None if a is None else a[mx.array(rows)] for a in (draws, path)]
            readings.append(sums.read(*some) if isinstance(sums, GuidedSums) else sums.read(some[0]))
        return Reading(
            best=self._together([reading.best for reading in readings]),
            guess=self._together([reading.guess for reading in readings]),
            entropy=self._together([reading.entropy for reading in readings]),
            tail=self._together([reading.tail for reading in readings]),
            signal=self._together([r.signal for r in readings if r.signal is not None]) if self.with_signal else None,
        )

    def sparse_signal(self, unsure: np.ndarray, *, tuning: Tuning = DEFAULT) -> mx.array:
        """The signal [B, L, H] with the full product at the `unsure` positions (bool [B, L]) alone; the others are one
        token."""
        signals = []
        for rows, sums in self.parts:
            positions = np.flatnonzero(unsure[rows])
            if isinstance(sums, GuidedSums):
                signals.append(sums.sparse_signal(positions))
            else:
                best = sums.read(None).best
                signals.append(vocabulary.sparse_signal(sums, best, mx.array(positions), tuning=tuning))
        return self._together(signals)

    def _together(self, arrays: list[mx.array]) -> mx.array:
        """One array of all rows, from those of the parts."""
        order = np.argsort(np.concatenate([rows for rows, _ in self.parts]))
        return mx.concatenate(arrays)[mx.array(order)]
