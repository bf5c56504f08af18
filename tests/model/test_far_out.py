"""The longest context: behind 261,888 tokens attention in pieces is as exact as MLX's over everything at once, in the
memory that was predicted. What is lost against float64 is MLX's: its CPU's softmax adds up a row's float32 weights one
after the other, so that behind 261,888 keys they do not quite sum to 1 (5e-4 at most; 6e-7 behind 300)."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.model import layers
from mlx_diffgemma.model.masks import Window
from mlx_diffgemma.model.memory import STEP, memory_needed
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.tuning import DEFAULT
from mlx_diffgemma.proof.products import truth_of_attention
from tests import small

LONGEST, CANVAS, CHUNK = 262_144, 256, 2_048
Seen = list[tuple[mx.array, mx.array, mx.array, object, mx.array]]


@pytest.fixture(scope="module")
def network() -> Network:
    """A sliding and a full layer of two small heads, for canvases of the released length."""
    text = small.CONFIG["text_config"] | {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 1_024,
        "max_position_embeddings": LONGEST,
        "vocab_size": 64,
    }
    config = small.CONFIG | {"canvas_length": CANVAS, "text_config": text}
    return small.small_network(config=config, weights={"seed": 5})


def behind(network: Network, prefix: int, watch: Callable[[Seen], None]) -> tuple[tuple[float, ...], int, int]:
    """A chunk that ends the prefix and a canvas behind it: the largest relative errors of an attention, the bytes that
    the prefix holds, and the most that were used beside it."""
    cache = network.make_cache(canvas_length=CANVAS)
    cache.reserve(prefix)
    for start in range(0, prefix - CANVAS, CHUNK):  # random keys and values, put there as chunks are
        count = min(CHUNK, prefix - CANVAS - start)
        for number, (layer, kind) in enumerate(zip(cache.layers, network.config.layers, strict=True)):
            shape = (1, kind.num_kv_heads, count, kind.head_dim)
            keys, values = (mx.random.normal(shape, key=mx.random.key(start + 2 * number + i)) for i in (0, 1))
            layer.append(keys * 0.5, values)
            mx.eval(layer.state)
        cache.advance(count)
    seen: Seen = []
    watch(seen)
    held = sum(array.nbytes for layer in cache.layers for array in layer.state)
    ids = mx.array(np.random.default_rng(1).integers(0, 64, (1, CANVAS)))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(network.encode(ids, cache), cache.state)
    mx.eval(network.denoise(ids, cache, None))
    assert cache.length == prefix
    beside = mx.get_peak_memory() - before
    return tuple(map(max, zip(*(error_of(*call) for call in seen), strict=True))), held, beside


def error_of(q: mx.array, k: mx.array, v: mx.array, mask: object, ours: mx.array) -> tuple[float, float]:
    """One call of `attend`, for queries from everywhere: the error against float64, and the difference from MLX's own
    attention. Both are relative to the size of what is added up: random values cancel, the more the longer the prefix.
    """
    rows = np.unique(np.linspace(0, q.shape[2] - 1, 8).astype(int))
    total = k.shape[2]
    last = np.arange(total - q.shape[2], total)[rows] if mask is not None else np.full(len(rows), total)
    visible = np.arange(total) <= last[:, None]
    if isinstance(mask, Window):
        visible &= last[:, None] - np.arange(total) < mask.window
    some, our_rows = q[:, :, mx.array(rows)], np.array(ours[:, :, mx.array(rows)])
    truth, added = (truth_of_attention(some, k, values, visible) for values in (v, mx.abs(v)))
    theirs = mx.fast.scaled_dot_product_attention(some, k, v, scale=1.0, mask=mx.array(visible))
    size = np.sqrt(np.mean(added**2))
    return tuple(float(np.sqrt(np.mean((our_rows - other) ** 2)) / size) for other in (truth, np.array(theirs)))


def test_256k(network: Network, monkeypatch: pytest.MonkeyPatch, record_summary: Callable[[str], None]) -> None:
    original = layers.attend
    calls: list[Seen] = []

    def attend(q: mx.array, k: mx.array, v: mx.array, mask: object, tuning: object) -> mx.array:
        ours = original(q, k, v, mask, tuning)  # type: ignore[arg-type]
        calls[-1].append((q, k, v, mask, ours))
        return ours

    monkeypatch.setattr(layers, "attend", attend)
    short, *_ = behind(network, 300, calls.append)
    far, held, beside = behind(network, LONGEST - CANVAS, calls.append)
    assert [len(seen) for seen in calls] == [4, 4]  # two layers, encoded and denoised
    assert calls[1][3][1].shape[2] == LONGEST
    assert short[0] < 2e-6 and max(short[1], far[1]) < 2e-6 and far[0] < 5e-4
    record_summary(f"attention behind 300 and 261,888 tokens: relative errors {short[0]:.1e} and {far[0]:.1e}")
    config = network.config
    predicted = memory_needed(config, 0, LONGEST - CANVAS, 4) - STEP
    assert held == pytest.approx(predicted, rel=0.01)
    assert beside < STEP
    assert DEFAULT.scores < CANVAS * 2 * LONGEST * 4  # one piece would be more
