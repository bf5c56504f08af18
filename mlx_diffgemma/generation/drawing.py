"""Events and results as HTML, for notebooks: no styles but inline ones, readable on light and dark."""

import html
from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]  # ids → text

FRAME = '<div style="font-family:ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;line-height:1.5">{}</div>'
NOTE = '<span style="opacity:.6">{}</span>'
ACCEPTED = "background:rgba(34,197,94,.18)"
NOISY = 3.0  # nats: from here on a position is as faint as it gets


def text_html(text: str, note: str = "") -> str:
    """A text as it is, and a note below it."""
    parts = [html.escape(text)] * bool(text) + [NOTE.format(html.escape(note))] * bool(note)
    return FRAME.format("\n".join(parts))


def canvas_html(
    best: Sequence[int], accepted: Sequence[bool], entropy: Sequence[float], decode: Decode, note: str
) -> str:
    """A canvas [L]: what was accepted stands on green, the rest fades with its entropy (nats)."""
    spans = []
    for i, sure, nats in zip(best, accepted, entropy, strict=True):
        style = ACCEPTED if sure else f"opacity:{max(0.15, 1 - nats / NOISY):.2f}"
        spans.append(f'<span style="{style}">{html.escape(_piece(i, decode))}</span>')
    return FRAME.format("".join(spans) + "\n" + NOTE.format(html.escape(note)))


def _piece(i: int, decode: Decode) -> str:
    """What an id spells inside a text: a tokenizer strips the blank in front of the first word it decodes."""
    once = decode([i])
    return decode([i, i])[len(once) :]
