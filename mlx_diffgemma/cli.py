"""The command line: the click group, the options that commands share, and errors in one to three lines.

Exit status: 0 done · 1 failed · 2 wrong usage · 130 interrupted · 143 terminated.
"""

import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from . import launched
from ._version import __version__
from .disk import reason
from .errors import ConfigError, DiffGemmaError, PeerError
from .files.shipped import BUILT_IN
from .readers import parse_json
from .values import shown

if TYPE_CHECKING:
    from .model.sharing.ranks import Ranks
    from .model.sharing.share import Share
    from .pipeline.model import DiffusionGemma

COMMANDS = {
    "generate": "Write a reply to a prompt, and watch the canvas settle.",
    "chat": "Talk with the model.",
    "serve": "Serve the model to editors, chats and scripts, with a page.",
    "score": "Say how likely the model finds a text.",
    "convert": "Turn the released checkpoint into an MLX pack that fits.",
    "edit": "Write some lines of a file anew.",
    "decide": "Weigh the possible answers to a question, without writing one.",
    "check": "Check this installation and a model against the recorded reference.",
    "evaluate": "Run tasks of EleutherAI's lm-eval.",
    "bench": "Measure this machine; compare two measurements.",
    "tune": "Measure how this machine likes the work cut, once, and remember it.",
    "train": "Fine-tune with LoRA or in full, by the denoising objective.",
    "fuse": "Merge a LoRA adapter into its model.",
}


class Option(click.Option):
    """An option of a section of `--help-all`; those without one are the common options, which `--help` shows."""

    def __init__(self, *args: Any, section: str = "", **settings: Any):
        super().__init__(*args, **settings)
        self.section = section


Machines = Literal["one", "share", "each"]  # of those that mlx.launch started: which run a command

_LAST = "Machine Other"  # the sections that come last


class Command(click.Command):
    """A command whose failures are one to three lines on stderr, with a traceback only on `--debug`."""

    everything = False  # whether the help that is being written is `--help-all`'s
    machines: Machines = "one"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (line := option.get_help_record(ctx)):
                sections.setdefault(getattr(option, "section", ""), []).append(line)
        for section, lines in sorted(sections.items(), key=lambda item: _LAST.find(item[0] or "-")):
            if self.everything or not section:
                with formatter.section(section or "Options"):
                    formatter.write_dl(lines)
        hidden = sum(map(len, sections.values())) - len(sections.get("", ()))
        if hidden and not self.everything:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options: {ctx.command_path} --help-all")

    def help_all(self, ctx: click.Context) -> str:
        """The help with every option, in its section."""
        self.everything = True
        try:
            return self.get_help(ctx)
        finally:
            self.everything = False

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # pyright: ignore
        args = list(sys.argv[1:] if args is None else args)
        say, lost = _complain, None
        if launched.rank() and self.machines != "each":
            say = _mute()
        try:
            with _terminable():
                _open_streams()
                status = super().main(args, prog_name, **{**extra, "standalone_mode": False})
                sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            status = 130
        except click.ClickException as error:
            status = error.exit_code
            say(error.format_message() + _hint(error))
        except PeerError as error:
            lost = error
        except SystemExit as error:
            status = error.code
        except Exception as error:
            if "--debug" in args:
                raise
            status = 1
            say(_in_words(error))
        if lost := lost or next((share.lost for share in _JOINED if share.lost), None):
            status = 1
            _complain(str(lost))
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        if launched.size() == 1 or self.machines == "each":
            return super().invoke(ctx)
        if self.machines == "one":
            if not launched.rank():
                raise ConfigError(f"{self.name} runs on one machine: start it without mlx.launch.")
            return None
        if not launched.rank():
            return super().invoke(ctx)
        found = {name: ctx.params.get(name) for name in _LOADING}
        return _follow({name: value for name, value in found.items() if value is not None and value != ()})


class Group(Command, click.Group):
    """Imports a command's module when that command is asked for, so that `--help` is quick."""

    machines: Machines = "each"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return import_module(f"mlx_diffgemma.{cmd_name}").main if cmd_name in COMMANDS else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _open_streams() -> None:
    """What a stream's encoding cannot write is written as an escape, not an error. Errors: DiffGemmaError."""
    if sys.stdout is None:
        raise DiffGemmaError("standard output is closed: there is nowhere to write to.")
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        *((s, "backslashreplace") for s in (sys.stdout, sys.stderr)),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: what is open is closed, the cursor shown again."""

    def end(*_: object) -> NoReturn:
        sys.exit(143)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _mute() -> Callable[[str], None]:
    """On another machine than the first: that one speaks."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports may swallow what Python raises
    return lambda _: None


