"""What a schema asks of a value: `Shape`, one alternative of it, kind by kind; and what two of them ask together."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from .graph import Table
from .scalars import Bound, strings

KINDS = ("null", "boolean", "number", "string", "array", "object")
Span = tuple[int, int | None]  # least and most


@dataclass(frozen=True, kw_only=True)
class Place:
    """A schema inside the schema: its path, and the definitions that it was reached through."""

    schema: Any
    path: str
    trail: tuple[str, ...] = ()

    def inner(self, schema: Any, *steps: str | int) -> "Place":
        """A schema that stands inside this one."""
        escaped = (str(step).replace("~", "~0").replace("/", "~1") for step in steps)
        return replace(self, schema=schema, path="/".join([self.path, *escaped]))


Wanted = tuple[Place, ...]  # a value must obey all of them; none: any value


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One alternative. What is None or empty is not said, and then anything goes."""

    kinds: frozenset[str] = frozenset(KINDS)
    literals: tuple[Any, ...] | None = None
    whole: bool = False  # numbers are integers
    low: Bound | None = None
    high: Bound | None = None
    length: Span = (0, None)
    patterns: tuple[tuple[str, str], ...] = ()  # and where each stands
    formats: tuple[str, ...] = ()
    prefix: tuple[Wanted, ...] = ()
    rest: Wanted | None = None  # the items behind the prefix
    items: Span = (0, None)
    properties: Mapping[str, Wanted] | None = None
    others: Wanted | None = None  # the properties without a name
    required: tuple[str, ...] = ()
    trail: tuple[str, ...] = ()

    def item(self, index: int) -> Wanted:
        return self.prefix[index] if index < len(self.prefix) else self.rest or ()

    def member(self, name: str) -> Wanted:
        return (self.properties or {}).get(name, self.others or ())

    @property
    def strings(self) -> Table:
        return strings(self.patterns, self.formats, *self.length)


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value: not NaN, and no Python objects of other types."""
    if isinstance(value, list):
        return all(map(is_json, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and is_json(member) for name, member in value.items())
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def kind_of(value: Any) -> str:
    """The kind of a JSON value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    types = {"number": int | float, "string": str, "array": list, "object": dict}
    return next(kind for kind, of in types.items() if isinstance(value, of))


def key(value: Any) -> str:
    """The same for equal JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{key(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(key, value)) + "]"
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def within(number: int, span: Span) -> bool:
    return number >= span[0] and (span[1] is None or number <= span[1])


def between(value: Decimal, low: Bound | None, high: Bound | None) -> bool:
    return (low is None or value > low.value or (value == low.value and low.inclusive)) and (
        high is None or value < high.value or (value == high.value and high.inclusive)
    )


def highest(bounds: list[Bound | None]) -> Bound | None:
    """The tightest of lower bounds."""
    given = [bound for bound in bounds if bound is not None]
    return max(given, key=lambda bound: (bound.value, not bound.inclusive), default=None)


def lowest(bounds: list[Bound | None]) -> Bound | None:
    """The tightest of upper bounds."""
    given = [bound for bound in bounds if bound is not None]
    return min(given, key=lambda bound: (bound.value, bound.inclusive), default=None)


def common(first: tuple[Any, ...] | None, second: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The literals in both, where None is all there are."""
    if first is None or second is None:
        return second if first is None else first
    keys = set(map(key, second))
    return tuple(value for value in first if key(value) in keys)


def merged(a: Shape, b: Shape) -> Shape | None:
    """What both ask together; None when no value can give it."""
    names = list({**(a.properties or {}), **(b.properties or {})})
    unnamed = a.properties is None and b.properties is None
    return possible(
        Shape(
            kinds=a.kinds & b.kinds,
            literals=common(a.literals, b.literals),
            whole=a.whole or b.whole,
            low=highest([a.low, b.low]),
            high=lowest([a.high, b.high]),
            length=_overlap(a.length, b.length),
            patterns=tuple(dict.fromkeys(a.patterns + b.patterns)),
            formats=tuple(dict.fromkeys(a.formats + b.formats)),
            prefix=tuple(a.item(n) + b.item(n) for n in range(max(len(a.prefix), len(b.prefix)))),
            rest=_joined(a.rest, b.rest),
            items=_overlap(a.items, b.items),
            properties=None if unnamed else {name: a.member(name) + b.member(name) for name in names},
            others=_joined(a.others, b.others),
            required=tuple(dict.fromkeys(a.required + b.required)),
            trail=max(a.trail, b.trail, key=len),
        )
    )


def possible(shape: Shape) -> Shape | None:
    """The shape without the kinds whose bounds exclude every value; None when no kind is left."""
    kinds = set(shape.kinds)
    if not within(shape.length[0], shape.length):
        kinds.discard("string")
    if not within(shape.items[0], shape.items):
        kinds.discard("array")
    if shape.low and shape.high and _crossed(shape.low, shape.high):
        kinds.discard("number")
    return replace(shape, kinds=frozenset(kinds)) if kinds and shape.literals != () else None


def _crossed(low: Bound, high: Bound) -> bool:
    return low.value > high.value or (low.value == high.value and not (low.inclusive and high.inclusive))


def _overlap(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min((most for most in (a[1], b[1]) if most is not None), default=None)


def _joined(a: Wanted | None, b: Wanted | None) -> Wanted | None:
    return None if a is None and b is None else (a or ()) + (b or ())
