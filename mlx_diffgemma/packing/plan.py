"""Recipe × tensor → what is stored, where, and what it weighs: known to the byte before anything is written."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import ConfigError
from ..files.layout import Source
from ..files.quantization import Dims, Quantization, describe, packing
from ..files.shards import NAMES, SIZES
from .recipes import Recipe

TRUNK = ("router", "embedding", "attention", "self-conditioning")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor and what is stored for it: name → (dtype, shape)."""

    source: Source
    how: Quantization | None
    stored: dict[str, tuple[str, Dims]]
    wanted: Quantization | None = None  # what the recipe asked for, where the tensor's width did not allow it

    @property
    def nbytes(self) -> int:
        return sum(SIZES[dtype] * prod(shape) for dtype, shape in self.stored.values())


def plan(recipe: Recipe, sources: Iterable[Source]) -> list[Planned]:
    """What the recipe makes of every tensor.

    Errors: ConfigError for an override that matches nothing or departs from the base for experts, and for a trunk
    below 8 bits that the recipe does not allow in words.
    """
    dtype, used = NAMES[recipe.dtype], set[int]()
    planned = []
    for source in sources:
        wanted = _wanted(recipe, source, used)
        how = wanted and _fitting(wanted, source.shape[-1])
        if how is None:
            stored = {source.name: (dtype, source.shape)}
        else:
            parts = packing(source.shape, how, dtype)
            stored = {f"{source.path}.{part}": what for part, what in parts.items()}
        planned.append(Planned(source=source, how=how, stored=stored, wanted=None if how == wanted else wanted))
    for i, override in enumerate(recipe.overrides):
        if i not in used:
            raise ConfigError(f"recipe {recipe.name}: the path {override.path!r} matches nothing that can be packed.")
    _guard_trunk(recipe, planned)
    _guard_experts(recipe, planned)
    return planned


def _wanted(recipe: Recipe, source: Source, used: set[int]) -> Quantization | None:
    if not (source.quantize or source.on_request) or recipe.base is None:
        return None
    for i, override in enumerate(recipe.overrides):
        named = source.quantize or override.path.startswith("encoder.")
        if named and override.matches(source.path.removeprefix("model.")):
            used.add(i)
            return override.quantization
    return recipe.base if source.quantize else None


def _fitting(how: Quantization, width: int) -> Quantization | None:
    """The same packing in groups that divide `width`: smaller ones where the mode has them, else none."""
    groups = [how.group_size] if how.mode != "affine" else [g for g in (128, 64, 32) if g <= how.group_size]
    sizes = [group for group in groups if width % group == 0]
    return Quantization(bits=how.bits, group_size=sizes[0], mode=how.mode) if sizes else None


def _guard_trunk(recipe: Recipe, planned: list[Planned]) -> None:
    for item in planned:
        if item.how and item.how.bits < 8 and item.source.component in TRUNK and not recipe.allow_low_bit_trunk:
            raise ConfigError(
                f"recipe {recipe.name} packs {item.source.path} ({item.source.component}) at {item.how.bits} bits,"
                " expected 8 or more: it costs denoising steps.\n"
                "Add an override, or say `allow_low_bit_trunk = true` in the recipe."
            )


def _guard_experts(recipe: Recipe, planned: list[Planned]) -> None:
    """Other readers take the experts' packing from the base alone, and byte scales under an affine base for its own."""
    for item in planned:
        if item.source.component == "experts" and item.wanted is None and item.how != recipe.base:
            got = describe(item.how, recipe.dtype)
            raise ConfigError(
                f"recipe {recipe.name} packs {item.source.path} as {got}, expected the recipe's base,"
                f" {describe(recipe.base, recipe.dtype)}: other readers take the experts' packing from there.\n"
                "Make that the base, and override the rest."
            )


def quantization_block(recipe: Recipe, planned: Iterable[Planned]) -> dict[str, object]:
    """The `quantization` entry of config.json: the base, then every packed module that departs from it."""
    if recipe.base is None:
        return {}
    block: dict[str, object] = {**recipe.base.to_dict(), "mode": recipe.base.mode}
    return block | {p.source.path: p.how.to_dict() for p in planned if p.how and p.how != recipe.base}


# ------------------------------------------------------------------------------------------------------ the shards


SHARD = 5_000_000_000  # bytes of tensors per file, at most


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One stored tensor's place in its shard."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file: known whole before a byte of it is written."""

    name: str
    header: bytes
    size: int
    items: tuple[Planned, ...]
    slots: dict[str, Slot]


def lay_out(planned: Iterable[Planned], limit: int = SHARD) -> list[Shard]:
    """Distribute the tensors over shards, in natural order of their names; what belongs together stays together."""
    groups: list[list[Planned]] = [[]]
    filled = 0
    for item in sorted(planned, key=lambda item: _natural(item.source.name)):
        if groups[-1] and filled + item.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += item.nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    return [_shard(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _shard(name: str, items: list[Planned]) -> Shard:
    """Wide dtypes first, so that every tensor is aligned to its own dtype."""
    stored = {key: what for item in items for key, what in item.stored.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position, starts = 0, {}
    for key in sorted(stored, key=lambda key: (-SIZES[stored[key][0]], key)):
        dtype, shape = stored[key]
        end = position + SIZES[dtype] * prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        starts[key], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    encoded = len(text).to_bytes(8, "little") + text
    slots = {key: Slot(dtype=what[0], shape=what[1], start=len(encoded) + starts[key]) for key, what in stored.items()}
    return Shard(name=name, header=encoded, size=len(encoded) + position, items=tuple(items), slots=slots)


# ------------------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True, kw_only=True)
class Size:
    """One line of the size report."""

    tensors: int
    parameters: int
    nbytes: int
    packing: str  # "4-bit/64", "bfloat16", or several

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    @classmethod
    def sum(cls, parts: Iterable["Size"]) -> "Size":
        """All components together."""
        parts = list(parts)
        return cls(
            tensors=sum(part.tensors for part in parts),
            parameters=sum(part.parameters for part in parts),
            nbytes=sum(part.nbytes for part in parts),
            packing="",
        )


def sizes(recipe: Recipe, planned: Iterable[Planned]) -> dict[str, Size]:
    """Per component, in the order of first appearance."""
    groups: dict[str, list[Planned]] = {}
    for item in planned:
        groups.setdefault(item.source.component, []).append(item)
    return {component: _size(recipe, items) for component, items in groups.items()}


def _size(recipe: Recipe, items: list[Planned]) -> Size:
    return Size(
        tensors=sum(len(item.stored) for item in items),
        parameters=sum(prod(item.source.shape) for item in items),
        nbytes=sum(item.nbytes for item in items),
        packing=", ".join(dict.fromkeys(describe(item.how, recipe.dtype) for item in items)),
    )
