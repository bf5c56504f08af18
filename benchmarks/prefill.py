"""The last chunk of a long prompt, ours beside mlx-vlm's: seconds and peak memory, in one run.

    python -m benchmarks.prefill [--length 1024 8192 32768] [--runs 3] [--out FILE]
    python -m benchmarks.prefill --length 131072 --runs 1 --ours-alone     mlx-vlm would hold 17 GB of scores there

Real heads and window, hidden size and depth scaled down, float32, random weights, chunks of 2,048. Three layers: a
sliding one, a full one, and a last one, of which a prefill needs the keys and values alone. The prefix before
the last chunk is random keys and values, put into each side's cache: what a chunk costs depends on how long it is, not
on what it says, and the last chunk of a prompt is where memory peaks. "memory" is what the chunk needs beyond weights
and prefix.
"""

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.diffusion_gemma import Model as PeerModel

from benchmarks import common
from benchmarks.models import Arrays, config, keys_and_values, our_network, our_prefix, peer_model, peer_prefix
from mlx_diffgemma.model.network import Network

CHUNK = 2048


def ours(network: Network, prefix: Arrays, chunk: mx.array) -> tuple[float, int]:
    """Our chunk behind a prefix; returns seconds, and bytes by which memory's peak rose."""
    cache = our_prefix(network, prefix, chunk.shape[1])
    return measured(lambda: (network.encode(chunk, cache), mx.eval(cache.state)))


def theirs(model: PeerModel, prefix: Arrays, chunk: mx.array) -> tuple[float, int]:
    """mlx-vlm's chunk, as its chunked prefill runs it."""
    caches = peer_prefix(model, prefix)

    def run() -> None:
        model.model.encoder(chunk, attention_mask=None, cache=caches)
        mx.eval([cache.state for cache in caches])

    return measured(run)


def measured(run: Any) -> tuple[float, int]:
    """Seconds, and bytes by which memory's peak rose above what was held before."""
    import time

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, mx.get_peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 8192, 32_768])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--ours-alone", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = config(arguments.hidden, 6, 16)
    raw["text_config"] |= {"vocab_size": arguments.vocabulary, "num_hidden_layers": 3}
    raw["text_config"]["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    network = our_network(raw)
    ways: dict[str, tuple[Any, Any]] = {"ours": (ours, network)}
    if not arguments.ours_alone:
        ways["mlx-vlm"] = (theirs, peer_model(raw, network))
    document: dict[str, Any] = {**common.provenance(), "config": raw, "results": []}
    rows = []
    for length in arguments.length:
        size = min(CHUNK, length)
        chunk = mx.random.randint(0, arguments.vocabulary, (1, size), key=mx.random.key(0))
        prefix = keys_and_values(network, length - size) if length > size else []
        sides: dict[str, list[tuple[float, int]]] = {side: [] for side in ways}
        for _ in range(arguments.runs):
            for side, (run, with_) in ways.items():
                sides[side].append(run(with_, prefix, chunk))
        result: dict[str, Any] = {"length": length}
        for what, column, scale, unit in (("seconds", 0, 1.0, "s"), ("memory", 1, 1e-6, "MB")):
            medians = {side: float(np.median([run[column] for run in runs])) for side, runs in sides.items()}
            result[what] = dict(medians)
            row = [f"{median * scale:.3f} {unit}" for median in medians.values()]
            if not arguments.ours_alone:
                result[what]["ratio"] = medians["ours"] / medians["mlx-vlm"]
                row.append(f"{result[what]['ratio']:.2f}")
            rows.append([length, what, *row])
        document["results"].append(result)
    common.report(rows, header=["prompt", "last chunk", "ours", "mlx-vlm", "ratio"][: len(rows[0])])
    common.finish(document, arguments.out)


if __name__ == "__main__":
    main()
