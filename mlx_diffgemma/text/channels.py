"""The channels inside an answer of the Gemma 4 family: thoughts, tool calls, text."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DiffGemmaError
from ..readers import check_tree


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An answer taken apart."""

    text: str
    thinking: str | None
    tool_calls: list[dict[str, Any]]


# The markers of the family; a vocabulary without them has no channels and no tools.
CHANNEL, END_CHANNEL = "<|channel>", "<channel|>"
TOOL_CALL, END_TOOL_CALL = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
OPEN = "open"  # a channel that the prompt opened


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Their ids in one vocabulary; None where it lacks one."""

    channel: int | None
    end_channel: int | None
    tool_call: int | None
    end_tool_call: int | None
    quote: int | None

    @classmethod
    def of(cls, id_of: Callable[[str], int | None]) -> "Markers":
        return cls(
            channel=id_of(CHANNEL),
            end_channel=id_of(END_CHANNEL),
            tool_call=id_of(TOOL_CALL),
            end_tool_call=id_of(END_TOOL_CALL),
            quote=id_of(QUOTE),
        )

    def spans(self, ids: Sequence[int], *, open_channel: bool) -> list[tuple[str, list[int]]]:
        """Cut ids at the markers: (OPEN, CHANNEL, TOOL_CALL or "", the ids between). A call inside a thought does not
        end it; another marker ends a call that was not closed."""
        kinds = {self.channel: CHANNEL, self.tool_call: TOOL_CALL}
        closing = {self.end_channel, self.end_tool_call} - {None}
        if {*kinds, *closing}.isdisjoint(ids):
            return [(OPEN if open_channel else "", list(ids))] if ids else []
        spans: list[tuple[str, list[int]]] = [(OPEN if open_channel else "", [])]
        place = 0
        while place < len(ids):
            token = ids[place]
            if token == self.tool_call and token is not None:
                end = self._end_of_call(ids, place + 1)
                closer = ids[end] if end < len(ids) else None
                thought = spans[-1][0] in (OPEN, CHANNEL) and closer != self.end_channel
                spans += [(TOOL_CALL, list(ids[place + 1 : end])), (OPEN if thought else "", [])]
                place = end + (closer in closing)
                continue
            if token in kinds:
                spans.append((kinds[token], []))
            elif token in closing:
                spans.append(("", []))
            else:
                spans[-1][1].append(token)
            place += 1
        return [span for span in spans if span[1]]

    def calls(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where calls begin, with their marker, and where their insides end."""
        place = 0
        while self.tool_call is not None and self.tool_call in ids[place:]:
            place = ids.index(self.tool_call, place)
            end = self._end_of_call(ids, place + 1)
            yield place, end
            place = end

    def _end_of_call(self, ids: Sequence[int], start: int) -> int:
        """Where a call ends: at the next marker that is no part of a quoted argument. A quote that is not closed does
        not count, for it would take in the rest of the answer."""
        ends = {self.channel, self.end_channel, self.tool_call, self.end_tool_call} - {None}
        quoted = False
        for place in range(start, len(ids)):
            if ids[place] == self.quote:
                quoted = not quoted
            elif ids[place] in ends and not quoted:
                return place
        if not quoted:
            return len(ids)
        return next((place for place in range(start, len(ids)) if ids[place] in ends), len(ids))


def parse_calls(text: str) -> list[dict[str, Any]]:
    """A tool call's inside, parsed by mlx-lm; one that does not parse, or holds what JSON cannot, is given as it is."""
    from mlx_lm.tool_parsers import gemma4

    try:
        found: Any = gemma4.parse_tool_call(text)
        calls = found if isinstance(found, list) else [found]
        check_tree(calls, "a tool call")
        if all(isinstance(call.get("name"), str) and _is_plain(call.get("arguments")) for call in calls):
            return calls
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, DiffGemmaError):
        pass  # whatever a model writes: it is handed over below
    return [{"name": None, "arguments": None, "text": text}]


def _is_plain(value: Any) -> bool:
    """Whether JSON can write it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
