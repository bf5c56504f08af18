"""An adapter in PEFT's format, for transformers' DiffusionGemmaForBlockDiffusion."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..disk import replacing
from ..errors import CheckpointError
from ..model.network import Network
from .adapters import CONFIG, EXPERTS, PEFT_WEIGHTS, Lora, adapter_weights
from .shards import write_tensors

ROLES = ("model.encoder.language_model", "model.decoder")  # where transformers keeps the two modules that share weights


def save_peft(network: Network, lora: Lora, folder: Path, *, base: str) -> None:
    """Write the attached adapter as PEFT does, for transformers' DiffusionGemmaForBlockDiffusion: `base` or its path.

    There encoder and decoder are two modules over the same weights, each adapted by itself, so the same matrices stand
    under both names and the model is the same function. It must stay unmerged: PEFT's `merge_and_unload` would add the
    change to the shared weights twice; `fuse` merges. Errors: CheckpointError when no adapter is attached.
    """
    found = adapter_weights(network)
    if not found:
        raise CheckpointError(f"nothing was written to {folder}: no adapter is attached to this network.")
    layers = len(network.decoder.layers)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG, "w") as stream:
        stream.write(json.dumps(_peft_config(lora, layers, base), indent=2) + "\n")
    weights = {name: weight for role in ROLES for name, weight in _peft_weights(found, lora, role).items()}
    write_tensors(folder / PEFT_WEIGHTS, weights, {"format": "pt"})


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
