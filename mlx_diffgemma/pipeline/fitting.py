"""Does it fit? Asked before any work, and answered with what would."""

import bisect
import math

import mlx.core as mx

from ..config import ModelConfig
from ..errors import MemoryLimitError
from ..files import layout
from ..model.memory import machine_limit, memory_needed


def check_memory(
    config: ModelConfig, weights: int, limit: int, prefix: int = 0, *, rows: int = 1, forks: int = 0
) -> None:
    """Errors: MemoryLimitError when the weights, or they and the context, cannot fit; says what would."""

    def needed(prefix: int) -> int:
        whole = memory_needed(config, weights, prefix, forks=forks)
        return whole + (rows - 1) * (whole - memory_needed(config, weights, 0))

    lender = "this machine" if limit == machine_limit() else "memory_limit"
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
