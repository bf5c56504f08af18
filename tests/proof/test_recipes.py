"""What each recipe does to the built-in model, against float32 (benchmarks/recipes.py also counts right answers)."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import recipes
from benchmarks.recipes import Kept, Reading
from mlx_diffgemma.files import weights
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """Every recipe, packed by the converter and computed in float32."""
    folder, whole, found = tmp_path_factory.mktemp("packs"), Reading.of(recipes.built_in(), recipes.RENOISED), {}
    for name in recipe_names():
        network = weights.load_network(recipes.pack(name, folder))
        network.set_dtype(mx.float32)  # scales, biases and what is not packed: MLX on a CPU is slow in bfloat16
        found[name] = Kept.of(whole, Reading.of(network, recipes.RENOISED))
    return found


def test_float32_returns_its_settled_canvas() -> None:
    canvases = np.concatenate([np.tile(canvas.flatten(), 2) for _, canvas in recipes.settled()])
    assert (Reading.of(recipes.built_in(), 0.0).best == canvases).mean() > 0.95


def test_every_recipe_stays_close(kept: dict[str, Kept], record_summary: Callable[[str], None]) -> None:
    record_summary(
        "recipes on the built-in model against float32: equal best tokens, accepted sets in common, entropy correlation"
    )
    for name, it in kept.items():
        record_summary(f"  {name:8} {it.equal_best:6.1%}  {it.accept_overlap:6.1%}  {it.entropy_correlation:.4f}")
    assert kept["q8"].equal_best >= 0.99 and kept["q8"].entropy_correlation >= 0.99
    for name, it in kept.items():
        if not load_recipe(name).experimental:
            assert it.equal_best >= 0.98 and it.accept_overlap >= 0.97 and it.entropy_correlation >= 0.9, name


def test_the_default_loses_no_more_than_a_point_to_q8(kept: dict[str, Kept]) -> None:
    assert kept["q4"].equal_best >= kept["q8"].equal_best - 0.01


def test_fewer_bits_keep_less(kept: dict[str, Kept]) -> None:
    correlations = [kept[name].entropy_correlation for name in ("q2", "q4", "q8")]
    assert correlations == sorted(correlations)
