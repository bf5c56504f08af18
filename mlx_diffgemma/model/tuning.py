"""How a machine likes the work cut: one frozen value, handed down. None of it changes what is computed."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .sharing.share import ALONE, Share

Trunk = Literal["auto", "packed", "bf16"]
CPU_TILE, GPU_TILE = 8_192, 32_768


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The defaults suit the device; `trunk` "auto" is settled when a model is loaded. `mlx_diffgemma.tune` measures
    which of the first five a machine likes.

    The three fields before the last leave out an exact idea, for comparison (`bench --without`).
    """

    tile: int | None = None  # ids of the vocabulary scored at a time, in whole folds; None: as `ids_at_once` says
    scores: int = 1 << 26  # bytes of attention scores that may exist at once
    trunk: Trunk = "auto"  # all but the experts: as in the pack, or unpacked to the values that it stands for
    wired: bool = True  # Metal keeps weights and prefix in memory while the model lives
    operations: int | None = None  # kernels in one command buffer on Metal; None: MLX's own choice
    streams: int = 2  # CPU streams that share the vocabulary; a GPU works on everything at once
    sort_from: int = 64  # (token, expert) pairs from which sorting by expert pays
    skip_hidden_keys: bool = True  # attention leaves out the keys that a window hides from a run of queries
    write_in_place: bool = True  # a canvas's keys and values lie behind the prefix, which is not copied
    share: Share = ALONE  # what this machine computes where several share a model

    @property
    def ids_at_once(self) -> int:
        """The tile. A GPU's is larger: every tile is some twenty kernels, whatever its size."""
        if self.tile is not None:
            return self.tile
        return GPU_TILE if mx.default_device() == mx.gpu else CPU_TILE

    @property
    def fingerprint(self) -> str:
        """What a seed's text depends on beside model, device and versions: products of other sizes, or of unpacked
        weights, round differently."""
        tile = f", tile {self.ids_at_once}, scores {self.scores}" if mx.default_device() == mx.gpu else ""
        return f"trunk {self.trunk}{tile}"


DEFAULT = Tuning()
