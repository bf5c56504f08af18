"""Which machine, which versions: what a report of figures or of a fault begins with."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .._version import __version__


def machine() -> dict[str, Any]:
    """Chip, memory, system and versions."""
    from importlib.metadata import version

    import mlx.core as mx

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "chip": _chip(),
        "memory_bytes": memory,
        "cores": os.cpu_count(),
        "system": f"macOS {platform.mac_ver()[0]}" if platform.system() == "Darwin" else platform.platform(terse=True),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "device": str(mx.default_device()),
        "preload": os.environ.get("LD_PRELOAD"),
        "mlx_diffgemma": __version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _chip() -> str:
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
