"""How one matrix is packed: bits, group size, mode; what MLX stores for it, and the packing itself.

`quantize` and `dequantize` work on any run of rows: every group of a row is packed by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..values import Field, Table, integer, one_of

if TYPE_CHECKING:  # not needed to name and describe a packing
    import mlx.core as mx

Dims = tuple[int, ...]

# What MLX means by a mode when nothing else is said: (group size, bits); the mx and nv modes have no other.
MODE_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
_BLOCK = Table(
    Field("bits", integer(), None),
    Field("group_size", integer(), None),
    Field("mode", one_of(*MODE_DEFAULTS), "affine"),
    open=True,
)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How one matrix is packed; `where` in the errors of `from_dict` says who asked."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> "Quantization":
        """Read `{bits, group_size, mode}`; absent values are MLX's defaults for the mode."""
        block = _BLOCK.read(values, where)
        mode = block["mode"]
        group_size, bits = MODE_DEFAULTS[mode]
        given = {name: block[name] for name in ("bits", "group_size") if block[name] is not None}
        made = cls(**{"bits": bits, "group_size": group_size, **given}, mode=mode)
        if mode != "affine" and (made.group_size, made.bits) != (group_size, bits):
            raise ConfigError(
                f"{where}: {mode} is always {bits} bits in groups of {group_size};"
                f" got {made.bits} bits, group size {made.group_size}."
            )
        if mode == "affine" and (made.bits not in (2, 3, 4, 5, 6, 8) or made.group_size not in (32, 64, 128)):
            raise ConfigError(
                f"{where}: affine packing has 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128;"
                f" got {made.bits!r} bits, group size {made.group_size!r}."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """As a `quantization` override in config.json: an override without a mode is affine."""
        values: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        return values if self.mode == "affine" else values | {"mode": self.mode}


def packing(shape: Dims, how: Quantization, dtype: str) -> dict[str, tuple[str, Dims]]:
    """What MLX stores for one packed matrix: `weight`, `scales` and, for affine, `biases` → (dtype, shape)."""
    *rows, width = shape
    groups = (*rows, width // how.group_size)
    stored = {"weight": ("U32", (*rows, width * how.bits // 32)), "scales": ("U8", groups)}
    if how.mode == "affine":
        stored |= {"scales": (dtype, groups), "biases": (dtype, groups)}
    return stored


def quantize(matrix: "mx.array", how: Quantization) -> dict[str, "mx.array"]:
    """Pack rows [..., width] → `weight`, `scales` and, for affine, `biases`; lazy."""
    import mlx.core as mx

    parts = mx.quantize(matrix, group_size=how.group_size, bits=how.bits, mode=how.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def dequantize(parts: Mapping[str, "mx.array"], how: Quantization, dtype: "mx.Dtype") -> "mx.array":
    """The rows that `quantize` packed, as the network will see them; lazy."""
    import mlx.core as mx

    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=how.group_size,
        bits=how.bits,
        mode=how.mode,
        dtype=dtype,
    )


def describe(how: Quantization | None, dtype: str) -> str:
    """A packing in a word: `4-bit/64`, `mxfp4`, or the dtype."""
    if how is None:
        return dtype
    return f"{how.bits}-bit/{how.group_size}" if how.mode == "affine" else how.mode
