"""What the benchmarks share: where a figure comes from, fair timing, one table, one JSON document at the end."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma import __version__

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "mlx_diffgemma" / "demo"
PROMPTS = (  # one of each task that the built-in model was trained for
    "Sort these names:\nZoe, Ada, Kim, Ben, Olga",
    'Make a Markdown table:\n{"name": "Ada", "age": 31}\n{"name": "Ben", "age": 42}',
    "Write this as JSON:\nname: Cleo\ncity: Oslo\nage: 27",
    "Fill in the template:\nDear {name}, your {item} will be ready on {day}.\nitem: kite\nname: Tara\nday: Friday",
    "Solve this Sudoku:\n632 ..4\n51. 3..\n32. .41\n.51 632\n.43 265\n.65 4..",
)
PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "torch", "numpy")


def provenance() -> dict[str, Any]:
    """The machine, the versions and the commit that a figure was measured with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "mlx-diffgemma": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")),
    }


def machine() -> dict[str, Any]:
    """Processor, memory, operating system, MLX's default device, and the BLAS in front of MLX's own."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{mx.default_device().type.name} ({mx.device_info().get('device_name', 'unknown')})",
        "preloaded": [Path(library).name for library in os.environ.get("LD_PRELOAD", "").split()],
        "blas": {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")},
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid()))) * 1024


def alternate(functions: Mapping[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every run by name, in the order A B A B …: what slows the machine down slows all of them.

    Each function must wait for its own result (`mx.eval`). The first `warmup` rounds do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(warmup + runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if run >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """An aligned Markdown table; columns of numbers stand on the right. None is an empty cell."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    width = [max(3, *(len(row[i]) for row in [list(header), *cells])) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, width, right, strict=True)
        return "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in pairs) + " |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(width, right, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, cells)])


def report(rows: Sequence[Sequence[object]], header: Sequence[str], title: str = "") -> None:
    """Print a table below its title."""
    print(*([title, ""] if title else []), table(rows, header), "", sep="\n", flush=True)


def finish(document: dict[str, Any], out: Path | None = None) -> None:
    """Print the document as the last line, in JSON, and write it to `out` as well."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(document, ensure_ascii=False), flush=True)


def _is_number(cell: str) -> bool:
    """A figure, perhaps with a unit; "–" and nothing are figures too."""
    return re.fullmatch(r"–?|[-+−≈<>≤≥]?[\d.,]+ ?[\w%/]{0,6}", cell) is not None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """What a command prints; empty when it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
