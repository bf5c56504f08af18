"""Reading a JSON schema: at each place the alternatives of what a value may be come out, as shapes.

Supported, exactly: type, enum, const, nullable; properties, required, additionalProperties; items, prefixItems,
minItems, maxItems; minLength, maxLength, pattern, format; minimum, maximum and their exclusive forms; anyOf, allOf,
oneOf of alternatives that exclude each other; $ref into the schema itself. Annotations and `x-…` mean nothing here.
Every other keyword is refused by name: what constrains is never ignored.

A definition may stand inside itself `depth` times; beyond that it has no values, so what leads there is not written.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from ...errors import ConfigError
from ...readers import parse_json
from ...values import shown
from .graph import intersect
from .scalars import FORMATS, Bound, numbers
from .shapes import (
    KINDS,
    Place,
    Shape,
    Span,
    Wanted,
    between,
    common,
    highest,
    is_json,
    kind_of,
    lowest,
    merged,
    possible,
    within,
)

FREE = "*"  # in a trail: inside a value of which the schema says nothing
COMBINATIONS = 5_000
ANNOTATIONS = frozenset(
    "title description default examples example $schema $id $comment $defs definitions deprecated readOnly writeOnly "
    "discriminator externalDocs xml".split()
)


def read(schema: Any) -> Any:
    """A schema from what people have: a dict, a bool, JSON text, or a class with pydantic's `model_json_schema`.
    Errors: ConfigError when it is none of these, or no JSON, which a text is read as."""
    if hasattr(schema, "model_json_schema"):
        return schema.model_json_schema()
    if isinstance(schema, str):
        schema = parse_json(schema, "the JSON schema", fault=ConfigError)
    if not isinstance(schema, Mapping | bool):
        raise _wrong("#", f"expected an object, true or false, got {shown(schema)}")
    return schema


class Schema:
    """A schema, and what it says at each place. Errors: ConfigError for a depth below 1."""

    def __init__(self, root: Any, *, depth: int):
        if depth < 1:
            raise ConfigError(f"depth must be 1 or more, got {depth}.")
        self.root, self.depth = root, depth
        self.unfit: list[str] = []  # paths at which no value fits
        self.notes: dict[str, None] = {}  # what was cut, in words
        self._known: dict[tuple[str, tuple[str, ...]], list[Shape]] = {}

    def alternatives(self, wanted: Wanted) -> list[Shape]:
        """What a value may be that obeys all of `wanted`. Errors: ConfigError for a schema that is invalid or
        unsupported, with its path."""
        found = [Shape()]
        for place in wanted:
            found = _both(found, self._read(place), place.path)
        found = [s for shape in found if (s := self._with_literals_that_fit(shape)) is not None]
        if not found and not any(place.schema is False for place in wanted):
            self.unfit.append(wanted[0].path)
        return found

    def top(self) -> Wanted:
        """The whole schema."""
        return (Place(schema=self.root, path="#", trail=("#",)),)

    def holds(self, value: Any, wanted: Wanted) -> bool:
        """Whether a value obeys all of `wanted`."""
        return not wanted or any(self._fits(value, shape) for shape in self.alternatives(wanted))

    def _read(self, place: Place) -> list[Shape]:
        known = self._known.get((place.path, place.trail))
        if known is None:
            known = self._known[place.path, place.trail] = self._alternatives(place)
        return known

    def _alternatives(self, place: Place) -> list[Shape]:
        schema = place.schema
        if isinstance(schema, bool) or schema == {}:
            if ended := place.trail.count(FREE) >= self.depth:
                self.notes[f"what the schema leaves open nests at most {self.depth} deep"] = None
            kinds = frozenset(KINDS) - ({"array", "object"} if ended else set())
            return [] if schema is False else [Shape(kinds=kinds, trail=place.trail)]
        _check(schema, place.path)
        own = _own(place)
        found = [] if own is None else [own]
        if "$ref" in schema:
            found = _both(found, self._target(place), place.path)
        for number, part in enumerate(schema.get("allOf", ())):
            found = _both(found, self._read(place.inner(part, "allOf", number)), place.path)
        for keyword in ("anyOf", "oneOf"):
            if keyword not in schema:
                continue
            options = [self._read(place.inner(part, keyword, n)) for n, part in enumerate(schema[keyword])]
            if keyword == "oneOf":
                self._check_apart(options, place.path)
            found = _both(found, [shape for option in options for shape in option], place.path)
        return [*found, Shape(kinds=frozenset(["null"]))] if schema.get("nullable") else found

    def _target(self, place: Place) -> list[Shape]:
        """The alternatives behind a `$ref`; none where it stands inside itself too often."""
        reference = place.schema["$ref"]
        if reference != "#" and not reference.startswith("#/"):
            raise _wrong(place.path, f"$ref {reference!r} cannot be followed: only '#' and '#/…' can")
        if place.trail.count(reference) >= self.depth:
            self.notes[f"{reference} stands inside itself at most {self.depth} deep"] = None
            return []
        target = self.root
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            else:
                raise _wrong(place.path, f"$ref {reference!r} leads nowhere: there is no {step!r}")
        return self._read(Place(schema=target, path=reference, trail=(*place.trail, reference)))

    def _with_literals_that_fit(self, shape: Shape) -> Shape | None:
        if shape.literals is None:
            return shape
        kept = tuple(v for v in shape.literals if self._fits(v, replace(shape, literals=None)))
        return replace(shape, literals=kept) if kept else None

    def _fits(self, value: Any, shape: Shape) -> bool:
        kind = kind_of(value)
        if kind not in shape.kinds or common((value,), shape.literals) == ():
            return False
        if kind == "number":
            whole = not shape.whole or value == int(value)
            return whole and between(Decimal(repr(value)), shape.low, shape.high)
        if kind == "string":
            return shape.strings.accepts(map(ord, value))
        if kind == "array":
            fits = within(len(value), shape.items)
            return fits and all(self.holds(v, shape.item(n)) for n, v in enumerate(value))
        if kind == "object":
            fits = all(name in value for name in shape.required)
            return fits and all(self.holds(v, shape.member(name)) for name, v in value.items())
        return True

    def _check_apart(self, options: list[list[Shape]], path: str) -> None:
        for second, shapes in enumerate(options):
            for first, others in enumerate(options[:second]):
                if not all(self._apart(a, b) for a in others for b in shapes):
                    raise _wrong(
                        f"{path}/oneOf",
                        f"alternatives {first} and {second} may hold for one value, which oneOf forbids.\n"
                        "Write anyOf, or tell them apart: by type, or by a required property with one const in each",
                    )

    def _apart(self, a: Shape, b: Shape) -> bool:
        """Whether it is certain that no value fits both."""
        for one, other in ((a, b), (b, a)):
            if one.literals is not None:
                return not any(self._fits(value, one) and self._fits(value, other) for value in one.literals)
        return all(self._kind_apart(kind, a, b) for kind in a.kinds & b.kinds)

    def _kind_apart(self, kind: str, a: Shape, b: Shape) -> bool:
        if kind == "number":
            return numbers(a.whole or b.whole, highest([a.low, b.low]), lowest([a.high, b.high])).empty
        if kind == "string":
            return intersect(a.strings, b.strings).empty
        if kind == "array":
            least = max(a.items[0], b.items[0])
            if not (within(least, a.items) and within(least, b.items)):
                return True
            return any(self._wanted_apart(a.item(n), b.item(n)) for n in range(least))
        if kind == "object":
            names = dict.fromkeys(a.required + b.required)
            return any(self._wanted_apart(a.member(name), b.member(name)) for name in names)
        return False

    def _wanted_apart(self, first: Wanted, second: Wanted) -> bool:
        return all(self._apart(a, b) for a in self.alternatives(first) for b in self.alternatives(second))


def _both(first: list[Shape], second: list[Shape], path: str) -> list[Shape]:
    """The alternatives of a value that obeys one of each list."""
    if len(first) * len(second) > COMBINATIONS:
        raise _wrong(path, f"more than {COMBINATIONS:,} combinations of alternatives")
    return [shape for a in first for b in second if (shape := merged(a, b)) is not None]


def _own(place: Place) -> Shape | None:
    """What a schema's own keywords ask, apart from those that combine schemas; None when no value can give it."""
    schema = place.schema
    types = schema.get("type", KINDS)
    types = [types] if isinstance(types, str) else types
    properties, others, rest = (schema.get(k) for k in ("properties", "additionalProperties", "items"))
    shape = Shape(
        kinds=frozenset("number" if t == "integer" else t for t in types),
        literals=common(
            tuple(schema["enum"]) if "enum" in schema else None, (schema["const"],) if "const" in schema else None
        ),
        whole="integer" in types and "number" not in types,
        low=highest([_bound(schema, "minimum", True), _bound(schema, "exclusiveMinimum", False)]),
        high=lowest([_bound(schema, "maximum", True), _bound(schema, "exclusiveMaximum", False)]),
        length=_span(schema, "minLength", "maxLength"),
        patterns=((schema["pattern"], f"schema at {place.path}: pattern"),) if "pattern" in schema else (),
        formats=(schema["format"],) if "format" in schema else (),
        prefix=tuple((place.inner(s, "prefixItems", n),) for n, s in enumerate(schema.get("prefixItems", ()))),
        rest=None if rest is None else (place.inner(rest, "items"),),
        items=_span(schema, "minItems", "maxItems"),
        properties=properties and {n: (place.inner(s, "properties", n),) for n, s in properties.items()},
        others=None if others is None else (place.inner(others, "additionalProperties"),),
        required=tuple(dict.fromkeys(schema.get("required", ()))),
        trail=place.trail,
    )
    return possible(shape)


