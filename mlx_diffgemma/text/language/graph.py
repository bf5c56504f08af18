"""Automata under construction: a `Graph` that grows edge by edge, and the smallest `Table` of what it reads.

A symbol is a small integer: a code point while characters are spoken of, a byte or control symbol later on. Edges carry
ranges of symbols; a table has one column for each class of symbols that no edge tells apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise

import numpy as np

from ...errors import ConfigError
from .automaton import BYTES, Automaton, Language

STATES = 25_000  # of a finished automaton
NODES = 250_000  # of a graph

Edge = tuple[int, int, int]  # lowest symbol, highest symbol, target


class Graph:
    """A nondeterministic automaton that is being drawn. What draws a piece between two states adds no edge into the
    first and none out of the second, so pieces can share both."""

    def __init__(self) -> None:
        self.edges: list[list[Edge]] = []
        self.jumps: list[list[int]] = []  # edges that read nothing

    def state(self) -> int:
        """A new state."""
        if len(self.edges) >= NODES:
            raise too_large()
        self.edges.append([])
        self.jumps.append([])
        return len(self.edges) - 1

    def edge(self, source: int, low: int, high: int, target: int) -> None:
        self.edges[source].append((low, high, target))

    def jump(self, source: int, target: int) -> None:
        self.jumps[source].append(target)

    def word(self, source: int, symbols: Iterable[int], target: int) -> None:
        """Exactly these symbols."""
        at = source
        for symbol in symbols:
            following = self.state()
            self.edge(at, symbol, symbol, following)
            at = following
        self.jump(at, target)

    def text(self, source: int, text: str, target: int) -> None:
        """Exactly this text, as UTF-8."""
        self.word(source, text.encode(), target)

    def insert(self, source: int, table: "Table", target: int) -> None:
        """A copy of a table's language."""
        base = [self.state() for _ in range(table.states)]
        self.jump(source, base[0])
        for state, edges in enumerate(table.edges):
            for low, high, following in edges:
                self.edge(base[state], low, high, base[following])
            if table.accepting[state]:
                self.jump(base[state], target)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A deterministic automaton over classes of symbols; state 0 is the first.

    starts       int64 [K]: class k is the symbols from `starts[k]` up to the next start; the last one ends at `size`
    next         int32 [S, K]: the state behind a symbol of each class, −1 where there is none
    accepting    bool [S]
    size         how many symbols there are
    """

    starts: np.ndarray
    next: np.ndarray
    accepting: np.ndarray
    size: int

    @property
    def states(self) -> int:
        return len(self.accepting)

    @property
    def empty(self) -> bool:
        return not self.accepting.any()

    def accepts(self, symbols: Iterable[int]) -> bool:
        state = 0
        for symbol in symbols:
            state = self.next[state, np.searchsorted(self.starts, symbol, side="right") - 1]
            if state < 0:
                return False
        return bool(self.accepting[state])

    @cached_property
    def edges(self) -> list[list[Edge]]:
        """The edges out of each state, neighbouring classes with one target joined."""
        bounds = [*self.starts.tolist(), self.size]
        found: list[list[Edge]] = []
        for row in self.next:
            cuts = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist(), len(row)]
            found.append([(bounds[a], bounds[b] - 1, int(row[a])) for a, b in pairwise(cuts) if row[a] >= 0])
        return found

    def spread(self) -> np.ndarray:
        """The table with a column for every symbol, int32 [S, size]."""
        return np.repeat(self.next, np.diff([*self.starts, self.size]), axis=1)


def too_large(what: str = "the language") -> ConfigError:
    return ConfigError(
        f"{what} needs more than {STATES:,} states.\nBound it more tightly: smaller maxLength, maxItems or {{m,n}}, "
        "less depth for recursion and free values; or leave a large maxLength out."
    )


def language(graph: Graph, start: int, end: int, controls: tuple[str, ...] = (), *, empty: str) -> Language:
    """A graph over bytes and `controls` as a language of one part. Errors: ConfigError, `empty`, when it reads nothing;
    and over STATES."""
    table = smallest(graph, start, end, BYTES + len(controls))
    if table.empty:
        raise ConfigError(empty)
    return Language(parts=(Automaton(transitions=table.spread(), accepting=table.accepting, controls=controls),))


def smallest(graph: Graph, start: int, end: int, size: int) -> Table:
    """The smallest table of what the graph reads from `start` to `end`. Errors: ConfigError over STATES."""
    table = minimize(determinize(graph, start, end, size))
    if table.states > STATES:
        raise too_large()
    return table


def determinize(graph: Graph, start: int, end: int, size: int) -> Table:
    """The subset construction, with an edge's range cut only where another edge of the same subset begins or ends."""
    points = {0} | {p for edges in graph.edges for low, high, _ in edges for p in (low, high + 1)}
    starts = sorted(p for p in points if p < size)
    column = {p: k for k, p in enumerate(starts)} | {size: len(starts)}
    closures: dict[int, tuple[int, ...]] = {}
    numbers: dict[tuple[int, ...], int] = {}
    subsets: list[tuple[int, ...]] = []

    def closure(state: int) -> tuple[int, ...]:
        """What can be reached without reading, as far as it matters: states with edges, and the end."""
        if (known := closures.get(state)) is None:
            seen, stack = {state}, [state]
            while stack:
                for target in graph.jumps[stack.pop()]:
                    if target not in seen:
                        seen.add(target)
                        stack.append(target)
            known = closures[state] = tuple(sorted(s for s in seen if graph.edges[s] or s == end))
        return known

    def number(subset: tuple[int, ...]) -> int:
        if (known := numbers.get(subset)) is None:
            known = numbers[subset] = len(subsets)
            subsets.append(subset)
            if known > 2 * STATES:
                raise too_large()
        return known

    number(closure(start))
    rows = []
    for subset in subsets:  # grows while it is walked
        row = np.full(len(starts), -1, np.int32)
        for low, high, targets in _parts([e for state in subset for e in graph.edges[state]]):
            closed = [closure(t) for t in targets]
            merged = closed[0] if len(closed) == 1 else tuple(sorted(set().union(*closed)))
            row[column[low] : column[high + 1]] = number(merged)
        rows.append(row)
    accepting = np.array([end in subset for subset in subsets])
    return Table(starts=np.array(starts, np.int64), next=np.stack(rows), accepting=accepting, size=size)


