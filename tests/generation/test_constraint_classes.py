"""The walk in class order against the plain formulas in float64, and against the walk of all ids."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_diffgemma.generation import vocabulary
from mlx_diffgemma.generation.constraint.classes import GROUP, WIDE, ClassOrder, ClassReading, Head, read
from mlx_diffgemma.generation.vocabulary import Shaping
from mlx_diffgemma.model.table import Table, unpacked_dtype

HIDDEN, POSITIONS, CAP, TEMPERATURE = 64, 12, 30.0, 0.6
SHAPING = Shaping(cap=CAP, temperature=TEMPERATURE)
LOOSE = {mx.float32: 2e-5, mx.bfloat16: 2e-2}  # of shaped logits


def table_of(size: int, dtype: mx.Dtype = mx.float32) -> nn.Embedding:
    table = nn.Embedding(size, HIDDEN)
    table.weight = mx.random.normal((size, HIDDEN), key=mx.random.key(size)).astype(dtype)
    return table


def weights_of(table: Table) -> np.ndarray:
    """The table's rows as it gives them, float64 [V, H]."""
    return np.array(table(mx.arange(table.weight.shape[0])).astype(mx.float32)).astype(np.float64)


def packed(mode: str, bits: int, group: int) -> nn.QuantizedEmbedding:
    return nn.QuantizedEmbedding.from_embedding(table_of(3000), group_size=group, bits=bits, mode=mode)


TABLES: dict[str, Table] = {
    "float32-300": table_of(300),
    "float32-5000": table_of(5000),
    "bfloat16-3000": table_of(3000, mx.bfloat16),
    "affine-4": packed("affine", 4, 64),
    "mxfp8": packed("mxfp8", 8, 32),
}


def hidden_of(count: int = POSITIONS, dtype: mx.Dtype = mx.float32) -> mx.array:
    """States of which some are sure of one id, some of none."""
    sharpness = mx.linspace(0.05, 3.0, count)[:, None]
    return (mx.random.normal((count, HIDDEN), key=mx.random.key(1)) * sharpness).astype(dtype)


def classes_of(size: int) -> np.ndarray:
    """A large class, some small ones, classes of one id, and ids without a class."""
    rng = np.random.default_rng(size)
    kinds = rng.choice(8, size, p=[0.6, 0.15, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01]) - 1
    kinds[rng.choice(size, 3, replace=False)] = [7, 8, 9]
    return kinds.astype(np.int32)


class Plain:
    """Everything from all logits."""

    def __init__(self, hidden: mx.array, table: Table, classes: np.ndarray):
        rows = weights_of(table)
        scores = np.array(hidden.astype(mx.float32)).astype(np.float64) @ rows.T
        self.logits, self.rows, self.classes = CAP * np.tanh(scores / CAP) / TEMPERATURE, rows, classes
        self.count = classes.max() + 1

    def ids(self, kind: int) -> np.ndarray:
        return np.flatnonzero(self.classes == kind)

    def mass(self) -> np.ndarray:
        inside = [self.logits[:, self.ids(kind)] for kind in range(self.count)]
        return np.stack([np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1) for x in inside], axis=1)

    def entropy(self) -> np.ndarray:
        made = []
        for kind, mass in enumerate(self.mass().T):
            p = np.exp(self.logits[:, self.ids(kind)] - mass[:, None])
            made.append(-(p * np.log(np.maximum(p, 1e-300))).sum(1))
        return np.stack(made, axis=1)

    def posterior(self, multiplier: np.ndarray) -> np.ndarray:
        q = np.exp(self.logits + multiplier[:, np.maximum(self.classes, 0)])
        return np.where(self.classes >= 0, q, 0)

    def signal(self, multiplier: np.ndarray) -> np.ndarray:
        return self.posterior(multiplier) @ self.rows * HIDDEN**0.5


def reading_of(name: str, *, fold: int = 8192, keep: bool = False) -> tuple[ClassReading, Plain]:
    table = TABLES[name]
    classes, hidden = classes_of(table.weight.shape[0]), hidden_of(dtype=unpacked_dtype(table))
    order = ClassOrder(classes, fold=fold)
    return read(hidden, Head(table=table, shaping=SHAPING), order, keep=keep), Plain(hidden, table, classes)


def shares_of(count: int) -> np.ndarray:
    """The log of random posteriors over `count` classes; some have none."""
    rng = np.random.default_rng(7)
    shares = rng.dirichlet(np.ones(count), POSITIONS) * (rng.random((POSITIONS, count)) < 0.7)
    shares[:, 0] += 1e-3
    with np.errstate(divide="ignore"):
        return np.log(shares / shares.sum(1, keepdims=True))


