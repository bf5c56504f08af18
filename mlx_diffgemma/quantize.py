"""Recipe × module path → bits, group size, mode; and what the pack will weigh.

Plans first, with numbers exact to the byte; `quantize` and `dequantize` do the arithmetic, a few rows at a time
if the caller likes: every group of a row is packed by itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .config import ModelConfig, Quantization, Recipe
from .errors import ConfigError

Shape = tuple[int, ...]
TRUNK = ("router", "embedding", "attention", "self-conditioning")
DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
SIZES = {name: dtype.size for name, dtype in DTYPES.items()}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
WORDS = {short: word for word, short in NAMES.items()}

# Memory of a Mac (GiB), and the share Metal lends one process unless iogpu.wired_limit_mb says otherwise.
MACS = (16, 18, 24, 32, 36, 48, 64, 96, 128)
SYSTEM = 4 << 30  # bytes macOS keeps for itself when that limit is raised
# Bytes beside weights and prefix, for a step's arrays or a 2,048-token prefill chunk's. Measured in float32, two layers
# at the released widths behind 32K tokens: 624 MB a step, 982 MB a chunk; bfloat16 halves nearly all of it.
STEP = 800_000_000


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor before packing: its name in a pack, and what the rules say about it."""

    name: str
    shape: Shape
    component: str
    quantize: bool

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor and what is stored for it: name → (dtype, shape)."""

    source: Source
    how: Quantization | None
    stored: dict[str, tuple[str, Shape]]
    wanted: Quantization | None = None  # what the recipe asked for, where the tensor's width did not allow it

    @property
    def nbytes(self) -> int:
        return sum(SIZES[dtype] * prod(shape) for dtype, shape in self.stored.values())


def packing(shape: Shape, how: Quantization, dtype: str) -> dict[str, tuple[str, Shape]]:
    """What MLX stores for one packed matrix: `weight`, `scales` and, for affine, `biases` → (dtype, shape)."""
    *rows, width = shape
    groups = (*rows, width // how.group_size)
    stored = {"weight": ("U32", (*rows, width * how.bits // 32)), "scales": ("U8", groups)}
    if how.mode == "affine":
        stored |= {"scales": (dtype, groups), "biases": (dtype, groups)}
    return stored


def plan(recipe: Recipe, sources: Iterable[Source]) -> list[Planned]:
    """What the recipe makes of every tensor.

    Errors: ConfigError for an override that matches nothing, and for a trunk below 8 bits that the recipe does
    not allow in words.
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
    return planned


def _wanted(recipe: Recipe, source: Source, used: set[int]) -> Quantization | None:
    if not source.quantize or recipe.base is None:
        return None
    for i, override in enumerate(recipe.overrides):
        if override.matches(source.path.removeprefix("model.")):
            used.add(i)
            return override.quantization
    return recipe.base


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


def quantization_block(recipe: Recipe, planned: Iterable[Planned]) -> dict[str, object]:
    """The `quantization` entry of config.json: the base, then every packed module that departs from it."""
    if recipe.base is None:
        return {}
    block: dict[str, object] = {**recipe.base.to_dict(), "mode": recipe.base.mode}
    return block | {p.source.path: p.how.to_dict() for p in planned if p.how and p.how != recipe.base}


def quantize(matrix: mx.array, how: Quantization) -> dict[str, mx.array]:
    """Pack rows [..., width] → `weight`, `scales` and, for affine, `biases`; lazy."""
    parts = mx.quantize(matrix, group_size=how.group_size, bits=how.bits, mode=how.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def dequantize(parts: Mapping[str, mx.array], how: Quantization, dtype: mx.Dtype) -> mx.array:
    """The rows that `quantize` packed, as the network will see them; lazy."""
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=how.group_size,
        bits=how.bits,
        mode=how.mode,
        dtype=dtype,
    )


def packed_trunk(network: nn.Module) -> dict[str, nn.QuantizedLinear | nn.QuantizedEmbedding]:
    """The packed modules outside the experts, by path."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {path: module for path, module in network.named_modules() if isinstance(module, kinds)}


def unpacked_growth(network: nn.Module) -> int:
    """How many bytes `unpack_trunk` would add."""
    growth = 0
    for module in packed_trunk(network).values():
        unpacked = module.weight.size * 32 // module.bits * module.scales.dtype.size
        growth += unpacked - sum(array.nbytes for array in module.parameters().values() if isinstance(array, mx.array))
    return growth


def unpack_trunk(network: nn.Module) -> None:
    """Store everything but the experts as plain matrices with the values the packed ones stand for.

    The same model, larger: with 256 rows a product is bound by arithmetic, where a packed one is the slower.
    """
    unpacked = []
    for path, module in packed_trunk(network).items():
        dtype = module.scales.dtype if module.mode == "affine" else mx.bfloat16
        how = Quantization(bits=module.bits, group_size=module.group_size, mode=module.mode)
        plain = nn.Linear(1, 1, bias=False) if isinstance(module, nn.QuantizedLinear) else nn.Embedding(1, 1)
        plain.weight = dequantize(module, how, dtype)
        mx.eval(plain.weight)
        unpacked.append((path, plain))
    network.update_modules(tree_unflatten(unpacked))
    mx.clear_cache()


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


def describe(how: Quantization | None, dtype: str) -> str:
    """A packing in a word: `4-bit/64`, `mxfp4`, or the dtype."""
    if how is None:
        return dtype
    return f"{how.bits}-bit/{how.group_size}" if how.mode == "affine" else how.mode


def memory_needed(config: ModelConfig, weight_bytes: int, prefix: int, item_size: int = 2) -> int:
    """Bytes to denoise behind a prefix of that many tokens: weights (without vision), keys and values, one step."""
    total = weight_bytes + STEP
    for layer in config.layers:
        positions = min(prefix, config.sliding_window - 1) if layer.is_sliding else prefix
        total += 2 * layer.num_kv_heads * layer.head_dim * (positions + config.canvas_length) * item_size
    return total


def smallest_macs(nbytes: int) -> tuple[int | None, int | None]:
    """The smallest memory (GiB) of a Mac that runs this: as it comes, and with a raised limit.

    Metal lends one process two thirds of up to 36 GiB, three quarters of more.
    """
    lent = {mac: (mac << 30) * (2 / 3 if mac <= 36 else 3 / 4) for mac in MACS}
    normal = (mac for mac in MACS if nbytes <= lent[mac])
    raised = (mac for mac in MACS if nbytes <= (mac << 30) - SYSTEM)
    return next(normal, None), next(raised, None)
