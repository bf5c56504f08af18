"""What runs need in bytes, what a machine lends, and which Mac has so much."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import ModelConfig
from .network import Network, leaves
from .vision import Eyes, looking_bytes

# Memory of a Mac (GiB), and the share Metal lends one process unless iogpu.wired_limit_mb says otherwise.
MACS = (16, 18, 24, 32, 36, 48, 64, 96, 128)
SYSTEM = 4 << 30  # bytes macOS keeps for itself when that limit is raised

# Bytes beside weights and prefix, for a step's arrays or a 2,048-token prefill chunk's. Measured in float32, two layers
# at the released widths behind 32K tokens: 624 MB a step, 982 MB a chunk; bfloat16 halves nearly all of it.
STEP = 800_000_000


def memory_needed(
    config: ModelConfig,
    weight_bytes: int,
    prefix: int,
    item_size: int = 2,
    *,
    forks: int = 0,
    sight: "SightMemory | None" = None,
) -> int:
    """Bytes to denoise behind a prefix of that many tokens: weights, keys and values, one step. `sight` is what
    pictures add, where a prompt has some.

    `forks` of the prefix that are kept beside it hold windows of their own; what full layers hold is shared.
    """
    total = weight_bytes + STEP + (0 if sight is None else sight.added)
    for layer in config.layers:
        positions = min(prefix, config.sliding_window - 1) if layer.is_sliding else prefix
        held = 2 * layer.num_kv_heads * layer.head_dim * (positions + config.canvas_length) * item_size
        total += held * (1 + forks if layer.is_sliding else 1)
    return total


@dataclass(frozen=True, kw_only=True)
class SightMemory:
    """Bytes that pictures take: the tower's weights, all soft tokens, and looking at the largest picture, which is over
    before a step begins: the larger of the two is needed."""

    weights: int
    tokens: int
    looking: int

    @property
    def added(self) -> int:
        """Beside what a run without pictures needs."""
        return self.weights + self.tokens + max(self.looking - STEP, 0)

    @classmethod
    def of(cls, eyes: Eyes, patches: Sequence[int]) -> "SightMemory":
        """For pictures of so many patches each; nothing need be read yet."""
        config, arrays = eyes.vision_tower.config, leaves(eyes.parameters())
        size = arrays["vision_tower.patch_embedder.position_embedding_table"].dtype.size
        hidden = arrays["embed_vision.embedding_projection.weight"].shape[0]
        return cls(
            weights=sum(array.nbytes for array in arrays.values()),
            tokens=sum(patches) // config.pooling_kernel_size**2 * hidden * size,
            looking=looking_bytes(config, max(patches), size),
        )


def smallest_macs(nbytes: int) -> tuple[int | None, int | None]:
    """The smallest memory (GiB) of a Mac that runs this: as it comes, and with a raised limit."""
    normal = (mac for mac in MACS if nbytes <= lent(mac))
    raised = (mac for mac in MACS if nbytes <= (mac << 30) - SYSTEM)
    return next(normal, None), next(raised, None)


def lent(mac: int) -> float:
    """Bytes that Metal lends one process on a Mac with so many GiB: two thirds of up to 36, three quarters of more."""
    return (mac << 30) * (2 / 3 if mac <= 36 else 3 / 4)


def machine_limit() -> int:
    """Bytes this process may use: what Metal lends it, else the memory of the GPU or of the machine."""
    info = mx.device_info()
    lent = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return int(lent or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def weight_bytes(network: Network) -> int:
    """Bytes of the parameters that are in memory at a time."""
    return network.experts.nbytes + sum(
        array.nbytes for name, array in leaves(network.parameters()).items() if not network.experts.owns(name)
    )
