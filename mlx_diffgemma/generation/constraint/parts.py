"""The parts of a language, and each as a machine over ids: what every id does to every state.

A byte automaton is lifted: ids that do the same to all of its states form a class, and classes are all that is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import ConfigError

DEAD = -1  # no state, or no class


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """Texts that a byte automaton takes."""

    transitions: np.ndarray  # int32 [S, 256 + C]: the state after each byte of UTF-8, then each control; −1 is dead
    start: int
    accepting: np.ndarray  # bool [S]
    controls: tuple[int, ...] = ()  # column 256 + c is the id controls[c], which has no bytes

    @property
    def content(self) -> tuple[object, ...]:
        """What makes two of them equal."""
        return self.transitions.shape, self.transitions.tobytes(), self.start, self.accepting.tobytes(), self.controls


@dataclass(frozen=True, kw_only=True)
class Spelled:
    """One of these runs of ids, and no other spelling of them."""

    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Anything:
    """Any ids but `without`; at most `at_most` of them."""

    without: tuple[int, ...] = ()
    at_most: int | None = None


Part = Pattern | Spelled | Anything


class Spellings:
    """What every id spells, laid out once for a tokenizer so that a lift can take all ids a byte at a time."""

    def __init__(self, tokens: Sequence[bytes | None]):
        """The bytes of every id; None for one that is no text."""
        pieces = [token or b"" for token in tokens]
        self.count = len(pieces)
        self.lengths = np.fromiter(map(len, pieces), np.int64, self.count)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.bytes = np.frombuffer(b"".join(pieces), np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """A deterministic automaton over classes of ids."""

    classes: np.ndarray  # int32 [V], −1 for ids without a class
    table: np.ndarray  # int32 [S, C], −1 is dead
    start: int
    accepting: np.ndarray  # bool [S]

    def edges(self) -> np.ndarray:
        """(state, next state) of every transition, [E, 2]."""
        state, kind = np.nonzero(self.table >= 0)
        return np.stack([state, self.table[state, kind]], axis=1)


def machines_of(parts: Sequence[Part], spellings: Spellings, tail: list[int]) -> list[Machine]:
    """One a part, equal parts lifted once. Ids of the tail are in no text."""
    made: dict[object, Machine] = {}
    machines = []
    for part in parts:
        key = part.content if isinstance(part, Pattern) else part
        if key not in made:
            made[key] = _machine(part, spellings, tail)
        machines.append(made[key])
    return machines or [_spelled(((),), spellings.count)]


def _machine(part: Part, spellings: Spellings, tail: list[int]) -> Machine:
    if isinstance(part, Pattern):
        return _lifted(part, spellings, tail)
    if isinstance(part, Spelled):
        _check({i for ids in part.choices for i in ids}, spellings, tail)
        return _spelled(part.choices, spellings.count)
    return _anything(part, spellings.count, tail)


def _check(ids: set[int], spellings: Spellings, tail: list[int]) -> None:
    bad = sorted(i for i in ids if i in tail or not 0 <= i < spellings.count)
    if bad:
        raise ConfigError(f"ids {bad} cannot be part of a text: they end it, or do not exist.")


def _lifted(pattern: Pattern, spellings: Spellings, tail: list[int]) -> Machine:
    """A byte automaton as one over ids. All ids are taken a byte at a time: an id's element is the function
    from state to state that its bytes so far amount to, and equal functions are one element."""
    _check(set(pattern.controls), spellings, tail)
    functions = _Functions(pattern.transitions)
    final = np.full(spellings.count, functions.NOWHERE)
    alive = spellings.lengths > 0
    alive[tail] = False
    ids = np.flatnonzero(alive)
    element = np.full(len(ids), functions.IDENTITY)
    depth = 0
    while len(ids):
        element = functions.after(element, spellings.bytes[spellings.starts[ids] + depth])
        depth += 1
        ends = spellings.lengths[ids] == depth
        final[ids[ends]] = element[ends]
        goes_on = ~ends & (element != functions.NOWHERE)
        ids, element = ids[goes_on], element[goes_on]
    if pattern.controls:
        symbols = 256 + np.arange(len(pattern.controls))
        final[list(pattern.controls)] = functions.after(np.full(len(symbols), functions.IDENTITY), symbols)
    found, classes = np.unique(final, return_inverse=True)
    dead = int(found[0] == functions.NOWHERE)  # the least number: it comes first
    return Machine(
        classes=(classes - dead).astype(np.int32),
        table=functions.table(found[dead:]),
        start=pattern.start,
        accepting=np.asarray(pattern.accepting, bool),
    )


class _Functions:
    """Functions from the states of a byte automaton to its states (and to none), each held once under a number."""

    NOWHERE, IDENTITY = 0, 1

    def __init__(self, transitions: np.ndarray):
        columns, self._column = distinct_columns(transitions)
        self._states = len(transitions)
        kind = np.int16 if self._states < 2**15 else np.int32
        nowhere = np.full((len(columns), 1), self._states)  # one state more: none, for good
        self._steps = np.append(np.where(columns < 0, self._states, columns), nowhere, axis=1).astype(kind)
        self._rows: list[np.ndarray] = []
        self._numbers: dict[bytes, int] = {}
        self._after = np.full((0, len(columns)), -1)  # [functions, columns]: which function comes out, −1 not yet known
        self._number(np.full(self._states + 1, self._states, kind))
        self._number(np.arange(self._states + 1, dtype=kind))

    def after(self, element: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Each element [n] followed by a symbol [n]."""
        unseen = len(self._rows) - len(self._after)
        self._after = np.append(self._after, np.full((unseen, len(self._steps)), -1), axis=0)
        columns = self._column[symbols]
        found = self._after[element, columns]
        if (found < 0).any():
            unknown = np.zeros(self._after.shape, bool)
            unknown[element[found < 0], columns[found < 0]] = True
            for e, c in np.argwhere(unknown).tolist():
                self._after[e, c] = self._number(self._steps[c][self._rows[e]])
            found = self._after[element, columns]
        return found

    def table(self, elements: np.ndarray) -> np.ndarray:
        """The functions as columns, int32 [S, n], −1 for no state."""
        rows = [self._rows[e][:-1] for e in elements]
        columns = np.array(rows, np.int32).reshape(len(rows), self._states).T
        return np.where(columns == self._states, DEAD, columns)

    def _number(self, row: np.ndarray) -> int:
        number = self._numbers.setdefault(row.tobytes(), len(self._rows))
        if number == len(self._rows):
            self._rows.append(row)
        return number