def _bound(schema: Mapping[str, Any], keyword: str, inclusive: bool) -> Bound | None:
    return Bound(value=Decimal(repr(schema[keyword])), inclusive=inclusive) if keyword in schema else None


def _span(schema: Mapping[str, Any], least: str, most: str) -> Span:
    return int(schema.get(least, 0)), int(schema[most]) if most in schema else None


# What each keyword's value must be, and in words.
_Check = tuple[Callable[[Any], bool], str]
_SCHEMA: _Check = (lambda v: isinstance(v, Mapping | bool), "a schema: an object, true or false")
_SCHEMAS: _Check = (lambda v: isinstance(v, list) and len(v) > 0, "a list of schemas")
_COUNT: _Check = (
    lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1e9 and v == int(v),
    "a whole number, 0 or more",
)
_NUMBER: _Check = (
    lambda v: isinstance(v, int | float) and not isinstance(v, bool) and -1e300 <= v <= 1e300,
    "a number of at most 300 digits",
)
_TEXT: _Check = (lambda v: isinstance(v, str), "a text")
_TYPES = (*KINDS, "integer")
_CHECKS: dict[str, _Check] = {
    "type": (
        lambda v: v in _TYPES if isinstance(v, str) else isinstance(v, list) and len(v) > 0 and set(v) <= set(_TYPES),
        f"one of {', '.join(_TYPES)}, or a list of them",
    ),
    "enum": (lambda v: isinstance(v, list) and len(v) > 0 and is_json(v), "a list of one JSON value or more"),
    "const": (is_json, "a JSON value"),
    "nullable": (lambda v: isinstance(v, bool), "true or false"),
    "properties": (lambda v: isinstance(v, Mapping) and all(isinstance(n, str) for n in v), "an object of schemas"),
    "required": (lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v), "a list of names"),
    "additionalProperties": _SCHEMA,
    "items": _SCHEMA,
    "prefixItems": _SCHEMAS,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "pattern": _TEXT,
    "format": (lambda v: v in FORMATS, f"one of {', '.join(FORMATS)}"),
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "anyOf": _SCHEMAS,
    "oneOf": _SCHEMAS,
    "allOf": _SCHEMAS,
    "$ref": _TEXT,
}


