"""The tiled walk over the vocabulary against the plain formulas in float64."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma.generation import vocabulary
from mlx_diffgemma.generation.vocabulary import LOWEST, Reading, Shaping, soft_rows, sparse_signal, walk
from mlx_diffgemma.model.table import Table, scaled, soft_embedding, softcap, unpacked_dtype
from mlx_diffgemma.model.tuning import Tuning

HIDDEN = 64
CAP = 30.0
QUANTIZED = [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
QUANTIZED += [("affine", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def table_of(size: int, dtype: mx.Dtype = mx.float32) -> nn.Embedding:
    table = nn.Embedding(size, HIDDEN)
    table.weight = mx.random.normal((size, HIDDEN), key=mx.random.key(size)).astype(dtype)
    return table


def hidden_of(batch: int, length: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """States whose logits spread over a few units: some positions are sure, some are not."""
    sharpness = mx.linspace(0.05, 2.0, batch * length).reshape(batch, length, 1)
    return (mx.random.normal((batch, length, HIDDEN), key=mx.random.key(1)) * sharpness).astype(dtype)


def weights_of(table: Table) -> np.ndarray:
    """The table's rows as it gives them, float64 [V, H]."""
    return np.array(table(mx.arange(table.weight.shape[0])).astype(mx.float32)).astype(np.float64)


class Dense:
    """Every quantity of a reading from the whole of [B, L, V]."""

    def __init__(self, hidden: mx.array, table: Table, temperature: float):
        weight = weights_of(table)
        scores = np.array(hidden.astype(mx.float32)).astype(np.float64) @ weight.T
        self.logits = CAP * np.tanh(scores / CAP) / temperature
        self.p = softmax(self.logits)
        self.entropy = -(self.p * np.log(np.maximum(self.p, 1e-300))).sum(-1)
        dtype = unpacked_dtype(table)
        rounded = np.array(mx.array(self.logits).astype(dtype).astype(mx.float32)).astype(np.float64)
        self.signal = softmax(rounded) @ weight * HIDDEN**0.5
        self.tolerance = 2e-4 if dtype == mx.float32 else 0.02 * np.abs(self.signal).max()
        self.cumulative = self.p.cumsum(-1)


def read(
    hidden: mx.array,
    table: Table,
    shaping: Shaping,
    draws: mx.array | None,
    *,
    with_signal: bool = True,
    tile: int = 8192,
) -> Reading:
    return walk(hidden, table, shaping, with_signal=with_signal, tuning=Tuning(tile=tile)).read(draws)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def tables() -> Iterator[tuple[str, Table]]:
    for size in (1, 2, 251, 256, 300, 1000, 1024):
        yield f"float32-{size}", table_of(size)
    for mode, bits, group in QUANTIZED:
        packed = nn.QuantizedEmbedding.from_embedding(table_of(768), group_size=group, bits=bits, mode=mode)
        yield f"{mode}-{bits}-by-{group}", packed


TABLES = dict(tables())


@pytest.mark.parametrize("tile", [256, 1 << 14])
@pytest.mark.parametrize("name", TABLES)
def test_the_walk_is_the_plain_formula(name: str, tile: int) -> None:
    table, hidden = TABLES[name], hidden_of(2, 8)
    plain = Dense(hidden, table, 0.7)
    draws = mx.random.uniform(shape=(2, 8), key=mx.random.key(2))
    reading = read(hidden, table, Shaping(cap=CAP, temperature=0.7), draws, tile=tile)
    np.testing.assert_array_equal(reading.best, plain.logits.argmax(-1))
    np.testing.assert_allclose(reading.entropy, plain.entropy, atol=2e-5)
    np.testing.assert_allclose(np.array(reading.tail), 1 - plain.p.max(-1), atol=1e-5)
    assert reading.signal is not None
    assert reading.signal.dtype == unpacked_dtype(table)
    np.testing.assert_allclose(reading.signal.astype(mx.float32), plain.signal, atol=plain.tolerance)
    expected = (plain.cumulative <= np.array(draws)[..., None]).sum(-1)
    near = np.abs(plain.cumulative - np.array(draws)[..., None]).min(-1) < 1e-5  # either neighbour is right
    np.testing.assert_array_equal(np.array(reading.guess)[~near], expected[~near])


