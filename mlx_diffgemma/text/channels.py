"""The channels inside an answer of the Gemma 4 family: thoughts, tool calls, text."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An answer taken apart."""

    text: str
    thinking: str | None
    tool_calls: list[dict[str, Any]]


# The markers of the Gemma 4 family; a vocabulary without them has no channels and no tools.
CHANNEL, END_CHANNEL = "<|channel>", "<channel|>"
TOOL_CALL, END_TOOL_CALL = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
OPEN = "open"  # a channel that the prompt opened


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """A tool call's inside, parsed by mlx-lm; one that does not parse is given as it is."""
    from mlx_lm.tool_parsers import gemma4

    try:
        calls = gemma4.parse_tool_call(text)
    except ValueError:
        return [{"name": None, "arguments": None, "text": text}]
    return calls if isinstance(calls, list) else [calls]
