"""The unpacked trunk: the same model, in more memory."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.files import weights
from mlx_diffgemma.model.network import Network
from mlx_diffgemma.pipeline import loading
from tests import small


def packed_network() -> Network:
    """Everything but the experts at 8 bits; the experts at 4 where their width allows it."""
    network = small.network()

    def packing(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        return {"bits": 4 if ".experts." in path else 8, "group_size": 32}

    nn.quantize(network, class_predicate=packing)
    return network


def weight_bytes(network: Network) -> int:
    return sum(array.nbytes for _, array in tree_flatten(network.parameters()))


def logits(network: Network) -> mx.array:
    cache = network.make_cache()
    network.encode(mx.array([[2, 40, 41]]), cache)
    canvas = mx.array([[50, 51, 52]])
    first = network.logits(canvas, cache)
    return network.logits(canvas, cache, first)


def test_unpacking_changes_nothing_but_the_size() -> None:
    network = packed_network()
    before, size, growth = logits(network), weight_bytes(network), weights.unpacked_growth(network)
    weights.unpack_trunk(network)
    assert mx.abs(logits(network) - before).max().item() < 1e-4
    assert growth > 0 and weight_bytes(network) - size == growth
    assert weights.packed_trunk(network) == {}
    assert weights.unpacked_growth(network) == 0


@pytest.mark.parametrize(
    ("mode", "group", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4), ("affine", 32, 5)]
)
def test_the_growth_is_told_to_the_byte_for_every_mode(mode: str, group: int, bits: int) -> None:
    network = small.network()
    nn.quantize(
        network,
        group,
        bits,
        mode=mode,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and "experts" not in path,
    )
    packed, growth = weight_bytes(network), weights.unpacked_growth(network)
    weights.unpack_trunk(network)
    assert weight_bytes(network) - packed == growth > 0


def test_the_experts_stay_packed() -> None:
    network = packed_network()
    experts = network.decoder.layers[0].experts.gate_up_proj
    weights.unpack_trunk(network)
    assert network.decoder.layers[0].experts.gate_up_proj is experts
    assert "scales" in experts


@pytest.mark.parametrize(("trunk", "packed"), [("packed", True), ("bf16", False)])
def test_what_was_asked_for_is_done(trunk: loading.Trunk, packed: bool) -> None:
    network = packed_network()
    loading._settle_trunk(network, trunk, 10**12)
    assert bool(weights.packed_trunk(network)) is packed


def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would do nothing"):
        loading._settle_trunk(small.network(), "bf16", 10**12)
    with pytest.raises(ConfigError, match="expected 'auto', 'packed', 'bf16'"):
        loading._settle_trunk(small.network(), "fp8", 10**12)  # type: ignore[arg-type]
