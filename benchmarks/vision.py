"""The vision tower, ours beside mlx-vlm's, on the same weights and patches, in one run.

    python -m benchmarks.vision [--budget 280 1120] [--layers 1 2] [--runs 3]
    python -m benchmarks.vision --layers 27 --dtype bfloat16     where there is a GPU

Released shapes: 1,152 wide, 16 heads of 72, patches of 16, 10,240 positions; random weights. A picture fills its
budget: square, unpadded, cut into patches once and given to both. Each side's time is that of soft tokens [n, 2816]
from the patches, with the projection; it begins with weights and patches in memory.

All layers are alike, so a CPU, which takes seconds for one, runs a few of the 27: time at 27 is the time at the fewest
layers, and for each of the others the difference between the deepest and the shallowest, divided by the layers between.
That is computed, not measured, and says so. "memory" is what a side needs at its peak beside weights and patches,
counted by MLX: it does not grow with the layers. Runs alternate; figures are medians, ratios ours ÷ theirs.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_vlm.models.gemma4 import config as peer_config
from mlx_vlm.models.gemma4 import vision as peer_vision
from mlx_vlm.models.gemma4.gemma4 import MultimodalEmbedder

from benchmarks import common
from benchmarks.step import memory
from mlx_diffgemma.model.vision import Eyes
from mlx_diffgemma.model.vision_config import VisionConfig
from mlx_diffgemma.text.pictures.images import PictureConfig, scaled_size

RELEASED_LAYERS, HIDDEN = 27, 2816
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "standardize": True,
    "use_clipped_linears": False,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}


class PeerEyes(nn.Module):
    """mlx-vlm's tower and projection, under the same names."""

    def __init__(self, raw: dict[str, Any]):
        super().__init__()
        self.vision_tower = peer_vision.VisionModel(peer_config.VisionConfig.from_dict(raw))
        self.embed_vision = MultimodalEmbedder(raw["hidden_size"], HIDDEN, 1e-6)

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        return self.embed_vision(self.vision_tower(patches[None], positions[None]))[0]


def towers(layers: int, dtype: mx.Dtype) -> tuple[Eyes, PeerEyes]:
    """Both with one set of arrays: random, of a size that keeps activations near 1."""
    raw = VISION | {"num_hidden_layers": layers}
    ours, theirs = Eyes(VisionConfig.from_dict(raw), HIDDEN), PeerEyes(raw)
    weights = []
    for number, (name, value) in enumerate(dict(tree_flatten(ours.parameters())).items()):
        noise = mx.random.normal(value.shape, key=mx.random.key(number))
        made = 1 + 0.1 * noise if value.ndim == 1 else noise * value.shape[-1] ** -0.5
        weights.append((name, made.astype(dtype)))
    ours.load_weights(weights)
    theirs.load_weights(weights)
    mx.eval(ours.parameters())
    return ours, theirs


def compare(budget: int, layers: int, runs: int, dtype: mx.Dtype) -> dict[str, Any]:
    """Both sides at one budget and depth."""
    ours, theirs = towers(layers, dtype)
    wide, high = scaled_size(1000, 1000, budget, PictureConfig())
    rows, columns = high // VISION["patch_size"], wide // VISION["patch_size"]
    patches = mx.array(np.random.default_rng(budget).random((rows * columns, 768), np.float32))
    y, x = np.divmod(np.arange(rows * columns), columns)
    positions = mx.array(np.stack([x, y], axis=-1))
    mx.eval(patches, positions)
    mine, others = ours(patches, columns).astype(mx.float32), theirs(patches, positions).astype(mx.float32)
    difference = (mx.abs(mine - others).max() / mine.square().mean().sqrt()).item()
    del mine, others
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: mx.eval(ours(patches, columns)),
        "mlx-vlm": lambda: mx.eval(theirs(patches, positions)),
    }
    seconds = {side: float(np.median(times)) for side, times in common.alternate(sides, runs).items()}
    counted = {side: memory(look) for side, look in sides.items()}
    return {
        "budget": budget,
        "layers": layers,
        "patches": rows * columns,
        "tokens": rows * columns // VISION["pooling_kernel_size"] ** 2,
        "difference": difference,  # the largest, in units of the soft tokens' RMS
        "seconds": seconds,
        "memory": counted,
        "ratio": {"seconds": seconds["ours"] / seconds["mlx-vlm"], "memory": counted["ours"] / counted["mlx-vlm"]},
    }


def projected(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time at all layers, from the shallowest and the deepest that were measured at each budget."""
    made = []
    for budget in dict.fromkeys(result["budget"] for result in results):
        own = sorted((r for r in results if r["budget"] == budget), key=lambda r: r["layers"])
        low, high = own[0], own[-1]
        if low["layers"] == high["layers"] or high["layers"] >= RELEASED_LAYERS:
            continue
        seconds = {}
        for side, base in low["seconds"].items():
            each = (high["seconds"][side] - base) / (high["layers"] - low["layers"])
            seconds[side] = base + each * (RELEASED_LAYERS - low["layers"])
        made.append({"budget": budget, "seconds": seconds, "ratio": seconds["ours"] / seconds["mlx-vlm"]})
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, nargs="+", default=[280, 1120])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    options = parser.parse_args(arguments)
    dtype = getattr(mx, options.dtype)
    results = [compare(b, layers, options.runs, dtype) for b in options.budget for layers in options.layers]
    rows = [
        [
            r["budget"],
            r["layers"],
            *(f"{r['seconds'][side]:.2f} s" for side in r["seconds"]),
            *(f"{r['memory'][side] / 1e6:.0f} MB" for side in r["memory"]),
            *(f"{ratio:.2f}" for ratio in r["ratio"].values()),
            f"{r['difference']:.0e}",
        ]
        for r in results
    ]
    header = ["budget", "layers", "ours", "mlx-vlm", "ours, memory", "mlx-vlm, memory", "time", "memory", "difference"]
    common.report(rows, header, f"The tower of {options.dtype}: ours, mlx-vlm's, ours ÷ mlx-vlm's")
    whole = projected(results)
    if whole:
        lines = [[w["budget"], *(f"{s:.1f} s" for s in w["seconds"].values()), f"{w['ratio']:.2f}"] for w in whole]
        title = f"Computed for {RELEASED_LAYERS} layers, not measured"
        common.report(lines, ["budget", "ours", "mlx-vlm", "time"], title)
    document = {"benchmark": "vision", "config": VISION, "dtype": options.dtype, "runs": options.runs}
    common.finish(common.provenance() | document | {"results": results, "projected": whole}, options.out)


if __name__ == "__main__":
    main()
