"""Values that others wrote (in JSON, in TOML, as options of the API), read by table: every key has a kind with bounds.

    ROPE = Table(Field("rope_theta", number(above=0)), Field("rope_type", one_of("default", "proportional"), "default"))
    ROPE.read(values, "config.json")

An error says where, which key, what was expected and what was got.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, DiffGemmaError

Fault = type[DiffGemmaError]


class Unfit(Exception):
    """A value of the wrong kind; `key` is filled from the inside out. `unknown`: the key itself is what is wrong."""

    def __init__(self, expected: str, got: Any, key: str = "", *, unknown: bool = False):
        super().__init__(expected)
        self.expected, self.got, self.key, self.unknown = expected, got, key, unknown

    def under(self, key: str) -> "Unfit":
        """The same, seen from one level further out."""
        inner = self.key if self.key.startswith("[") or not self.key else f".{self.key}"
        return Unfit(self.expected, self.got, f"{key}{inner}", unknown=self.unknown)

    def sentence(self, where: str) -> str:
        if self.unknown:
            return f"{where} has the unknown key {self.key} = {shown(self.got)}.{self.expected}"
        between = "" if not self.key or self.key.startswith("[") else ": "
        return f"{where}{between}{self.key} is {shown(self.got)}, expected {self.expected}."


@dataclass(frozen=True)
class Kind:
    """What a value may be: `take` gives it back, perhaps in another type, or raises Unfit."""

    expected: str
    take: Callable[[Any], Any]

    def read(self, value: Any, where: str, key: str = "", *, fault: Fault = ConfigError) -> Any:
        """`value`, which `where` calls `key`. Errors: `fault`, one line."""
        try:
            return self.take(value)
        except Unfit as unfit:
            raise fault((unfit.under(key) if key else unfit).sentence(where)) from None


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error message may show it: on one line, short, whatever a file holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple) and len(value) > 8:
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)} entries"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a number of more digits than Python writes
        text = f"a very long {type(value).__name__}"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def half_character(value: str) -> int | None:
    """Where a lone surrogate stands: half of a character, which no encoding can write."""
    if value.isascii():
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


# ----------------------------------------------------------------------------------------------------------- kinds


def _kind(expected: str, good: Callable[[Any], bool], make: Callable[[Any], Any] = lambda value: value) -> Kind:
    def take(value: Any) -> Any:
        if not good(value):
            raise Unfit(expected, value)
        return make(value)

    return Kind(expected, take)


def _number(word: str, types: tuple[type, ...], least: Any, above: Any, most: Any) -> Kind:
    low = f" of at least {least:,}" if least is not None else f" above {above:,}" if above is not None else ""
    words = "a positive integer" if (word, least) == ("an integer", 1) else word + low

    def take(value: Any) -> Any:
        if type(value) not in types or abs(value) > 1e300 or not math.isfinite(value):
            raise Unfit(words, value)
        if (least is not None and value < least) or (above is not None and value <= above):
            raise Unfit(words, value)
        if most is not None and value > most:
            raise Unfit(f"{word} of at most {most:,}", value)
        return value

    return Kind(words, take)


def integer(*, least: int | None = None, most: int | None = None) -> Kind:
    """A whole number; 16.0 is none, nor is true."""
    return _number("an integer", (int,), least, None, most)


def number(*, least: float | None = None, above: float | None = None, most: float | None = None) -> Kind:
    """A finite number, whole or not."""
    return _number("a number", (int, float), least, above, most)


def text(*, empty: bool = True, most: int | None = None) -> Kind:
    """Characters; `most` bounds their count."""
    words = ("text" if empty else "text that is not empty") + (
        "" if most is None else f" of at most {most:,} characters"
    )
    return _kind(words, lambda v: isinstance(v, str) and (empty or v != "") and len(v) <= (most or len(v)))


def one_of(*values: Any) -> Kind:
    """One of a few values, of exactly their types: 1 is not true."""
    words = " or ".join(shown(value) for value in values)
    return _kind(words, lambda v: any(type(v) is type(value) and v == value for value in values))


flag = _kind("true or false", lambda v: isinstance(v, bool))
anything = Kind("anything", lambda v: v)


def optional(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(f"{kind.expected} or null", lambda v: None if v is None else _said(kind, f"{kind.expected} or null", v))


def either(*kinds: Kind) -> Kind:
    """The first kind that takes the value."""
    words = " or ".join(kind.expected for kind in kinds)

    def take(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.take(value)
            except Unfit as unfit:
                if unfit.key:  # of the right kind outside, and wrong within: the better message
                    raise
        raise Unfit(words, value)

    return Kind(words, take)


def _said(kind: Kind, words: str, value: Any) -> Any:
    try:
        return kind.take(value)
    except Unfit as unfit:
        raise unfit if unfit.key else Unfit(words, value) from None


def many(kind: Kind, *, least: int = 0, most: int | None = None) -> Kind:
    """A list of one kind, as a tuple."""
    count = {0: "", 1: " that is not empty"}.get(least, f" of at least {least}")
    words = f"a list{count}{'' if most is None else f' of at most {most:,}'} ({kind.expected})"

    def take(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= (len(value) if most is None else most):
            raise Unfit(words, value)
        return tuple(_inside(kind, entry, f"[{i}]") for i, entry in enumerate(value))

    return Kind(words, take)


def mapping(kind: Kind, keys: Kind | None = None) -> Kind:
    """An object whose values are of one kind; its keys are taken by `keys`, and texts if that is not given."""
    keys = keys or text()

    def take(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise Unfit("an object", value)
        return {_inside(keys, key, f"the key {shown(key)}"): _inside(kind, v, dotted(key)) for key, v in value.items()}

    return Kind("an object", take)


def dotted(key: Any) -> str:
    """A key as it stands in a path; a downloaded file decides what it is."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 80 else shown(key)


