"""The vocabulary pass: hidden states in; best, guess, entropy and signal out.

The embedding table is walked once, in tiles: of [B, L, V] nothing larger than one tile ever exists. Running sums
are kept about a running maximum, as in flash attention: the hidden states are the queries, the table is both
the keys (the head's logits) and the values (the soft embedding).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

TILE = 8_192  # ids per tile
BLOCK = 256  # ids per entry of the first stage of sampling
LOWEST = -1e30  # stands for −∞ where ∞ − ∞ would be NaN
HALF_UNIT = {mx.float32: 2**-25, mx.bfloat16: 2**-9, mx.float16: 2**-12}  # relative, just below 1

Table = nn.Embedding | nn.QuantizedEmbedding


def scaled(embeddings: mx.array) -> mx.array:
    """Times sqrt(H), rounded to the embeddings' dtype first (transformers DiffusionGemmaTextScaledWordEmbedding)."""
    return embeddings * mx.array(embeddings.shape[-1] ** 0.5, embeddings.dtype)


def softcap(logits: mx.array, cap: float) -> mx.array:
    """cap · tanh(logits / cap), in float32."""
    return cap * mx.tanh(logits.astype(mx.float32) / cap)


def soft_embedding(logits: mx.array, table: Table) -> mx.array:
    """The signal of the next step, [B, L, H], from shaped logits [B, L, V].

    As the reference does, the logits are rounded to the table's dtype, and so are the probabilities.
    """
    dtype = table_dtype(table)
    probabilities = mx.softmax(logits.astype(dtype).astype(mx.float32), axis=-1, precise=True)
    return scaled(_mix(probabilities.astype(dtype), table, slice(None)))


def table_dtype(table: Table) -> mx.Dtype:
    """The dtype of the embeddings that the table gives; MLX unpacks the modes with byte scales to bfloat16."""
    if not isinstance(table, nn.QuantizedEmbedding):
        return table.weight.dtype
    return table.scales.dtype if table.mode == "affine" else mx.bfloat16


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one step says about the canvas, under the temperature-shaped distribution of each position."""

    best: mx.array  # [B, L] int32, the argmax
    guess: mx.array  # [B, L] int32, one draw
    entropy: mx.array  # [B, L] float32, nats
    tail: mx.array  # [B, L] float32, the probability of everything but the best
    signal: mx.array | None  # [B, L, H], unlike the logits small enough to keep; None if it was not asked for


@dataclass(frozen=True, kw_only=True)
class Shape:
    """From the head's scores to shaped logits: softcap, temperature, and ids forbidden at some positions."""

    cap: float
    temperature: float | mx.array
    forbidden: tuple[int, ...] = ()
    positions: mx.array | None = None  # bool [N]: where `forbidden` applies

    def __call__(self, scores: mx.array, ids: mx.array) -> mx.array:
        """Scores [N, n] of the `ids` ([n], or [N, n]) → float32 shaped logits [N, n]."""
        logits = softcap(scores, self.cap) / self.temperature
        if not self.forbidden or self.positions is None:
            return logits
        banned = (ids[..., None] == mx.array(self.forbidden)).any(axis=-1) & self.positions[:, None]
        return mx.where(banned, LOWEST, logits)


def read(
    hidden: mx.array,
    table: Table,
    shape: Shape,
    draws: mx.array | None,
    *,
    with_signal: bool = True,
    tile: int = TILE,
) -> Reading:
    """Hidden states [B, L, H] and one uniform draw in [0, 1) per position → Reading.

    The guess inverts the cumulative distribution, in vocabulary order, at the draw: same law as a categorical
    draw, one random number instead of V. Without `draws` the guess is the best token.
    """
    x = hidden.flatten(0, 1)  # [N, H]
    walk = _walk(x, table, shape, tile, with_signal)
    guess = walk.best if draws is None else _invert(walk, x, table, shape, draws.flatten())
    grid = hidden.shape[:2]
    return Reading(
        best=walk.best.reshape(grid),
        guess=guess.reshape(grid),
        entropy=walk.entropy().reshape(grid),
        tail=((walk.mass - 1) / walk.mass).reshape(grid),
        signal=walk.signal().reshape(*grid, -1) if with_signal else None,
    )


