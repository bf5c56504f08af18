"""The options that commands share, and the model that they open."""

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from . import joined
from .errors import ConfigError
from .files.shipped import BUILT_IN
from .readers import parse_json
from .values import shown

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma


class Option(click.Option):
    """An option of a section of `--help-all`; those without one are the common options, which `--help` shows."""

    def __init__(self, *args: Any, section: str = "", **settings: Any):
        super().__init__(*args, **settings)
        self.section = section


class Number(click.FloatRange):
    """A finite number in a range: nan lies in none, and inf is a slip of the pen."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class _JsonObject(click.ParamType):
    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            found = parse_json(value, shown(value), fault=ConfigError)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r} is not a JSON object, as in {{"enable_thinking": true}}.', param, ctx)
        return found


class _Logprobs(click.ParamType):
    name = "K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | int:
        if isinstance(value, bool) or value == "True":
            return True
        if not str(value).isdecimal():
            self.fail(f"{value!r} is not a number of tokens.", param, ctx)
        return int(value)


LOADING: dict[str, dict[str, Any]] = {
    "model": {"metavar": "PATH|REPO", "help": "Folder or Hub repository.  [default: the built-in one]"},
    "adapter": {"metavar": "PATH", "help": "A LoRA adapter made by train."},
    "trunk": {
        "section": "Machine",
        "type": click.Choice(["auto", "packed", "bf16"]),
        "help": "All but the experts: as in the pack, or unpacked (same values, faster, larger).  [default: auto]",
    },
    "no_tuned": {
        "section": "Machine",
        "is_flag": True,
        "default": None,
        "help": "Not as mlx_diffgemma.tune chose, but by the defaults.",
    },
    "memory_limit": {
        "section": "Machine",
        "type": Number(0, min_open=True),
        "metavar": "GB",
        "help": "The most memory to use.",
    },
    "stream_experts": {
        "section": "Machine",
        "type": click.IntRange(0),
        "metavar": "N",
        "help": "Read the experts of N layers from disk in every pass.  [default: as few as fit]",
    },
    "ignore_key": {
        "section": "Machine",
        "multiple": True,
        "metavar": "KEY",
        "help": "An unknown key of config.json that you know is harmless.",
    },
}


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """What `open_model` takes, handed over as one dict `source` that holds what the user set and nothing else."""
    return gathered(function, "source", LOADING, {"adapter": ["--adapter-path"]})


def open_model(source: dict[str, Any], *, quiet: bool = False) -> "DiffusionGemma":
    """Load the model, or the built-in one with a line that says how to get the real one."""
    from rich.text import Text

    from .model.tuning import DEFAULT
    from .pipeline.loading import load
    from .terminal.console import console

    share = joined.share()
    stderr = console(stderr=True, quiet=quiet)
    if "model" not in source:
        stderr.print(
            "The small built-in model. The real one: mlx_diffgemma.convert, then --model PATH (README: The real model)",
            style="dim",
        )
    own = ("model", "memory_limit", "ignore_key", "no_tuned")
    options = {name: value for name, value in source.items() if name not in own}
    if "no_tuned" in source:
        options["tuning"] = DEFAULT
    if "memory_limit" in source:
        options["memory_limit"] = max(int(source["memory_limit"] * 1e9), 1)
    with stderr.status(Text(f"Loading {source.get('model', 'the built-in model')}")):
        model = load(source.get("model", BUILT_IN), ignore_keys=source.get("ignore_key", ()), share=share, **options)
    for notice in model.notices:
        stderr.print(f"Note: {notice}", style="dim")
    return model


BUDGET = "Soft tokens of a picture, at most: 70, 140, 280, 560, 1120, low or high."
_POSITIVE, _NUMBER = click.IntRange(1), Number(0)
_SAMPLER, _DEPARTURES = (
    "Sampler (without these, the checkpoint's own values)",
    "Not the reference (reported in the result)",
)
_PROMPT, _TOKENS, _SCORES = "Prompt", "Token by token (--decoding autoregressive)", "Log-probabilities"
_GENERATION: dict[str, dict[str, Any]] = {
    "seed": {"type": int, "metavar": "N", "help": "Makes a run repeatable.  [default: new]"},
    "max_tokens": {"type": _POSITIVE, "metavar": "N", "help": "Stop after this many tokens."},
    "temperature": {"type": _NUMBER, "metavar": "X", "help": "Of the schedule: 1 is the reference, 0 --greedy."},
    "decoding": {
        "type": click.Choice(["diffusion", "autoregressive"]),
        "metavar": "WAY",
        "help": "diffusion, or autoregressive: token by token.",
    },
    "extra_eos_token": {
        "section": _PROMPT,
        "metavar": "TOKEN",
        "multiple": True,
        "help": "A token that ends a reply too; may be repeated.",
    },
    "template_options": {
        "section": _PROMPT,
        "type": _JsonObject(),
        "help": "Further variables of the chat template, as a JSON object.",
    },
    "max_denoising_steps": {"section": _SAMPLER, "type": _POSITIVE, "help": "At most so many steps a canvas."},
    "t_max": {"section": _SAMPLER, "type": Number(0, min_open=True), "help": "Temperature of the first step."},
    "t_min": {"section": _SAMPLER, "type": _NUMBER, "help": "What the temperature falls towards."},
    "entropy_bound": {"section": _SAMPLER, "type": _NUMBER, "help": "Nats that one step may accept together."},
    "stability_threshold": {
        "section": _SAMPLER,
        "type": click.IntRange(0),
        "help": "Steps without a change before a canvas is settled.",
    },
    "confidence_threshold": {
        "section": _SAMPLER,
        "type": _NUMBER,
        "help": "Mean entropy under which a canvas is settled.",
    },
    "top_p": {"section": _TOKENS, "type": _NUMBER, "help": "The likeliest tokens with this probability together."},
    "top_k": {"section": _TOKENS, "type": click.IntRange(0), "help": "So many of the likeliest tokens; 0: all."},
    "min_p": {"section": _TOKENS, "type": _NUMBER, "help": "Tokens at least so likely as this times the likeliest."},
    "logprobs": {
        "section": _SCORES,
        "is_flag": False,
        "flag_value": True,
        "type": _Logprobs(),
        "metavar": "[K]",
        "help": "Of every token given its left; with K also the K likeliest there.",
    },
    "best_of": {"section": _SCORES, "type": _POSITIVE, "help": "So many answers; the likeliest is given."},
    "retries": {"section": _SCORES, "type": click.IntRange(0), "help": "More answers while a token is unlikely."},
    "stable_answer": {
        "section": _DEPARTURES,
        "type": _POSITIVE,
        "help": "End a canvas whose answer has not changed for so many steps: 8 costs nearly nothing, 1 much.",
    },
    "free_steps": {
        "section": _SAMPLER,
        "type": click.IntRange(0),
        "metavar": "N",
        "help": "Under a constraint: steps that the model leads.  [default: 8; 0 where holes are filled]",
    },
    "prefill_step_size": {"section": "Machine", "type": _POSITIVE, "help": "Prompt tokens encoded at a time."},
    "canvas_length": {"section": _DEPARTURES, "type": _POSITIVE, "help": "A shorter canvas, for short answers."},
    "picture_mask": {
        "section": _DEPARTURES,
        "type": click.Choice(["transformers", "gemma4"]),
        "help": "Who sees whom in a picture: as transformers generates, or as in Google's own code.",
    },
    "greedy": {"section": _DEPARTURES, "is_flag": True, "default": None, "help": "Always guess the best token."},
    "avoid_empty": {"section": _DEPARTURES, "is_flag": True, "default": None, "help": "Never an empty reply."},
}
_SPELLINGS = {
    "max_tokens": ["-m"],
    "temperature": ["--temp"],
    "template_options": ["--chat-template-config"],
}


def generation_options(function: Callable[..., None]) -> Callable[..., None]:
    """The sampler's options, handed over as one dict `options` that holds what the user set and nothing else.

    Without them the checkpoint's generation_config.json decides, and where that is silent, the reference.
    """
    return gathered(function, "options", _GENERATION, _SPELLINGS)


def run_options(model: "DiffusionGemma", options: dict[str, Any]) -> dict[str, Any]:
    """The options as `model.prepare` takes them: stop tokens by name become ids.

    Errors: ConfigError for a name that is no single token of this model, or that ends replies anyway.
    """
    options = dict(options)
    extra = options.pop("extra_eos_token", ())
    stop_ids = list(model.generation_config.stop_ids)
    for name in extra:
        ids = [known] if (known := model.tokenizer.id_of(name)) is not None else model.tokenizer.encode(name)
        if len(ids) != 1:
            raise ConfigError(f"--extra-eos-token {name!r} is {len(ids)} tokens of this model, expected one.")
        if ids[0] in stop_ids:
            raise ConfigError(f"--extra-eos-token {name!r} would do nothing: it ends a reply already.")
        stop_ids += ids
    return options | ({"stop_ids": tuple(stop_ids)} if extra else {})


def gathered(
    function: Callable[..., None], argument: str, table: dict[str, dict[str, Any]], also: dict[str, list[str]]
) -> Callable[..., None]:
    """Add the options of `table` to a command; their values arrive together in one dict. `also`: other spellings."""

    @wraps(function)
    def gather(*args: Any, **values: Any) -> None:
        chosen = {name: values.pop(name) for name in table}
        function(*args, **values, **{argument: {name: v for name, v in chosen.items() if v is not None and v != ()}})

    for name, settings in reversed(table.items()):
        spellings = dict.fromkeys(("--" + name.replace("_", "-"), *also.get(name, [])))
        click.option(*spellings, name, cls=Option, **settings)(gather)
    return gather
