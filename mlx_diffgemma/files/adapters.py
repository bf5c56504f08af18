"""LoRA: attach, save, load, fuse. The layers and the files are mlx-lm's; peft.py writes PEFT's.

Encoder and decoder share their weights, so one adapter acts in both roles and can be merged. TRL trains two
separate adapters for the two roles; those cannot be merged into this architecture, and are not read.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..disk import replacing, user_path
from ..errors import CheckpointError, ConfigError
from ..model.expert_linear import ExpertLinear, QuantizedExpertLinear
from ..model.network import Network, leaves
from ..readers import read_json
from ..values import Field, Table, integer, many, number, one_of
from .shards import printable, read_header, write_tensors

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
TARGETS = (*ATTENTION, *DENSE, *EXPERTS)
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which projections get an adapter, in every layer, and of what size. The change is `scale` · B · A."""

    rank: int = 16
    scale: float = 2.0  # alpha / rank
    keys: tuple[str, ...] = (*ATTENTION, *DENSE)

    def __post_init__(self) -> None:
        integer(least=1, most=1 << 16).read(self.rank, "rank")
        number().read(self.scale, "scale")
        if not self.keys:
            raise ConfigError("an adapter needs at least one target.")
        if unknown := [key for key in self.keys if key not in TARGETS]:
            raise ConfigError(f"unknown LoRA targets {', '.join(unknown)}; known: {', '.join(TARGETS)}.")


def attach(network: Network, lora: Lora, *, seed: int = 0) -> None:
    """Freeze the network and put an adapter, which changes nothing yet, beside every targeted projection. The caller's
    random numbers go on as they would have."""
    network.freeze()
    state: Any = mx.random.state
    high, low = state[0].tolist()
    mx.random.seed(seed)
    for layer in network.decoder.layers:
        found = [(key, module) for key, module in layer.named_modules() if key in lora.keys]
        layer.update_modules(tree_unflatten([(key, _adapted(module, lora)) for key, module in found]))
    mx.random.seed(high << 32 | low)


def _adapted(module: nn.Module, lora: Lora) -> nn.Module:
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    stacked = isinstance(module, ExpertLinear | QuantizedExpertLinear)
    make: Any = LoRASwitchLinear.from_base if stacked else LoRALinear.from_base
    return make(_of_mlx_lm(module) if stacked else module, r=lora.rank, dropout=0.0, scale=lora.scale)


def _of_mlx_lm(module: ExpertLinear | QuantizedExpertLinear) -> nn.Module:
    """mlx-lm's layer of the same arrays, which its adapters know how to merge."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    if isinstance(module, ExpertLinear):
        made: Any = SwitchLinear(1, 1, 1, bias=False)
    else:
        how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        made = QuantizedSwitchLinear(128, 128, 1, bias=False, **how)
        made.scales, made.biases = module.scales, module.get("biases")
    made.weight = module.weight
    made.freeze()
    return made


def save(network: Network, lora: Lora, folder: Path) -> None:
    """Write adapter_config.json and adapters.safetensors, as mlx-lm does. Errors: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {**asdict(lora), "keys": list(lora.keys), "dropout": 0.0}
    layers = len(network.decoder.layers)
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
    write_tensors(folder / WEIGHTS, adapter_weights(network))
    with replacing(folder / CONFIG, "w") as stream:
        stream.write(json.dumps(config, indent=2) + "\n")


def find(path: str | Path) -> Path:
    """The folder of an adapter that is said to be at `path`. Errors: ConfigError, CheckpointError."""
    folder = user_path(path, "adapter")
    if folder.is_file():
        raise CheckpointError(f"adapter {folder} is a file, expected the folder that mlx_diffgemma.train wrote.")
    if not folder.is_dir():
        raise CheckpointError(f"adapter {folder}: there is no such folder.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            peft = (
                " This looks like a PEFT adapter: give the folder above it."
                if (folder / PEFT_WEIGHTS).is_file()
                else ""
            )
            raise CheckpointError(f"{folder} is not a LoRA adapter: {name} is missing.{peft}")
    return folder


def load(network: Network, folder: Path) -> None:
    """Attach the adapter in `folder`, unmerged.

    Errors: CheckpointError when the folder is no adapter, or one of another model: every tensor must fit exactly.
    """
    lora, layers = read_config(folder)
    own = len(network.decoder.layers)
    if layers not in (None, -1, own):
        raise CheckpointError(
            f"{folder / CONFIG}: num_layers is {layers}, expected {own}: adapters of some layers alone are not read."
        )
    read_header(folder / WEIGHTS)  # a damaged file is refused in words
    attach(network, lora)
    found: Any = mx.load(str(folder / WEIGHTS))
    expected = {name: weight.shape for name, weight in adapter_weights(network).items()}
    shapes = {name: weight.shape for name, weight in found.items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise CheckpointError(
            f"{folder / WEIGHTS}: this adapter belongs to another model: {printable(wrong[0])} is"
            f" {shapes.get(wrong[0])}, expected {expected.get(wrong[0])} ({len(wrong)} tensors differ)."
        )
    for name, weight in found.items():
        if not mx.issubdtype(weight.dtype, mx.floating) or not mx.isfinite(weight).all():
            raise CheckpointError(f"{folder / WEIGHTS}: {name} holds NaN, infinity or integers, expected weights.")
    network.load_weights(list(found.items()), strict=False)
    network.eval()
    mx.eval(network.parameters())


_LORA = Table(
    Field("rank", integer(least=1, most=1 << 16)),
    Field("scale", number()),
    Field("keys", many(one_of(*TARGETS), least=1)),
    Field("dropout", one_of(0, 0.0), 0.0),
    open=True,
)
_CONFIG = Table(
    Field("fine_tune_type", one_of("lora"), "lora"),
    Field("num_layers", integer(least=-1), None),
    Field("lora_parameters", _LORA.kind),
    open=True,
)


def read_config(folder: Path) -> tuple[Lora, int | None]:
    """The adapter's rank, scale and targets, and of how many layers it says it is. Errors: CheckpointError."""
    values = read_json(folder / CONFIG)
    if "peft_type" in values:
        raise CheckpointError(f"{folder / CONFIG} is PEFT's, expected the folder that mlx_diffgemma.train wrote.")
    whole = _CONFIG.read(values, str(folder / CONFIG), fault=CheckpointError)
    values = whole["lora_parameters"]
    return Lora(rank=values["rank"], scale=float(values["scale"]), keys=values["keys"]), whole["num_layers"]


def fuse(network: Network) -> None:
    """Merge every adapter into its projection; a quantized one is quantized again, as it was."""
    merged = [(name, module.fuse()) for name, module in network.named_modules() if hasattr(module, "fuse")]
    network.update_modules(tree_unflatten(merged))


def adapter_weights(network: Network) -> dict[str, mx.array]:
    """The adapters' matrices, by dotted name."""
    found = leaves(network.parameters())
    return {name: weight for name, weight in found.items() if name.endswith((".lora_a", ".lora_b"))}
