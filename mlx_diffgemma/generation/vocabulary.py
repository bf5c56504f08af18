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
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..model.sharing.share import Share
from ..model.table import Runs, Table, block_scores, mix, scaled, scores, shaped, unpacked_dtype
from ..model.tuning import DEFAULT, Tuning

PARTS = 4  # of the vocabulary: what streams and machines share
FOLD = 8_192  # ids that are summed at once
BLOCK = 256  # ids per entry of the first stage of sampling
STREAMS = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(2))  # see lanes
COLUMNS = mx.array([0, 1, 2])
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
        """Scores [..., N, n] of the `ids`, which broadcast to them → float32 shaped logits [..., N, n]."""
        logits = shaped(scores, mx.array(self.cap, mx.float32), mx.array(self.temperature))
        if not self.forbidden or self.positions is None:
            return logits
        banned = (ids[..., None] == mx.array(self.forbidden)).any(axis=-1) & self.positions[:, None]
        return mx.where(banned, LOWEST, logits)

    def told(self) -> dict[str, Any]:
        """What another machine makes the same of."""
        own = {"cap": self.cap, "forbidden": self.forbidden, "positions": self.positions}
        return {**own, "temperature": float(self.temperature)}

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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of N tokens, nats; `top` has the likeliest k of each place, best first, if asked for."""

    logprobs: list[float]
    best: list[int]  # the likeliest token of each place
    top: list[tuple[tuple[int, float], ...]] | None

    def split(self, count: int) -> "tuple[Scores, Scores]":
        """The first `count`, and the rest."""
        first, rest = (None, None) if self.top is None else (self.top[:count], self.top[count:])
        return (
            Scores(logprobs=self.logprobs[:count], best=self.best[:count], top=first),
            Scores(logprobs=self.logprobs[count:], best=self.best[count:], top=rest),
        )

    def fields(self) -> dict[str, Any]:
        """As a CanvasRow has them."""
        top = None if self.top is None else tuple(self.top)
        return {"logprobs": tuple(self.logprobs), "top_logprobs": top}


SCORED_AT_ONCE = 32  # places whose whole row of logits exists at the same time, where the likeliest are asked for


def score(
    hidden: mx.array, table: Table, shaping: Shaping, ids: mx.array, *, top: int = 0, tuning: Tuning = DEFAULT
) -> Scores:
    """Log-probabilities of the `ids` [N] by the distributions of hidden states [N, H], and the `top` likeliest there.

    The sums of one walk, without a signal, give every distribution's logarithm of the total mass.
    """
    whole = _walk(hidden, table, shaping, False, tuning)
    total = whole.maximum + mx.log(whole.mass)
    size = _block(table.weight.shape[0])
    logits = shaping(block_scores(hidden, table, ids // size, size), (ids // size)[:, None] * size + mx.arange(size))
    own = mx.take_along_axis(logits, (ids % size)[:, None], axis=-1)[:, 0]
    logprobs = mx.minimum(own - total, 0.0)  # rounding may put one token above all of them
    mx.eval(logprobs, whole.best)
    return Scores(
        logprobs=cast(list[float], logprobs.tolist()),
        best=cast(list[int], whole.best.tolist()),
        top=_top(hidden, table, shaping, total, top),
    )


def _top(
    hidden: mx.array, table: Table, shaping: Shaping, total: mx.array, count: int
) -> list[tuple[tuple[int, float], ...]] | None:
    if not count:
        return None
    found: list[tuple[tuple[int, float], ...]] = []
    for start in range(0, len(hidden), SCORED_AT_ONCE):
        rows = slice(start, start + SCORED_AT_ONCE)
        every = slice(0, table.weight.shape[0])
        found += likeliest(shaping(scores(hidden[rows], table, every), mx.arange(every.stop)), total[rows], count)
    return found


def likeliest(logits: mx.array, total: mx.array, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Of logits [N, V] the `count` best ids of each row with their log-probabilities, best first."""
    ids = mx.argpartition(logits, kth=-count, axis=-1)[:, -count:]
    logprobs = mx.minimum(mx.take_along_axis(logits, ids, axis=-1) - total[:, None], 0.0)
    order = mx.argsort(-logprobs, axis=-1)
    ids, logprobs = mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(logprobs, order, axis=-1)
    rows = zip(np.array(ids).tolist(), np.array(logprobs).tolist(), strict=True)
    return [tuple(zip(names, nats, strict=True)) for names, nats in rows]


