"""The entropy-bound sampler (arXiv 2505.24857) as pure functions over arrays: temperature, accept, renoise, settled."""

import mlx.core as mx
import numpy as np


def temperature(step: int, steps: int, *, t_min: float, t_max: float) -> float:
    """The temperature of `step` = 0 … steps − 1: `t_max` first, one part short of `t_min` last.

    Source: transformers LinearTemperatureScheduleLogitsProcessor, which counts the steps that remain, in an array: so
    all of it but the difference is float32, rounded after each operation.
    """
    remaining = np.float32(steps - step) / np.float32(steps)
    return float(np.float32(t_min) + np.float32(t_max - t_min) * remaining)


def accept(entropy: mx.array, bound: float) -> mx.array:
    """Positions whose guesses are certain enough to keep, bool [B, L], from their entropies [B, L] in nats.

    Sorted by entropy, the longest run whose summed entropy, without its largest term, stays within `bound`: an
    upper limit on how much the kept tokens can depend on each other. The most certain position always passes;
    one whose entropy is not a number never does.
    Source: transformers EntropyBoundSampler.accept_canvas.
    """
    entropy = mx.where(mx.isnan(entropy), mx.inf, entropy)
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    kept = mx.cumsum(ascending, axis=-1) - ascending <= bound
    return mx.put_along_axis(mx.zeros_like(kept), order, kept, axis=-1)


def renoise(accepted: mx.array, guess: mx.array, ids: mx.array) -> mx.array:
    """The next canvas [B, L]: the guess where accepted, fresh random ids everywhere else."""
    return mx.where(accepted, guess, ids)


def settled(
    best: mx.array, earlier: list[mx.array], entropy: mx.array, *, stability: int, confidence: float
) -> mx.array:
    """Rows that may stop, bool [B]: `best` [B, L] equals the last `stability` canvases of best tokens (`earlier`
    holds them, without this one), and the mean entropy is below `confidence` nats.

    Source: transformers StableAndConfidentStoppingCriteria.
    """
    confident = entropy.mean(axis=-1) < confidence
    if len(earlier) < stability:
        return mx.zeros_like(confident)
    for other in earlier[len(earlier) - stability :]:
        confident &= (other == best).all(axis=-1)
    return confident


def answer_stable(best: mx.array, earlier: list[mx.array], stop_ids: tuple[int, ...], *, steps: int) -> mx.array:
    """Rows whose answer has not changed for so many `steps`, bool [B]: of `best` [B, L] what stands up to and with the
    first stop id equals the last canvases of best tokens (`earlier` holds them, without this one)."""
    if len(earlier) < steps:
        return mx.zeros(best.shape[:1], mx.bool_)
    stops = mx.cumsum((best[..., None] == mx.array(stop_ids or (-1,))).any(axis=-1), axis=-1)
    behind = mx.pad(stops[:, :-1], [(0, 0), (1, 0)]) > 0  # [B, L]: a stop id stands further left
    return mx.stack([((other == best) | behind).all(axis=-1) for other in earlier[len(earlier) - steps :]]).all(axis=0)
