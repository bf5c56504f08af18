"""Does it fit? Asked before any work, and answered with what would."""

import bisect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ...config import ModelConfig
from ...errors import ConfigError, MemoryLimitError
from ...files import layout
from ...files.streaming import SLOTS, spread
from ...model.memory import MACS, STEP, SightMemory, lent, machine_limit, memory_needed
from ...model.network import Network, leaves
from ...model.sharing.share import ALONE, Share

if TYPE_CHECKING:
    from ...packing.plan import Planned

CONTEXT = 4_096  # tokens that have room when layers are streamed because a model does not fit otherwise


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a network's weights: of all but the experts, and of each layer's experts."""

    trunk: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, network: Network, growth: int = 0) -> "Sizes":
        """As they will be held; they need not be read yet. `growth` is what the trunk will gain."""
        layers = tuple(_bytes(leaves(layer.experts.parameters()).values()) for layer in network.decoder.layers)
        return cls(trunk=_bytes(leaves(network.parameters()).values()) - sum(layers) + growth, layers=layers)

    @classmethod
    def planned(cls, config: ModelConfig, planned: "Iterable[Planned]", share: Share = ALONE) -> "Sizes":
        """Of a pack that is not made yet, or of one machine's share of it; vision is not counted."""
        layers, trunk = [0] * len(config.layers), 0
        for item in planned:
            spans = share.spans(config, f"{item.source.path.removeprefix('model.')}.weight")
            rows = item.source.shape[-2] if spans else 1
            nbytes = item.nbytes * sum(stop - start for start, stop in spans) // rows if spans else item.nbytes
            if match := re.search(r"\.layers\.(\d+)\.experts\.", item.source.path):
                layers[int(match[1])] += nbytes
            elif item.source.component != "vision":
                trunk += nbytes
        return cls(trunk=trunk, layers=tuple(layers))

    def held(self, streamed: int) -> int:
        """Bytes in memory when so many layers' experts are streamed."""
        passing = {number: self.layers[number] for number in spread(streamed, len(self.layers))} if streamed else {}
        slots = SLOTS * max(passing.values(), default=0)
        return self.trunk + sum(self.layers) - sum(passing.values()) + slots


def _bytes(arrays: Iterable[mx.array]) -> int:
    return sum(array.nbytes for array in arrays)


def streamed_layers(config: ModelConfig, sizes: Sizes, limit: int, wanted: int | None = None) -> int:
    """How many layers' experts are to be streamed: as many as are `wanted`, else as few as leave room for CONTEXT
    tokens, none where everything fits.

    Errors: ConfigError for a number that would save nothing or that there is not, MemoryLimitError.
    """
    layers = len(sizes.layers)
    context = min(CONTEXT, config.max_position_embeddings)
    possible = [0, *range(SLOTS + 1, layers + 1)]
    if wanted is not None and wanted not in possible:
        raise ConfigError(
            f"stream_experts is {wanted}; this model has {layers} layers, of which {SLOTS} are in memory at any time:"
            f" expected 0, or {SLOTS + 1} … {layers}."
        )
    fitting = [n for n in possible if memory_needed(config, sizes.held(n), context) <= limit]
    least = [n for n in possible if memory_needed(config, sizes.held(n), 0) <= limit]
    if not least:
        raise MemoryLimitError(_floor(config, sizes, limit))
    if wanted is None:
        return fitting[0] if fitting else max(least)
    if wanted < least[0]:
        needed = memory_needed(config, sizes.held(wanted), 0)
        raise MemoryLimitError(
            f"with the experts of {wanted} layers streamed this model needs {needed / 1e9:.1f} GB;"
            f" {_lender(limit)} lets it use {limit / 1e9:.1f} GB.\n"
            f"At least {least[0]} of {layers} layers must be streamed (--stream-experts)."
        )
    return wanted


def smallest_streaming(config: ModelConfig, sizes: Sizes, prefix: int) -> tuple[int, int]:
    """The smallest memory (GiB) of a Mac, as it comes, that runs this behind so many tokens when experts are streamed;
    and the bytes that every pass reads there."""
    layers = len(sizes.layers)
    possible = [0, *range(SLOTS + 1, layers + 1)]
    for mac in (8, *MACS):
        for count in possible:
            if memory_needed(config, sizes.held(count), prefix) <= lent(mac):
                return mac, sum(sizes.layers[number] for number in spread(count, layers))
    return 0, 0


def _floor(config: ModelConfig, sizes: Sizes, limit: int) -> str:
    """The least there can be, and what it is made of."""
    count = len(sizes.layers)
    streams = count > SLOTS
    held = sizes.held(count if streams else 0)
    experts = f"{(held - sizes.trunk) / 1e9:.2f} GB {f'for {SLOTS} layers of them' if streams else 'for the experts'}"
    canvas = memory_needed(config, 0, 0) - STEP
    hint = ", or raise the limit: sudo sysctl iogpu.wired_limit_mb=…" if mx.metal.is_available() else ""
    return (
        f"this model needs at least {memory_needed(config, held, 0) / 1e9:.2f} GB and {_lender(limit)} lets it use"
        f" {limit / 1e9:.2f} GB: {sizes.trunk / 1e9:.2f} GB for all but the experts, {experts},"
        f" {(STEP + canvas) / 1e9:.2f} GB for a step.\n"
        f"Take a recipe of fewer bits (mlx_diffgemma.convert --dry-run){hint}."
    )


def _lender(limit: int) -> str:
    """Who sets the limit."""
    return "this machine" if limit == machine_limit() else "memory_limit"


def check_memory(
    config: ModelConfig,
    weights: int,
    limit: int,
    prefix: int = 0,
    *,
    rows: int = 1,
    forks: int = 0,
    sight: SightMemory | None = None,
) -> None:
    """Errors: MemoryLimitError when the weights, or they and the context, or these and the pictures (`sight`), cannot
    fit; says what would."""

    def needed(prefix: int) -> int:
        whole = memory_needed(config, weights, prefix, forks=forks)
        return whole + (rows - 1) * (whole - memory_needed(config, weights, 0))

    lender = _lender(limit)
    if needed(0) > limit:
        parameters = sum(math.prod(shape) for shape in layout.expected_tensors(config).values())
        bits = 8 * max(limit - needed(0) + weights, 0) / parameters
        fits = f"A pack of at most {bits:.1f} bits a weight would fit" if bits > 2 else "No recipe is small enough"
        hint = ", or raise the limit: sudo sysctl iogpu.wired_limit_mb=…" if mx.metal.is_available() else "."
        raise MemoryLimitError(
            f"this model needs {needed(0) / 1e9:.1f} GB and {lender} lets it use {limit / 1e9:.1f} GB.\n"
            f"{fits}: see mlx_diffgemma.convert --dry-run{hint}"
        )
    if needed(prefix) > limit:
        fits = bisect.bisect_right(range(prefix), limit, key=needed) - 1
        raise MemoryLimitError(
            f"the model and a context of {prefix} tokens need {needed(prefix) / 1e9:.1f} GB; {lender} lets it use"
            f" {limit / 1e9:.1f} GB.\nUp to {fits} tokens of prompt and reply would fit."
        )
    if sight is not None:
        seeing = needed(prefix) + sight.added
        if seeing > limit:
            raise MemoryLimitError(
                f"with its pictures this prompt needs {seeing / 1e9:.1f} GB, {sight.added / 1e9:.2f} GB of it to see"
                f" them; {lender} lets it use {limit / 1e9:.1f} GB.\n"
                "Give fewer pictures, a smaller budget for each, or take a recipe of fewer bits."
            )
