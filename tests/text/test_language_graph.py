"""Minimising, intersecting and complementing tables, against plain definitions on random tables."""

from random import Random

import numpy as np
import pytest

from mlx_diffgemma.text.language.automaton import Automaton
from mlx_diffgemma.text.language.characters import (
    ANY,
    ESCAPED,
    PLAIN,
    SHORT,
    USUAL,
    intersection,
    union,
    without,
    written,
)
from mlx_diffgemma.text.language.graph import Graph, Table, complement, determinize, intersect, minimize


def random_graph(random: Random, symbols: int) -> Graph:
    graph = Graph()
    states = [graph.state() for _ in range(random.randint(2, 12))]
    for _ in range(random.randint(1, 25)):
        low, high = sorted(random.choices(range(symbols), k=2))
        graph.edge(random.choice(states), low, high, random.choice(states))
        if random.random() < 0.2:
            graph.jump(random.choice(states), random.choice(states))
    return graph


def reads(graph: Graph, word: list[int]) -> bool:
    """Whether the graph leads from state 0 to state 1 over `word`: by the definition."""

    def settle(states: set[int]) -> set[int]:
        while more := {t for s in states for t in graph.jumps[s]} - states:
            states |= more
        return states

    states = settle({0})
    for symbol in word:
        states = settle({t for s in states for low, high, t in graph.edges[s] if low <= symbol <= high})
    return 1 in states


def moore(table: Table) -> int:
    """How many states the smallest table has, by Moore's rounds over the table with a dead state."""
    following = np.append(table.next, np.full((1, table.next.shape[1]), -1), axis=0)
    following[following < 0] = table.states
    block = np.append(table.accepting, False).astype(np.int64)
    while True:
        finer = np.unique(np.c_[block, block[following]], axis=0, return_inverse=True)[1].reshape(-1)
        if finer.max() == block.max():
            return len(set(block[:-1].tolist()) - {int(block[-1])})
        block = finer


def test_tables_read_what_their_graphs_read_and_are_smallest() -> None:
    random = Random(16)
    for _ in range(400):
        graphs = [random_graph(random, 5) for _ in range(2)]
        raw = [determinize(graph, 0, 1, 5) for graph in graphs]
        first, second = map(minimize, raw)
        assert first.states == max(moore(raw[0]), 1)
        both, neither = intersect(first, second), complement(first)
        for _ in range(12):
            word = random.choices(range(5), k=random.randint(0, 7))
            one, other = reads(graphs[0], word), reads(graphs[1], word)
            assert first.accepts(word) == raw[0].accepts(word) == one
            assert both.accepts(word) == (one and other) and neither.accepts(word) != one


def test_minimising_is_canonical() -> None:
    random = Random(3)
    for _ in range(100):
        table = minimize(determinize(random_graph(random, 4), 0, 1, 4))
        order = [0, *random.sample(range(1, table.states), table.states - 1)]
        shuffled = np.full(table.states + 1, -1)
        shuffled[order] = range(table.states)
        other = minimize(
            Table(starts=table.starts, next=shuffled[table.next[order]], accepting=table.accepting[order], size=4)
        )
        assert np.array_equal(other.next, table.next) and np.array_equal(other.accepting, table.accepting)


def test_sets_of_characters() -> None:
    assert union([(5, 9), (0, 3), (4, 4), (20, 30), (25, 26)]) == ((0, 9), (20, 30))
    assert union([(0xD000, 0xE000)]) == ((0xD000, 0xD7FF), (0xE000, 0xE000))
    assert intersection(((0, 9), (20, 30)), ((5, 25),)) == ((5, 9), (20, 25))
    assert without(ANY, ((0, 9), (0x10FFFF, 0x10FFFF))) == ((10, 0xD7FF), (0xE000, 0x10FFFE))
    assert without(((3, 4),), ()) == ((3, 4),) and without(((3, 4),), ((0, 9),)) == ()


@pytest.mark.parametrize("writing", [PLAIN, ESCAPED, USUAL, SHORT])
def test_characters_are_written_as_utf8_and_escapes(writing: str) -> None:
    """Every way to write each of some ranges, and no other: the edges of UTF-8 and of the surrogates."""
    random = Random(1)
    edges = [
        0,
        0x1F,
        0x20,
        0x22,
        0x2F,
        0x5C,
        0x7F,
        0x80,
        0x7FF,
        0x800,
        0xD7FF,
        0xE000,
        0xFFFF,
        0x10000,
        0x103FF,
        0x10400,
    ]
    edges += [0xFFFFF, 0x100000, 0x10FFFF]
    for _ in range(40):
        low, high = sorted(random.sample(edges, 2))
        table = written(union([(low, high)]), writing)
        for code in {*edges, *(random.randint(0, 0x10FFFF) for _ in range(20))} - set(range(0xD800, 0xE000)):
            for text, ways in ways_to_write(chr(code)).items():
                assert table.accepts(text) == (writing in ways and low <= code <= high), (hex(code), text)


def ways_to_write(character: str) -> dict[bytes, set[str]]:
    """How a character can be written, and in which ways of writing."""
    code, raw = ord(character), character.encode()
    found = {raw: {PLAIN, ESCAPED, USUAL, SHORT} if code >= 0x20 and character not in '"\\' else {PLAIN}}
    letters = dict(zip('"\\\b\f\n\r\t', '"\\bfnrt', strict=True))
    if character in letters:
        found[b"\\" + letters[character].encode()] = {ESCAPED, USUAL, SHORT}
    if character == "/":
        found[b"\\/"] = {ESCAPED}
    units = character.encode("utf-16-be")
    pairs = [f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)]
    for escape in ("".join(pairs), "".join(pair[:2] + pair[2:].upper() for pair in pairs)):
        found[escape.encode()] = {ESCAPED, USUAL} if code < 0x20 and character not in letters else {ESCAPED}
    return found


def test_control_symbols_are_recognised_by_name_in_text_only() -> None:
    graph = Graph()
    start, end = graph.state(), graph.state()
    graph.word(start, [256, ord("a"), 257], end)
    table = minimize(determinize(graph, start, end, 258))
    automaton = Automaton(transitions=table.spread(), accepting=table.accepting, controls=("<x>", "<|y|>"))
    assert automaton.accepts("<x>a<|y|>") and not automaton.accepts(b"<x>a<|y|>")
    assert list(automaton.symbols("é<|y|><x><")) == [0xC3, 0xA9, 257, 256, ord("<")]
    assert automaton.walk("a", automaton.walk("<x>")) == 2 and automaton.walk("b") == -1