def _parts(edges: list[Edge]) -> list[tuple[int, int, set[int]]]:
    """Overlapping edges as disjoint ranges with all of their targets."""
    edges = sorted(edges)
    if all(before[1] < after[0] for before, after in pairwise(edges)):
        return [(low, high, {target}) for low, high, target in edges]
    opening: dict[int, list[int]] = {}
    closing: dict[int, list[int]] = {}
    for low, high, target in edges:
        opening.setdefault(low, []).append(target)
        closing.setdefault(high + 1, []).append(target)
    active: dict[int, int] = {}
    found = []
    for point, following in pairwise(sorted({*opening, *closing})):
        for target in opening.get(point, ()):
            active[target] = active.get(target, 0) + 1
        for target in closing.get(point, ()):
            active[target] -= 1
            if not active[target]:
                del active[target]
        if active:
            found.append((point, following - 1, set(active)))
    return found


def minimize(table: Table) -> Table:
    """The smallest table of the same language: no state that cannot accept, none that equals another, states and
    classes in a fixed order. Of an empty language one state remains, which accepts nothing.

    States start out apart when their shortest ways to acceptance differ, and are told apart by the blocks that their
    symbols lead to; after each round only those that look at a split block are looked at again.
    """
    into = _Sources(table.next)
    distance = _distances(into, table.accepting)
    alive = np.flatnonzero(distance >= 0)
    if not len(alive) or distance[0] < 0:
        return Table(starts=np.zeros(1, np.int64), next=np.full((1, 1), -1, np.int32),
                     accepting=np.zeros(1, bool), size=table.size)  # fmt: skip
    renumbered = np.full(table.states + 1, -1, np.int32)  # the last one stands for −1
    renumbered[alive] = np.arange(len(alive), dtype=np.int32)
    following = renumbered[table.next[alive]]
    into = _Sources(following)
    for seed in count():
        block = _blocks(following, into, distance[alive], np.random.default_rng(seed))
        members = np.unique(block, return_index=True)[1]
        ids = np.append(block, -1).astype(np.int32)
        if (ids[following] == ids[following[members[block]]]).all():  # no two signatures collided
            break
    return _ordered(ids[following[members]], table.accepting[alive][members], int(block[renumbered[0]]), table)


class _Sources:
    """The states that have an edge into each state."""

    def __init__(self, following: np.ndarray):
        new = following >= 0
        new[:, 1:] &= following[:, 1:] != following[:, :-1]  # a wide range is one edge
        sources, columns = np.nonzero(new)
        targets = following[sources, columns]
        self.sources = sources[np.argsort(targets, kind="stable")]
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(targets, minlength=len(following)))])

    def of(self, targets: np.ndarray) -> np.ndarray:
        """All sources of `targets`, each once."""
        first, lengths = self.offsets[targets], self.offsets[targets + 1] - self.offsets[targets]
        shift = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
        return np.unique(self.sources[shift + np.arange(len(shift))])


def _distances(into: _Sources, accepting: np.ndarray) -> np.ndarray:
    """The fewest symbols from each state to acceptance, −1 where there is no way."""
    distance = np.where(accepting, 0, -1)
    reached = np.flatnonzero(accepting)
    steps = 0
    while len(reached):
        steps += 1
        reached = into.of(reached)
        reached = reached[distance[reached] < 0]
        distance[reached] = steps
    return distance


