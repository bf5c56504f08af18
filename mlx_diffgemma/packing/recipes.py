"""Recipes: what a pack is made of, as data in convert/recipes or in a TOML file of your own."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk import existing_file, visible
from ..errors import ConfigError
from ..files.layout import glob
from ..files.quantization import MODE_DEFAULTS, Quantization
from ..files.shipped import knowledge
from ..readers import read_toml
from ..values import Field, Table, flag, integer, many, nearest, one_of, text

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Override:
    """What a recipe says about the modules whose path matches a glob; `quantization` None leaves them as they are."""

    path: str
    quantization: Quantization | None
    because: str

    def matches(self, path: str) -> bool:
        """Whether a module path, written without the leading `model.`, is meant."""
        return glob(self.path).fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a pack is made of. `base` None quantizes nothing; of the overrides, the first that matches counts."""

    name: str
    because: str
    base: Quantization | None
    overrides: tuple[Override, ...] = ()
    dtype: str = "bfloat16"
    allow_low_bit_trunk: bool = False
    experimental: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str) -> "Recipe":
        """Read a recipe's TOML. Errors: ConfigError for an unknown key, a value MLX cannot pack, a missing reason."""
        where = f"recipe {name}"
        read = _RECIPE.read(values, where)
        base = _packing(read, where)
        if read["override"] and base is None:
            raise ConfigError(f"{where}: overrides without base bits; config.json needs a base.")
        return cls(
            name=name,
            because=read["because"],
            base=base,
            overrides=tuple(_override(entry, f"{where}, override {i + 1}") for i, entry in enumerate(read["override"])),
            dtype=read["dtype"],
            allow_low_bit_trunk=read["allow_low_bit_trunk"],
            experimental=read["experimental"],
        )


_PACKING = (
    Field("bits", integer(), None),
    Field("group_size", integer(), None),
    Field("mode", one_of(*MODE_DEFAULTS), None),
)
_SENTENCE = text(empty=False)
_OVERRIDE = Table(Field("path", _SENTENCE), Field("because", _SENTENCE), Field("quantize", flag, True), *_PACKING)
_RECIPE = Table(
    Field("because", _SENTENCE),
    Field("dtype", one_of(*DTYPES), Recipe.dtype),
    Field("allow_low_bit_trunk", flag, False),
    Field("experimental", flag, False),
    Field("override", many(_OVERRIDE.kind), ()),
    *_PACKING,
)
_EXTENDS = Table(Field("extends", _SENTENCE, None), Field("override", many(_OVERRIDE.kind), ()), open=True)


def _packing(values: dict[str, Any], where: str) -> Quantization | None:
    asked = {f.name: values[f.name] for f in _PACKING if values[f.name] is not None}
    return Quantization.from_dict(asked, where) if asked else None


def _override(values: dict[str, Any], where: str) -> Override:
    packing = _packing(values, where)
    if not values["quantize"] and packing is not None:
        raise ConfigError(f"{where}: `quantize = false` beside bits, group_size or mode; keep one of them.")
    if values["quantize"] and packing is None:
        packing = Quantization.from_dict({}, where)
    return Override(path=values["path"], quantization=packing, because=values["because"])


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in visible(knowledge() / "recipes", "*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a TOML file. `extends` puts another recipe's overrides behind its own."""
    return Recipe.from_dict(_recipe_values(name, ()), Path(name).stem if name.endswith(".toml") else name)


def _recipe_values(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name.endswith(".toml"):
        file = existing_file(name, "--recipe")
    elif name in recipe_names():
        file = knowledge() / "recipes" / f"{name}.toml"
    else:
        hint = nearest(name, recipe_names())
        raise ConfigError(f"there is no recipe {name!r}, expected a .toml file or one that comes along.{hint}")
    if name in seen:
        raise ConfigError(f"recipe {name} extends itself: {' → '.join((*seen, name))}.")
    values = read_toml(file)
    read = _EXTENDS.read(values, str(file))
    if read["extends"] is None:
        return values
    inherited = _recipe_values(read["extends"], (*seen, name)).get("override", [])
    own = {key: value for key, value in values.items() if key != "extends"}
    return own | {"override": [*read["override"], *inherited]}


def adhoc_recipe(bits: int | None, group_size: int | None, mode: str | None) -> Recipe:
    """The experts as asked (None: MLX's default for the mode), the trunk as in q4."""
    asked = {"bits": bits, "group_size": group_size, "mode": mode}
    base = Quantization.from_dict({key: value for key, value in asked.items() if value is not None}, "-q")
    packing = f"{base.bits}-bit/{base.group_size}" if base.mode == "affine" else base.mode
    because = f"Chosen on the command line: {packing} experts, 8-bit trunk."
    return dataclasses.replace(load_recipe("q4"), name=packing.replace("/", "-"), because=because, base=base)
