"""How many kernels a denoising step is, by part, counted from its graph: nothing is computed, and no GPU is needed.

    python -m benchmarks.kernels [--prefix 300 8192 32768] [--tile 8192 32768 65536] [--layers 30] [--packed]

The network has the released shapes, and no weights: they stay lazy. Counted are the primitives that do work; reshapes,
transposes, slices and broadcasts are views. Norms and rotations are one kernel each on Metal, where this machine's
graph spells them out: here they are counted as one. Attention is counted as MLX computes it unfused, which it is at
these head sizes. A few views are copies on a device, and a reduction may be two kernels: compare figures with figures.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks import common
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.generation import sampler, vocabulary
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.model.tuning import Tuning

VIEWS = set("Reshape Transpose Slice Squeeze ExpandDims Broadcast Flatten Unflatten Split AsStrided Depends".split())
VIEWS |= {"StopGradient", "BroadcastAxes", "NumberOfElements", "View", "Full"}  # a Full of one number is no kernel
PREFIXES, TILES = (300, 8192, 32_768), (8_192, 32_768, 65_536)
PARTS = ("layers", "vocabulary", "sampler")


def released(layers: int) -> dict[str, Any]:
    """The released text model's shapes (config.json of google/diffusiongemma-26B-A4B-it), with so many layers."""
    kinds = [("sliding", "full")[number % 6 == 5] + "_attention" for number in range(layers)]
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "text_config": {
            "vocab_size": 262_144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_hidden_layers": layers,
            "layer_types": kinds,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_experts": 128,
            "top_k_experts": 8,
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
        },
    }


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Norms and rotations as one primitive of their result's shape; on a CPU MLX spells them out."""
    own = mx.fast.rms_norm, mx.fast.rope
    mx.fast.rms_norm = lambda x, weight, eps, **_: mx.erfinv(x)
    mx.fast.rope = lambda x, *_, **__: mx.arctanh(x)
    try:
        yield
    finally:
        mx.fast.rms_norm, mx.fast.rope = own


def make_network(layers: int, packed: bool) -> Network:
    """The released shapes in bfloat16, or with 4-bit weights; every weight lazy."""
    network = Network(ModelConfig.from_dict(released(layers)))
    network.set_dtype(mx.bfloat16)
    if packed:
        nn.quantize(network, group_size=64, bits=4, class_predicate=lambda name, m: "router" not in name and None)
    return network


def primitives(outputs: Sequence[mx.array], stop: Sequence[mx.array] = ()) -> Counter[str]:
    """The primitives that compute `outputs` and not already `stop`, views left out."""
    return Counter(_names(outputs)) - Counter(_names(stop) if stop else {})


def _names(arrays: Sequence[mx.array]) -> Counter[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *arrays)
        names = re.findall(r'\[label ="([^"]+)", shape=rectangle\]', file.read_text())
    return Counter(name for name in names if name not in VIEWS)


def step(network: Network, prefix: int, tuning: Tuning) -> dict[str, Counter[str]]:
    """The kernels of one step behind so many tokens, by part; what fills the prefix does not count."""
    network.tuning = tuning
    length, size = network.config.canvas_length, network.config.hidden_size
    with one_kernel_each():
        cache = network.make_cache()
        for layer, kind in zip(cache.layers, network.config.layers, strict=True):
            held = prefix if layer.window is None else min(prefix, layer.window - 1)
            empty = mx.zeros((1, kind.num_kv_heads, held, kind.head_dim), mx.bfloat16)
            layer.append(empty, empty)
        cache.advance(prefix)
        before = [array for layer in cache.layers for array in layer.state]
        canvas, signal = mx.zeros((1, length), mx.int32), mx.zeros((1, length, size), mx.bfloat16)
        parameters = [array for _, array in _leaves(network)]
        hidden = network.denoise(canvas, cache, signal)
        shaping = vocabulary.Shaping(cap=30.0, temperature=0.8)
        draws = mx.zeros((1, length))
        sums = vocabulary.walk(hidden, network.decoder.embed_tokens, shaping, tuning=tuning)
        reading = sums.read(draws)
        read = [reading.best, reading.guess, reading.entropy, reading.tail, reading.signal]
        accepted = sampler.accept(reading.entropy, 0.1)
        after = sampler.renoise(accepted, reading.guess, canvas)
        done = sampler.settled(reading.best, [canvas], reading.entropy, stability=1, confidence=0.005)
        inputs = [*before, *parameters, canvas, signal, draws]
        return {
            "layers": primitives([hidden, *inputs], inputs),
            "vocabulary": primitives([*read, hidden, *inputs], [hidden, *inputs]),
            "sampler": primitives([after, done, *read, hidden, *inputs], [*read, hidden, *inputs]),
        }


def _leaves(network: Network) -> list[tuple[str, mx.array]]:
    from mlx_diffgemma.model.network import leaves

    return list(leaves(network.parameters()).items())


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    network, found, rows = make_network(options.layers, options.packed), [], []
    for tile in options.tile:
        for prefix in options.prefix:
            counted = {part: sum(c.values()) for part, c in step(network, prefix, Tuning(tile=tile, streams=1)).items()}
            a_layer = counted["layers"] / options.layers
            found.append({"tile": tile, "prefix": prefix, "layer": a_layer, **counted})
            rows.append([tile, prefix, *counted.values(), f"{a_layer:.1f}", sum(counted.values())])
    title = f"Kernels of a step: released shapes, {options.layers} layers, {'4 bits' if options.packed else 'bfloat16'}"
    common.report(rows, ["tile", "prefix", *PARTS, "a layer", "step"], title)
    common.finish(common.provenance() | {"benchmark": "kernels", "counts": found}, options.out)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=list(PREFIXES), help="tokens behind which the step is")
    parser.add_argument("--tile", type=int, nargs="+", default=list(TILES), help="ids of the vocabulary at a time")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--packed", action="store_true", help="with 4-bit weights instead of bfloat16")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
