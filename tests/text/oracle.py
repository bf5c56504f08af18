"""llguidance as an oracle of prefixes: behind every prefix of a text, the bytes that may come next.

Both sides write compact JSON here. llguidance lets unnamed properties and items in where a schema does not close them,
so its schema is closed first. What is left of differences is counted by kind; `EXPECTED` names those that are meant.
"""

import re
from collections import Counter
from random import Random
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mlx_diffgemma.text.language.syntax import Layout
from mlx_diffgemma.text.language.values import json_schema
from tests.text.schemas import Sampler

COMPACT = Layout(spaces=False, indents=())
_OPTIONS = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "coerce_one_of": True}
EXPECTED = {  # in text before, whose bytes, why
    "zero": (rb"-$", "theirs", b"0", "−0 is no integer of ours"),
    "leap": (rb"\d\d:\d\d:$", "theirs", b"6", "nor is a leap second a time"),
    "small": (rb"\d-\d\d$", "theirs", b"t", "letters of a time are capital"),
    "zulu": (rb":\d\d(\.\d*)?$", "theirs", b"z", "the same"),
    "nanoseconds": (rb"\.\d{9}$", "theirs", b"0123456789", "at most nine digits"),
    "leap day": (rb"-02-2$", "theirs", b"9", "29 February is in leap years"),
    "address": (rb"@$", "theirs", b"[", "no addresses in brackets"),
    "year": (rb'"000$', "theirs", b"0", "there is no year 0"),
    "escape": (
        rb"\\$",
        "both",
        b"/u",
        "\\/ and \\uXXXX of theirs are for control characters, of ours for free strings",
    ),
    "delete": (rb"", "ours", b"\x7f", "DEL needs no escape"),
}


def closed(schema: Any) -> Any:
    """The schema without what we never write: properties and items that it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for keyword, value in schema.items():
        if keyword in ("properties", "$defs", "definitions"):
            found[keyword] = {name: closed(part) for name, part in value.items()}
        else:
            found[keyword] = value if keyword in ("const", "enum", "default", "examples") else closed(value)
    if "properties" in schema:
        found.setdefault("additionalProperties", False)
    if "prefixItems" in schema:
        found.setdefault("items", False)
    return found


def comparable(schema: Any) -> bool:
    """Whether closing means the same on both sides, and llguidance reads it as JSON Schema does: not where allOf joins
    objects or the schema leaves a value open, nor bounds of numbers with a fraction, nor keywords it does not know."""
    if isinstance(schema, list):
        return all(map(comparable, schema))
    if not isinstance(schema, dict):
        return schema is False
    types = schema.get("type", [])
    if not schema or "allOf" in schema or "nullable" in schema or "$ref" in schema:
        return False
    if not types and not schema.keys() & {"const", "enum", "anyOf", "oneOf"}:
        return False
    if "number" in types and schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
        return False
    if "array" in types and (
        "items" not in schema or schema.get("minItems", 0) > len(schema.get("prefixItems", ())) > 0
    ):
        return False
    if "object" in types and ("properties" not in schema and not isinstance(schema.get("additionalProperties"), dict)):
        return False
    if any(isinstance(v, float) for v in [schema.get("const"), *schema.get("enum", ())]):
        return False
    if set(schema.get("required", ())) - set(schema.get("properties", ())):
        return False
    inner = [*schema.get("properties", {}).values(), *schema.get("prefixItems", ()), *schema.get("anyOf", ())]
    inner += [*schema.get("oneOf", ()), *(schema[k] for k in ("items", "additionalProperties") if k in schema)]
    return all(map(comparable, inner))


def compare(schema: Any, random: Random, walks: int) -> tuple[Counter[str], list[str]] | None:
    """Walk some texts of ours through both. Returns how many prefixes were compared and how many differed as expected,
    by kind, and the other differences; None when llguidance refuses the schema."""
    grammar = LLMatcher.grammar_from_json_schema(closed(schema), defaults=_OPTIONS)
    tokenizer = LLTokenizer("byte")
    if LLMatcher(tokenizer, grammar).get_error():
        return None
    [automaton] = json_schema(schema, layout=COMPACT).parts
    sampler, counts, wrong = Sampler.of(automaton), Counter(), []
    for _ in range(walks):
        matcher, state, text = LLMatcher(tokenizer, grammar), 0, sampler.draw(random)
        for at in range(len(text) + 1):
            if b"\\u" in text[:at]:
                break  # there the two differ
            before, ours = text[:at], set(np.flatnonzero(automaton.transitions[state] >= 0).tolist())
            theirs = {i for i in _allowed(matcher) if i < 256}
            expected = _expected(before, ours - theirs, theirs - ours)
            counts += Counter(["prefixes", *expected])
            meant = {byte for name in expected for byte in EXPECTED[name][2]}
            if (ours ^ theirs) - meant:
                wrong.append(
                    f"{schema} behind {before!r}: ours {bytes(ours - theirs)!r}, theirs {bytes(theirs - ours)!r}"
                )
            if bool(automaton.accepting[state]) != matcher.is_accepting():
                wrong.append(f"{schema}: {before!r} may end here on one side only")
            if at == len(text) or not matcher.try_consume_tokens([text[at]]):
                break  # only what differs as expected is not consumed
            state = int(automaton.transitions[state, text[at]])
    return counts, wrong


def _expected(before: bytes, ours: set[int], theirs: set[int]) -> list[str]:
    different = {"ours": ours, "theirs": theirs, "both": ours | theirs}
    return [
        n for n, (text, side, found, _) in EXPECTED.items() if different[side] & set(found) and re.search(text, before)
    ]


def _allowed(matcher: LLMatcher) -> list[int]:
    mask = np.frombuffer(bytes(matcher.compute_bitmask()), np.uint8)
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
