"""The command line: the click group, the options that commands share, and errors in one to three lines.

Exit status: 0 done · 1 failed · 2 wrong usage · 130 interrupted.
"""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .errors import DiffGemmaError
from .files.shipped import BUILT_IN

if TYPE_CHECKING:
    from .pipeline.model import DiffusionGemma

COMMANDS = {
    "generate": "Write a reply to a prompt, and watch the canvas settle.",
    "chat": "Talk with the model.",
    "convert": "Turn the released checkpoint into an MLX pack that fits.",
    "check": "Check this installation and a model against the recorded reference.",
    "bench": "Measure this machine; compare two measurements.",
    "tune": "Measure how this machine likes the work cut, once, and remember it.",
    "train": "Fine-tune with LoRA or in full, by the denoising objective.",
}


class Command(click.Command):
    """A command whose failures are one to three lines on stderr, with a traceback only on `--debug`."""

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # pyright: ignore
        args = list(sys.argv[1:] if args is None else args)
        try:
            status = super().main(args, prog_name, **{**extra, "standalone_mode": False})
        except (KeyboardInterrupt, click.Abort):
            status = 130
        except click.ClickException as error:
            status = error.exit_code
            _complain(error.format_message() + _hint(error))
        except Exception as error:
            if "--debug" in args:
                raise
            status = 1
            _complain(str(error) if isinstance(error, DiffGemmaError) else _unforeseen(error))
        sys.exit(status if isinstance(status, int) else 0)


class Group(Command, click.Group):
    """Imports a command's module when that command is asked for, so that `--help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return import_module(f"mlx_diffgemma.{cmd_name}").main if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _complain(message: str) -> None:
    click.echo("Error: " + message.replace("\n", "\n       "), err=True)


def _hint(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f"\nSee: {ctx.command_path} --help" if ctx else ""


def _unforeseen(error: Exception) -> str:
    what = str(error).strip().splitlines()
    return f"{type(error).__name__}: {what[0] if what else '(no message)'}\nRun again with --debug for the traceback."


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx_diffgemma")
def main() -> None:
    """DiffusionGemma in MLX. Every command has its own --help."""


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the command `name`: `-h`, `--debug`, and plain errors."""

    def decorate(function: Callable[..., None]) -> click.Command:
        names = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        made = click.command(name, cls=Command, context_settings=names)(function)
        made.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks."))
        return made

    return decorate


_LOADING: dict[str, dict[str, Any]] = {
    "model": {"metavar": "PATH|REPO", "help": "A folder or Hub repository.  [default: the small built-in model]"},
    "adapter": {"metavar": "PATH", "help": "A LoRA adapter made by mlx_diffgemma.train."},
    "trunk": {
        "type": click.Choice(["auto", "packed", "bf16"]),
        "help": "All but the experts: as in the pack, or unpacked (same values, faster, larger).  [default: auto]",
    },
    "no_tuned": {"is_flag": True, "default": None, "help": "Not as mlx_diffgemma.tune chose: as the device likes it."},
    "memory_limit": {"type": click.FloatRange(0, min_open=True), "metavar": "GB", "help": "The most memory to use."},
}


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """What `open_model` takes, handed over as one dict `source` that holds what the user set and nothing else."""
    return _gathered(function, "source", _LOADING, {"adapter": ["--adapter-path"]})


def open_model(source: dict[str, Any], *, quiet: bool = False) -> "DiffusionGemma":
    """Load the model, or the built-in one with a line that says how to get the real one."""
    from rich.console import Console

    from .pipeline.loading import load, notes

    stderr = Console(stderr=True, quiet=quiet)
    if "model" not in source:
        stderr.print(
            "The small built-in model. The real one: mlx_diffgemma.convert, then --model PATH (README: The real model)",
            style="dim",
        )
    options = {name: value for name, value in source.items() if name not in ("model", "memory_limit", "no_tuned")}
    if source.get("no_tuned"):
        from .model.tuning import DEFAULT

        options["tuning"] = DEFAULT
    if "memory_limit" in source:
        options["memory_limit"] = int(source["memory_limit"] * 1e9)
    with stderr.status(f"Loading {source.get('model', 'the built-in model')}"):
        with warnings.catch_warnings(record=True) as said:  # of a choice that is remembered and cannot be used
            warnings.simplefilter("always", UserWarning)
            model = load(source.get("model", BUILT_IN), **options)
    for line in [*(str(w.message) for w in said), *notes(model)]:
        stderr.print(line, style="dim", highlight=False)
    return model


_POSITIVE, _NUMBER = click.IntRange(1), click.FloatRange(0)
_GENERATION: dict[str, dict[str, Any]] = {
    "seed": {"type": int, "help": "Makes a run repeatable.  [default: a new one each time, reported]"},
    "max_tokens": {"type": _POSITIVE, "help": "Stop after this many tokens."},
    "max_denoising_steps": {"type": _POSITIVE, "help": "At most so many steps a canvas."},
    "t_max": {"type": _NUMBER, "help": "Temperature of the first step."},
    "t_min": {"type": _NUMBER, "help": "What the temperature falls towards."},
    "entropy_bound": {"type": _NUMBER, "help": "Nats that one step may accept together."},
    "stability_threshold": {"type": click.IntRange(0), "help": "Steps without a change before a canvas is settled."},
    "confidence_threshold": {"type": _NUMBER, "help": "Mean entropy under which a canvas is settled."},
    "prefill_step_size": {"type": _POSITIVE, "help": "Prompt tokens encoded at a time."},
    "canvas_length": {"type": _POSITIVE, "help": "Not the reference: a shorter canvas, for short answers."},
    "greedy": {"is_flag": True, "default": None, "help": "Not the reference: always guess the best token."},
    "avoid_empty": {"is_flag": True, "default": None, "help": "Not the reference: never an empty reply."},
}


def generation_options(function: Callable[..., None]) -> Callable[..., None]:
    """The sampler's options, handed over as one dict `options` that holds what the user set and nothing else.

    Without them the checkpoint's generation_config.json decides, and where that is silent, the reference.
    """
    return _gathered(function, "options", _GENERATION, {"max_tokens": ["-m"]})


def _gathered(
    function: Callable[..., None], argument: str, table: dict[str, dict[str, Any]], also: dict[str, list[str]]
) -> Callable[..., None]:
    """Add the options of `table` to a command; their values arrive together in one dict. `also`: other spellings."""

    @wraps(function)
    def gather(*args: Any, **values: Any) -> None:
        chosen = {name: values.pop(name) for name in table}
        function(*args, **values, **{argument: {name: v for name, v in chosen.items() if v is not None}})

    for name, settings in reversed(table.items()):
        click.option("--" + name.replace("_", "-"), *also.get(name, []), name, **settings)(gather)
    return gather