def _check(schema: Any, path: str) -> None:
    """Errors: ConfigError for a keyword that is unknown, or whose value is not what it must be."""
    if not isinstance(schema, Mapping):
        raise _wrong(path, f"expected an object, true or false, got {schema!r:.60}")
    for keyword, value in schema.items():
        if keyword == "$id" and path != "#":
            raise _wrong(path, "$id inside a schema, which changes what every $ref means, is not supported")
        if keyword in ANNOTATIONS or str(keyword).startswith("x-"):
            continue
        if keyword not in _CHECKS:
            near = difflib.get_close_matches(str(keyword), _CHECKS, n=1, cutoff=0.85)
            hint = f"Did you mean {near[0]}?" if near else "Leave it out, or say the same with keywords that are"
            raise _wrong(path, f"the keyword {keyword!r} is not supported, and not ignored either.\n{hint}")
        fits, expected = _CHECKS[keyword]
        if not fits(value):
            raise _wrong(f"{path}/{keyword}", f"expected {expected}, got {json.dumps(value, default=repr)[:60]}")
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minimum", "maximum")):
        if least in schema and most in schema and schema[least] > schema[most]:
            raise _wrong(path, f"{least} is {schema[least]}, more than {most}, {schema[most]}")


def _wrong(path: str, what: str) -> ConfigError:
    return ConfigError(f"schema at {path}: {what}" + ("" if what.endswith("?") else "."))