def test_another_thread_reads_the_same() -> None:
    """The CPU streams that share the tiles belong to the thread that asks."""
    hidden, table, draws = hidden_of(1, 16), table_of(1024), mx.random.uniform(shape=(1, 16), key=mx.random.key(5))
    mx.eval(hidden, table.weight, draws)

    def guesses() -> list[int]:
        return read(hidden, table, Shaping(cap=CAP, temperature=0.5), draws, tile=256).guess.flatten().tolist()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(guesses).result(timeout=60) == guesses()


@pytest.mark.parametrize("name", ["float32-1000", "affine-4-by-64", "mxfp4-4-by-32", "nvfp4-4-by-16"])
def test_the_signal_is_that_of_the_logits(name: str) -> None:
    """One pass over the table gives what the softmax of all logits gives."""
    table, hidden = TABLES[name], hidden_of(1, 8)
    reading = read(hidden, table, Shaping(cap=CAP, temperature=0.6), None, tile=256)
    logits = softcap(table.as_linear(hidden), CAP) / 0.6
    assert reading.signal is not None
    ours, whole = (x.astype(mx.float32) for x in (reading.signal, soft_embedding(logits, table)))
    np.testing.assert_allclose(ours, np.array(whole), atol=Dense(hidden, table, 0.6).tolerance)


def test_a_bfloat16_signal_is_rounded_where_the_reference_rounds() -> None:
    """Logits, then probabilities, then the sum, then the scale: each in the table's dtype."""
    table, hidden = table_of(512, mx.bfloat16), hidden_of(1, 16, mx.bfloat16)
    reading = read(hidden, table, Shaping(cap=CAP, temperature=0.5), None)
    logits = softcap(table.as_linear(hidden), CAP) / 0.5
    signal = soft_embedding(logits, table)
    assert reading.signal is not None and reading.signal.dtype == signal.dtype == mx.bfloat16
    rounded = np.array(logits.astype(mx.bfloat16).astype(mx.float32)).astype(np.float64)
    exact = softmax(rounded) @ weights_of(table) * HIDDEN**0.5
    unrounded = softmax(np.array(logits).astype(np.float64)) @ weights_of(table) * HIDDEN**0.5
    for ours in (reading.signal, signal):
        error = np.abs(np.array(ours.astype(mx.float32)) - exact)
        assert error.mean() < 0.5 * np.abs(unrounded - exact).mean()


def test_guesses_follow_the_shaped_distribution() -> None:
    """Chi-square over 40,000 draws at one position."""
    count, table = 40_000, table_of(300)
    hidden = mx.random.normal((1, 1, HIDDEN), key=mx.random.key(3)) * 0.2
    p = Dense(hidden, table, 0.8).p[0, 0]
    draws = mx.random.uniform(shape=(1, count), key=mx.random.key(4))
    reading = read(mx.repeat(hidden, count, axis=1), table, Shaping(cap=CAP, temperature=0.8), draws, with_signal=False)
    seen = np.bincount(np.array(reading.guess)[0], minlength=300)
    common = p * count >= 5
    expected = np.append(p[common], p[~common].sum()) * count
    found = np.append(seen[common], seen[~common].sum())
    chi_square, freedom = ((found - expected) ** 2 / expected).sum(), common.sum()
    assert common.sum() > 100
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [251, 1000])
def test_the_ends_of_the_interval(size: int) -> None:
    """The least draw gives the first id, the greatest the last: no draw falls outside."""
    table = table_of(size)
    hidden = mx.zeros((1, 2, HIDDEN))  # uniform over the vocabulary
    reading = read(hidden, table, Shaping(cap=CAP, temperature=0.8), mx.array([[0.0, 1 - 2**-24]]))
    assert reading.guess.tolist() == [[0, size - 1]]
    np.testing.assert_allclose(reading.entropy, np.log(size), atol=1e-5)


def test_a_sure_position_is_drawn_whatever_the_draw() -> None:
    table = table_of(300)
    hidden = mx.broadcast_to(table.weight[7] * 10, (1, 3, HIDDEN))
    reading = read(hidden, table, Shaping(cap=300.0, temperature=0.4), mx.array([[0.0, 0.5, 1 - 2**-24]]))
    assert reading.guess.tolist() == reading.best.tolist() == [[7, 7, 7]]
    np.testing.assert_allclose(reading.entropy, 0, atol=1e-6)


