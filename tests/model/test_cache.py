"""The prefix cache: what it keeps, what it holds, and how forks share it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.model.cache import GROWTH, FullLayer, LayerCache, PrefixCache, SlidingLayer
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.proof.recordings import small_network
from tests.reference_models import MODELS, text_config

WINDOW, ROOM = 16, 24


@pytest.fixture(scope="module")
def network() -> Network:
    return MODELS["plain"].network()


def numbered(start: int, count: int) -> mx.array:
    """Keys [1, 1, T, 1] that are their positions."""
    return mx.arange(start, start + count, dtype=mx.float32).reshape(1, 1, -1, 1)


def numbers(keys: mx.array) -> list[int]:
    return [int(x) for x in np.array(keys).flatten()]


def ids(count: int, seed: int = 0, batch: int = 1) -> mx.array:
    return mx.random.randint(0, 256, (batch, count), key=mx.random.key(seed))


def read(network: Network, cache: PrefixCache, *pieces: mx.array) -> PrefixCache:
    for piece in pieces:
        network.encode(piece, cache)
        mx.eval(cache.state)
    return cache


def look(network: Network, cache: PrefixCache) -> mx.array:
    return network.logits(ids(24, seed=9, batch=cache.batch_size), cache)


# --- One layer


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [15, 25], [16, 24], [14, 1, 1, 24], [7] * 5 + [5]])
def test_a_sliding_layer_keeps_the_last_of_any_pieces(pieces: list[int]) -> None:
    layer, start = SlidingLayer(WINDOW, ROOM), 0
    for count in pieces:
        held = layer.length
        seen, _ = layer.append(numbered(start, count), numbered(start, count))
        assert numbers(seen) == list(range(start - held, start + count))  # the mask cuts, not the cache
        start += count
        assert layer.length == min(start, WINDOW - 1)
    assert layer.held is not None
    assert numbers(layer.held[0]) == list(range(40 - WINDOW + 1, 40))
    assert layer.state[0].shape[2] <= WINDOW - 1 + ROOM


def test_a_full_layer_keeps_everything() -> None:
    layer = FullLayer(ROOM)
    for start in range(0, 700, 100):
        seen, values = layer.append(numbered(start, 100), -numbered(start, 100))
        assert numbers(seen) == list(range(start + 100))
        assert mx.array_equal(values, -seen)


def test_a_canvas_is_seen_and_leaves_nothing() -> None:
    layers: list[LayerCache] = [FullLayer(ROOM), SlidingLayer(WINDOW, ROOM)]
    for layer in layers:
        layer.append(numbered(0, 20), numbered(0, 20))
        kept = list(range(20))[-layer.length :]
        for canvas in (100, 200):
            assert numbers(layer.look(numbered(canvas, ROOM), numbered(canvas, ROOM))[0])[: layer.length] == kept
        assert layer.length == len(kept)
        seen, _ = layer.append(numbered(20, 3), numbered(20, 3))
        assert numbers(seen) == [*kept, 20, 21, 22]


def test_a_canvas_fits_without_a_new_buffer() -> None:
    """Room behind the prefix, also when the prefix ends where a buffer would."""
    for length in (1, GROWTH - 1, GROWTH, GROWTH + 1):
        layer = FullLayer(ROOM)
        layer.append(numbered(0, length), numbered(0, length))
        capacity = layer.state[0].shape[2]
        layer.look(numbered(0, ROOM), numbered(0, ROOM))
        assert layer.state[0].shape[2] == capacity


def test_growth_is_in_steps_that_grow() -> None:
    """Appending one canvas after the other makes few buffers: copies stay in proportion to the prefix."""
    layer, capacities = FullLayer(ROOM), set()
    for start in range(0, 24 * 400, 24):
        layer.append(numbered(start, 24), numbered(start, 24))
        capacities.add(layer.state[0].shape[2])
    assert len(capacities) < 20
    assert max(capacities) < 1.3 * 24 * 400 + GROWTH + ROOM


# --- The whole prefix


def test_reserve_makes_every_buffer_once(network: Network) -> None:
    cache = network.make_cache()
    cache.reserve(1000)
    read(network, cache, ids(5))
    held = cache.nbytes
    read(network, cache, *[ids(100, seed) for seed in range(9)])
    assert cache.nbytes == held


def test_bytes_are_counted(network: Network) -> None:
    cache = network.make_cache()
    assert cache.nbytes == 0
    read(network, cache, ids(5))
    sliding = 3 * 2 * 2 * (WINDOW - 1 + ROOM) * 16 * 4  # layers, keys and values, heads, positions, head size, bytes
    full = 2 * 2 * 2 * (GROWTH + ROOM) * 32 * 4
    assert cache.nbytes == sliding + full == sum(a.nbytes for a in cache.state)
    read(network, cache, ids(600))
    assert cache.nbytes == sliding + 2 * 2 * 2 * (3 * GROWTH + ROOM) * 32 * 4  # 605 positions: three steps of growth


def test_positions_go_on_through_pieces_and_canvases(network: Network) -> None:
    cache = read(network, network.make_cache(), ids(5), ids(24))
    look(network, cache)
    assert cache.length == 29
    assert [layer.length for layer in cache.layers] == [15, 29, 15, 15, 29]


@pytest.mark.parametrize("length", [5, WINDOW - 1, WINDOW, 40])
def test_two_forks_go_their_ways(network: Network, length: int) -> None:
    """One writes canvases and looks, then the other, then both by turns: each as if it were alone."""
    prompt, others = ids(length), [[ids(24, seed=1), ids(24, seed=2)], [ids(30, seed=3), ids(1, seed=4)]]
    kept = read(network, network.make_cache(), prompt)
    before = look(network, kept)
    forks = [kept.fork(), kept.fork()]
    for step in range(2):
        for fork, pieces in zip(forks, others, strict=True):
            read(network, fork, pieces[step])
            mx.eval(look(network, fork))
    for fork, pieces in zip(forks, others, strict=True):
        straight = read(network, network.make_cache(), prompt, *pieces)
        assert fork.length == straight.length
        assert mx.array_equal(look(network, fork), look(network, straight))
    assert kept.length == length
    assert mx.array_equal(look(network, kept), before)


def test_a_full_layer_has_one_writer() -> None:
    """A fork writes behind a shared prefix in place; only a second one copies, and only while the first lives."""
    kept = FullLayer(ROOM)
    kept.append(numbered(0, 20), numbered(0, 20))
    shared = kept._buffer
    first, second = kept.fork(), kept.fork()
    first.append(numbered(100, 5), numbered(100, 5))
    assert first._buffer is shared
    second.look(numbered(200, 5), numbered(200, 5))
    assert second._buffer is not shared
    assert [numbers(layer.held[0])[20:] for layer in (kept, first, second) if layer.held] == [
        [],
        [*range(100, 105)],
        [],
    ]
    del first
    third = kept.fork()
    third.append(numbered(300, 5), numbered(300, 5))
    assert third._buffer is shared


def test_a_window_is_shifted_once_per_room() -> None:
    """Token by token, a sliding layer makes a new buffer once in as many tokens as it has room for."""
    layer, shifts = SlidingLayer(WINDOW, ROOM), []
    for position in range(WINDOW - 1 + 3 * ROOM):
        start = layer._start
        seen, _ = layer.append(numbered(position, 1), numbered(position, 1))
        mx.eval(layer.state)
        assert numbers(seen) == list(range(max(0, position - WINDOW + 1), position + 1))
        shifts += [position] if layer._start < start else []
    assert len(shifts) == 2 and shifts[1] - shifts[0] == ROOM


def test_a_window_of_one_keeps_nothing() -> None:
    layer = SlidingLayer(1, ROOM)
    seen, _ = layer.append(numbered(0, 40), numbered(0, 40))
    assert numbers(seen) == list(range(40)) and layer.length == 0
    assert numbers(layer.look(numbered(7, 3), numbered(7, 3))[0]) == [7, 8, 9]


def test_memory_of_a_chunked_prefill_does_not_grow_with_the_prompt() -> None:
    """What is needed beside the cache, at four times the prompt, is what it was."""
    net = small_network(
        config=MODELS["plain"].config | {"text_config": text_config(max_position_embeddings=1 << 16)},
        weights={"seed": 1},
    )

    def beside(length: int) -> int:
        cache = net.make_cache()
        cache.reserve(length)
        mx.clear_cache()
        for start in range(0, length, 64):
            piece = ids(64, seed=start)
            if start == length - 64:
                mx.reset_peak_memory()
            read(net, cache, piece)
        return mx.get_peak_memory() - cache.nbytes

    short, long = beside(512), beside(2048)
    scores = 4 * 64 * (2048 - 512) * 4  # one layer's attention scores, heads × T × keys, are what may grow
    assert long - short < 1.5 * scores


def test_padding_is_never_seen(network: Network) -> None:
    """A padded row equals the same row alone: rotation is relative."""
    rows = [ids(30, seed=1), ids(19, seed=2), ids(1, seed=3)]
    padded = mx.concatenate([mx.pad(row, [(0, 0), (30 - row.shape[1], 0)]) for row in rows], axis=0)
    cache = network.make_cache(3, [0, 11, 29])
    read(network, cache, padded[:, :13], padded[:, 13:])
    together = look(network, cache)
    canvas = ids(24, seed=9, batch=3)
    for number, row in enumerate(rows):
        alone = network.logits(canvas[number : number + 1], read(network, network.make_cache(), row))
        np.testing.assert_allclose(np.array(together[number : number + 1]), np.array(alone), atol=2e-3)


def test_another_canvas_length_has_its_room(network: Network) -> None:
    cache = read(network, network.make_cache(canvas_length=40), ids(20))
    held = cache.nbytes
    network.logits(ids(40), cache)
    assert cache.nbytes == held
