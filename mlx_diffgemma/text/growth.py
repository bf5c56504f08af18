"""How large the result of a template's operation would be: bounds from above, cheap to tell before the work is done.

What is not listed makes nothing longer than what it was given.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any


def size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | set) else 1


def entries(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list | tuple | set) else ()


def _whole(value: Any) -> int:
    """A number as a length; anything else has none."""
    return max(int(value), 0) if isinstance(value, int) else 0


def after(operator: str, left: Any, right: Any) -> float:
    """The size of `left operator right`, or that of an integer in digits, which count a thousandfold."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**":
        return left.bit_length() * max(right, 0) * 1000 if numbers else 0
    if operator == "*":
        if numbers:
            return (left.bit_length() + right.bit_length()) * 1000
        return size(left) * _whole(right) + size(right) * _whole(left)
    if operator == "%" and isinstance(left, str | bytes):
        return formatted(left, *(right if isinstance(right, tuple) else (right,)))
    return size(left) + size(right) if operator == "+" else 0


# A width as printf and as format writes it, and the signs that one is taken from the values.
_WIDTHS = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d*)\.?(\d*)|:[^{}]*?(\d*)\.?(\d*)[^{}\d]*\}")
_TAKEN = re.compile(r"%(?:\([^)]*\))?[-+ #0]*[\d.]*\*|:[^{}]*\{")


def formatted(form: Any, *values: Any) -> float:
    """`form % values`, `form.format(*values)`."""
    form = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    widths = [int(digits[:9]) for found in _WIDTHS.findall(form) for digits in found if digits]
    widths += [_whole(value) for value in values] if _TAKEN.search(form) else []
    slots = form.replace("{{", "").count("{") + form.replace("%%", "").count("%")
    sizes = [_deep(value) for value in values]
    written = sum(sizes) if slots <= len(sizes) else slots * max(sizes, default=0)  # each once, or again and again
    return len(form) + slots * max(widths, default=0) + written


def _deep(value: Any) -> int:
    """As `size`, of a table's values too."""
    return sum(map(size, value.values())) if isinstance(value, dict) else size(value)


def _replaced(value: Any, old: Any = "", new: Any = "", *_: Any) -> float:
    count = value.count(str(old)) if isinstance(value, str) and old else size(value) + 1
    return size(value) + count * size(new)


def _joined(value: Any, other: Any = "", *_: Any) -> float:
    """`glue.join(parts)` and `parts | join(glue)`."""
    glue, parts = (value, other) if isinstance(value, str) else (other, value)
    parts = parts if isinstance(parts, list | tuple | set | dict) else str(parts)
    return sum(map(size, parts)) + len(parts) * size(glue)


def _padded(value: Any, *widths: Any) -> float:
    return max(size(value), *map(_whole, widths), 0)


def _per(mark: str) -> Callable[..., float]:
    """At every `mark` in a text something is put in, of a width or a text."""

    def longer(value: Any, *put: Any) -> float:
        return size(value) + (str(value).count(mark) + 1) * max([0, *map(_whole, put), *map(size, put)])

    return longer


def _translated(value: Any, table: Any = None, *_: Any) -> float:
    return size(value) * max([1, *map(size, table.values())]) if isinstance(table, dict) else size(value)


def _digits(value: Any, *numbers: Any) -> float:
    """A number of places, or an indent: ten thousand are too many."""
    return max(map(_whole, numbers), default=0) * 1600


LENGTHENS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "batch", "slice"), _padded),
    **dict.fromkeys(("round", "tojson"), _digits),
    "expandtabs": _per("\t"),
    "indent": _per("\n"),
    "wordwrap": lambda value, *_: 2 * size(value),
    "translate": _translated,
    "replace": _replaced,
    "join": _joined,
    "format": formatted,
}
WRITES = frozenset("string tojson pprint join format urlencode xmlattr e escape forceescape".split())
