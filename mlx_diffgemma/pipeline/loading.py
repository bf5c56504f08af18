"""From a path or a repository to a loaded model."""

import os
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import mlx.core as mx

from .._version import __version__
from ..errors import ConfigError, TokenizerError
from ..files import adapters, checkpoint, hub, shared, streaming, tuned, weights
from ..files.folder import fingerprint_of
from ..files.shipped import BUILT_IN
from ..generation.settings import GenerationConfig
from ..generation.vocabulary import is_parted
from ..model import threads, wiring
from ..model.expert_linear import QuantizedExpertLinear
from ..model.memory import machine_limit, memory_needed, weight_bytes
from ..model.network import Network
from ..model.sharing.share import ALONE, Share, check_divides
from ..model.tuning import DEFAULT, Trunk, Tuning
from ..text.tokenizer import Tokenizer
from ..values import integer, optional
from .machine.fitting import Sizes, streamed_layers
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
    share: Share = ALONE,
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
    checkpoint says that does nothing here is in `notices`. With a `share` from model/sharing (`ranks.join`) several
    machines hold the model together; all but the first then `follow` (pipeline/following).
    On Metal the weights and a prefix are wired while the model lives (mx.set_wired_limit).
    Sets MLX's cache of freed buffers, for the whole process, to at most 1 GiB (mx.set_cache_limit).
    Errors: CheckpointError, ConfigError, MemoryLimitError.
    """
    memory_limit = optional(integer(least=1)).read(memory_limit, "memory_limit")
    threads.clear_at_the_end()
    if adapter is not None:
        adapter = _adapter(adapter, share)
    opened, generation_config = share.together(
        lambda: _opened(hub.resolve(path_or_repo, revision=revision), ignore_keys, share)
    )
    folder, config, limit = opened.folder, opened.config, memory_limit or machine_limit()
    if share.size > 1:
        options = f"trunk {trunk}, stream_experts {stream_experts}, memory_limit {memory_limit}"
        share.agree(**_what_must_agree(folder), options=options)
    chosen = tuning is not None or share.size > 1  # what was tuned for one machine says nothing of several
    found = tuned.Found(tuning=tuning) if chosen else tuned.remembered(folder)
    tuning = replace(found.tuning or DEFAULT, share=share)
    if tuning.operations is not None:  # read by MLX when it first uses the GPU
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(tuning.operations))
    trunk = trunk or tuning.trunk
    network, sizes = share.together(lambda: _read(opened, tuning, trunk, limit, stream_experts))
    network.tuning = replace(tuning, trunk=share.together(lambda: _settle_trunk(network, trunk, limit)))
    limit = weight_bytes(network) + share.least(limit - weight_bytes(network))
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
    if network.experts.streamed and stream_experts is None:
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
        wiring.wire(model, memory_needed(network.own, weight_bytes(network), ROOMY_PREFIX))
    share.ready()
    return model


def _opened(folder: Path, ignore_keys: tuple[str, ...], share: Share) -> tuple[checkpoint.Checkpoint, GenerationConfig]:
    opened = checkpoint.open_checkpoint(folder, ignore_keys=ignore_keys)
    check_divides(opened.config, share.size)
    if share.size > 1 and not is_parted(opened.config.vocab_size):
        raise ConfigError(f"machines cannot share a vocabulary of {opened.config.vocab_size}: it has too few blocks.")
    return opened, checkpoint.read_generation_config(folder, opened.config)


def _adapter(adapter: str | Path, share: Share) -> Path:
    if share.size > 1:
        raise ConfigError(
            "an adapter is not cut: several machines share a model without one.\nMerge it first: mlx_diffgemma.fuse."
        )
    return adapters.find(adapter)


def _what_must_agree(folder: Path) -> dict[str, str]:
    """Of machines that share a model."""
    versions = {"versions": f"{__version__} (mlx {version('mlx')})", "devices": mx.default_device().type.name}
    return {"packs": fingerprint_of(folder), **versions}


def _read(
    opened: checkpoint.Checkpoint, tuning: Tuning, trunk: Trunk, limit: int, stream_experts: int | None
) -> tuple[Network, Sizes]:
    """The network with its weights; this machine's share of them."""
    network, share = weights.unread(opened), tuning.share
    network.tuning = tuning
    if share.size > 1:
        shared.cut(network, share)
    sizes = Sizes.of(network, growth=weights.unpacked_growth(network) if trunk == "bf16" else 0)
    if count := streamed_layers(network.own, sizes, limit, stream_experts):
        streaming.stream(network, opened, streaming.spread(count, len(sizes.layers)))
    if share.size > 1:
        shared.fill(network, opened, share)
    weights.evaluate(network, opened)
    return network, sizes


def _streams(network: Network, sizes: Sizes, limit: int) -> str:
    """Why layers are streamed that nobody asked for, and what that costs."""
    needed, passing = memory_needed(network.own, sizes.held(0), 0) / 1e9, network.experts
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
    roomy = memory_needed(network.own, weight_bytes(network) + growth, ROOMY_PREFIX) <= limit
    roomy = bool(network.tuning.share.least(int(roomy)))
    if trunk == "bf16" or (trunk == "auto" and growth and roomy and mx.default_device() == mx.gpu):
        weights.unpack_trunk(network)
        return "bf16"
    return "packed" if growth else "auto"