def soft_rows(reading: Reading, table: Table) -> mx.array:
    """Positions [B, L] whose distribution is more than one token to the precision of the table's dtype.

    Where the tail is at most half a unit in the last place of 1, the best token's embedding is the signal to
    within that tail times the table's largest embedding: what rounding does to it anyway.
    """
    return reading.tail > HALF_UNIT[table_dtype(table)]


def sparse_signal(
    hidden: mx.array, table: Table, shape: Shape, best: mx.array, rows: mx.array, *, tile: int = TILE
) -> mx.array:
    """The signal [B, L, H] with the full product for the flat positions `rows` alone; the others are one token."""
    signal = scaled(table(best)).flatten(0, 1)
    if rows.size:
        soft = replace(shape, positions=None if shape.positions is None else shape.positions[rows])
        signal[rows] = _walk(hidden.flatten(0, 1)[rows], table, soft, tile, True).signal()
    return signal.reshape(hidden.shape)


def _walk(x: mx.array, table: Table, shape: Shape, tile: int, with_signal: bool) -> "_Walk":
    """Add up all tiles for x [N, H]."""
    walk = _Walk(x, table)
    for ids in _tiles(table.weight.shape[0], tile):
        # One tile after the other: MLX would else compute every tile's logits first, and hold them all.
        after = mx.depends(x, walk.state)
        logits = shape(_scores(after, table, ids), mx.arange(ids.start, ids.stop))
        before = walk.maximum
        weight = walk.add(logits, ids.start)
        if with_signal:
            walk.add_soft(logits, weight, before, lambda p, ids=ids: _mix(p, table, ids))
    return walk


def _tiles(vocabulary: int, tile: int) -> Iterator[slice]:
    block = _block(vocabulary)
    step = max(block, tile // block * block)
    return (slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step))


def _block(vocabulary: int) -> int:
    """The largest divisor of the vocabulary that is at most BLOCK."""
    return next(b for b in range(min(BLOCK, vocabulary), 0, -1) if vocabulary % b == 0)


class _Walk:
    """Running sums over the tiles, for N positions, about the maximum seen so far.

    With w = exp(logit − maximum): `mass` = Σ w, `slope` = Σ w · (logit − maximum), so that the entropy is
    log mass − slope / mass. `soft_mass` and `soft` belong to the signal, whose logits are rounded to the
    table's dtype.
    """

    def __init__(self, x: mx.array, table: Table):
        positions, hidden_size = x.shape
        self.dtype = table_dtype(table)
        self.block = _block(table.weight.shape[0])
        self.maximum = mx.full((positions,), LOWEST)
        self.best = mx.zeros((positions,), mx.int32)
        self.mass = mx.zeros((positions,))
        self.slope = mx.zeros((positions,))
        self.soft_mass = mx.zeros((positions,))
        self.soft = mx.zeros((positions, hidden_size))
        self.blocks: list[tuple[mx.array, mx.array]] = []  # per tile: mass per block [N, n], and its maximum [N]

    def add(self, logits: mx.array, start: int) -> mx.array:
        """One tile of shaped logits [N, n], whose first id is `start`; returns its weights."""
        top = logits.max(axis=-1)
        maximum = mx.maximum(self.maximum, top)
        self.best = mx.where(top > self.maximum, start + logits.argmax(axis=-1).astype(mx.int32), self.best)
        shift = self.maximum - maximum
        shrink = mx.exp(shift)
        above = logits - maximum[:, None]
        weight = mx.exp(above)
        blocks = weight.reshape(weight.shape[0], -1, self.block).sum(axis=-1)
        self.slope = shrink * (self.slope + self.mass * shift) + (weight * above).sum(axis=-1)
        self.mass = shrink * self.mass + blocks.sum(axis=-1)
        self.blocks.append((blocks, maximum))
        self.maximum = maximum
        return weight

    def add_soft(
        self, logits: mx.array, weight: mx.array, before: mx.array, mix: Callable[[mx.array], mx.array]
    ) -> None:
        """The tile's share of the signal. `before` is the maximum without it; `mix` multiplies by its rows."""
        shrink = mx.exp(before - self.maximum)
        if self.dtype != mx.float32:
            rounded = self._round(self.maximum)
            shrink = mx.exp(self._round(before) - rounded)
            weight = mx.exp(self._round(logits) - rounded[:, None])
        self.soft_mass = shrink * self.soft_mass + weight.sum(axis=-1)
        self.soft = shrink[:, None] * self.soft + mix(weight.astype(self.dtype)).astype(mx.float32)

    @property
    def state(self) -> list[mx.array]:
        """The running sums."""
        return [self.maximum, self.best, self.mass, self.slope, self.soft_mass, self.soft]

    def _round(self, x: mx.array) -> mx.array:
        return x.astype(self.dtype).astype(mx.float32)

    def entropy(self) -> mx.array:
        return mx.log(self.mass) - self.slope / self.mass

    def signal(self) -> mx.array:
        return scaled((self.soft / self.soft_mass[:, None]).astype(self.dtype))

    def block_masses(self) -> mx.array:
        """Mass of every block of the vocabulary, [N, V / block], all about the last maximum."""
        return mx.concatenate([w * mx.exp(m - self.maximum)[:, None] for w, m in self.blocks], axis=-1)


