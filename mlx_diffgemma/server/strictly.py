"""Which calls of an answer do not obey: those of functions whose `strict` promises that arguments fit the schema."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import ConfigError
from ..text.channels import END_TOOL_CALL, QUOTE, TOOL_CALL, parse_calls
from ..text.language.automaton import Automaton, Language
from ..text.language.values import tool_call
from ..text.tokenizer import Tokenizer
from .protocols.typed import typed_call

KEPT = 64  # languages, the latest


class Strict:
    """The strict functions among some tools, by name, as languages of their calls."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]):
        self.tools = tools
        functions = [tool["function"] for tool in tools if tool["function"].get("strict") is True]
        found = {function["name"]: _language(json.dumps(function)) for function in functions}
        self.languages = {name: language for name, language in found.items() if language is not None}
        self.left_out = [f"tools.{name}.strict" for name, language in found.items() if language is None]

    def broken(self, tokenizer: Tokenizer, ids: Sequence[int], start: int) -> tuple[int, int, Language] | None:
        """The first call from place `start` on that does not obey: where it begins and ends, and what it may be."""
        for begin, end in tokenizer.markers.calls(ids) if self.languages else ():
            inside = tokenizer.call_text(ids[begin + 1 : end])
            name = inside.removeprefix("call:").partition("{")[0].strip()
            if begin >= start and name in self.languages and not self.obeys(name, inside):
                closed = end < len(ids) and ids[end] == tokenizer.markers.end_tool_call
                return begin, end + closed, self.languages[name]
        return None

    def obeys(self, name: str, inside: str) -> bool:
        """Whether a call's inside is one that its language has, as it stands or with the types of its schema."""
        return any(_accepts(self.languages[name], text) for text in (inside, *self._typed(inside)))

    def _typed(self, inside: str) -> Iterator[str]:
        calls = [call for call in parse_calls(inside) if call.get("name") is not None]
        if len(calls) == 1:
            call = typed_call(calls[0], self.tools)
            yield f"call:{call['name']}{_spelled(call['arguments'])}"


@lru_cache(maxsize=KEPT)
def _language(function: str) -> Language | None:
    """None for a schema that no language is made of."""
    try:
        return tool_call([json.loads(function)])
    except ConfigError:
        return None


def _accepts(language: Language, inside: str) -> bool:
    [automaton] = language.parts
    return isinstance(automaton, Automaton) and automaton.accepts(f"{TOOL_CALL}{inside}{END_TOOL_CALL}")


def _spelled(value: Any) -> str:
    """A value as calls write it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        names = sorted(value, key=str.lower)
        return "{" + ",".join(f"{name}:{_spelled(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_spelled, value)) + "]"
    return json.dumps(value)
