"""How fast a device does the products of a step: a model's own weights, the rows of a canvas, one product at a time."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...model.network import Network, leaves
from ...model.table import mix, scores, unpacked_dtype

ROUNDS, AT_ONCE = 3, 4  # products queued together, so that waiting for them is a small part


def speeds(network: Network) -> list[dict[str, Any]]:
    """For the experts' products, a projection, the head and the signal: `product`, `kernel`, `rows`, `teraflops` (10¹²
    multiplications and additions a second) and `gigabytes` (10⁹ bytes of weights a second, each read once)."""
    found = []
    for name, module, rows, inputs, share, work in _products(network):
        seconds = _seconds(work)
        size = share * sum(array.nbytes for array in leaves(module.parameters()).values())
        figures = {"teraflops": 2e-12 * work().size * inputs / seconds, "gigabytes": 1e-9 * size / seconds}
        found.append({"product": name, "kernel": type(module).__name__, "rows": rows} | figures)
    return found


Product = tuple[str, nn.Module, int, int, float, Callable[[], mx.array]]


def _products(network: Network) -> Iterator[Product]:
    """Name, weights, rows, length of a sum, the share of the weights that is read, and the product."""
    config, layer, table = network.config, network.decoder.layers[0], network.decoder.embed_tokens
    dtype = network.embed(mx.zeros((1, 1), mx.int32)).dtype
    rows, width = config.canvas_length, config.hidden_size
    pairs = rows * config.top_k_experts
    chosen = mx.sort(mx.random.randint(0, config.num_experts, (pairs,), mx.uint32, key=mx.random.key(0)))
    x, wide = mx.ones((rows, width), dtype), mx.ones((pairs, 1, width), dtype)
    inner = mx.ones((pairs, 1, config.moe_intermediate_size), dtype)
    up, down, query = layer.experts.gate_up_proj, layer.experts.down_proj, layer.self_attn.q_proj
    yield "experts' gate and up", up, pairs, width, 1.0, lambda: up(wide, chosen, sorted_indices=True)
    yield "experts' down", down, pairs, inner.shape[-1], 1.0, lambda: down(inner, chosen, sorted_indices=True)
    yield "queries", query, rows, width, 1.0, lambda: query(x)
    ids = slice(0, min(network.tuning.ids_at_once, config.vocab_size))
    share = ids.stop / config.vocab_size
    p = mx.ones((rows, ids.stop), unpacked_dtype(table))
    yield "a tile of the head", table, rows, width, share, lambda: scores(x, table, ids)
    yield "a tile of the signal", table, rows, ids.stop, share, lambda: mix(p, table, ids)


def _seconds(work: Callable[[], mx.array]) -> float:
    """Of one product, the best of some rounds; the first is not counted."""
    taken = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        mx.eval([work() for _ in range(AT_ONCE)])
        taken.append((time.perf_counter() - begun) / AT_ONCE)
    return min(taken[1:])
