"""The export to PEFT: transformers' model with the adapter computes what ours does, prefix and canvas."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import record_reference as reference
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files import adapters, peft
from mlx_diffgemma.files.adapters import Lora
from mlx_diffgemma.model.network import Network
from tests.reference_models import MODELS

MODEL = MODELS["plain"]
BOTH = Lora(rank=4, scale=3.0, keys=adapters.TARGETS)
KINDS = {
    "default": Lora(rank=4),
    "everything": BOTH,
    "experts": Lora(rank=3, scale=1.1, keys=adapters.EXPERTS),
    "one-stack": Lora(rank=2, keys=("self_attn.v_proj", "experts.down_proj")),
}
PROMPT = np.random.default_rng(0).integers(0, 256, (1, 20))  # longer than the window
CANVAS = np.random.default_rng(1).integers(0, 256, (1, 24))

# PEFT 0.21 asks transformers 5.23 by an old name whether it checkpoints gradients.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(lora: Lora) -> Network:
    """Ours, with a random adapter that changes much."""
    network = MODEL.network()
    adapters.attach(network, lora)
    random = np.random.default_rng(3)
    grown = [
        (name, mx.array(random.normal(0, 0.1, weight.shape).astype(np.float32)))
        for name, weight in adapters.adapter_weights(network).items()
    ]
    network.load_weights(grown, strict=False)
    return network


def ours(network: Network) -> np.ndarray:
    cache = network.make_cache()
    network.encode(mx.array(PROMPT), cache)
    return np.array(network.logits(mx.array(CANVAS), cache))


def theirs(folder: Path | None) -> np.ndarray:
    """transformers' logits: the prompt through its encoder, the canvas through its decoder."""
    model: Any = MODEL.reference()
    if folder is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).get_base_model()
    prefix = reference.encode(model, PROMPT, np.zeros(1, int), np.zeros((0, 1, 24), int))
    return reference.decode(model, CANVAS, *prefix, None)


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_transformers_with_the_exported_adapter_computes_the_same(tmp_path: Path, lora: Lora) -> None:
    network = adapted(lora)
    peft.save_peft(network, lora, tmp_path, base="small")
    expected = ours(network)
    assert np.abs(theirs(tmp_path) - expected).max() < 1e-4
    assert np.abs(theirs(None) - expected).max() > 0.1


@pytest.mark.parametrize("role", peft.ROLES)
def test_each_role_needs_its_own_matrices(tmp_path: Path, role: str) -> None:
    """With either half left at zero the model is another one: the test above would see it."""
    network = adapted(BOTH)
    peft.save_peft(network, BOTH, tmp_path, base="small")
    file = tmp_path / peft.PEFT_WEIGHTS
    halved = {name: weight * 0 if f".{role}." in name else weight for name, weight in load_file(file).items()}
    save_file(halved, file)
    assert np.abs(theirs(tmp_path) - ours(network)).max() > 0.1


def test_the_config_is_what_peft_reads(tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = Lora(rank=4, scale=0.3)
    peft.save_peft(adapted(lora), lora, tmp_path, base="google/diffusiongemma-26B-A4B-it")
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, pytest.approx(1.2), 0.0, "none")
    assert config.base_model_name_or_path == "google/diffusiongemma-26B-A4B-it"
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]


def test_a_network_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter is attached"):
        peft.save_peft(MODEL.network(), Lora(), tmp_path / "peft", base="small")
    assert not (tmp_path / "peft").exists()