def _follow(source: dict[str, Any]) -> None:
    """Compute what the first machine announces. Errors: PeerError."""
    model = open_model(source, quiet=True)
    from .pipeline.following import follow

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what waits for a message looks at no signals
    try:
        follow(model)
    except PeerError:
        raise
    except DiffGemmaError as error:
        raise PeerError(str(error)) from None


def _complain(message: str) -> None:
    text = "Error: " + message.replace("\n", "\n       ")
    with suppress(OSError):
        click.echo("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text), err=True)


def _hint(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f"\nSee: {ctx.command_path} --help" if ctx else ""


def _in_words(error: Exception) -> str:
    if isinstance(error, DiffGemmaError):
        return str(error)
    if isinstance(error, OSError):
        _lose_output(error)
        return f"{error.filename or 'the output'} cannot be used: {reason(error)}."
    if isinstance(error, MemoryError):
        return "there is not enough memory for this."
    what = str(error).strip().splitlines()
    return f"{type(error).__name__}: {what[0] if what else '(no message)'}\nRun again with --debug for the traceback."


def _lose_output(error: OSError) -> None:
    """When standard output is what failed, Python would fail again at the end, in its own words."""
    if error.filename is None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NAMES = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Group, context_settings=_NAMES, invoke_without_command=True)
@click.version_option(__version__, prog_name="mlx_diffgemma", help="Print the version.")
@click.pass_context
def main(context: click.Context) -> None:
    """DiffusionGemma in MLX. Every command has its own --help."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def command(name: str, *, machines: Machines = "one") -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the command `name`: `-h`, `--help-all`, `--version`, `--debug`, and plain errors.

    `machines`: of several that mlx.launch started, "one" refuses, "share" shares the model, "each" is run by all.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        made = click.command(name, cls=Command, context_settings=_NAMES)(function)
        made.machines = machines
        flag: dict[str, Any] = {"is_flag": True, "expose_value": False, "section": "Other"}
        made.params += [
            Option(["--help-all"], is_eager=True, callback=_help_all, help="Show this.", **flag),
            Option(["--version"], is_eager=True, callback=_say_version, help="Print the version.", **flag),
            Option(["--debug"], help="Show tracebacks.", **flag),
        ]
        return made

    return decorate


def _help_all(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(ctx.command, Command):
        click.echo(ctx.command.help_all(ctx))
        ctx.exit()


def _say_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"mlx_diffgemma, version {__version__}")
        ctx.exit()


class Number(click.FloatRange):
    """A finite number in a range: nan lies in none, and inf is a slip of the pen."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


_LOADING: dict[str, dict[str, Any]] = {
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
    return gathered(function, "source", _LOADING, {"adapter": ["--adapter-path"]})


def open_model(source: dict[str, Any], *, quiet: bool = False) -> "DiffusionGemma":
    """Load the model, or the built-in one with a line that says how to get the real one."""
    from rich.text import Text

    from .model.tuning import DEFAULT
    from .pipeline.loading import load
    from .terminal.console import console

    share = _share()
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


def _share() -> "Share":
    """The machines that mlx.launch started, or this one alone. Errors: ConfigError."""
    from .model.sharing.share import ALONE

    if launched.size() == 1:
        return ALONE
    from .model.sharing.ranks import join

    _native_stderr()
    share = join()
    if share.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one says when it is over
    _JOINED.append(share)
    return share


_JOINED: "list[Ranks]" = []
PATIENCE = 2.0  # seconds that a command has to end by itself when another machine was lost


def _native_stderr() -> None:
    """MLX's ring tells each failed look at a socket on standard error, some twenty lines in pieces; ours is one. When
    it has given up, a pass that comes too late for its failure waits for ever: then the process is ended from here."""
    kept = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    sys.stderr = open(kept, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115  as long as the process

    def pass_on() -> None:
        passing, ending = True, threading.Thread(target=_end_soon, daemon=True)
        with open(read, "rb") as lines:
            for line in lines:
                passing = passing and (b"[ring]" not in line or "MLX_RING_VERBOSE" in os.environ)
                if passing:
                    os.write(kept, line)
                if b"Too many send/recv errors" in line and ending.ident is None:
                    ending.start()

    threading.Thread(target=pass_on, daemon=True).start()


def _end_soon() -> None:
    """Another machine was lost. What ends as it should has ended by then."""
    time.sleep(PATIENCE)
    if not any(share.lost for share in _JOINED):
        from .model.sharing.ranks import LOST

        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a live canvas hides the cursor
        _complain(LOST)
    os._exit(1)


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
    "free_signal": {
        "section": _DEPARTURES,
        "is_flag": True,
        "default": None,
        "help": "Under a constraint: show the next step what the model would say without it.",
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
