"""LoRA: attach, save, load, fuse. The layers and the files are mlx-lm's; `save_peft` writes PEFT's.

Encoder and decoder share their weights, so one adapter acts in both roles and can be merged. TRL trains two
separate adapters for the two roles; those cannot be merged into this architecture, and are not read.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from .errors import CheckpointError, ConfigError
from .network import Network

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
TARGETS = (*ATTENTION, *DENSE, *EXPERTS)
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
ROLES = ("model.encoder.language_model", "model.decoder")  # where transformers keeps the two modules that share weights


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which projections get an adapter, in every layer, and of what size. The change is `scale` · B · A."""

    rank: int = 16
    scale: float = 2.0  # alpha / rank
    keys: tuple[str, ...] = (*ATTENTION, *DENSE)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected at least 1.")
        if unknown := [key for key in self.keys if key not in TARGETS]:
            raise ConfigError(f"unknown LoRA targets {', '.join(unknown)}; known: {', '.join(TARGETS)}.")


def attach(network: Network, lora: Lora, *, seed: int = 0) -> None:
    """Freeze the network and put an adapter, which changes nothing yet, beside every targeted projection."""
    network.freeze()
    mx.random.seed(seed)
    for layer in network.decoder.layers:
        found = [(key, module) for key, module in layer.named_modules() if key in lora.keys]
        layer.update_modules(tree_unflatten([(key, _adapted(module, lora)) for key, module in found]))


def _adapted(module: nn.Module, lora: Lora) -> nn.Module:
    stacked = isinstance(module, SwitchLinear | QuantizedSwitchLinear)
    make: Any = LoRASwitchLinear.from_base if stacked else LoRALinear.from_base
    return make(module, r=lora.rank, dropout=0.0, scale=lora.scale)


def save(network: Network, lora: Lora, folder: Path) -> None:
    """Write adapter_config.json and adapters.safetensors, as mlx-lm does."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {**asdict(lora), "keys": list(lora.keys), "dropout": 0.0}
    layers = len(network.decoder.layers)
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    mx.save_safetensors(str(folder / WEIGHTS), _weights(network))


def load(network: Network, folder: Path) -> None:
    """Attach the adapter in `folder`, unmerged.

    Errors: CheckpointError when the folder is no adapter, or one of another model: every tensor must fit exactly.
    """
    lora = read_config(folder)
    attach(network, lora)
    try:
        found: Any = mx.load(str(folder / WEIGHTS))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    expected = {name: weight.shape for name, weight in _weights(network).items()}
    shapes = {name: weight.shape for name, weight in found.items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise CheckpointError(
            f"{folder}: this adapter belongs to another model: {wrong[0]} is {shapes.get(wrong[0])},"
            f" expected {expected.get(wrong[0])} ({len(wrong)} tensors differ)."
        )
    network.load_weights(list(found.items()), strict=False)
    network.eval()
    mx.eval(network.parameters())


def read_config(folder: Path) -> Lora:
    """The adapter's rank, scale and targets. Errors: CheckpointError, ConfigError."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        values = config["lora_parameters"]
        kind, dropout = config.get("fine_tune_type", "lora"), values.get("dropout", 0.0)
        lora = Lora(rank=values["rank"], scale=values["scale"], keys=tuple(values["keys"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a LoRA adapter: {CONFIG} cannot be used ({error!r}).") from None
    if kind != "lora" or dropout:
        raise CheckpointError(f"{folder}: fine_tune_type is {kind!r} with dropout {dropout}, expected 'lora' with 0.")
    return lora


def fuse(network: Network) -> None:
    """Merge every adapter into its projection; a quantized one is quantized again, as it was."""
    merged = [(name, module.fuse()) for name, module in network.named_modules() if hasattr(module, "fuse")]
    network.update_modules(tree_unflatten(merged))


def save_peft(network: Network, lora: Lora, folder: Path, *, base: str) -> None:
    """Write the attached adapter as PEFT does, for transformers' DiffusionGemmaForBlockDiffusion: `base` or its path.

    There encoder and decoder are two modules over the same weights, each adapted by itself, so the same matrices stand
    under both names and the model is the same function. It must stay unmerged: PEFT's `merge_and_unload` would add the
    change to the shared weights twice; `fuse` merges. Errors: CheckpointError when no adapter is attached.
    """
    found = _weights(network)
    if not found:
        raise CheckpointError(f"nothing was written to {folder}: no adapter is attached to this network.")
    layers = len(network.decoder.layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(_peft_config(lora, layers, base), indent=2) + "\n")
    weights = {name: weight for role in ROLES for name, weight in _peft_weights(found, lora, role).items()}
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), weights, {"format": "pt"})


def _peft_config(lora: Lora, layers: int, base: str) -> dict[str, Any]:
    """What PEFT 0.21 has to know. No task type: its wrappers for one do not know this model's arguments."""
    roles = "|".join(re.escape(role.removeprefix("model.")) for role in ROLES)
    linear = "|".join(re.escape(key) for key in lora.keys if key not in EXPERTS)
    stacked = [key for key in lora.keys if key in EXPERTS]
    model = "transformers.models.diffusion_gemma.modeling_diffusion_gemma"
    alpha = lora.rank * lora.scale
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": "DiffusionGemmaForBlockDiffusion", "parent_library": model},
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf"model\.({roles})\.layers\.\d+\.({linear})" if linear else [],
        "target_parameters": [f"{role}.layers.{i}.{key}" for role in ROLES for i in range(layers) for key in stacked],
    }


def _peft_weights(found: dict[str, mx.array], lora: Lora, role: str) -> dict[str, mx.array]:
    """The matrices under PEFT's names for one role. It wraps the two stacks of experts one around the other, the
    first one innermost, and lays their A [E, r, in] out as [E · r, in], their B [E, out, r] as [out, r · E]."""
    renamed = {}
    for name, weight in found.items():
        path, _, part = name.removeprefix("decoder.").rpartition(".")
        _, _, key = path.split(".", 2)  # layers.N.key
        if key in EXPERTS:
            inner = key == EXPERTS[0] and EXPERTS[1] in lora.keys
            path = path.rpartition(".")[0] + (".base_layer" if inner else "")
            weight = weight.flatten(0, 1) if part == "lora_a" else weight.transpose(1, 2, 0).flatten(1)
        else:
            weight = weight.T
        renamed[f"base_model.model.{role}.{path}.lora_{part[-1].upper()}.weight"] = weight
    return renamed


def _weights(network: Network) -> dict[str, mx.array]:
    found = leaves(network.parameters())
    return {name: weight for name, weight in found.items() if name.endswith((".lora_a", ".lora_b"))}


def leaves(tree: dict[str, Any]) -> dict[str, mx.array]:
    """The arrays of a tree of parameters, by dotted name."""
    flat: Any = tree_flatten(tree)
    return dict(flat)
