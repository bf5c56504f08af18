"""What `mlx_diffgemma.tune` chose, remembered under the user's cache folder: a small file for each pack and device.

A choice holds for the chip, macOS, MLX and version of this package that it was measured with; another's is left alone.
"""

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx

from .._version import __version__
from ..disk import replacing, user_path, visible
from ..errors import DiffGemmaError
from ..model.tuning import Trunk, Tuning
from ..readers import read_json
from ..values import Field, Table, flag, integer, mapping, one_of, optional, text

FIELDS = ("trunk", "tile", "scores", "wired", "operations")  # what is chosen, in this order

_COUNT = integer(least=1, most=1 << 40)
_TUNING = Table(
    Field("trunk", one_of(*get_args(Trunk))),
    Field("tile", optional(_COUNT), None),
    Field("scores", _COUNT),
    Field("wired", flag),
    Field("operations", optional(_COUNT), None),
)
KEPT = Table(Field("pack", text()), Field("measured_with", mapping(text())), Field("tuning", _TUNING.kind), open=True)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A remembered choice, or why there is none that can be used."""

    tuning: Tuning | None = None
    notices: tuple[str, ...] = ()


def folder() -> Path:
    """MLX_DIFFGEMMA_CACHE, or this package's place in the user's cache folder."""
    if own := os.environ.get("MLX_DIFFGEMMA_CACHE"):
        return user_path(own, "MLX_DIFFGEMMA_CACHE")
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "mlx_diffgemma"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_diffgemma"


def circumstances() -> dict[str, str]:
    """What a choice depends on beside the pack."""
    return {
        "chip": str(mx.device_info().get("device_name", platform.machine())),
        "device": mx.default_device().type.name,
        "system": f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.system(),
        "mlx": version("mlx"),
        "mlx_diffgemma": __version__,
    }


def file_of(pack: Path) -> Path:
    """Where this pack's choice on this device is kept."""
    here = circumstances()
    sizes = sorted((file.name, file.stat().st_size) for file in visible(pack, "*.safetensors"))
    known = json.dumps([here["chip"], here["device"], sizes, (pack / "config.json").read_text()])
    return folder() / f"tuning-{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"


def remembered(pack: Path) -> Found:
    """The choice for this pack here; none, without a word, where nothing was chosen."""
    try:
        file = file_of(pack)
    except (OSError, RuntimeError, UnicodeDecodeError):
        return Found()
    if not file.is_file():
        return Found()
    try:
        kept = KEPT.read(read_json(file), str(file))
    except DiffGemmaError:
        return Found(notices=(f"{file} is not a choice of mlx_diffgemma.tune and is left alone.",))
    then, here = kept["measured_with"], circumstances()
    changed = [f"{name} {then.get(name)}, now {here[name]}" for name in here if then.get(name) != here[name]]
    if changed:
        then = "; ".join(changed)
        return Found(notices=(f"the tuning was measured with {then} and is left alone: run mlx_diffgemma.tune again.",))
    return Found(tuning=Tuning(**kept["tuning"]))


def remember(pack: Path, name: str, tuning: Tuning, seconds: dict[str, Any]) -> Path:
    """Write the choice whole or not at all. Errors: OSError, DiffGemmaError."""
    file = file_of(pack)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {field: getattr(tuning, field) for field in FIELDS}
    kept = {"pack": name, "measured_with": circumstances(), "tuning": values, "seconds": seconds}
    with replacing(file) as stream:
        stream.write((json.dumps(kept, indent=1) + "\n").encode())
    return file


def everything() -> list[tuple[Path, dict[str, Any] | None]]:
    """All choices that are kept; None for a file that cannot be read."""
    found = []
    for file in sorted(folder().glob("tuning-*.json")) if folder().is_dir() else ():
        kept: dict[str, Any] | None = None
        with suppress(DiffGemmaError):
            kept = KEPT.read(read_json(file), str(file))
        found.append((file, kept))
    return found
