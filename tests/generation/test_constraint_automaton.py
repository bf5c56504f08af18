"""From byte automata and runs of ids to constraints, against walking the bytes and against plain sets of runs."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.generation.constraint.automaton import Constraint, Pairs, anything, build, never_first
from mlx_diffgemma.generation.constraint.parts import Anything, Part, Pattern, Spelled, Spellings

PAD, STOP = 0, 1
LETTERS = b"abc"
TOKENS = [None, None, b"a", b"b", b"c", b"ab", b"bc", b"aa", b"cab", None]


def built(*parts: Part, tokens: Sequence[bytes | None] = TOKENS, most: int = 20_000) -> Constraint:
    return build(parts, Spellings(tokens), stop_ids=[STOP], pad_id=PAD, most=most)


def pattern_of(*texts: str) -> Pattern:
    """The texts and no other, as a trie over bytes."""
    rows, ends = [[-1] * 256], {0} if "" in texts else set()
    for text in texts:
        state = 0
        for byte in text.encode():
            if rows[state][byte] < 0:
                rows[state][byte] = len(rows)
                rows.append([-1] * 256)
            state = rows[state][byte]
        ends.add(state)
    return Pattern(transitions=np.array(rows, np.int32), start=0, accepting=np.isin(np.arange(len(rows)), list(ends)))


def repeated(letters: bytes) -> Pattern:
    """Any number of these bytes."""
    transitions = np.full((1, 256), -1, np.int32)
    transitions[0, list(letters)] = 0
    return Pattern(transitions=transitions, start=0, accepting=np.ones(1, bool))


def random_pattern(rng: np.random.Generator, states: int) -> Pattern:
    transitions = np.full((states, 256), -1, np.int32)
    for letter in LETTERS:
        transitions[:, letter] = np.where(rng.random(states) < 0.7, rng.integers(0, states, states), -1)
    return Pattern(transitions=transitions, start=int(rng.integers(states)), accepting=rng.random(states) < 0.4)


def random_tokens(rng: np.random.Generator, count: int) -> list[bytes | None]:
    words = [bytes(rng.choice(list(LETTERS), size=rng.integers(1, 4)).tolist()) for _ in range(count)]
    return [None, None, *words, None]


def takes(pattern: Pattern, text: bytes) -> bool:
    """Byte by byte."""
    state = pattern.start
    for byte in text:
        state = pattern.transitions[state, byte]
        if state < 0:
            return False
    return bool(pattern.accepting[state])


def is_text(constraint: Constraint, ids: Sequence[int]) -> bool:
    state = constraint.walk(constraint.start, ids)
    return state >= 0 and constraint.distance[state] == 0 and not constraint.stopped[state]


def runs(vocabulary: int, longest: int) -> list[tuple[int, ...]]:
    return [ids for length in range(longest + 1) for ids in product(range(vocabulary), repeat=length)]


def test_a_lift_takes_what_its_bytes_spell() -> None:
    """Every run of up to four ids, for random automata and vocabularies."""
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(60):
        pattern, tokens = random_pattern(rng, int(rng.integers(1, 6))), random_tokens(rng, 4)
        expected = {}
        for ids in runs(len(tokens), 3):
            spelled = [tokens[i] for i in ids]
            expected[ids] = None not in spelled and takes(pattern, b"".join(filter(None, spelled)))
        if not any(expected.values()):
            continue
        constraint = built(pattern, tokens=tokens)
        for ids, wanted in expected.items():
            assert is_text(constraint, ids) == wanted
            seen[wanted] += 1
    assert min(seen.values()) > 500


def test_ids_that_do_the_same_are_one_class() -> None:
    constraint = built(repeated(b"ab"))
    assert constraint.classes.tolist() == [2, 1, 0, 0, -1, 0, -1, 0, -1, -1]
    assert constraint.states == 2  # text, and behind its end


def test_controls_are_symbols_of_their_own() -> None:
    transitions = np.full((3, 258), -1, np.int32)
    transitions[0, 257], transitions[1, ord("a")], transitions[1, 256] = 1, 1, 2
    pattern = Pattern(transitions=transitions, start=0, accepting=np.arange(3) == 2, controls=(9, 4))
    constraint = built(pattern)
    assert is_text(constraint, [4, 2, 7, 9]) and is_text(constraint, [4, 9])
    assert not is_text(constraint, [4, 2]) and not is_text(constraint, [9, 2, 4]) and not is_text(constraint, [4, 4, 9])


PARTS = {
    "a hole between pins": [Spelled(choices=((2, 3),)), Anything(without=(9,)), Spelled(choices=((3, 4),))],
    "a hole that the pin overlaps": [repeated(b"a"), Spelled(choices=((2, 3), (2, 2))), repeated(b"b")],
    "choices, then a pattern": [Spelled(choices=((2,), (5,), (2, 3))), pattern_of("c", "bc", "")],
    "two bounded holes": [Anything(at_most=1), Spelled(choices=((4,),)), Anything(at_most=2)],
    "nothing, or something": [Spelled(choices=((), (2, 2))), Spelled(choices=((), (2,)))],
    "no parts": [],
}


def texts_of(part: Part) -> set[tuple[int, ...]]:
    """The runs of up to four ids that are one text of the part."""
    found = set()
    for ids in runs(len(TOKENS), 4):
        words = [TOKENS[i] for i in ids]
        match part:
            case Pattern():
                taken = None not in words and takes(part, b"".join(filter(None, words)))
            case Spelled():
                taken = ids in part.choices
            case Anything():
                taken = not set(ids) & {PAD, STOP, *part.without} and len(ids) <= (part.at_most or 4)
        if taken:
            found.add(ids)
    return found


@pytest.mark.parametrize("name", PARTS)
def test_parts_meet_at_token_boundaries(name: str) -> None:
    expected = {()}
    for part in PARTS[name]:
        expected = {a + b for a in expected for b in texts_of(part) if len(a + b) <= 4}
    constraint = built(*PARTS[name])
    assert {ids for ids in runs(len(TOKENS), 4) if is_text(constraint, ids)} == expected
    assert constraint.fewest == min(map(len, expected))


@pytest.mark.parametrize("name", PARTS)
def test_behind_the_text_only_stop_ids_and_padding(name: str) -> None:
    constraint = built(*PARTS[name])
    ends = np.flatnonzero((constraint.distance == 0) & ~constraint.stopped)
    for state in range(constraint.states):
        after = constraint.walk(state, [STOP])
        assert (after >= 0) == (state in ends or constraint.stopped[state])
        assert (constraint.walk(state, [PAD]) >= 0) == bool(constraint.stopped[state])
        if after >= 0:
            assert constraint.stopped[after] and constraint.walk(after, [PAD, STOP, PAD]) == after
            assert all(constraint.walk(after, [i]) < 0 for i in range(2, len(TOKENS)))


def test_every_state_is_reached_and_can_end() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        pattern = random_pattern(rng, 6)
        try:
            constraint = built(pattern)
        except ConfigError:
            continue
        reached, edge = {constraint.start}, [constraint.start]
        while edge:
            after = {int(s) for state in edge for s in constraint.table[state] if s >= 0} - reached
            reached |= after
            edge = list(after)
        assert reached == set(range(constraint.states))
        assert (constraint.table >= 0).any(axis=0).all(), "a class without use"
        for state in range(constraint.states):
            shortest = next(n for n in range(9) if _ends_within(constraint, state, n))
            assert constraint.distance[state] == shortest


def _ends_within(constraint: Constraint, state: int, tokens: int) -> bool:
    if constraint.stopped[state] or constraint.walk(state, [STOP]) >= 0:
        return True
    return tokens > 0 and any(
        after >= 0 and _ends_within(constraint, int(after), tokens - 1) for after in constraint.table[state]
    )


def test_pairs_are_the_table() -> None:
    constraint = built(*PARTS["a hole that the pin overlaps"])
    pairs, table = constraint.pairs, constraint.table
    again = np.full_like(table, -1)
    for number, (source, target, kind) in enumerate(zip(pairs.source, pairs.target, pairs.kinds, strict=True)):
        assert pairs.first[source] <= number < pairs.first[source + 1]
        again[source, pairs.members[pairs.starts[kind] : pairs.starts[kind + 1]]] = target
    np.testing.assert_array_equal(again, table)
    assert len(Pairs.of(np.full((2, 1), -1, np.int32)).target) == 0


def test_constraints_on_ids_alone() -> None:
    free, guarded = anything(5), never_first(5, [1, 3])
    assert free.states == 1 and all(free.walk(0, ids) == 0 for ids in runs(5, 2))
    for ids in runs(5, 3):
        assert (guarded.walk(guarded.start, ids) >= 0) == (not ids or ids[0] not in (1, 3))


def test_what_ends_a_text_is_in_none() -> None:
    """A stop id and the padding may have bytes of their own: they spell nothing."""
    tokens = [b"a", b"b", b"c"]
    with pytest.raises(ConfigError, match=r"allows no text"):
        built(pattern_of("a", "b"), tokens=tokens)
    constraint = built(pattern_of("a", "c"), tokens=tokens)
    assert is_text(constraint, [2]) and constraint.table.shape[1] == 3
    constraint = built(Anything(without=(2,)), tokens=tokens)
    assert is_text(constraint, []) and constraint.table.shape[1] == 2


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allows no text"):
        built(pattern_of("d"))
    with pytest.raises(ConfigError, match=r"allows no text"):
        built(Spelled(choices=()))
    with pytest.raises(ConfigError, match=r"ids \[1, 99\] cannot be part of a text"):
        built(Spelled(choices=((2, STOP), (99,))))
    with pytest.raises(ConfigError, match=r"ids \[1\] cannot be part of a text"):
        built(Pattern(transitions=np.full((1, 257), -1), start=0, accepting=np.ones(1, bool), controls=(STOP,)))
    with pytest.raises(ConfigError, match=r"needs a stop id"):
        build([Anything()], Spellings(TOKENS), stop_ids=[], pad_id=PAD)
    with pytest.raises(ConfigError, match=r"shortest has 3 tokens, max_tokens is 2"):
        built(Spelled(choices=((2, 3, 4),))).check(2)
    built(Spelled(choices=((2, 3, 4),))).check(3)
    with pytest.raises(ConfigError, match=r"too large: 52 or more pairs of states, at most 40.\nBound what repeats"):
        built(Anything(at_most=25), most=40)
    with pytest.raises(ConfigError, match=r"too large"):
        built(Anything(at_most=200), Anything(at_most=200), most=40)
