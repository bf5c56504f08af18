"""How a machine likes the work cut: one frozen value, handed down. None of it changes what is computed."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

Trunk = Literal["auto", "packed", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The defaults suit a CPU; `trunk` "auto" is settled when a model is loaded.

    The last three fields leave out an exact idea, for comparison (`bench --without`).
    """

    tile: int = 8_192  # ids of the vocabulary scored at a time; taken in whole folds
    scores: int = 1 << 26  # bytes of attention scores that may exist at once
    streams: int = 2  # CPU streams that share the vocabulary; a GPU works on everything at once
    trunk: Trunk = "auto"  # all but the experts: as in the pack, or unpacked to the values that it stands for
    sort_from: int = 64  # (token, expert) pairs from which sorting by expert pays
    skip_hidden_keys: bool = True  # attention leaves out the keys that a window hides from a run of queries
    write_in_place: bool = True  # a canvas's keys and values lie behind the prefix, which is not copied

    @property
    def fingerprint(self) -> str:
        """What a seed's text depends on beside model, device and versions: products of other sizes, or of unpacked
        weights, round differently."""
        tile = f", tile {self.tile}" if mx.default_device() == mx.gpu else ""
        return f"trunk {self.trunk}{tile}"


DEFAULT = Tuning()
