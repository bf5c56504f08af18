"""A call's arguments, with the types that the tool's schema gives them: models write "3" for 3, and 3 for "3"."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {"integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict, "null": type(None)}


def typed_call(call: dict[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"name": …, "arguments": {…}} by the schema of the tool of that name; what fits no type stays as it is."""
    schemas = (tool["function"].get("parameters") for tool in tools if tool["function"]["name"] == call["name"])
    return call | {"arguments": typed(call["arguments"], next(schemas, None))}


def typed(value: Any, schema: Any) -> Any:
    """A value by its schema, as far as the schema says one type."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" and isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(kind, str) and kind in TYPES and isinstance(value, str):
        value = _read(value, TYPES[kind])
    if isinstance(value, dict) and isinstance(schema, Mapping) and isinstance(schema.get("properties"), Mapping):
        return {name: typed(entry, schema["properties"].get(name)) for name, entry in value.items()}
    if isinstance(value, list) and isinstance(schema, Mapping):
        return [typed(entry, schema.get("items")) for entry in value]
    return value


def _read(value: str, kind: Any) -> Any:
    """What a text says as JSON, if that is of the kind."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    fits = isinstance(found, kind) and (kind is bool or not isinstance(found, bool))
    return found if fits else value
