"""From a path or a repository to a loaded model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import get_args

import mlx.core as mx

from ..errors import ConfigError, TokenizerError
from ..files import checkpoint, hub, tuned, weights
from ..model import threads, wiring
from ..model.expert_linear import QuantizedExpertLinear
from ..model.memory import machine_limit, memory_needed, weight_bytes
from ..model.network import Network
from ..model.tuning import DEFAULT, Trunk, Tuning
from ..text.tokenizer import Tokenizer
from .fitting import check_memory
from .model import DiffusionGemma

ROOMY_PREFIX = 32_768  # tokens of prefix that must still fit for the trunk to be unpacked by itself
CACHE_LIMIT = 1 << 30  # bytes of freed buffers MLX may keep for reuse


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    trunk: Trunk | None = None,
    memory_limit: int | None = None,
    tuning: Tuning | None = None,
) -> DiffusionGemma:
    """Load a model: a pack made by `mlx_diffgemma.convert`, an mlx-community pack, or a Hugging Face folder.

    `adapter` is a folder written by `mlx_diffgemma.train`. `trunk` says how everything but the experts is held:
    "packed" as the pack has it, "bf16" unpacked (the same values, faster products, more memory), "auto" unpacked
    on a GPU with room for it; without it `tuning` decides, which says how the machine likes the work cut: what
    `mlx_diffgemma.tune` chose for this pack on this machine, if it did, unless another is given (DEFAULT: none).
    On Metal the weights and a prefix are wired while the model lives (mx.set_wired_limit), unless tuned otherwise.
    `memory_limit` in bytes is this process's budget, instead of what the machine has.
    Sets MLX's cache of freed buffers, for the whole process, to at most 1 GiB (mx.set_cache_limit).
    Errors: CheckpointError, ConfigError, MemoryLimitError.
    """
    threads.clear_at_the_end()
    folder = hub.resolve(path_or_repo, revision=revision)
    if tuning is None:
        tuning = tuned.remembered(folder) or DEFAULT
    if tuning.operations is not None:  # read by MLX when it first uses the GPU
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(tuning.operations))
    config, limit = checkpoint.read_config(folder), memory_limit or machine_limit()
    check_memory(config, sum(file.stat().st_size for file in folder.glob("*.safetensors")), limit)
    network = weights.load_network(folder)
    network.tuning = replace(tuning, trunk=_settle_trunk(network, trunk or tuning.trunk, limit))
    if adapter is not None:
        from ..files import adapters

        adapters.load(network, Path(adapter))
    try:
        tokenizer = Tokenizer.load(folder)
    except TokenizerError:
        tokenizer = None
    generation_config = checkpoint.read_generation_config(folder)
    if tokenizer is not None:
        stop_ids = tuple(dict.fromkeys((*generation_config.stop_ids, *tokenizer.stop_ids)))
        generation_config = generation_config.replace(stop_ids=stop_ids)
    mx.set_cache_limit(CACHE_LIMIT)
    model = DiffusionGemma(network, tokenizer, generation_config, folder=folder, memory_limit=limit)
    if network.tuning.wired:
        wiring.wire(model, memory_needed(config, weight_bytes(network), ROOMY_PREFIX))
    return model


def notes(model: DiffusionGemma) -> list[str]:
    """What is known to make a model slow on this machine, a line each."""
    if mx.metal.is_available() or mx.default_device() != mx.gpu:
        return []
    if not any(isinstance(module, QuantizedExpertLinear) for module in model.network.modules()):
        return []
    return [
        "MLX's CUDA backend multiplies packed experts 18 to 28 times slower than plain ones (mlx #4339): where the memory"
        " is there, use a pack with bf16 experts."
    ]


def _settle_trunk(network: Network, trunk: Trunk, limit: int) -> Trunk:
    """Unpack the trunk if it was asked for, or if there is a GPU and room for a long prefix beside it; says which.

    Errors: ConfigError for a word that is none of the three, or when there is nothing to unpack.
    """
    if trunk not in get_args(Trunk):
        raise ConfigError(f"trunk is {trunk!r}, expected {', '.join(map(repr, get_args(Trunk)))}.")
    growth = weights.unpacked_growth(network)
    if trunk == "bf16" and not growth:
        raise ConfigError("trunk='bf16' would do nothing: this pack's trunk is not packed.")
    roomy = memory_needed(network.config, weight_bytes(network) + growth, ROOMY_PREFIX) <= limit
    if trunk == "bf16" or (trunk == "auto" and growth and roomy and mx.default_device() == mx.gpu):
        weights.unpack_trunk(network)
        return "bf16"
    return "packed" if growth else "auto"