def invert(masses: mx.array, draws: mx.array) -> mx.array:
    """The ids [N] at which the cumulative sums of `masses` [N, V], in vocabulary order, pass the fractions `draws` [N]
    of their totals: block by block first, so that small masses are not lost in long sums."""
    size = _block(masses.shape[1])
    blocks = masses.reshape(len(masses), -1, size)
    block, inside = _pass(blocks.sum(axis=-1), draws)
    offset, _ = _pass(mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], inside)
    return (block * size + offset).astype(mx.int32)


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
    """The sums for x [N, H]. Machines share the parts."""
    share = tuning.share
    if share.size == 1:
        groups = _parts(x, table, shaping, with_signal, tuning)
    else:
        with share.announced("walk", x=x, with_signal=with_signal, **shaping.told()) as done:
            groups = list(_gathered(_parts(x, table, shaping, with_signal, tuning), table, share))
            done([group.state for group in groups])
    whole = reduce(_Run.join, [one for group in groups for one in group.each()])
    return replace(whole, blocks=tuple(blocks for group in groups for blocks in group.blocks))


def take_part(x: mx.array, table: Table, shaping: Shaping, with_signal: bool, tuning: Tuning) -> None:
    """On a machine that follows: the walk for x [N, H] that was announced."""
    _walk(x, table, shaping, with_signal, tuning)


def _parts(x: mx.array, table: Table, shaping: Shaping, with_signal: bool, tuning: Tuning) -> "list[_Run]":
    """The sums over this machine's parts. Streams share them, and walk theirs in step with one another."""
    size, parts = table.weight.shape[0], tuning.share.part(PARTS)
    streams = lanes(size, tuning)[: len(parts)]
    runs: dict[int, _Run] = {}  # by the first of the parts that are walked abreast
    for round_ in zip_longest(*(_tiles(size, tuning.ids_at_once, some) for some in _shares(parts, len(streams)))):
        # Wait for the round before: MLX would else compute every tile's logits first, and hold them all.
        before = [array for run in runs.values() for array in run.state]
        for tile, stream in zip(round_, streams, strict=True):
            if tile:
                with mx.stream(stream):
                    _add(runs, mx.depends(x, before) if before else x, table, shaping, tile, with_signal)
    return [runs[part] for part in sorted(runs)]