def _inside(kind: Kind, value: Any, key: str) -> Any:
    try:
        return kind.take(value)
    except Unfit as unfit:
        raise unfit.under(key) from None


# ---------------------------------------------------------------------------------------------------------- tables


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Field:
    """One key. Without a default it must be there; null means the default, as it does where transformers writes it."""

    name: str
    kind: Kind
    default: Any = REQUIRED


@dataclass(frozen=True)
class Table:
    """An object with known keys. Others are refused with the nearest name, or, if `open`, left alone."""

    fields: tuple[Field, ...]
    open: bool = False
    names: frozenset[str] = field(init=False)

    def __init__(self, *fields: Field, open: bool = False):
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "open", open)
        object.__setattr__(self, "names", frozenset(f.name for f in fields))

    @property
    def kind(self) -> Kind:
        """This table as a kind, for the tables around it."""
        return Kind("an object", self._take)

    def read(self, values: Any, where: str, *, fault: Fault = ConfigError) -> dict[str, Any]:
        """All keys, absent ones with their defaults. Errors: `fault`."""
        return self.kind.read(values, where, fault=fault)

    def given(self, values: Any, where: str, *, fault: Fault = ConfigError) -> dict[str, Any]:
        """Only the keys that are there and not null, checked."""
        read = self.read(values, where, fault=fault)
        return {name: read[name] for name in read if values.get(name) is not None}

    def _take(self, values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise Unfit("an object", values)
        if not self.open and (unknown := [key for key in values if key not in self.names]):
            name = unknown[0]
            raise Unfit(nearest(str(name), self.names), values[name], dotted(name), unknown=True)
        read = {}
        for f in self.fields:
            if values.get(f.name) is None:
                if f.default is REQUIRED:
                    raise Unfit(f.kind.expected, None, f.name)
                read[f.name] = f.default
            else:
                read[f.name] = _inside(f.kind, values[f.name], f.name)
        return read


def nearest(name: str, known: Iterable[str], *, all_of_them: bool = True) -> str:
    """A sentence to put behind an error about an unknown name: the likeliest one, or else all of them."""
    import difflib

    if close := difflib.get_close_matches(name, sorted(known), n=1):
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if all_of_them else ""
