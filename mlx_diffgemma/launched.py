"""What `mlx.launch` tells each of the processes that it starts; known without MLX."""

import os
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .readers import parse_json, read_bytes


def rank() -> int:
    """Which of them this process is; 0 speaks for all."""
    told = os.environ.get("MLX_RANK", "0")
    return int(told) if told.isdecimal() else 0


def size() -> int:
    """How many there are. Errors: ConfigError for a file of hosts that cannot be read."""
    if "MLX_RANK" not in os.environ:
        return 1
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
        if file := os.environ.get(name):
            return _count(Path(file), name)
    told = os.environ.get("MLX_WORLD_SIZE", "1")
    return int(told) if told.isdecimal() else 1


def _count(file: Path, name: str) -> int:
    raw = read_bytes(file, fault=ConfigError)
    hosts: Any = parse_json(raw, f"{name} {file}", fault=ConfigError) if raw.strip() else []  # mlx.launch -n 1
    return max(len(hosts), 1) if isinstance(hosts, list) else 1