@pytest.mark.parametrize("size", [1, 300, 5000])
def test_the_order_holds_every_id_with_a_class_once(size: int) -> None:
    classes = classes_of(size) if size > 1 else np.zeros(1, np.int32)
    order = ClassOrder(classes, fold=2048)
    assert sorted(order.ids[order.ids >= 0]) == np.flatnonzero(classes >= 0).tolist()
    assert order.wide == (np.bincount(classes[classes >= 0]) // WIDE).sum()
    for piece, kind in enumerate(order.kinds):
        ids = order.ids[order.first(piece) :][: WIDE if piece < order.wide else GROUP]
        assert (classes[ids[ids >= 0]] == kind).all() and ids[0] >= 0
        assert (np.diff(ids[ids >= 0]) > 0).all()
    for fold in order.folds:
        np.testing.assert_array_equal(fold.kinds, order.kinds[fold.pieces])
    assert sum(fold.ids.size for fold in order.folds) == len(order.ids)
    by_class = order.kinds[order.by_class]
    assert all((by_class[a:b] == k).all() for k, (a, b) in enumerate(zip(order.starts, order.starts[1:], strict=False)))


@pytest.mark.parametrize("fold", [32, 1024, 8192])
@pytest.mark.parametrize("name", TABLES)
def test_the_sums_are_the_plain_formula(name: str, fold: int) -> None:
    reading, plain = reading_of(name, fold=fold)
    loose = LOOSE[unpacked_dtype(TABLES[name])]
    np.testing.assert_allclose(reading.sums.mass, plain.mass(), atol=40 * loose, rtol=0)
    np.testing.assert_allclose(reading.sums.entropy, plain.entropy(), atol=40 * loose, rtol=0)
    for kind in range(plain.count):
        logits = plain.logits[:, plain.ids(kind)]
        chosen = np.take_along_axis(plain.logits, reading.sums.top_id[:, kind, None], 1)[:, 0]
        assert (plain.classes[reading.sums.top_id[:, kind]] == kind).all()
        assert (chosen > logits.max(1) - 40 * loose).all()
        np.testing.assert_allclose(reading.sums.top[:, kind], logits.max(1), atol=40 * loose)


def test_float32_sums_are_exact_to_its_precision() -> None:
    reading, plain = reading_of("float32-5000")
    np.testing.assert_allclose(reading.sums.mass, plain.mass(), atol=2e-5)
    np.testing.assert_allclose(reading.sums.entropy, plain.entropy(), atol=2e-5)
    assert reading.sums.top_id[:, 0].tolist() == plain.ids(0)[plain.logits[:, plain.ids(0)].argmax(1)].tolist()


def test_folds_do_not_change_what_is_read() -> None:
    one, many = (reading_of("float32-5000", fold=fold)[0].sums for fold in (8192, 1024))
    np.testing.assert_allclose(one.mass, many.mass, atol=1e-5)
    assert (one.top_id == many.top_id).all()


def test_a_class_far_below_another_keeps_its_mass() -> None:
    """146 nats apart: beside the other's maximum it would be 0 in float32."""
    table, classes = nn.Embedding(4, 2), np.array([0, 0, 1, 1], np.int32)
    table.weight = mx.array([[1.0, 0], [1.0, 0], [-1.0, 0], [-1.0, 0.001]])
    head = Head(table=table, shaping=Shaping(cap=30.0, temperature=30 / 73))
    sums = read(mx.array([[1e6, 1e6]]), head, ClassOrder(classes), keep=False).sums
    np.testing.assert_allclose(sums.mass, [[73 + np.log(2), -73 + np.log(2)]], rtol=1e-5)
    np.testing.assert_allclose(sums.entropy, np.log(2), rtol=1e-5)


def test_of_equal_logits_the_lowest_id_is_best() -> None:
    table, classes = nn.Embedding(3000, 8), np.tile(np.arange(2, dtype=np.int32), 1500)
    table.weight = mx.zeros((3000, 8))
    sums = read(mx.zeros((2, 8)), Head(table=table, shaping=SHAPING), ClassOrder(classes), keep=False).sums
    assert sums.top_id.tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("name", TABLES)
def test_ids_are_drawn_where_the_class_distribution_passes_the_draw(name: str) -> None:
    reading, plain = reading_of(name, fold=1024)
    rng, tried = np.random.default_rng(0), 0
    for _ in range(6):
        kinds, draws = rng.integers(0, plain.count, POSITIONS), rng.random(POSITIONS)
        found = reading.pick(kinds, draws)
        for n, (kind, draw) in enumerate(zip(kinds, draws, strict=True)):
            ids = plain.ids(kind)
            cumulative = np.exp(plain.logits[n, ids] - plain.mass()[n, kind]).cumsum()
            near = np.abs(cumulative - draw).min() < 1e-4 if unpacked_dtype(TABLES[name]) == mx.float32 else True
            assert plain.classes[found[n]] == kind
            assert near or found[n] == ids[(cumulative <= draw).sum()]
            tried += not near
    assert tried > 50 or unpacked_dtype(TABLES[name]) != mx.float32


@pytest.mark.parametrize("name", TABLES)
def test_the_ends_of_the_interval(name: str) -> None:
    reading, plain = reading_of(name)
    kinds = np.zeros(POSITIONS, int)
    first, last = reading.pick(kinds, np.zeros(POSITIONS)), reading.pick(kinds, np.full(POSITIONS, 1 - 2**-24))
    assert (first <= last).all() and first[0] == plain.ids(0)[0]
    assert last[0] > plain.ids(0)[-len(plain.ids(0)) // 20]  # nearly uniform


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", TABLES)
def test_the_signal_is_that_of_the_posterior(name: str, keep: bool) -> None:
    reading, plain = reading_of(name, fold=1024, keep=keep)
    multiplier = shares_of(plain.count) - reading.sums.mass
    signal, whole = reading.signal(multiplier), plain.signal(shares_of(plain.count) - plain.mass())
    dtype = unpacked_dtype(TABLES[name])
    assert signal.dtype == dtype and signal.shape == (POSITIONS, HIDDEN)
    loose = 2e-4 if dtype == mx.float32 else 0.03 * np.abs(whole).max()
    np.testing.assert_allclose(np.array(signal.astype(mx.float32)), whole, atol=loose)
    rows = np.array([1, 4, 11])
    some = np.array(reading.signal(multiplier, rows).astype(mx.float32))
    np.testing.assert_allclose(some, whole[rows], atol=loose)


@pytest.mark.parametrize("share", [1e-2, 1e-8])
def test_an_unlikely_class_is_in_the_signal(share: float) -> None:
    """Folds of its own ids count, however little they weigh; only what float32 cannot hold is left out."""
    reading, plain = reading_of("float32-5000", fold=GROUP)
    shares = np.full((POSITIONS, plain.count), (1 - share) / (plain.count - 1))
    shares[:, 0] = share
    signal = np.array(reading.signal(np.log(shares) - reading.sums.mass))
    whole = plain.signal(np.log(shares) - plain.mass())
    without = plain.signal(np.log(np.where(np.arange(plain.count) == 0, 1e-300, shares)) - plain.mass())
    error, left_out = np.abs(signal - whole).max(), np.abs(without - whole).max()
    assert error < 2e-4 and (error < left_out / 10 or left_out < 1e-6)


def test_kept_weights_or_a_second_walk() -> None:
    kept, again = (reading_of("float32-5000", keep=keep) for keep in (True, False))
    multiplier = shares_of(kept[1].count) - kept[1].mass()
    np.testing.assert_allclose(kept[0].signal(multiplier), np.array(again[0].signal(multiplier)), atol=1e-5)


def test_one_class_is_the_walk_of_all_ids() -> None:
    """Everything may follow everything: best, guess, entropy and signal are the unconstrained ones."""
    table, hidden = TABLES["float32-5000"], hidden_of(64)
    draws = mx.random.uniform(shape=(1, 64), key=mx.random.key(5))
    free = vocabulary.walk(hidden[None], table, SHAPING).read(draws)
    order = ClassOrder(np.zeros(5000, np.int32))
    reading = read(hidden, Head(table=table, shaping=SHAPING), order, keep=True)
    assert reading.sums.top_id[:, 0].tolist() == free.best[0].tolist()
    np.testing.assert_allclose(reading.sums.entropy[:, 0], free.entropy[0], atol=2e-5)
    guesses = reading.pick(np.zeros(64, int), np.array(draws[0], np.float64))
    assert (guesses == np.array(free.guess[0])).sum() >= 63
    np.testing.assert_allclose(reading.signal(-reading.sums.mass), np.array(free.signal[0]), atol=2e-4)


def test_an_enumeration_reads_its_own_rows() -> None:
    classes = np.full(5000, -1, np.int32)
    classes[[7, 4000, 4999]] = [0, 1, 1]
    order = ClassOrder(classes)
    assert len(order.ids) == 2 * GROUP and len(order.folds) == 1
