"""The sparse signal: its bound, and that a generation does not notice it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma.generation import engine, vocabulary
from mlx_diffgemma.generation.events import Denoised
from mlx_diffgemma.generation.noise import SeededNoise
from mlx_diffgemma.generation.settings import GenerationConfig
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.table import scaled, softcap
from tests import small


def table(dtype: mx.Dtype, size: int = 512, hidden: int = 64) -> nn.Embedding:
    embedding = nn.Embedding(size, hidden)
    embedding.weight = mx.random.normal((size, hidden), key=mx.random.key(0)).astype(dtype)
    return embedding


def hidden_of_all_sorts(embedding: nn.Embedding) -> mx.array:
    """32 positions: from sure of one token to undecided."""
    sharpness = mx.linspace(0, 2, 32)[:, None].astype(embedding.weight.dtype)
    return (embedding.weight[:32] * sharpness)[None]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_sparse_signal_is_within_its_bound(dtype: mx.Dtype) -> None:
    embedding = table(dtype)
    hidden = hidden_of_all_sorts(embedding)
    shape = vocabulary.Shaping(cap=30.0, temperature=0.4)
    sums = vocabulary.walk(hidden, embedding, shape)
    dense = sums.read(None)
    assert dense.signal is not None
    soft = np.array(vocabulary.soft_rows(dense, embedding)).flatten()
    assert 0 < soft.sum() < soft.size
    rows = mx.array(np.flatnonzero(soft))
    sparse = vocabulary.sparse_signal(sums, dense.best, rows)
    largest = mx.abs(scaled(embedding.weight)).max().item()
    difference = np.array(mx.abs(sparse - dense.signal).astype(mx.float32).max(axis=-1))[0]
    unit = 2 * vocabulary.HALF_UNIT[dtype]
    rounding = max(unit, 30 / 0.4 * 2.0**-24)  # of a shaped logit in float32: a BLAS sums other shapes in other orders
    assert (difference[soft] <= rounding * largest).all()  # the same product, other rows beside it
    bound = np.array(dense.tail)[0] * 2 * largest + unit * largest
    assert (difference[~soft] <= bound[~soft]).all()


def test_the_tail_is_what_the_best_token_leaves() -> None:
    embedding = table(mx.float32)
    hidden = hidden_of_all_sorts(embedding)
    shape = vocabulary.Shaping(cap=30.0, temperature=0.7)
    reading = vocabulary.walk(hidden, embedding, shape, with_signal=False).read(None)
    probabilities = mx.softmax(softcap(embedding.as_linear(hidden), 30.0) / 0.7, axis=-1)
    assert mx.allclose(reading.tail, 1 - probabilities.max(axis=-1), atol=1e-5)
    assert reading.signal is None


def test_a_generation_is_the_same_with_and_without() -> None:
    network = small.network()

    def run(**options: Any) -> list[Denoised]:
        settings = GenerationConfig(max_tokens=48, max_denoising_steps=12, stop_ids=(), **options)
        noise = SeededNoise([1, 2], length=small.CANVAS, vocabulary=small.VOCABULARY)
        events = engine.generate(network, [[2, 40], [2, 41, 42]], settings, noise)
        return [e for e in events if isinstance(e, Denoised)]

    sparse, dense = run(), run(sparse_signal=False)
    assert [e.accepted_count for e in sparse] == [e.accepted_count for e in dense]
    assert all(mx.array_equal(a.best, b.best) for a, b in zip(sparse, dense, strict=True))


def test_the_full_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once most positions are sure, only the others are multiplied."""
    shapes: list[int] = []
    mix = vocabulary.mix
    monkeypatch.setattr(vocabulary, "mix", lambda p, t, ids: shapes.append(p.shape[-2]) or mix(p, t, ids))
    monkeypatch.setattr(vocabulary, "HALF_UNIT", {mx.float32: 1e-3})
    network: Network = small.network()
    settings = GenerationConfig(max_tokens=16, max_denoising_steps=12, stop_ids=())
    list(engine.generate(network, [[2, 40]], settings, SeededNoise([5], length=16, vocabulary=small.VOCABULARY)))
    assert max(shapes) == small.CANVAS and min(shapes) <= small.CANVAS // 2, shapes