def _invert(walk: _Walk, x: mx.array, table: Table, shape: Shape, draws: mx.array) -> mx.array:
    """The id at which the cumulative distribution passes the draw: first its block, then the id inside it."""
    size = walk.block
    block, inside = _pass(walk.block_masses(), draws)
    ids = block[:, None] * size + mx.arange(size)  # [N, size]
    logits = shape(_block_scores(x, table, block, size), ids)
    offset, _ = _pass(mx.exp(logits - logits.max(axis=-1, keepdims=True)), inside)
    return (block * size + offset).astype(mx.int32)


def _pass(masses: mx.array, draws: mx.array) -> tuple[mx.array, mx.array]:
    """Where the cumulative sum of `masses` [N, n] passes the fraction `draws` [N] of its total, and at which
    fraction of that entry. An entry without mass is never chosen."""
    cumulative = mx.cumsum(masses, axis=-1)
    target = draws * cumulative[:, -1]
    index = mx.minimum((cumulative <= target[:, None]).sum(axis=-1), _last(masses))
    chosen = mx.take_along_axis(masses, index[:, None], axis=-1)[:, 0]
    below = mx.take_along_axis(cumulative, index[:, None], axis=-1)[:, 0] - chosen
    return index.astype(mx.int32), mx.clip((target - below) / chosen, 0.0, 1.0)


def _last(masses: mx.array) -> mx.array:
    """The last entry with mass, per row."""
    count = mx.arange(masses.shape[1])
    return mx.where(masses > 0, count, 0).max(axis=-1)


def _scores(x: mx.array, table: Table, ids: slice) -> mx.array:
    """x [N, H] times the rows `ids` of the table → [N, n]."""
    if isinstance(table, nn.QuantizedEmbedding):
        return mx.quantized_matmul(x, *_packed(table, ids), transpose=True, **_packing(table))
    return x @ table.weight[ids].T


def _mix(p: mx.array, table: Table, ids: slice) -> mx.array:
    """Weights p [..., n] over the rows `ids` of the table → their weighted sum [..., H]."""
    if isinstance(table, nn.QuantizedEmbedding):
        return mx.quantized_matmul(p, *_packed(table, ids), transpose=False, **_packing(table))
    return p @ table.weight[ids]


def _block_scores(x: mx.array, table: Table, block: mx.array, size: int) -> mx.array:
    """x [N, H] times the rows of one block of `size` ids per position → [N, size]."""
    rows = x[:, None]  # [N, 1, H]
    if isinstance(table, nn.QuantizedEmbedding):
        parts: list[Any] = [a if a is None else a.reshape(-1, size, a.shape[-1]) for a in _packed(table, slice(None))]
        return mx.gather_qmm(rows, *parts, rhs_indices=block, transpose=True, **_packing(table))[:, 0]
    weight = table.weight.reshape(-1, size, x.shape[-1])
    return mx.gather_mm(rows, weight.swapaxes(-1, -2), rhs_indices=block)[:, 0]


def _packed(table: nn.QuantizedEmbedding, ids: slice) -> tuple[mx.array, mx.array, mx.array | None]:
    biases = table.get("biases")
    return table.weight[ids], table.scales[ids], None if biases is None else biases[ids]


def _packing(table: nn.QuantizedEmbedding) -> dict:
    return {"group_size": table.group_size, "bits": table.bits, "mode": table.mode}
