"""The vocabulary pass: hidden states in; best, guess, entropy and signal out.

The embedding table is walked once, in tiles: of [B, L, V] nothing larger than one tile per stream ever exists. It is
summed by folds, each about its own maximum and joined to the sums before it, as in flash attention: the hidden states
are the queries, the table is both the keys (the head's logits) and the values (the soft embedding).

Folds, and the four parts whose sums are joined last, follow from the size of the vocabulary alone. How many folds are
scored at once (the tile) and who walks which part (streams, machines) does not change what is added to what.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import zip_longest
from typing import NamedTuple

import mlx.core as mx

from ..model.table import Table, block_scores, mix, scaled, scores, shaped, unpacked_dtype
from ..model.tuning import DEFAULT, Tuning

PARTS = 4  # of the vocabulary: what streams and machines share
FOLD = 8_192  # ids that are summed at once
BLOCK = 256  # ids per entry of the first stage of sampling
STREAMS = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(2))  # see lanes
LOWEST = -1e30  # stands for −∞ where ∞ − ∞ would be NaN
HALF_UNIT = {mx.float32: 2**-25, mx.bfloat16: 2**-9, mx.float16: 2**-12}  # relative, just below 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one step says about the canvas, under the temperature-shaped distribution of each position."""

    best: mx.array  # [B, L] int32, the argmax
    guess: mx.array  # [B, L] int32, one draw
    entropy: mx.array  # [B, L] float32, nats
    tail: mx.array  # [B, L] float32, the probability of everything but the best
    signal: mx.array | None  # [B, L, H], unlike the logits small enough to keep; None if it was not asked for


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """From the head's scores to shaped logits: softcap, temperature, and ids forbidden at some positions."""

    cap: float
    temperature: float | mx.array
    forbidden: tuple[int, ...] = ()
    positions: mx.array | None = None  # bool [N]: where `forbidden` applies

    def __call__(self, scores: mx.array, ids: mx.array) -> mx.array:
        """Scores [N, n] of the `ids` ([n], or [N, n]) → float32 shaped logits [N, n]."""
        logits = shaped(scores, mx.array(self.cap, mx.float32), mx.array(self.temperature))
        if not self.forbidden or self.positions is None:
            return logits
        banned = (ids[..., None] == mx.array(self.forbidden)).any(axis=-1) & self.positions[:, None]
        return mx.where(banned, LOWEST, logits)

    def at(self, rows: mx.array) -> "Shaping":
        """The same for some of the positions."""
        return self if self.positions is None else replace(self, positions=self.positions[rows])


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What one walk over the table found out, before anything is drawn from it."""

    hidden: mx.array  # [B, L, H]
    table: Table
    shaping: Shaping
    whole: "_Run"  # over all ids, for B · L positions

    def read(self, draws: mx.array | None) -> Reading:
        """One uniform draw in [0, 1) per position, float32 [B, L] → Reading.

        The guess inverts the cumulative distribution, in vocabulary order, at the draw: same law as a categorical
        draw, one random number instead of V. Without `draws` the guess is the best token.
        """
        grid, whole = self.hidden.shape[:2], self.whole
        guess = whole.best if draws is None else self._invert(draws.flatten())
        return Reading(
            best=whole.best.reshape(grid),
            guess=guess.reshape(grid),
            entropy=whole.entropy().reshape(grid),
            tail=((whole.mass - 1) / whole.mass).reshape(grid),
            signal=None if whole.soft is None else whole.signal().reshape(*grid, -1),
        )

    def log_mass(self) -> mx.array:
        """log Σ exp of the shaped logits, [B, L]."""
        return (self.whole.maximum + mx.log(self.whole.mass)).reshape(self.hidden.shape[:2])

    def _invert(self, draws: mx.array) -> mx.array:
        """The ids [N] at which the cumulative distributions pass the draws [N]: first the block, then the id in it."""
        size = _block(self.table.weight.shape[0])
        block, inside = _pass(self.whole.block_masses(), draws)
        ids = block[:, None] * size + mx.arange(size)  # [N, size]
        logits = self.shaping(block_scores(self.hidden.flatten(0, 1), self.table, block, size), ids)
        offset, _ = _pass(mx.exp(logits - logits.max(axis=-1, keepdims=True)), inside)
        return (block * size + offset).astype(mx.int32)


def walk(
    hidden: mx.array, table: Table, shaping: Shaping, *, with_signal: bool = True, tuning: Tuning = DEFAULT
) -> Sums:
    """Hidden states [B, L, H] → the sums over the whole table, tile after tile."""
    whole = _walk(hidden.flatten(0, 1), table, shaping, with_signal, tuning)
    return Sums(hidden=hidden, table=table, shaping=shaping, whole=whole)


def soft_rows(reading: Reading, table: Table) -> mx.array:
    """Positions [B, L] whose distribution is more than one token to the precision of the table's dtype.

    Where the tail is at most half a unit in the last place of 1, the best token's embedding is the signal to
    within that tail times the table's largest embedding: what rounding does to it anyway.
    """
    return reading.tail > HALF_UNIT[unpacked_dtype(table)]


def sparse_signal(sums: Sums, best: mx.array, rows: mx.array, *, tuning: Tuning = DEFAULT) -> mx.array:
    """The signal [B, L, H] with the full product for the flat positions `rows` alone; the others are one token."""
    signal = scaled(sums.table(best)).flatten(0, 1)
    if rows.size:
        x = sums.hidden.flatten(0, 1)[rows]
        signal[rows] = _walk(x, sums.table, sums.shaping.at(rows), True, tuning).signal()
    return signal.reshape(sums.hidden.shape)


def _walk(x: mx.array, table: Table, shaping: Shaping, with_signal: bool, tuning: Tuning) -> "_Run":
    """The sums for x [N, H]. Streams share the parts, and walk theirs in step with one another."""
    size = table.weight.shape[0]
    streams = lanes(size, tuning)
    parts: list[_Run | None] = [None] * PARTS
    for round_ in zip_longest(*(_tiles(size, tuning.tile, share) for share in _shares(len(streams)))):
        # Wait for the round before: MLX would else compute every tile's logits first, and hold them all.
        before = [array for run in parts if run is not None for array in run.state]
        for folds, stream in zip(round_, streams, strict=True):
            if folds:
                with mx.stream(stream):
                    _add(parts, mx.depends(x, before) if before else x, table, shaping, folds, with_signal)
    return reduce(_Run.join, filter(None, parts))


def _add(
    parts: "list[_Run | None]", x: mx.array, table: Table, shaping: Shaping, folds: "list[_Fold]", with_signal: bool
) -> None:
    """Score the ids of some neighbouring folds at once, and join each fold to its part."""
    start, stop = folds[0].ids.start, folds[-1].ids.stop
    logits = shaping(scores(x, table, slice(start, stop)), mx.arange(start, stop))  # [N, n]
    for fold in folds:
        ids = slice(fold.ids.start - start, fold.ids.stop - start)
        new, old = _Run.of(logits[:, ids], table, fold.ids, with_signal), parts[fold.part]
        parts[fold.part] = new if old is None else old.join(new)


class _Fold(NamedTuple):
    """A run of ids that is summed at once."""

    part: int
    ids: slice


def _folds(vocabulary: int, part: int) -> Iterator[_Fold]:
    """The folds of one part, whole blocks each: they follow from the size of the vocabulary and nothing else."""
    block = _block(vocabulary)
    start, stop = (vocabulary // block * p // PARTS * block for p in (part, part + 1))
    step = max(block, FOLD // block * block)
    return (_Fold(part, slice(first, min(first + step, stop))) for first in range(start, stop, step))


def _tiles(vocabulary: int, tile: int, parts: range) -> Iterator[list[_Fold]]:
    """The folds of neighbouring parts, as many at a time as a tile holds."""
    taken: list[_Fold] = []
    for fold in (fold for part in parts for fold in _folds(vocabulary, part)):
        if taken and fold.ids.stop - taken[0].ids.start > tile:
            yield taken
            taken = []
        taken.append(fold)
    if taken:
        yield taken


def _shares(lanes: int) -> list[range]:
    """Which parts each lane walks."""
    return [range(PARTS * lane // lanes, PARTS * (lane + 1) // lanes) for lane in range(lanes)]


def lanes(vocabulary: int, tuning: Tuning) -> Sequence[mx.Stream | mx.ThreadLocalStream]:
    """The streams that share the parts: a CPU stream is one thread, a GPU works on everything at once."""
    device, streams = mx.default_device(), min(tuning.streams, len(STREAMS))
    if device.type == mx.cpu and streams > 1 and vocabulary >= streams * tuning.tile:
        return STREAMS[:streams]
    return [mx.default_stream(device)]


def _block(vocabulary: int) -> int:
    """The largest divisor of the vocabulary that is at most BLOCK."""
    return next(b for b in range(min(BLOCK, vocabulary), 0, -1) if vocabulary % b == 0)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Sums over a run of ids, for N positions, about the run's largest logit.

    With w = exp(logit − maximum): `mass` = Σ w, `slope` = Σ w · (logit − maximum), so that the entropy is
    log mass − slope / mass. `soft_mass` and `soft` belong to the signal, whose logits are rounded to the
    table's dtype; without signal they are None.
    """

    dtype: mx.Dtype  # the table's
    maximum: mx.array  # [N]
    best: mx.array  # [N] int32
    mass: mx.array  # [N]
    slope: mx.array  # [N]
    soft_mass: mx.array | None  # [N]
    soft: mx.array | None  # [N, H]
    blocks: tuple[tuple[mx.array, mx.array], ...]  # per tile: mass per block [N, n], and its maximum [N]

    @classmethod
    def of(cls, logits: mx.array, table: Table, ids: slice, with_signal: bool) -> "_Run":
        """One tile of shaped logits [N, n]."""
        maximum = logits.max(axis=-1)
        weight, slopes = _weights(logits, maximum[:, None])
        blocks = weight.reshape(len(weight), -1, _block(table.weight.shape[0])).sum(axis=-1)
        dtype, soft_mass, soft = unpacked_dtype(table), None, None
        if with_signal:
            if dtype != mx.float32:
                weight = _rounded_weights(logits, maximum[:, None], mx.zeros((), dtype))
            soft_mass, soft = weight.sum(axis=-1), mix(weight.astype(dtype), table, ids).astype(mx.float32)
        return cls(
            dtype=dtype,
            maximum=maximum,
            best=ids.start + logits.argmax(axis=-1).astype(mx.int32),
            mass=blocks.sum(axis=-1),
            slope=slopes.sum(axis=-1),
            soft_mass=soft_mass,
            soft=soft,
            blocks=((blocks, maximum),),
        )

    def join(self, later: "_Run") -> "_Run":
        """The sums over both runs; the ids of `later` come after."""
        maximum = mx.maximum(self.maximum, later.maximum)
        a, b = self._about(maximum), later._about(maximum)
        return replace(
            a,
            best=mx.where(later.maximum > self.maximum, b.best, a.best),
            mass=a.mass + b.mass,
            slope=a.slope + b.slope,
            soft_mass=None if a.soft_mass is None or b.soft_mass is None else a.soft_mass + b.soft_mass,
            soft=None if a.soft is None or b.soft is None else a.soft + b.soft,
            blocks=a.blocks + b.blocks,
        )

    def _about(self, maximum: mx.array) -> "_Run":
        """The same sums about a larger maximum."""
        shift = self.maximum - maximum
        shrink = mx.exp(shift)
        soft_shrink = mx.exp(_rounded(self.maximum, self.dtype) - _rounded(maximum, self.dtype))
        return replace(
            self,
            maximum=maximum,
            mass=shrink * self.mass,
            slope=shrink * (self.slope + self.mass * shift),
            soft_mass=None if self.soft_mass is None else soft_shrink * self.soft_mass,
            soft=None if self.soft is None else soft_shrink[:, None] * self.soft,
        )

    @property
    def state(self) -> list[mx.array]:
        """What the next tile waits for."""
        return [a for a in (self.maximum, self.best, self.mass, self.slope, self.soft_mass, self.soft) if a is not None]

    def entropy(self) -> mx.array:
        return mx.log(self.mass) - self.slope / self.mass

    def signal(self) -> mx.array:
        assert self.soft is not None and self.soft_mass is not None  # only asked of sums made with a signal
        return scaled((self.soft / self.soft_mass[:, None]).astype(self.dtype))

    def block_masses(self) -> mx.array:
        """Mass of every block of the vocabulary, [N, V / block], all about the maximum."""
        return mx.concatenate([w * mx.exp(m - self.maximum)[:, None] for w, m in self.blocks], axis=-1)


@partial(mx.compile, shapeless=True)
def _weights(logits: mx.array, maximum: mx.array) -> tuple[mx.array, mx.array]:
    """w = exp(logit − maximum), and w · (logit − maximum)."""
    above = logits - maximum
    weight = mx.exp(above)
    return weight, weight * above


@partial(mx.compile, shapeless=True)
def _rounded_weights(logits: mx.array, maximum: mx.array, like: mx.array) -> mx.array:
    """The same w with both rounded to the dtype of `like`."""
    return mx.exp(_rounded(logits, like.dtype) - _rounded(maximum, like.dtype))


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


def _rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """To a dtype's precision, in float32."""
    return x.astype(dtype).astype(mx.float32)
