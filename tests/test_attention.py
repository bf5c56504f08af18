"""Blockwise attention equals MLX's own, for every mask the network makes."""

import mlx.core as mx
import pytest

from mlx_diffgemma import layers, masks


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mask", ["none", "causal", "window", "padded", "padded canvas"])
def test_blocks_change_nothing(block: int, heads: tuple[int, int], mask: str) -> None:
    length, prefix, dim = 12, 29, 8
    padding = mx.array([5, 0])
    made = {
        "none": None,
        "causal": masks.causal(length, visible=prefix, position=prefix, window=None, padding=None),
        "window": masks.causal(length, visible=prefix, position=prefix + 3, window=9, padding=None),
        "padded": masks.causal(length, visible=prefix, position=prefix, window=None, padding=padding),
        "padded canvas": masks.bidirectional(length, visible=prefix, position=prefix, padding=padding),
    }[mask]
    total = prefix + length
    q = mx.random.normal((2, heads[0], length, dim), key=mx.random.key(0)) * 3
    k = mx.random.normal((2, heads[1], total, dim), key=mx.random.key(1))
    v = mx.random.normal((2, heads[1], total, dim), key=mx.random.key(2))
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=made)
    got = layers.attend_blockwise(q, k, v, made, block)
    assert mx.abs(got - expected).max().item() < 2e-5


def test_blocks_are_used_where_scores_would_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(layers, "attend_blockwise", lambda q, k, v, m, b: used.append(b) or q)
    q = mx.zeros((1, 16, 256, 8))
    for keys in (8192, 8193):
        k = mx.zeros((1, 2, keys, 8))
        layers.attend(q, k, k, None)
    assert used == [8192]
