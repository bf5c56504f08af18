"""Recipes: what a pack is made of, as data in convert/recipes or in a TOML file of your own."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import check, refuse_unknown
from ..errors import ConfigError
from ..files.layout import glob
from ..files.quantization import Quantization
from ..files.shipped import knowledge

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
        known = {"because", "bits", "group_size", "mode", "dtype", "allow_low_bit_trunk", "experimental", "override"}
        refuse_unknown(values, known, f"recipe {name}")
        overrides = []
        entries = values.get("override", [])
        check(f"recipe {name}: override", entries, _is_tables(entries), "one or more [[override]] tables")
        for i, entry in enumerate(entries):
            where = f"recipe {name}, override {i + 1}"
            refuse_unknown(entry, {"path", "because", "quantize", "bits", "group_size", "mode"}, where)
            for key in ("path", "because"):
                check(f"{where}: {key}", entry.get(key), isinstance(entry.get(key), str) and entry[key], "a sentence")
            keep = entry.get("quantize", True) is False
            if keep and entry.keys() & {"bits", "group_size", "mode"}:
                raise ConfigError(f"{where}: `quantize = false` beside bits, group_size or mode; keep one of them.")
            quantization = None if keep else Quantization.from_dict(entry, where)
            overrides.append(Override(path=entry["path"], quantization=quantization, because=entry["because"]))
        quantized = bool(values.keys() & {"bits", "group_size", "mode"})
        if overrides and not quantized:
            raise ConfigError(f"recipe {name}: overrides without base bits; config.json needs a base.")
        check(f"recipe {name}: because", values.get("because"), bool(values.get("because")), "a sentence")
        for key in ("allow_low_bit_trunk", "experimental"):
            check(f"recipe {name}: {key}", values.get(key), values.get(key) in (None, True, False), "true or false")
        dtype = values.get("dtype", cls.dtype)
        check(f"recipe {name}: dtype", dtype, dtype in DTYPES, " or ".join(DTYPES))
        return cls(
            name=name,
            because=values["because"],
            base=Quantization.from_dict(values, f"recipe {name}") if quantized else None,
            overrides=tuple(overrides),
            dtype=dtype,
            allow_low_bit_trunk=values.get("allow_low_bit_trunk", False),
            experimental=values.get("experimental", False),
        )


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in (knowledge() / "recipes").glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a TOML file. `extends` puts another recipe's overrides behind its own."""
    return Recipe.from_dict(_recipe_values(name, ()), Path(name).stem if name.endswith(".toml") else name)


def _recipe_values(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    file = Path(name) if name.endswith(".toml") else knowledge() / "recipes" / f"{name}.toml"
    if not file.is_file() or name in seen:
        raise ConfigError(f"there is no recipe {name!r}; expected a .toml file or one of {', '.join(recipe_names())}.")
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe {file} cannot be read: {error}.") from None
    if (parent := values.pop("extends", None)) is None:
        return values
    inherited = _recipe_values(str(parent), (*seen, name)).get("override", [])
    return values | {"override": [*values.get("override", []), *inherited]}


def adhoc_recipe(bits: int | None, group_size: int | None, mode: str | None) -> Recipe:
    """The experts as asked (None: MLX's default for the mode), the trunk as in q4."""
    asked = {"bits": bits, "group_size": group_size, "mode": mode}
    base = Quantization.from_dict({key: value for key, value in asked.items() if value is not None}, "-q")
    packing = f"{base.bits}-bit/{base.group_size}" if base.mode == "affine" else base.mode
    because = f"Chosen on the command line: {packing} experts, 8-bit trunk."
    return dataclasses.replace(load_recipe("q4"), name=packing.replace("/", "-"), because=because, base=base)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