def _blocks(following: np.ndarray, into: _Sources, distance: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Numbers of the classes of equal states, refined from the classes of equal distance.

    A state's signature is a random weighted sum of the blocks its symbols lead to. Of a block whose signatures differ
    the states that were not looked at, or else the largest group, keep the number."""
    block = np.unique(distance, return_inverse=True)[1].reshape(-1)
    blocks = int(block.max()) + 1
    size = np.zeros(len(block), np.int64)
    size[:blocks] = np.bincount(block)
    weights = random.integers(2**64, size=following.shape[1], dtype=np.uint64)
    salt = random.integers(2**64, size=len(block) + 1, dtype=np.uint64)  # the last one stands for "no way"
    common = np.zeros(len(block), np.uint64)  # the signature of a block's states
    looked = np.arange(len(block))
    while len(looked):
        ids = np.append(block, len(block))
        signature = (salt[ids[following[looked]]] * weights).sum(axis=1, dtype=np.uint64)
        order = np.lexsort((signature, block[looked]))
        looked, signature = looked[order], signature[order]
        owner = block[looked]
        first = np.append(True, (owner[1:] != owner[:-1]) | (signature[1:] != signature[:-1]))
        group = np.cumsum(first) - 1
        owners, signatures, sizes = owner[first], signature[first], np.bincount(group)
        resting = size[owners] - np.bincount(owner, minlength=blocks)[owners]
        keeps = (resting > 0) & (signatures == common[owners])
        largest = np.lexsort((-sizes, owners))
        largest = largest[np.append(True, np.diff(owners[largest]) != 0)]
        keeps[largest[resting[largest] == 0]] = True
        common[owners[keeps]] = signatures[keeps]
        fresh = np.cumsum(~keeps) - 1 + blocks
        names = np.where(keeps, owners, fresh)
        moved = ~keeps[group]
        common[names] = signatures
        np.subtract.at(size, owner[moved], 1)
        block[looked] = names[group]
        blocks += int((~keeps).sum())
        size[names[~keeps]] = sizes[~keeps]
        looked = into.of(looked[moved])
    return block


def _ordered(following: np.ndarray, accepting: np.ndarray, start: int, table: Table) -> Table:
    """States in the order in which symbols reach them from the start, equal neighbouring classes joined."""
    differs = np.append(True, (following[:, 1:] != following[:, :-1]).any(axis=0))
    following, starts = following[:, differs], table.starts[differs]
    number = np.full(len(following) + 1, -1, np.int32)
    number[start], order = 0, [np.array([start])]
    reached = 1
    while len(order[-1]):
        ways = following[order[-1]].reshape(-1)
        ways = ways[(ways >= 0) & (number[ways] < 0)]
        new = ways[np.sort(np.unique(ways, return_index=True)[1])]
        number[new] = np.arange(reached, reached + len(new))
        reached += len(new)
        order.append(new)
    states = np.concatenate(order)
    return Table(starts=starts, next=number[following[states]], accepting=accepting[states], size=table.size)


def intersect(first: Table, second: Table) -> Table:
    """The smallest table of what both read."""
    starts = np.union1d(first.starts, second.starts)
    left = first.next[:, np.searchsorted(first.starts, starts, side="right") - 1].astype(np.int64)
    right = second.next[:, np.searchsorted(second.starts, starts, side="right") - 1].astype(np.int64)
    numbers, frontier, rows = {0: 0}, [0], []
    while frontier:
        a, b = np.divmod(np.array(frontier), second.states)
        pairs = np.where((left[a] >= 0) & (right[b] >= 0), left[a] * second.states + right[b], -1)
        rows.append(pairs)
        frontier = [p for p in np.unique(pairs).tolist() if p >= 0 and p not in numbers]
        numbers |= {p: len(numbers) + k for k, p in enumerate(frontier)}
        if len(numbers) > 2 * STATES:
            raise too_large()
    codes = np.array(list(numbers))
    order = np.argsort(codes)
    pairs = np.concatenate(rows)
    following = np.where(pairs >= 0, order[np.searchsorted(codes[order], pairs.clip(0))], -1).astype(np.int32)
    accepting = first.accepting[codes // second.states] & second.accepting[codes % second.states]
    return minimize(Table(starts=starts, next=following, accepting=accepting, size=first.size))


def complement(table: Table) -> Table:
    """All that the table does not read."""
    dead = np.full((1, len(table.starts)), -1, np.int32)
    following = np.concatenate([table.next, dead])
    following[following < 0] = table.states
    return Table(starts=table.starts, next=following, accepting=np.append(~table.accepting, True), size=table.size)
