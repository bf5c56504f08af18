"""DiffusionGemma in MLX: `load` a model, then `generate`, `stream` or `chat` with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .errors import BusyError as BusyError
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DiffGemmaError as DiffGemmaError
    from .errors import MemoryLimitError as MemoryLimitError
    from .errors import NoiseError as NoiseError
    from .errors import PromptError as PromptError
    from .errors import TokenizerError as TokenizerError
    from .errors import TrainingError as TrainingError
    from .generation.events import CanvasRow as CanvasRow
    from .generation.events import Committed as Committed
    from .generation.events import Denoised as Denoised
    from .generation.events import Event as Event
    from .generation.events import Finished as Finished
    from .generation.events import Prefilled as Prefilled
    from .generation.events import Statistics as Statistics
    from .generation.settings import GenerationConfig as GenerationConfig
    from .pipeline.chat import Chat as Chat
    from .pipeline.loading import load as load
    from .pipeline.model import DiffusionGemma as DiffusionGemma
    from .pipeline.results import Result as Result
    from .text.language.automaton import Language as Language
    from .text.language.regex import regex as regex
    from .text.language.texts import Hole as Hole
    from .text.language.texts import choices as choices
    from .text.language.texts import free_text as free_text
    from .text.language.texts import literal as literal
    from .text.language.values import any_json as any_json
    from .text.language.values import json_schema as json_schema

_ERRORS = """
    DiffGemmaError BusyError CheckpointError ConfigError MemoryLimitError NoiseError PromptError TokenizerError
    TrainingError
""".split()
_EVENTS = "Event Prefilled Denoised Committed CanvasRow Finished Statistics".split()
_HOME = {
    "load": "pipeline.loading",
    "DiffusionGemma": "pipeline.model",
    "Chat": "pipeline.chat",
    "Result": "pipeline.results",
    "GenerationConfig": "generation.settings",
    "Language": "text.language.automaton",
    "any_json": "text.language.values",
    "json_schema": "text.language.values",
    "regex": "text.language.regex",
    **dict.fromkeys("Hole choices free_text literal".split(), "text.language.texts"),
    **dict.fromkeys(_EVENTS, "generation.events"),
    **dict.fromkeys(_ERRORS, "errors"),
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `--help` should not wait for MLX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
