"""What the package brings along: the built-in model, the converter's knowledge, the recordings of the reference.

A wheel carries the last two inside the package; a checkout has them beside it.
"""

from pathlib import Path

from ..errors import ConfigError

PACKAGE = Path(__file__).parent.parent
BUILT_IN = PACKAGE / "demo"  # the small model that is run when none is named
EYES = BUILT_IN / "eyes"  # its vision tower, and what it has learned to read pictures by


def knowledge() -> Path:
    """The folder `convert/`."""
    return _folder("_convert", "convert")


def references() -> Path:
    """The folder of the recordings, `tests/reference/`."""
    return _folder("_reference", "tests/reference")


def _folder(packed: str, beside: str) -> Path:
    for path in (PACKAGE / packed, PACKAGE.parent / beside):
        if path.is_dir():
            return path
    raise ConfigError(f"this installation is incomplete: there is no {PACKAGE / packed}. Install it again.")
