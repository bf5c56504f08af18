"""What a run may choose: GenerationConfig, the only home of its defaults."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypedDict

from ..config import check, ids_of, nearest
from ..errors import ConfigError

# Sampling keys of autoregressive models, and the values at which they do nothing.
_UNUSED = {"top_k": (0, 50), "top_p": (1.0,), "min_p": (0.0,), "temperature": (1.0,), "repetition_penalty": (1.0,)}


class GenerationOptions(TypedDict, total=False):
    """GenerationConfig's fields as keywords of `generate`, `stream`, `chat` and `prepare`."""

    max_tokens: int
    max_denoising_steps: int
    t_min: float
    t_max: float
    entropy_bound: float
    stability_threshold: int
    confidence_threshold: float
    stop_ids: tuple[int, ...]
    pad_token_id: int
    prefill_step_size: int
    sparse_signal: bool
    canvas_length: int | None
    temperature: float
    greedy: bool
    avoid_empty: bool


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate. The defaults are transformers' (DiffusionGemmaGenerationConfig), the checkpoint's
    `generation_config.json` comes over them, and what the caller names over both.

    Exact unless one of the last four is set: those depart from the reference and are reported in the
    statistics of every result.
    """

    max_tokens: int = 256  # of the reply; transformers' max_new_tokens
    max_denoising_steps: int = 48  # a canvas, at most
    t_min: float = 0.4  # what the temperature falls towards: the last step stays a part above it
    t_max: float = 0.8  # temperature of the first step (LinearTemperatureScheduleLogitsProcessor)
    entropy_bound: float = 0.1  # nats that one step may accept together (EntropyBoundSampler, arXiv 2505.24857)
    stability_threshold: int = 1  # steps without a change of the best tokens before a canvas is settled
    confidence_threshold: float = 0.005  # nats, mean over the canvas, below which it is settled; both of them:
    # StableAndConfidentStoppingCriteria
    stop_ids: tuple[int, ...] = (1, 106)  # <eos>, <turn|>: what stands before the first of them is the reply
    pad_token_id: int = 0  # fills shorter prompts of a batch on their left
    prefill_step_size: int = 2048  # prompt tokens encoded at a time: memory, not results
    sparse_signal: bool = True  # the signal's full product only where a position is not one token to its precision
    # Departures from the reference, by name.
    canvas_length: int | None = None  # tokens; shorter canvases than the model's, for short answers
    temperature: float = 1.0  # multiplies t_min and t_max; 0 is greedy, by the reference's temperatures
    greedy: bool = False  # the guess is the best token: no draw
    avoid_empty: bool = False  # no stop id at position 0 of the first canvas, in the signal too

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_denoising_steps", "prefill_step_size"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("stability_threshold", self.stability_threshold, self.stability_threshold >= 0, "at least 0")
        check("t_min", self.t_min, 0 < self.t_min <= self.t_max, f"above 0 and at most t_max ({self.t_max})")
        check("entropy_bound", self.entropy_bound, self.entropy_bound >= 0, "at least 0")
        check("confidence_threshold", self.confidence_threshold, self.confidence_threshold >= 0, "at least 0")
        if self.canvas_length is not None:
            check("canvas_length", self.canvas_length, self.canvas_length >= 1, "at least 1")
        scale = self.temperature
        check("temperature", scale, scale == 0 or 0.001 <= scale <= 1000, "0 (greedy), or 0.001 … 1000")
        if scale == 0:
            check("greedy", self.greedy, not self.greedy, "nothing beside temperature 0, which says it already")
            object.__setattr__(self, "greedy", True)
            object.__setattr__(self, "temperature", 1.0)

    def replace(self, **options: Any) -> "GenerationConfig":
        """A copy with `options` set; an option that does not exist is a ConfigError with the nearest name."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown generation option {name!r}.{nearest(name, known)}")
        return dataclasses.replace(self, **options)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, stop_ids: tuple[int, ...] = ()) -> "GenerationConfig":
        """Read `generation_config.json`; `stop_ids` (the tokenizer's and config's) are joined to its own.

        Keys that transformers writes for autoregressive models are ignored when they are null or at rest;
        sampling keys this algorithm has no place for (top_k, top_p, …) are refused by name.
        """
        renamed = {"max_new_tokens": "max_tokens"}
        options: dict[str, Any] = {}
        for key in ("max_new_tokens", "max_denoising_steps", "t_min", "t_max", "stability_threshold"):
            if values.get(key) is not None:
                options[renamed.get(key, key)] = values[key]
        for key in ("confidence_threshold", "pad_token_id"):
            if values.get(key) is not None:
                options[key] = values[key]
        sampler = values.get("sampler_config") or {}
        if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
            raise ConfigError(
                f"generation_config.json asks for the sampler {sampler['_cls_name']!r};"
                " only EntropyBoundSamplerConfig exists here."
            )
        if sampler.get("entropy_bound") is not None:
            options["entropy_bound"] = sampler["entropy_bound"]
        for key, at_rest in _UNUSED.items():
            if values.get(key) is not None and values[key] not in at_rest:
                raise ConfigError(f"generation_config.json sets {key} = {values[key]}, which this model does not use.")
        ids = dict.fromkeys((*ids_of(values.get("eos_token_id")), *stop_ids))
        if ids:
            options["stop_ids"] = tuple(ids)
        return cls(**options)

    @property
    def schedule(self) -> tuple[float, float]:
        """What the temperature falls towards, and where it begins."""
        return self.t_min * self.temperature, self.t_max * self.temperature

    @property
    def departures(self) -> dict[str, Any]:
        """The options in force that make a run differ from the reference algorithm."""
        at_rest = {"canvas_length": None, "temperature": 1.0, "greedy": False, "avoid_empty": False}
        named = {name: getattr(self, name) for name in at_rest}
        return {name: value for name, value in named.items() if value != at_rest[name]}