def distinct_columns(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct columns as rows [n, S], and which of them each column is."""
    known: dict[bytes, int] = {}
    columns = np.ascontiguousarray(transitions.T)
    which = np.array([known.setdefault(column.tobytes(), len(known)) for column in columns], np.int32)
    return np.array([np.frombuffer(column, columns.dtype) for column in known]), which


def _spelled(choices: Sequence[Sequence[int]], vocabulary: int) -> Machine:
    """A trie of ids; every id in it is a class of its own."""
    used = sorted({token for ids in choices for token in ids})
    kind = {token: number for number, token in enumerate(used)}
    rows: list[list[int]] = [[DEAD] * len(used)]
    accepting: set[int] = set()
    for ids in choices:
        state = 0
        for token in ids:
            if rows[state][kind[token]] == DEAD:
                rows[state][kind[token]] = len(rows)
                rows.append([DEAD] * len(used))
            state = rows[state][kind[token]]
        accepting.add(state)
    classes = np.full(vocabulary, DEAD, np.int32)
    classes[used] = np.arange(len(used))
    ends = np.isin(np.arange(len(rows)), list(accepting))
    return Machine(classes=classes, table=np.array(rows, np.int32).reshape(len(rows), -1), start=0, accepting=ends)


def _anything(part: Anything, vocabulary: int, tail: list[int]) -> Machine:
    classes = np.zeros(vocabulary, np.int32)
    classes[[*tail, *part.without]] = DEAD
    if part.at_most is None:
        return Machine(classes=classes, table=np.zeros((1, 1), np.int32), start=0, accepting=np.ones(1, bool))
    table = np.append(np.arange(1, part.at_most + 1), DEAD).astype(np.int32)[:, None]
    return Machine(classes=classes, table=table, start=0, accepting=np.ones(len(table), bool))
