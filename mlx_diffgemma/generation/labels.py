"""How probable it is that an answer is one of a few runs of ids, in one pass over a canvas."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..model.network import Network
from . import vocabulary
from .constraint.classes import Head
from .noise import Noise
from .settings import GenerationConfig

Ids = tuple[int, ...]


def log_probabilities(
    network: Network,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[Ids]],
    settings: GenerationConfig,
    noise: Noise,
    length: int,
) -> list[np.ndarray]:
    """For each of B prompts the log-probability of each of its labels, float64 [labels].

    Of a label, then a stop id, then stop ids and padding up to `length`, under the distributions of one step that sees
    the noise of a first canvas, at temperature 1: p(label) = Π p_i(id_i).
    """
    hidden = _first_look(network, prompts, settings, noise.canvas(0)[:, :length])  # [B, L, H]
    table = network.decoder.embed_tokens
    shaping = vocabulary.Shaping(cap=network.config.final_logit_softcapping, temperature=1.0)
    sums = vocabulary.walk(hidden, table, shaping, with_signal=False, tuning=network.tuning)
    tail = sorted({*settings.stop_ids, settings.pad_token_id})
    ids = sorted({token for row in labels for label in row for token in label} | set(tail))
    logits = Head(table=table, shaping=shaping).logits(hidden.flatten(0, 1), mx.array(ids))
    logs = np.array(logits, np.float64).reshape(len(prompts), length, -1) - np.array(sums.log_mass())[..., None]
    column = {token: number for number, token in enumerate(ids)}
    stops = np.logaddexp.reduce(logs[..., [column[i] for i in settings.stop_ids]], axis=-1)  # [B, L]
    fills = np.logaddexp.reduce(logs[..., [column[i] for i in tail]], axis=-1)
    return [
        np.array([_of_label(row, [column[i] for i in label], stop, fill) for label in some])
        for row, some, stop, fill in zip(logs, labels, stops, fills, strict=True)
    ]


def _of_label(logs: np.ndarray, label: Sequence[int], stops: np.ndarray, fills: np.ndarray) -> float:
    size = len(label)
    return float(logs[np.arange(size), label].sum() + stops[size : size + 1].sum() + fills[size + 1 :].sum())


def _first_look(
    network: Network, prompts: Sequence[Sequence[int]], settings: GenerationConfig, canvas: mx.array
) -> mx.array:
    """Encode the prompts, padded on their left, in chunks; one pass over the canvas [B, L] → [B, L, H]."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padded = mx.array(
        [[settings.pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], mx.int32
    )
    cache = network.make_cache(len(prompts), padding, canvas.shape[1])
    cache.reserve(longest)
    for start in range(0, longest, settings.prefill_step_size):
        network.encode(padded[:, start : start + settings.prefill_step_size], cache)
        mx.eval(cache.state)
    return network.denoise(canvas, cache, None)
