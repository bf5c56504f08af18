"""Machines over ids, one after the other as one, and without what is of no use."""

from collections.abc import Iterator

import numpy as np

from ...errors import ConfigError
from .parts import DEAD, Machine, distinct_columns

FAR = np.iinfo(np.int32).max  # the distance of a state that cannot end


def concatenated(machines: list[Machine], most: int) -> Machine:
    """One machine after the other. From an accepting state the next one may begin, so a state of the whole is a set
    of their states: of one, wherever an id can go on in one way only."""
    classes, projected = _joint_classes(machines)
    sets = _StateSets(machines, projected)
    first = sets.closure(0, machines[0].start)
    numbers, waiting, rows, pairs = {(): DEAD, first: 0}, [first], [], 0
    for states in waiting:  # grows while it is walked
        row = []
        for after in sets.after(states):
            if after not in numbers:
                numbers[after] = len(waiting)
                waiting.append(after)
            row.append(numbers[after])
        rows.append(row)
        pairs += len(set(row) - {DEAD})
        if pairs > 4 * most:  # what cannot end is not trimmed yet
            raise too_large(pairs, most)
    accepting = np.array([sets.accepts(states) for states in waiting])
    return Machine(classes=classes, table=np.array(rows, np.int32).reshape(len(rows), -1), start=0, accepting=accepting)


def _joint_classes(machines: list[Machine]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Classes of ids that are the same in every machine [V], and each machine's own class of those."""
    joint = np.zeros(len(machines[0].classes), np.int64)
    for machine in {id(m): m for m in machines}.values():
        code = joint * (machine.table.shape[1] + 1) + machine.classes + 1
        seen = np.zeros(code.max() + 1, bool)
        seen[code] = True
        joint = (np.cumsum(seen) - 1)[code]
    example = np.zeros(joint.max() + 1, np.int64)
    example[joint[::-1]] = np.arange(len(joint))[::-1]  # the lowest id
    used = np.any([machine.classes[example] >= 0 for machine in machines], axis=0)
    number = np.where(used, np.cumsum(used) - 1, DEAD)
    return number[joint].astype(np.int32), [machine.classes[example[used]] for machine in machines]


class _StateSets:
    """Sets of states of several machines, as ascending tuples of numbers."""

    def __init__(self, machines: list[Machine], projected: list[np.ndarray]):
        self.machines, self.projected = machines, projected
        self.offsets = np.cumsum([0, *(len(m.table) for m in machines)]).tolist()
        self._closures: dict[int, tuple[int, ...]] = {}
        self._rows: dict[int, list[int]] = {}

    def closure(self, machine: int, state: int) -> tuple[int, ...]:
        """The state, and the starts of the machines that may begin there."""
        here = self.machines[machine]
        number = self.offsets[machine] + state
        if not here.accepting[state] or machine + 1 == len(self.machines):
            return (number,)
        return (number, *self.closure(machine + 1, self.machines[machine + 1].start))

    def after(self, states: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Per joint class the set that follows `states`, empty where nothing does."""
        for targets in zip(*(self._row(state) for state in states), strict=True):
            alive = {target for target in targets if target != DEAD}
            if len(alive) == 1:
                yield self._closed(*alive)
            else:
                yield tuple(sorted({number for target in alive for number in self._closed(target)}))

    def accepts(self, states: tuple[int, ...]) -> bool:
        last = self.offsets[-2]
        return any(state >= last and self.machines[-1].accepting[state - last] for state in states)

    def _closed(self, number: int) -> tuple[int, ...]:
        if number not in self._closures:
            machine = int(np.searchsorted(self.offsets, number, side="right")) - 1
            self._closures[number] = tuple(sorted(self.closure(machine, number - self.offsets[machine])))
        return self._closures[number]

    def _row(self, number: int) -> list[int]:
        """The next state for every joint class."""
        if number not in self._rows:
            machine = int(np.searchsorted(self.offsets, number, side="right")) - 1
            row = np.append(self.machines[machine].table[number - self.offsets[machine]], DEAD)  # class −1 is dead
            targets = row[self.projected[machine]]
            self._rows[number] = np.where(targets < 0, DEAD, targets + self.offsets[machine]).tolist()
        return self._rows[number]


def trimmed(machine: Machine) -> Machine:
    """Without the states that the start does not reach, or that reach no accepting one; classes that then do the
    same are one, classes that lead nowhere none."""
    edges = np.unique(machine.edges(), axis=0)
    starts = np.arange(len(machine.table)) == machine.start
    kept = (distances(edges[:, ::-1], starts) < FAR) & (distances(edges, machine.accepting) < FAR)
    number = np.append(np.where(kept, np.cumsum(kept) - 1, DEAD), DEAD).astype(np.int32)
    columns, which = distinct_columns(number[machine.table[kept]])
    merged = np.append(which, DEAD)[machine.classes]
    used = np.bincount(merged[merged >= 0], minlength=len(columns)) > 0
    used &= (columns >= 0).any(axis=1) if len(columns) else False
    classes = np.append(np.where(used, np.cumsum(used) - 1, DEAD), DEAD)[merged]
    return Machine(
        classes=classes.astype(np.int32),
        table=columns[used].T.astype(np.int32) if used.any() else np.zeros((int(kept.sum()), 0), np.int32),
        start=int(number[machine.start]),
        accepting=machine.accepting[kept],
    )


def distances(edges: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Fewest edges [E, 2] from every state to one of `ends` (bool [S]); FAR where there is no way."""
    source, target = edges.T
    distance = np.where(ends, 0, FAR).astype(np.int32)
    reached = ends.copy()
    for steps in range(1, len(ends) + 1):
        new = np.zeros(len(ends), bool)
        new[source[reached[target]]] = True
        reached = new & (distance == FAR)
        if not reached.any():
            break
        distance[reached] = steps
    return distance


def too_large(pairs: int, most: int) -> ConfigError:
    return ConfigError(
        f"the constraint is too large: {pairs:,} or more pairs of states, at most {most:,}.\n"
        "Bound what repeats (maxLength, maxItems, {0,1000}, the depth of nesting) more tightly, or not at all."
    )
