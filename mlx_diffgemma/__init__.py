"""DiffusionGemma in MLX: `load` a model, then `generate`, `stream` or `chat` with it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_diffgemma.config import GenerationConfig as GenerationConfig
    from mlx_diffgemma.pipeline import DiffusionGemma as DiffusionGemma
    from mlx_diffgemma.pipeline import load as load

__version__ = "0.1.0"
__all__ = ["DiffusionGemma", "GenerationConfig", "__version__", "load"]

_HOME = {"load": "pipeline", "DiffusionGemma": "pipeline", "GenerationConfig": "config"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `--help` should not wait for MLX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