def test_forbidden_ids_are_gone_from_everything() -> None:
    table = table_of(300)
    hidden = mx.broadcast_to(table.weight[7], (1, 2, HIDDEN))
    shape = Shaping(cap=CAP, temperature=0.8, forbidden=(7, 9), positions=mx.array([True, False]))
    reading = read(hidden, table, shape, mx.array([[0.5, 0.5]]))
    plain = Dense(hidden, table, 0.8)
    logits = plain.logits.copy()
    logits[0, 0, [7, 9]] = LOWEST
    p = softmax(logits)
    np.testing.assert_array_equal(reading.best, logits.argmax(-1))
    assert reading.best[0, 0].item() != 7 == reading.best[0, 1].item()
    np.testing.assert_allclose(reading.entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(-1), atol=2e-5)
    assert reading.signal is not None
    np.testing.assert_allclose(np.array(reading.signal), p @ weights_of(table) * HIDDEN**0.5, atol=2e-4)


def test_without_draws_the_guess_is_the_best_token() -> None:
    reading = read(hidden_of(1, 8), TABLES["float32-300"], Shaping(cap=CAP, temperature=0.8), None)
    assert mx.array_equal(reading.guess, reading.best)


@pytest.mark.parametrize("size", [1, 3, 640, 1024, 40_960])
def test_how_the_work_is_cut_changes_no_bit(size: int) -> None:
    """Folds and parts follow from the vocabulary: tile and streams change neither what is added, nor in which order."""
    hidden, table, draws = hidden_of(1, 8), table_of(size), mx.random.uniform(shape=(1, 8), key=mx.random.key(5))

    def bits(tuning: Tuning) -> list[list]:
        reading = walk(hidden, table, Shaping(cap=CAP, temperature=0.5), tuning=tuning).read(draws)
        assert reading.signal is not None
        return [a.tolist() for a in (reading.best, reading.guess, reading.entropy, reading.tail, reading.signal)]

    first, *others = [bits(Tuning(tile=tile, streams=n)) for tile in (1, 256, 16_384, 1 << 40) for n in (1, 2)]
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 251, 640, 1000, 40_960, 262_144])
def test_folds_cover_the_vocabulary_once(size: int) -> None:
    folds = [fold for part in range(vocabulary.PARTS) for fold in vocabulary._folds(size, part)]
    assert [i for fold in folds for i in (fold.ids.start, fold.ids.stop)][1:-1:2] == [f.ids.start for f in folds[1:]]
    assert folds[0].ids.start == 0 and folds[-1].ids.stop == size
    assert all(fold.ids.stop - fold.ids.start <= vocabulary.FOLD for fold in folds)


@pytest.mark.parametrize("name", ["float32-1000", "affine-4-by-64", "mxfp8-8-by-32"])
def test_the_sparse_signal_is_the_full_one(name: str) -> None:
    """A sure position's signal is one token's embedding, to the table's precision."""
    table = TABLES[name]
    sure = mx.broadcast_to(table(mx.array([[3]])) * 20, (1, 4, HIDDEN))
    hidden = mx.concatenate([hidden_of(1, 8) * 0.1, sure], axis=1)
    shape = Shaping(cap=300.0, temperature=0.4)
    sums = walk(hidden, table, shape)
    reading = sums.read(None)
    soft = np.array(soft_rows(reading, table))
    assert soft[0, :8].all() and not soft[0, 8:].any()
    rows = mx.array(np.flatnonzero(soft))
    signal = sparse_signal(sums, reading.best, rows)
    assert reading.signal is not None and signal.dtype == reading.signal.dtype
    whole = np.array(reading.signal.astype(mx.float32))
    np.testing.assert_allclose(signal.astype(mx.float32), whole, atol=Dense(hidden, table, 0.4).tolerance)


def test_embeddings_are_scaled_by_the_rounded_root() -> None:
    """transformers rounds sqrt(H) to the dtype of the embeddings before it multiplies."""
    embeddings = mx.array([[1.0] * 2816], mx.bfloat16)
    assert scaled(embeddings)[0, 0].item() == 53.0  # sqrt(2816) = 53.066
