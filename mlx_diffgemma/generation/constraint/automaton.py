"""From a language to a constraint: an automaton over token classes that a canvas can be conditioned on.

    parts        a byte automaton, fixed runs of ids, any ids: each lifted to a machine over ids
    concatenate  parts meet at a token's boundary; determinised where two can go on
    trim         states that the start does not reach, or that can no longer end, are gone
    tail         after the text a stop id, then stop ids and padding alone

All spellings of a text are kept: a Pattern takes every run of ids whose bytes it takes, a Spelled only its own.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...errors import ConfigError
from .machines import concatenated, distances, too_large, trimmed
from .parts import DEAD, Machine, Part, Spellings, machines_of

PAIRS = 20_000  # most (state, next state) pairs: the chain's time is proportional to them


@dataclass(frozen=True, kw_only=True, eq=False)
class Constraint:
    """An automaton over token classes; every state is reached from the start and can still end.

    A text ends in an accepting state: one whose distance is 0. With a tail it says so by a stop id.
    """

    classes: np.ndarray  # int32 [V]: every id's class; −1 for ids in no text
    table: np.ndarray  # int32 [S, C]: the next state; −1 where the class cannot follow
    start: int
    distance: np.ndarray  # int32 [S]: fewest tokens until the text may end
    stopped: np.ndarray  # bool [S]: what may stand behind the end of the text
    seconds: float = 0.0  # that it took to build

    @property
    def fewest(self) -> int:
        """Tokens of the shortest text."""
        return int(self.distance[self.start])

    @property
    def states(self) -> int:
        return self.table.shape[0]

    @cached_property
    def pairs(self) -> "Pairs":
        return Pairs.of(self.table)

    @cached_property
    def forced(self) -> np.ndarray:
        """States behind which one id alone can stand, bool [S]."""
        ids = np.bincount(self.classes[self.classes >= 0], minlength=self.table.shape[1])
        return (self.table >= 0) @ ids == 1

    def check(self, max_tokens: int) -> None:
        """ConfigError where not even the shortest text fits `max_tokens`."""
        if self.fewest > max_tokens:
            raise ConfigError(
                f"no text of the constraint fits: the shortest has {self.fewest} tokens, max_tokens is {max_tokens}.\n"
                "Allow more tokens, or shorter texts."
            )

    def next_ids(self, state: int, left: int) -> np.ndarray:
        """Ids that may follow a state when `left` tokens may, and after which the text can still end, bool [V]."""
        target = self.table[state]
        allowed = (target >= 0) & (self.distance[target] < left)
        return np.append(allowed, False)[self.classes]

    def walk(self, state: int, ids: Sequence[int]) -> int:
        """The state after `ids`, −1 once they leave the language."""
        for token in ids:
            kind = self.classes[token]
            if state == DEAD or kind == DEAD:
                return DEAD
            state = int(self.table[state, kind])
        return state


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """The P pairs (state, next state) that some class joins, by state; and the K distinct sets of classes that join
    them, since most pairs share theirs with others."""

    source: np.ndarray  # int [P], ascending
    target: np.ndarray  # int [P]
    kinds: np.ndarray  # int [P]: which set of classes joins the pair
    first: np.ndarray  # int [S + 1]: state s has the pairs first[s] … first[s + 1] − 1
    members: np.ndarray  # int [M]: the classes of all sets, set after set, ascending
    starts: np.ndarray  # int [K + 1]: where each set starts in `members`

    @classmethod
    def of(cls, table: np.ndarray) -> "Pairs":
        """From the next states [S, C]."""
        state, kind = np.nonzero(table >= 0)
        target = table[state, kind]
        order = np.lexsort((kind, target, state))
        state, kind, target = state[order], kind[order], target[order]
        fresh = np.flatnonzero(np.diff(state, prepend=-1) | np.diff(target, prepend=-1))
        known: dict[bytes, int] = {}
        runs = np.split(kind, fresh[1:]) if len(fresh) else []
        kinds = [known.setdefault(run.tobytes(), len(known)) for run in runs]
        sets = [np.frombuffer(run, kind.dtype) for run in known]
        return cls(
            source=state[fresh],
            target=target[fresh],
            kinds=np.array(kinds, np.intp),
            first=np.searchsorted(state[fresh], np.arange(len(table) + 1)),
            members=np.concatenate(sets) if sets else np.zeros(0, np.intp),
            starts=np.cumsum([0, *map(len, sets)]),
        )


def anything(vocabulary: int) -> Constraint:
    """Every run of ids: one state, one class. Conditioning on it changes nothing."""
    return _untailed(np.zeros(vocabulary, np.int32), np.zeros((1, 1), np.int32))


def never_first(vocabulary: int, ids: Sequence[int]) -> Constraint:
    """Every run of ids that does not begin with one of `ids`."""
    classes = np.zeros(vocabulary, np.int32)
    classes[list(ids)] = 1
    return _untailed(classes, np.array([[1, DEAD], [1, 1]], np.int32))


def _untailed(classes: np.ndarray, table: np.ndarray) -> Constraint:
    """A constraint on runs of ids, not on texts: it may end anywhere."""
    size = len(table)
    return Constraint(
        classes=classes, table=table, start=0, distance=np.zeros(size, np.int32), stopped=np.ones(size, bool)
    )


def build(
    parts: Sequence[Part], spellings: Spellings, *, stop_ids: Sequence[int], pad_id: int, most: int = PAIRS
) -> Constraint:
    """The constraint to texts that are `parts` one after the other, then a stop id, then stop ids and padding.

    Errors: ConfigError for a language without a text, for ids that are no text, for more than `most` pairs of states,
    and without a stop id.
    """
    began = time.perf_counter()
    stop_ids = [i for i in stop_ids if i < spellings.count]
    tail = sorted({*stop_ids, pad_id})
    if not stop_ids:
        raise ConfigError("a constraint needs a stop id: without one no text of it can end.")
    machines = machines_of(parts, spellings, tail)
    whole = trimmed(machines[0] if len(machines) == 1 else concatenated(machines, most))
    if not whole.accepting.any():
        raise ConfigError("the constraint allows no text: no ids of this tokenizer spell one.")
    pairs = len(np.unique(whole.edges(), axis=0)) + int(whole.accepting.sum()) + 1
    if pairs > most:
        raise too_large(pairs, most)
    return _with_tail(whole, stop_ids, tail, began)


def _with_tail(machine: Machine, stop_ids: Sequence[int], tail: list[int], began: float) -> Constraint:
    """From accepting states a stop id leads to one state more, which stop ids and padding do not leave."""
    states, kinds = machine.table.shape
    padding = [i for i in tail if i not in stop_ids]
    table = np.full((states + 1, kinds + 1 + bool(padding)), DEAD, np.int32)
    table[:states, :kinds] = machine.table
    table[:states, kinds] = np.where(machine.accepting, states, DEAD)
    table[states, kinds:] = states
    classes = machine.classes.copy()
    classes[list(stop_ids)] = kinds
    classes[padding] = kinds + 1
    distance = np.append(distances(np.unique(machine.edges(), axis=0), machine.accepting), 0)
    return Constraint(
        classes=classes,
        table=table,
        start=machine.start,
        distance=distance.astype(np.int32),
        stopped=np.arange(states + 1) == states,
        seconds=time.perf_counter() - began,
    )
