"""LoRA: nothing changes until it is trained, saving and loading is exact, merging is the same function."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_diffgemma.errors import CheckpointError, ConfigError
from mlx_diffgemma.files import adapters
from mlx_diffgemma.files.adapters import Lora
from mlx_diffgemma.model.network import Network, leaves
from tests.reference_models import MODELS

EVERYTHING = Lora(rank=4, scale=3.0, keys=adapters.TARGETS)


def network() -> Network:
    return MODELS["plain"].network()


def logits(net: Network) -> mx.array:
    cache = net.make_cache()
    net.encode(mx.arange(20)[None], cache)
    return net.logits(mx.arange(24)[None] * 7 % 256, cache)


def trained(lora: Lora) -> Network:
    """A network whose adapter is no longer zero."""
    net = network()
    adapters.attach(net, lora)
    grown = [
        (n, w if n.endswith("lora_a") else 0.02 + mx.zeros_like(w)) for n, w in adapters.adapter_weights(net).items()
    ]
    net.load_weights(grown, strict=False)
    return net


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains() -> None:
    net = network()
    before = logits(net)
    adapters.attach(net, Lora())
    assert mx.array_equal(logits(net), before)
    names = leaves(net.trainable_parameters())
    assert names
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)
    touched = {name.split(".", 3)[3].rsplit(".", 1)[0] for name in names}
    assert touched == {*adapters.ATTENTION, *adapters.DENSE}


@pytest.mark.parametrize("lora", [Lora(), EVERYTHING], ids=["default", "everything"])
def test_a_saved_adapter_loads_to_the_same_bits(tmp_path: Path, lora: Lora) -> None:
    net = trained(lora)
    adapters.save(net, lora, tmp_path)
    again = network()
    adapters.load(again, tmp_path)
    assert not mx.allclose(logits(network()), logits(again), atol=1e-3)
    assert mx.array_equal(logits(again), logits(net))


def test_the_files_are_those_of_mlx_lm(tmp_path: Path) -> None:
    """mlx-lm's own loader takes them, and computes the same."""
    from mlx_lm.tuner.utils import load_adapters

    net = trained(Lora())
    adapters.save(net, Lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    plain = network()

    class AsMlxLm(nn.Module):
        """mlx-lm looks for the layers at `model.layers`."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = plain.decoder

        @property
        def layers(self) -> list:
            return self.decoder.layers

    load_adapters(AsMlxLm(), str(tmp_path))
    assert mx.array_equal(logits(plain), logits(net))


@pytest.mark.parametrize("lora", [Lora(), EVERYTHING], ids=["default", "everything"])
def test_merging_is_the_same_function(lora: Lora) -> None:
    net = trained(lora)
    apart = logits(net)
    adapters.fuse(net)
    assert leaves(net.parameters()).keys() == leaves(network().parameters()).keys()
    assert mx.allclose(logits(net), apart, atol=2e-3)


def test_a_quantized_base_keeps_its_packing_when_merged() -> None:
    net = network()
    nn.quantize(net, group_size=32, bits=8, class_predicate=lambda path, _: path.endswith(("q_proj", "up_proj")))
    names = leaves(net.parameters()).keys()
    adapters.attach(net, Lora())
    adapters.fuse(net)
    assert leaves(net.parameters()).keys() == names


def test_the_callers_random_numbers_go_on() -> None:
    """Attaching draws; whoever drew before and after it sees nothing of it."""
    drawn = []
    for attached in (False, True):
        base = network()
        mx.random.seed(3)
        mx.random.normal((2,))
        if attached:
            adapters.attach(base, Lora(), seed=7)
        drawn.append(mx.random.normal((4,)).tolist())
    assert drawn[0] == drawn[1]


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    net = trained(Lora())
    adapters.save(net, Lora(), tmp_path)
    with pytest.raises(CheckpointError, match=r"another model: decoder\.layers\.0\.mlp"):
        adapters.load(MODELS["three-heads"].network(), tmp_path)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        adapters.load(network(), tmp_path)
    adapters.save(trained(Lora()), Lora(), tmp_path)
    file = tmp_path / "adapter_config.json"
    written = file.read_text()
    file.write_text(json.dumps(json.loads(written) | {"num_layers": 1}))
    with pytest.raises(CheckpointError, match=r"num_layers is 1, expected \d: adapters of some layers alone"):
        adapters.load(network(), tmp_path)
    file.write_text(written.replace('"lora"', '"dora"'))
    with pytest.raises(CheckpointError, match="dora"):
        adapters.load(network(), tmp_path)


def test_targets_and_rank_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"known: self_attn\.q_proj"):
        Lora(keys=("self_attn.qkv",))
    with pytest.raises(ConfigError, match="rank is 0, expected a positive integer"):
        Lora(rank=0)