def _gathered(groups: "list[_Run]", table: Table, share: Share) -> "Iterator[_Run]":
    """The sums over every machine's parts, one by one; all in one exchange."""
    size, block = table.weight.shape[0], _block(table.weight.shape[0])
    folds = [[(fold.ids.stop - fold.ids.start) // block for fold in _folds(size, part)] for part in range(PARTS)]
    room = most_numbers(size)
    own = mx.concatenate([group.columns(room) for group in groups])  # [parts, N, columns]
    [flat] = share.gather(own.flatten())
    for like, columns, sizes in zip([groups[0]] * PARTS, flat.reshape(PARTS, 1, *own.shape[1:]), folds, strict=True):
        yield like.of_columns(columns, sizes)


def is_parted(vocabulary: int) -> bool:
    """Whether every part has ids: machines can share them."""
    return all(any(_folds(vocabulary, part)) for part in range(PARTS))


def most_numbers(vocabulary: int) -> int:
    """Of blocks and folds in a part, the most."""
    block = _block(vocabulary)
    parts = [list(_folds(vocabulary, part)) for part in range(PARTS)]
    return max(len(folds) + (folds[-1].ids.stop - folds[0].ids.start) // block for folds in parts if folds)


def _add(
    runs: "dict[int, _Run]", x: mx.array, table: Table, shaping: Shaping, tile: "_Tile", with_signal: bool
) -> None:
    """Score the ids of a tile at once, and join each of its folds to the parts."""
    first, size, count, apart = whole = tile.runs
    ids = mx.arange(first, first + size) + apart * mx.arange(count)[:, None, None]  # [parts, 1, n]
    made = scores(x, table, whole)
    logits = shaping(made if made.ndim > 2 else made[None], ids)  # [parts, N, n]
    for fold in tile.folds:
        inside = slice(fold.ids.start - first, fold.ids.stop - first)
        these = Runs(fold.ids.start, fold.ids.stop - fold.ids.start, count, apart)
        new, old = _Run.of(logits[:, :, inside], table, these, with_signal), runs.get(tile.folds[0].part)
        runs[fold.part] = new if old is None else old.join(new)


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


class _Tile(NamedTuple):
    """What is scored at once: neighbouring folds of one part, and the same ones of the parts walked abreast with it."""

    folds: list[_Fold]  # the first part's
    count: int  # of parts
    apart: int  # ids from part to part

    @property
    def runs(self) -> Runs:
        first = self.folds[0].ids.start
        return Runs(first, self.folds[-1].ids.stop - first, self.count, self.apart)


def _tiles(vocabulary: int, tile: int, parts: range) -> Iterator[_Tile]:
    """The folds of these parts, as many at a time as a tile holds; whole parts abreast before neighbouring folds."""
    abreast = _abreast(vocabulary, tile, len(parts))
    for first in parts[::abreast]:
        taken: list[_Fold] = []
        for fold in _folds(vocabulary, first):
            if taken and abreast * (fold.ids.stop - taken[0].ids.start) > tile:
                yield _Tile(taken, abreast, vocabulary // PARTS)
                taken = []
            taken.append(fold)
        if taken:
            yield _Tile(taken, abreast, vocabulary // PARTS)


def _abreast(vocabulary: int, tile: int, parts: int) -> int:
    """How many parts are walked abreast, in one array: more where a tile holds a fold of each and all are of one size.
    Every kernel works for all of them."""
    block = _block(vocabulary)
    if vocabulary // block % PARTS:
        return 1
    fold = max(fold.ids.stop - fold.ids.start for fold in _folds(vocabulary, 0))
    return next(count for count in (4, 2, 1) if count == 1 or (parts % count == 0 and count * fold <= tile))


def _shares(parts: range, lanes: int) -> list[range]:
    """Which of these parts each lane walks."""
    return [parts[len(parts) * lane // lanes : len(parts) * (lane + 1) // lanes] for lane in range(lanes)]


def lanes(vocabulary: int, tuning: Tuning) -> Sequence[mx.Stream | mx.ThreadLocalStream]:
    """The streams that share the parts: a CPU stream is one thread, a GPU works on everything at once."""
    device, streams = mx.default_device(), min(tuning.streams, len(STREAMS))
    if device.type == mx.cpu and streams > 1 and vocabulary >= streams * tuning.ids_at_once:
        return STREAMS[:streams]
    return [mx.default_stream(device)]


def _block(vocabulary: int) -> int:
    """The largest divisor of the vocabulary that is at most BLOCK."""
    return next(b for b in range(min(BLOCK, vocabulary), 0, -1) if vocabulary % b == 0)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Sums over a run of ids, for N positions, about the run's largest logit; of several runs with a first axis more.

    With w = exp(logit − maximum): `mass` = Σ w, `slope` = Σ w · (logit − maximum), so that the entropy is
    log mass − slope / mass. `soft_mass` and `soft` belong to the signal, whose logits are rounded to the
    table's dtype; without signal they are not there.
    """

    dtype: mx.Dtype  # the table's
    maximum: mx.array  # [N]
    best: mx.array  # [N] int32
    sums: mx.array  # [N, 3]: mass, slope, soft mass
    soft: mx.array | None  # [N, H], float32 once two are joined
    blocks: tuple["_Blocks", ...]  # one for each run of parts abreast

    @classmethod
    def of(cls, logits: mx.array, table: Table, runs: Runs, with_signal: bool) -> "_Run":
        """One fold of shaped logits [parts, N, n], in each part."""
        maximum = logits.max(axis=-1)
        weight, slopes = _weights(logits, maximum[..., None])
        blocks = weight.reshape(*weight.shape[:2], -1, _block(table.weight.shape[0])).sum(axis=-1)
        dtype, soft = unpacked_dtype(table), None
        sums = [blocks.sum(axis=-1), slopes.sum(axis=-1)]
        if with_signal:
            like = mx.zeros((), dtype)
            whole, rounded = (
                (weight, weight) if dtype == mx.float32 else _rounded_weights(logits, maximum[..., None], like)
            )
            sums.append(whole.sum(axis=-1))
            soft = mix(rounded, table, runs)
        starts = mx.array([[runs.first + runs.apart * part] for part in range(runs.count)], mx.int32)
        return cls(
            dtype=dtype,
            maximum=maximum,
            best=_moved(logits.argmax(axis=-1), starts),
            sums=mx.stack(sums, axis=-1),
            soft=soft,
            blocks=(_Blocks(masses=(blocks,), maxima=(maximum,)),),
        )

    def join(self, later: "_Run") -> "_Run":
        """The sums over both runs; the ids of `later` come after."""
        maximum, like = mx.maximum(self.maximum, later.maximum), mx.zeros((), self.dtype)
        own, others, both = self.maximum[..., None], later.maximum[..., None], maximum[..., None]
        column = COLUMNS[: self.sums.shape[-1]]
        soft = None
        if self.soft is not None and later.soft is not None:
            shrink = _soft_shrink(own, others, both, COLUMNS[:2], like)
            soft = _weighted(shrink[..., :1], self.soft, shrink[..., 1:], later.soft)
        masses = self.sums[..., :1], later.sums[..., :1]
        return replace(
            self,
            maximum=maximum,
            best=_better(self.maximum, self.best, later.maximum, later.best),
            sums=_joined_sums(self.sums, masses[0], own, later.sums, masses[1], others, both, column, like),
            soft=soft,
            blocks=tuple(map(_Blocks.join, self.blocks, later.blocks)),
        )

    def each(self) -> "Iterator[_Run]":
        """The runs of the first axis one by one, without their blocks."""
        parts = len(self.maximum)
        soft = [None] * parts if self.soft is None else _unstacked(self.soft)
        rest = zip(_unstacked(self.maximum), _unstacked(self.best), _unstacked(self.sums), soft, strict=True)
        for maximum, best, sums, of_part in rest:
            yield replace(self, maximum=maximum, best=best, sums=sums, soft=of_part, blocks=())

    def columns(self, room: int) -> mx.array:
        """All of it side by side, [parts, N, columns]; with room for so many numbers of blocks and folds."""
        [held] = self.blocks
        masses, maxima = mx.concatenate([*held.masses], axis=-1), mx.stack([*held.maxima], axis=-1)
        padding = [mx.zeros((*masses.shape[:-1], room - masses.shape[-1] - maxima.shape[-1]))]
        soft = [] if self.soft is None else [self.soft.astype(mx.float32)]
        numbers = [self.maximum[..., None], self.best[..., None].view(mx.float32), self.sums]
        return mx.concatenate([*numbers, *soft, masses, maxima, *padding], axis=-1)

    def of_columns(self, columns: mx.array, sizes: list[int]) -> "_Run":
        """One part from its `columns` [1, N, columns], with folds of so many blocks each, in the manner of `self`."""
        count = self.sums.shape[-1]
        width = 0 if self.soft is None else self.soft.shape[-1]
        ends = np.cumsum([1, 1, count, width, sum(sizes), len(sizes)]).tolist()
        maximum, best, sums, soft, masses, maxima, _ = mx.split(columns, ends, axis=-1)
        return replace(
            self,
            maximum=maximum[..., 0],
            best=best[..., 0].view(mx.int32),
            sums=sums,
            soft=soft if width else None,
            blocks=(
                _Blocks(
                    masses=tuple(mx.split(masses, np.cumsum(sizes)[:-1].tolist(), axis=-1)),
                    maxima=tuple(one.squeeze(-1) for one in mx.split(maxima, len(sizes), axis=-1)),
                ),
            ),
        )

    @property
    def state(self) -> list[mx.array]:
        """What the next tile waits for."""
        return [a for a in (self.maximum, self.best, self.sums, self.soft) if a is not None]

    @property
    def mass(self) -> mx.array:
        return self.sums[..., 0]

    def entropy(self) -> mx.array:
        return mx.log(self.mass) - self.sums[..., 1] / self.mass

    def signal(self) -> mx.array:
        assert self.soft is not None  # only asked of sums made with a signal
        return scaled((self.soft.astype(mx.float32) / self.sums[..., 2:]).astype(self.dtype))

    def block_masses(self) -> mx.array:
        """Mass of every block of the vocabulary, [N, V / block], all about the maximum."""
        return mx.concatenate([blocks.about(self.maximum) for blocks in self.blocks], axis=-1)


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """The masses of the blocks in parts walked abreast, fold after fold, each about the fold's maximum."""

    masses: tuple[mx.array, ...]  # [parts, N, n] each
    maxima: tuple[mx.array, ...]  # [parts, N] each

    def join(self, later: "_Blocks") -> "_Blocks":
        return _Blocks(masses=self.masses + later.masses, maxima=self.maxima + later.maxima)

    def about(self, maximum: mx.array) -> mx.array:
        """All of them about one maximum [N], in the order of the vocabulary: [N, n]."""
        pairs = zip(self.masses, self.maxima, strict=True)
        whole = mx.concatenate([_about(w, m[..., None], maximum[:, None]) for w, m in pairs], axis=-1)
        return whole.swapaxes(0, 1).flatten(1)


@partial(mx.compile, shapeless=True)
def _weights(logits: mx.array, maximum: mx.array) -> tuple[mx.array, mx.array]:
    """w = exp(logit − maximum), and w · (logit − maximum)."""
    above = logits - maximum
    weight = mx.exp(above)
    return weight, weight * above


@partial(mx.compile, shapeless=True)
def _rounded_weights(logits: mx.array, maximum: mx.array, like: mx.array) -> tuple[mx.array, mx.array]:
    """The same w with both rounded to the dtype of `like`; and w in that dtype."""
    weight = mx.exp(_rounded(logits, like.dtype) - _rounded(maximum, like.dtype))
    return weight, weight.astype(like.dtype)


@partial(mx.compile, shapeless=True)
def _moved(index: mx.array, start: mx.array) -> mx.array:
    return start + index.astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _about(masses: mx.array, own: mx.array, maximum: mx.array) -> mx.array:
    """Sums about their `own` maximum, about a larger one."""
    return masses * mx.exp(own - maximum)


# A join is a few kernels, whatever it joins: MLX compiles a chain with one result into one.


@partial(mx.compile, shapeless=True)
def _better(maximum: mx.array, best: mx.array, later_maximum: mx.array, later_best: mx.array) -> mx.array:
    return mx.where(later_maximum > maximum, later_best, best)


@partial(mx.compile, shapeless=True)
def _joined_sums(
    a: mx.array,
    mass_a: mx.array,
    max_a: mx.array,
    b: mx.array,
    mass_b: mx.array,
    max_b: mx.array,
    maximum: mx.array,
    column: mx.array,
    like: mx.array,
) -> mx.array:
    """Both runs' sums [..., N, 3] about their common maximum, added."""

    def about(sums: mx.array, mass: mx.array, own: mx.array) -> mx.array:
        shift = own - maximum
        rounded = _rounded(own, like.dtype) - _rounded(maximum, like.dtype)
        moved = mx.where(column == 1, mass * shift, 0.0)  # a slope's weights are measured from the maximum, too
        return mx.exp(mx.where(column == 2, rounded, shift)) * (sums + moved)

    return about(a, mass_a, max_a) + about(b, mass_b, max_b)


@partial(mx.compile, shapeless=True)
def _soft_shrink(max_a: mx.array, max_b: mx.array, maximum: mx.array, column: mx.array, like: mx.array) -> mx.array:
    """What both runs' signals shrink by, [..., N, 2]."""
    own = mx.where(column == 0, max_a, max_b)
    return mx.exp(_rounded(own, like.dtype) - _rounded(maximum, like.dtype))


@partial(mx.compile, shapeless=True)
def _weighted(a: mx.array, x: mx.array, b: mx.array, y: mx.array) -> mx.array:
    return a * x.astype(mx.float32) + b * y.astype(mx.float32)


def _unstacked(array: mx.array) -> list[mx.array]:
    """Views along the first axis; an index would copy."""
    return [part.squeeze(0) for part in mx.split(array, len(array))]


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
