"""A pack of the released model against the logits that were published for it."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..model.network import Network

from ..files import shipped
from .findings import Finding

# Two correct bfloat16 runs, on two vendors' GPUs, differ by 0.22 on average (1.1 at most) in the six-layer case. Bounds
# on the mean difference are multiples of that, by the bits of most weights: a judgement, with room for the recipe's own
# error; a wrong network misses them by far, since these logits lie between −30 and 30.
SPREAD = 0.22
TIMES = {16: 3, 8: 4, 6: 6, 5: 8, 4: 12, 3: 20, 2: 30}
RANKS = 0.8  # least mean rank correlation of the twelve logits of a position


def published_of(network: "Network | None", name: str | None) -> Iterator[Finding]:
    """Compare a loaded network, if there is one and it is the released one."""
    if network is None:
        why = "no --model was given."
    elif not is_released(network.config):
        why = f"{name} is not of the released model's shape, and only that one's logits were published."
    else:
        yield from published(network)
        return
    yield Finding(part="published", name="published logits", passed=None, says=why)


def is_released(config: "ModelConfig") -> bool:
    """Whether this is the shape of google/diffusiongemma-26B-A4B-it."""
    shape = (config.num_hidden_layers, config.hidden_size, config.num_experts, config.vocab_size)
    return shape == (30, 2816, 128, 262_144)


def published(network: "Network") -> Iterator[Finding]:
    """The whole network and its first six layers against the logits published for them."""
    told = json.loads((shipped.references() / "published_logits.json").read_text())
    bits = (network.config.quantization or {"bits": 16})["bits"]
    for name in ("full_model", "first_6_layers"):
        with first_layers(network, told[name]["layers"]):
            yield closeness(name, _logits(network, told["input_ids"]), told[name]["logits"], bits)


@contextmanager
def first_layers(network: "Network", count: int) -> Iterator[None]:
    """The network with its first `count` layers alone."""
    config, own, encoder = network.config, network.decoder.layers, network.encoder.language_model.layers
    network.config = dataclasses.replace(config, layers=config.layers[:count])
    network.decoder.layers, network.encoder.language_model.layers = own[:count], encoder[:count]
    try:
        yield
    finally:
        network.config = config
        network.decoder.layers, network.encoder.language_model.layers = own, encoder


def _logits(network: "Network", prompt: list[int], rows: int = 10, ids: int = 12) -> "np.ndarray":
    """Logits of the first positions and ids, of a canvas that counts from 0, without a signal."""
    import mlx.core as mx
    import numpy as np

    cache = network.make_cache()
    network.encode(mx.array([prompt]), cache)
    hidden = network.denoise(mx.arange(network.config.canvas_length)[None], cache, None)
    return np.array(network.head(hidden[:, :rows])[0, :, :ids])


def closeness(name: str, logits: "np.ndarray", told: list[list[float]], bits: int) -> Finding:
    """Compare logits [rows, ids] with published ones; the verdict depends on the bits of most weights."""
    import numpy as np

    difference = np.abs(logits - np.array(told))
    ranks = np.mean([_rank_correlation(a, b) for a, b in zip(logits, np.array(told), strict=True)])
    bound = SPREAD * TIMES[bits]
    figures = {"mean": float(difference.mean()), "max": float(difference.max()), "ranks": float(ranks), "bits": bits}
    says = (
        f"differs from CUDA by {figures['mean']:.2f} on average (bound at {bits} bits: {bound:.2f}) and"
        f" {figures['max']:.2f} at most; ranks agree to {ranks:.2f}."
        f" Two correct bfloat16 runs differ by {SPREAD} and 1.1."
    )
    passed = bool(difference.mean() <= bound and ranks >= RANKS)
    return Finding(part="published", name=name, passed=passed, says=says, figures=figures)


def _rank_correlation(a: "np.ndarray", b: "np.ndarray") -> float:
    """Spearman's."""
    import numpy as np

    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])
