"""From a path or a repository to a loaded model."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import mlx.core as mx

from ..errors import ConfigError, TokenizerError
from ..files import adapters, checkpoint, hub, streaming, tuned, weights
from ..files.shipped import BUILT_IN
from ..model import threads, wiring
from ..model.expert_linear import QuantizedExpertLinear
from ..model.memory import machine_limit, memory_needed, weight_bytes
from ..model.network import Network
from ..model.tuning import DEFAULT, Trunk, Tuning
from ..text.tokenizer import Tokenizer
from ..values import integer, optional
from .fitting import Sizes, streamed_layers
from .model import DiffusionGemma
from .sight import built_in_sight, own_sight

ROOMY_PREFIX = 32_768  # tokens of prefix that must still fit for the trunk to be unpacked by itself
CACHE_LIMIT = 1 << 30  # bytes of freed buffers MLX may keep for reuse


def load(
    path_or_repo: str | Path = BUILT_IN,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    trunk: Trunk | None = None,
    memory_limit: int | None = None,
    stream_experts: int | None = None,
    ignore_keys: tuple[str, ...] = (),
    tuning: Tuning | None = None,
) -> DiffusionGemma:
    """Load a model: a pack made by `mlx_diffgemma.convert`, an mlx-community pack, or a Hugging Face folder; without a
    path, the small built-in model.

    `adapter` is a folder written by `mlx_diffgemma.train`. `trunk` says how everything but the experts is held:
    "packed" as the pack has it, "bf16" unpacked (the same values, faster products, more memory), "auto" unpacked
    on a GPU with room for it; without it `tuning` decides, which says how the machine likes the work cut: without it,
    what `mlx_diffgemma.tune` chose for this pack on this machine, if it did (`tuning=DEFAULT`: not that).
    `memory_limit` in bytes is this process's budget, instead of what the machine has. Of a model that does not fit, the
    experts of as many layers as must be are read from the disk in every pass (`notices` says so); `stream_experts` says
    of how many layers, 0 of none. `ignore_keys` are unknown keys of config.json that you know are harmless. What the
    checkpoint says that does nothing here is in `notices`.
    On Metal the weights and a prefix are wired while the model lives (mx.set_wired_limit).
    Sets MLX's cache of freed buffers, for the whole process, to at most 1 GiB (mx.set_cache_limit).
    Errors: CheckpointError, ConfigError, MemoryLimitError.
    """
    memory_limit = optional(integer(least=1)).read(memory_limit, "memory_limit")
    threads.clear_at_the_end()
    folder = hub.resolve(path_or_repo, revision=revision)
    if adapter is not None:
        adapter = adapters.find(adapter)
    opened, limit = checkpoint.open_checkpoint(folder, ignore_keys=ignore_keys), memory_limit or machine_limit()
    config = opened.config
    generation_config = checkpoint.read_generation_config(folder, config)
    found = tuned.Found(tuning=tuning) if tuning is not None else tuned.remembered(folder)
    tuning = found.tuning or DEFAULT
    if tuning.operations is not None:  # read by MLX when it first uses the GPU
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(tuning.operations))
    trunk = trunk or tuning.trunk
    network = weights.unread(opened)
    sizes = Sizes.of(network, growth=weights.unpacked_growth(network) if trunk == "bf16" else 0)
    count = streamed_layers(config, sizes, limit, stream_experts)
    if count:
        streaming.stream(network, opened, streaming.spread(count, len(sizes.layers)))
    weights.evaluate(network, opened)
    network.tuning = replace(tuning, trunk=_settle_trunk(network, trunk, limit))
    if adapter is not None:
        adapters.load(network, adapter)
    try:
        tokenizer = Tokenizer.load(folder)
    except TokenizerError:
        tokenizer = None
    if tokenizer is not None:
        own = (i for i in tokenizer.stop_ids if i < config.vocab_size)
        stop_ids = tuple(dict.fromkeys((*generation_config.stop_ids, *own)))
        generation_config = generation_config.replace(stop_ids=stop_ids)
    mx.set_cache_limit(CACHE_LIMIT)
    notices = (*opened.notices, *checkpoint.unused_settings(folder, config), *found.notices, *_slow(network))
    if count and stream_experts is None:
        notices += (_streams(network, sizes, limit),)
    model = DiffusionGemma(
        network,
        tokenizer,
        generation_config,
        folder=folder,
        memory_limit=limit,
        notices=notices,
        see=partial(built_in_sight, adapter=adapter)
        if folder == BUILT_IN
        else partial(own_sight, ignore_keys=ignore_keys),
    )
    if network.tuning.wired:
        wiring.wire(model, memory_needed(config, weight_bytes(network), ROOMY_PREFIX))
    return model


def _streams(network: Network, sizes: Sizes, limit: int) -> str:
    """Why layers are streamed that nobody asked for, and what that costs."""
    needed, passing = memory_needed(network.config, sizes.held(0), 0) / 1e9, network.experts
    return (
        f"the model needs {needed:.1f} GB and may use {limit / 1e9:.1f}: the experts of {len(passing.streamed)} of"
        f" {len(sizes.layers)} layers are read from the disk in every pass, {passing.bytes_a_pass / 1e9:.2f} GB."
    )


def _slow(network: Network) -> list[str]:
    """What is known to make these weights slow on this device, in a sentence each."""
    cuda = mx.default_device() == mx.gpu and not mx.metal.is_available()
    if not cuda or not any(isinstance(module, QuantizedExpertLinear) for module in network.modules()):
        return []
    return ["On CUDA, MLX multiplies packed experts 18 to 28 times slower than plain ones (mlx #4339): keep them bf16."]


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
