"""AdamW, or Muon for matrices; warmup and a cosine."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from .settings import Settings


class Muon(optim.Muon):
    """MLX's Muon, with one orthogonalization per matrix of a stack instead of one for all."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        momentum = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = momentum
        x = (1 - self.momentum) * gradient + self.momentum * momentum  # Nesterov
        tall = x.shape[-2] > x.shape[-1]
        x = x.swapaxes(-1, -2) if tall else x
        x = x / (mx.sqrt(mx.square(x).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
        for _ in range(self.ns_steps):
            square = x @ x.swapaxes(-1, -2)
            x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
        x = x.swapaxes(-1, -2) if tall else x
        rate = self.learning_rate * max(1, x.shape[-2] / x.shape[-1]) ** 0.5
        return parameter * (1 - self.learning_rate * self.weight_decay) - rate * x


MUON_RATE = 10  # Muon's learning rate over AdamW's


def schedule(settings: Settings, factor: float = 1.0) -> Callable[[mx.array], mx.array]:
    """Learning rate by step: linear warmup, then a cosine to `final_rate`."""

    def rate(step: mx.array) -> mx.array:
        warm = (step + 1) / max(1, settings.warmup)
        done = mx.clip((step - settings.warmup) / max(1, settings.steps - settings.warmup), 0, 1)
        cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + mx.cos(math.pi * done))
        return settings.learning_rate * factor * mx.minimum(warm, cosine)

    return rate


def make_optimizer(settings: Settings) -> optim.Optimizer:
    adamw = optim.AdamW(
        schedule(settings), betas=list(settings.betas), weight_decay=settings.weight_decay, bias_correction=True
    )
    if settings.optimizer == "adamw":
        return adamw
    muon = Muon(schedule(settings, MUON_RATE), weight_decay=settings.weight_decay)
    return optim.MultiOptimizer([muon, adamw], [lambda name, weight: weight.ndim >= 2 and "embed" not in name])
