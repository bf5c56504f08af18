"""Attention taken in pieces equals MLX's own over everything, for every mask the network makes."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.model import layers, masks
from mlx_diffgemma.model.tuning import DEFAULT, Tuning

LENGTH, PREFIX, DIM = 12, 29, 8


def arrays(heads: int, kv_heads: int, batch: int = 2) -> tuple[mx.array, mx.array, mx.array]:
    shapes = (batch, heads, LENGTH, DIM), *[(batch, kv_heads, PREFIX + LENGTH, DIM)] * 2
    q, k, v = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    return q * 3, k, v


# Scores reach 40 and a product of fewer rows may be another kernel's: their last digit is 4e-6 of a probability.
ROUNDING = 2e-5


@pytest.mark.parametrize("queries", [1, 5, 8, 12])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "padded", "padded canvas"])
def test_pieces_change_nothing(queries: int, heads: tuple[int, int], mask: str) -> None:
    padding = mx.array([5, 0])
    made = {
        "none": None,
        "causal": masks.causal(LENGTH, visible=PREFIX, position=PREFIX, window=None, padding=None),
        "window": masks.causal(LENGTH, visible=PREFIX, position=PREFIX + 3, window=9, padding=None),
        "padded": masks.causal(LENGTH, visible=PREFIX, position=PREFIX, window=None, padding=padding),
        "padded canvas": masks.bidirectional(LENGTH, visible=PREFIX, position=PREFIX, padding=padding),
    }[mask]
    q, k, v = arrays(*heads)
    whole = made.array() if isinstance(made, masks.Window) else made
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=whole)
    few = Tuning(scores=4 * queries * heads[0] * (PREFIX + LENGTH))
    assert mx.abs(layers.attend(q, k, v, made, few) - expected).max().item() < ROUNDING


@pytest.mark.parametrize(("visible", "window"), [(29, 9), (29, 30), (0, 5), (3, 12), (8, 9)])
@pytest.mark.parametrize("step", [1, 4, 12, 50])
def test_a_window_shows_the_last_keys_up_to_each_query(visible: int, window: int, step: int) -> None:
    expected = [
        [key <= query and query - key < window for key in range(visible + LENGTH)]
        for query in range(visible, visible + LENGTH)
    ]
    made = masks.Window(length=LENGTH, visible=visible, window=window)
    assert made.array().tolist() == expected
    seen = mx.zeros((LENGTH, visible + LENGTH), mx.bool_)
    for rows, columns, mask in made.pieces(step):
        seen[rows, columns] = mask
    assert seen.tolist() == expected


def test_few_scores_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
        shapes.append((q.shape[2], k.shape[2]))
        return q

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    q, k, v = arrays(4, 2)
    layers.attend(q, k, v, None, DEFAULT)
    assert shapes == [(2 * LENGTH, PREFIX + LENGTH)]  # two heads' queries share keys
    shapes.clear()
    layers.attend(q, k, v, "causal", Tuning(scores=4 * 5 * 4 * (PREFIX + LENGTH)))
    assert shapes == [(2 * 4, PREFIX + 4), (2 * 4, PREFIX + 8), (2 * 4, PREFIX + 12)]


@pytest.mark.parametrize("most", [1, 4, 5, 31, 32, 33, 100, 256])
@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("length", [1, 7, 32, 250, 256])
def test_runs_are_few_and_nearly_equal(length: int, most: int, rows: int) -> None:
    runs = list(layers._equal_runs(length, most, rows))
    sizes = [stop - start for start, stop in runs]
    fills = rows <= most and -(-length // (most // rows * rows)) == len(runs)
    unit = rows if fills else 1
    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])] and runs[-1][1] == length
    assert max(sizes) <= most and len(runs) == -(-length // most)
    assert all(size % unit == 0 for size in sizes[:-1])
    assert max(sizes) - min(sizes[:-1] or sizes) <= unit and max(sizes) - sizes[-1] < 2 * unit


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rows"), [(4, 2, 8, 2), (8, 1, 8, 8), (2, 2, 8, 1)])
@pytest.mark.parametrize("mask", ["none", "padded canvas", "causal", "whole"])
def test_queries_that_share_keys_are_one_product(
    heads: int, kv_heads: int, dim: int, rows: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are read once for all heads of a group, and the bits are those of a product a head."""
    shapes: list[tuple[int, ...]] = []
    original = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        shapes.append(q.shape)
        return original(q, k, v, **options)

    q, k, v = arrays(heads, kv_heads)
    made = {
        "none": None,
        "padded canvas": masks.bidirectional(LENGTH, visible=PREFIX, position=PREFIX, padding=mx.array([5, 0])),
        "causal": "causal",
        "whole": mx.ones((2, 1, LENGTH, PREFIX + LENGTH), mx.bool_),
    }[mask]
    expected = original(q, k, v, scale=1.0, mask=made)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    np.testing.assert_array_equal(layers.attend(q, k, v, made, DEFAULT), expected)
    alike = mask in ("none", "padded canvas")
    assert shapes == [(2, kv_heads, LENGTH * rows, dim) if alike else q.shape]
