"""The vocabulary pass under a constraint: hidden states in; what each class of ids weighs, an id of a chosen class and
the signal out.

The rows of the table are walked in class order, without the ids that have no class: an enumeration reads a hundred rows
and not 262,144. Runs of one class are summed about their own maximum, so that no class underflows beside a likelier
one, and joined on the host. The weights of the walk can be kept: the signal then needs no second exp, and no scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce

import mlx.core as mx
import numpy as np

from ...model.table import Table, mix, scaled, scores, unpacked_dtype
from ...model.tuning import DEFAULT, Tuning
from ..vocabulary import FOLD, LOWEST, PARTS, Shaping, lanes
from .chain import ClassSums, passed

GROUP = 32  # ids of one class: as many rows are scored again where one id of them is drawn
WIDE = 32 * GROUP  # ids of one class that are summed in one piece, where it has as many
FAINT = 1e-10  # a class with at most this probability is left out of a position's signal


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """A run of the class order, scored and summed at once."""

    number: int  # from 0
    ids: mx.array  # int32 [n]
    padding: mx.array | None  # bool [n / size, size]: the id counts elsewhere
    size: int  # ids per piece
    kinds: mx.array  # int32 [n / size], the class of each piece
    pieces: slice  # which ones, of all


class ClassOrder:
    """The ids that have a class, cut into pieces of one class: first pieces of WIDE ids, then what is left of each
    class in pieces of GROUP, the last one padded."""

    def __init__(self, classes: np.ndarray, *, fold: int = FOLD):
        """`classes` int [V], −1 for none; `fold` ids are scored and summed at once, one piece at least."""
        ids = np.flatnonzero(classes >= 0)
        ids = ids[np.argsort(classes[ids], kind="stable")]  # by class, then by id
        counts = np.bincount(classes[ids])
        inside = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        wide = counts // WIDE
        in_wide = inside < np.repeat(wide * WIDE, counts)
        narrow = -(-(counts - wide * WIDE) // GROUP)
        spread = np.repeat((np.cumsum(narrow) - narrow) * GROUP - wide * WIDE, counts) + inside
        rest = np.full(narrow.sum() * GROUP, -1)
        rest[spread[~in_wide]] = ids[~in_wide]
        number = np.arange(len(counts))
        self.ids = np.concatenate([ids[in_wide], rest])  # int [n], −1 for padding
        self.wide = int(wide.sum())  # how many pieces are wide
        self.kinds = np.concatenate([np.repeat(number, wide), np.repeat(number, narrow)])  # of every piece
        self.by_class = np.argsort(self.kinds, kind="stable")  # pieces of one class beside each other, in id order
        self.starts = np.searchsorted(self.kinds[self.by_class], np.arange(len(counts) + 1))
        self.folds: list[Fold] = []
        for size, begin, end in ((WIDE, 0, self.wide), (GROUP, self.wide, len(self.kinds))):
            step = max(1, fold // size)
            for first in range(begin, end, step):
                self.folds.append(self._fold(size, first, min(first + step, end)))

    def first(self, pieces: np.ndarray) -> np.ndarray:
        """Where pieces start in the order."""
        return np.where(pieces < self.wide, pieces * WIDE, self.wide * (WIDE - GROUP) + pieces * GROUP)

    def _fold(self, size: int, first: int, last: int) -> Fold:
        start = int(self.first(np.array(first)))
        ids = self.ids[start : start + (last - first) * size]
        padded = mx.array(ids.astype(np.int32))
        return Fold(
            number=len(self.folds),
            ids=mx.maximum(padded, 0),
            padding=(padded < 0).reshape(-1, size) if (ids < 0).any() else None,
            size=size,
            kinds=mx.array(self.kinds[first:last].astype(np.int32)),
            pieces=slice(first, last),
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """The table as it scores hidden states at a step."""

    table: Table
    shaping: Shaping

    @property
    def dtype(self) -> mx.Dtype:
        """Of the embeddings, and so of the signal."""
        return unpacked_dtype(self.table)

    def logits(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [N, H] → float32 shaped logits [N, n] of the `ids` [n]."""
        return self.shaping(scores(x, self.table, ids), ids)

    def logits_of(self, x: mx.array, ids: mx.array) -> mx.array:
        """The same for ids of each position's own, [N, n]."""
        return self.shaping((self.table(ids) @ x[..., None])[..., 0], ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pieces:
    """Sums of shaped logits l over the pieces of one fold, about each one's maximum: w = exp(l − peak)."""

    peak: mx.array  # [N, pieces]
    slope: mx.array  # [N, pieces], Σ w · (l − peak)
    place: mx.array  # [N, pieces], of the (first) maximum in its piece
    groups: mx.array  # [N, pieces, size / GROUP], Σ w of each group
    weights: mx.array  # [N, pieces, size], w in the table's dtype

    @classmethod
    def of(cls, head: Head, x: mx.array, fold: Fold) -> "_Pieces":
        """For x [N, H]."""
        logits = head.logits(x, fold.ids).reshape(len(x), -1, fold.size)
        if fold.padding is not None:
            logits = mx.where(fold.padding, LOWEST, logits)
        peak = logits.max(axis=-1)
        weights, slopes = _weights(logits, peak[..., None])
        return cls(
            peak=peak,
            slope=slopes.sum(axis=-1),
            place=logits.argmax(axis=-1),
            groups=weights.reshape(*peak.shape, -1, GROUP).sum(axis=-1),
            weights=weights.astype(head.dtype),
        )


@partial(mx.compile, shapeless=True)
def _weights(logits: mx.array, peak: mx.array) -> tuple[mx.array, mx.array]:
    """w = exp(logit − peak), and w · (logit − peak)."""
    above = logits - peak
    weight = mx.exp(above)
    return weight, weight * above


def read(hidden: mx.array, head: Head, order: ClassOrder, *, keep: bool, tuning: Tuning = DEFAULT) -> "ClassReading":
    """One walk over the table for hidden states [N, H].

    With `keep` the walk's weights stay, in the table's dtype N times the ids that have a class: the signal then needs
    no scores of its own.
    """

    found: list[list[mx.array]] = []

    def visit(fold: Fold, x: mx.array) -> list[mx.array]:
        made = _Pieces.of(head, x, fold)
        found.append([made.peak, made.slope, made.place, made.groups, *([made.weights] if keep else [])])
        return found[-1]

    _in_turn(order.folds, hidden, visit, tuning)
    mx.eval(found)
    peak, slope, place = (np.concatenate([np.array(arrays[i]) for arrays in found], axis=1) for i in range(3))
    groups = [np.array(arrays[3]) for arrays in found]
    wide = [g for g, fold in zip(groups, order.folds, strict=True) if fold.size == WIDE]
    return ClassReading(
        hidden=hidden,
        head=head,
        order=order,
        peak=peak,
        mass=np.concatenate([g.sum(axis=-1) for g in groups], axis=1),
        slope=slope,
        place=place,
        groups=np.concatenate(wide, axis=1) if wide else np.zeros((len(hidden), 0, 0), np.float32),
        kept=[(arrays[4], arrays[0]) for arrays in found] if keep else None,
        tuning=tuning,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassReading:
    """What one walk found out at N positions: sums over the E pieces of the class order, as in _Pieces."""

    hidden: mx.array  # [N, H]
    head: Head
    order: ClassOrder
    peak: np.ndarray  # float32 [N, E]
    mass: np.ndarray  # float32 [N, E], Σ w
    slope: np.ndarray  # float32 [N, E]
    place: np.ndarray  # int [N, E]
    groups: np.ndarray  # float32 [N, wide pieces, groups]
    kept: list[tuple[mx.array, mx.array]] | None  # per fold weights and peak
    tuning: Tuning

    @cached_property
    def sums(self) -> ClassSums:
        """The pieces of each class joined, [N, C]."""
        order = self.order
        peak, mass, slope, place = (a[:, order.by_class] for a in (self.peak, self.mass, self.slope, self.place))
        starts, sizes = order.starts[:-1], np.diff(order.starts)
        top = np.maximum.reduceat(peak, starts, axis=1)
        shift = peak - np.repeat(top, sizes, axis=1)
        shrink = np.exp(shift)
        mass, slope = shrink * mass, shrink * (slope + shift * mass)
        total = np.add.reduceat(mass, starts, axis=1, dtype=np.float64)
        number = np.arange(len(order.kinds))
        first = np.minimum.reduceat(np.where(shift == 0, number, len(number)), starts, axis=1)
        places = order.first(order.by_class[first]) + np.take_along_axis(place, first, axis=1)
        return ClassSums(
            mass=top + np.log(total),
            entropy=np.log(total) - np.add.reduceat(slope, starts, axis=1, dtype=np.float64) / total,
            top=top.astype(np.float64),
            top_id=order.ids[places],
        )

    def pick(self, kinds: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """An id of each position's class `kinds` [N], by its draw in [0, 1) [N]: where the cumulative distribution
        inside the class, in id order, passes it. First the piece is found, then the group, then the id."""
        start, inside = np.zeros(len(kinds), np.intp), np.zeros(len(kinds))
        for n, kind in enumerate(kinds):
            pieces = self.order.by_class[self.order.starts[kind] : self.order.starts[kind + 1]]
            masses = np.exp(self.peak[n, pieces] - self.sums.top[n, kind]) * self.mass[n, pieces]
            place, inside[n] = passed(masses, draws[n])
            piece, group = pieces[place], 0
            if piece < self.order.wide:
                group, inside[n] = passed(self.groups[n, piece], inside[n])
            start[n] = self.order.first(piece) + group * GROUP
        ids = self.order.ids[start[:, None] + np.arange(GROUP)]
        logits = np.array(self.head.logits_of(self.hidden, mx.array(np.maximum(ids, 0).astype(np.int32))), np.float64)
        logits = np.where(ids < 0, LOWEST, logits)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.array([row[passed(w, u)[0]] for row, w, u in zip(ids, weights, inside, strict=True)])

    def signal(self, multiplier: np.ndarray, rows: np.ndarray | None = None) -> mx.array:
        """The soft embedding under q(v) = exp(l(v) + log μ of its class), at all positions or at `rows`, [N, H] in the
        table's dtype. `multiplier` is log μ, float64 [N, C]; each position's q sums to 1."""
        order, table, dtype = self.order, self.head.table, self.head.dtype
        likely = multiplier + self.sums.mass > np.log(FAINT)
        multiplier = np.where(likely, multiplier, LOWEST)  # what is fainter would reach numbers that a CPU is slow with
        some = slice(None) if rows is None else mx.array(rows)
        if rows is not None:
            multiplier, likely = multiplier[rows], likely[rows]
        factor = mx.array(multiplier.astype(np.float32))
        parts: dict[int, mx.array] = {}

        def visit(fold: Fold, x: mx.array) -> list[mx.array]:
            if self.kept is None:
                pieces = _Pieces.of(self.head, x, fold)
                weights, peak = pieces.weights, pieces.peak
            else:
                weights, peak = (a if rows is None else a[some] for a in self.kept[fold.number])
            q = weights * mx.exp(peak + factor[:, fold.kinds])[..., None]
            share = mix(q.astype(dtype).flatten(1), table, fold.ids).astype(mx.float32)
            part = fold.number % PARTS
            parts[part] = parts[part] + share if part in parts else share
            return [parts[part]]

        folds = [fold for fold in order.folds if likely[:, order.kinds[fold.pieces]].any()]
        _in_turn(folds, self.hidden[some], visit, self.tuning)
        return scaled(reduce(mx.add, (parts[part] for part in sorted(parts))).astype(dtype))


def _in_turn(
    folds: Sequence[Fold], x: mx.array, visit: Callable[[Fold, mx.array], list[mx.array]], tuning: Tuning
) -> None:
    """Visit the folds with x. Of several CPU streams each takes its turn, and waits for what the round before gave:
    MLX would else compute every fold's logits first, and hold them all."""
    streams = lanes(sum(fold.ids.size for fold in folds), tuning)
    before: list[mx.array] = []
    for start in range(0, len(folds), len(streams)):
        made = []
        for fold, stream in zip(folds[start : start + len(streams)], streams, strict=False):
            with mx.stream(stream):
                made += visit(fold, mx.depends(x, before) if before else x)
        before = made
